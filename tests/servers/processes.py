"""Processes of a server: started in the background, waited for, killed whatever happens."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.servers.api import S3Server

GUARD = """
while read -r group; do groups="$groups $group"; done
for group in $groups; do kill -s KILL -- "-$group"; done
"""
"""Reads process groups until its input ends, as it does when its parent dies; then kills them."""
POLL_S = 0.05
LOG_TAIL_BYTES = 2000

Sections = Mapping[str, Mapping[str, object]]


class ServerError(RuntimeError):
    """A server was not installed, did not start or did not answer."""


class Processes:
    """Background processes with a log file each; they do not outlive this interpreter.

    They are killed, not asked to end: what they stored is of no use to anybody afterwards.
    """

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        # For an interpreter that is killed: it runs no exit handler, but its pipes are closed.
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.stop)

    def start(self, name: str, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        """Start a process that stays in the foreground of its own process group."""
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[name] = process
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{process.pid}\n".encode())
        self._guard.stdin.flush()

    def kill(self, name: str) -> None:
        """Kill the group of one process, which from then on is not expected to run."""
        process = self._running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """Kill every process group and wait until all are gone; again does nothing."""
        if self._guard.stdin is None or self._guard.stdin.closed:
            return
        atexit.unregister(self.stop)
        for process in self._running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._running.values():
            process.wait()
        self._guard.stdin.close()
        self._guard.wait()

    def wait_until(self, what: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Ask again and again until it is so.

        Raises:
            ServerError: one of the processes ended, or the time is over; with the end of its log.
        """
        end = time.monotonic() + timeout_s
        while not ready():
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise ServerError(
                        f"{name} ended with {process.returncode}:\n{self._tail(name)}"
                    )
            if time.monotonic() > end:
                tails = "\n".join(f"[{name}]\n{self._tail(name)}" for name in self._running)
                raise ServerError(f"{what}: not so after {timeout_s:g} s\n{tails}")
            time.sleep(POLL_S)

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _tail(self, name: str) -> str:
        return self._log(name).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")


class Running:
    """A server that runs, until ``stop`` or the end of a ``with``."""

    def __init__(self, server: S3Server, processes: Processes) -> None:
        self.server = server
        self._processes = processes

    def stop(self) -> None:
        self._processes.stop()

    def __enter__(self) -> S3Server:
        return self.server

    def __exit__(self, *exception: object) -> None:
        self.stop()


def wait_for_s3(processes: Processes, server: S3Server, timeout_s: float) -> None:
    """Wait until the server lists its buckets to a signed request.

    Raises:
        ServerError: it did not in that time.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()

    def answers() -> bool:
        try:
            client.list_buckets()
        except (BotoCoreError, ClientError):
            return False
        return True

    processes.wait_until(f"{server.endpoint_url} lists buckets", answers, timeout_s)


def listens(port: int) -> bool:
    """Whether something accepts connections at this port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    """Different ports that nobody uses now; all are held until the last is found."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def run(
    command: Sequence[str | Path],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """What a command that ends by itself writes to stdout.

    Raises:
        ServerError: it failed or took too long; with the end of what it wrote to stderr.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
            env=env,
            cwd=cwd,
        )
    except FileNotFoundError as error:
        raise ServerError(f"{name}: no such program here") from error
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"{name}: not done after {timeout_s:g} s") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout or "").strip()[-LOG_TAIL_BYTES:]
        raise ServerError(f"{name} ended with {error.returncode}: {reason}") from error
    return done.stdout


def write_ini(path: Path, sections: Sections) -> Path:
    """Write a configuration file; True and False as words in lower case."""
    lines = []
    for section, settings in sections.items():
        lines.append(f"[{section}]")
        for key, value in settings.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(f"{key} = {text}")
    path.write_text("\n".join(lines) + "\n")
    return path
