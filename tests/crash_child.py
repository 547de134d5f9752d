"""Merges that end at a chosen call to the system, each in a process of its own.

``python -m tests.crash_child`` reads one JSON object per line, runs each in a fork of itself (the
interpreter has started and the kernels are compiled once) and answers each with its exit status.
With ``pid``, the number of the process is answered first. Keys:

    arguments   of the command line
    log         a file that gets one line per call
    do          ``kill`` itself, or ``pause`` until the file LOG.go is there; LOG.paused says so
    when        ``before`` or ``after`` the call
    call        its number, from 0; or else:
    op, path    what is called, and the end of the path it is about; the ``nth`` one, from 0
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import support
from tests.support import path_of

CALLS = (
    "pwrite",
    "write",
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "ftruncate",
    "mkdir",
    "rmdir",
)
SYNCS = ("fsync", "fdatasync")
_PAUSE_S = 60.0


class Calls:
    """Counts calls, and ends or stops the process at one of them."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._write = os.write
        self._lock = threading.Lock()
        self._count = self._matching = 0

    def wrap(self, name: str) -> None:
        # A killed process loses nothing that it has written: syncing would only take time.
        real: Callable[..., Any] = getattr(os, name) if name not in SYNCS else lambda _: None

        def wrapped(*arguments: Any, **more: Any) -> Any:
            chosen = self._enter(name, path_of(*arguments, **more))
            if chosen == "before":
                self._act()
            try:
                return real(*arguments, **more)
            finally:
                if chosen == "after":
                    self._act()

        setattr(os, name, wrapped)

    def _enter(self, name: str, path: str) -> str:
        """Count a call; says whether something is to be done before or after it."""
        with self._lock:
            number, self._count = self._count, self._count + 1
            self._write(self._log, f"{name} {path}\n".encode())
            if "call" in self._options:
                chosen = number == self._options["call"]
            else:
                chosen = name == self._options.get("op") and path.endswith(self._options["path"])
                self._matching += chosen
                chosen = chosen and self._matching - 1 == self._options.get("nth", 0)
        return str(self._options["when"]) if chosen else ""

    def _act(self) -> None:
        if self._options["do"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        Path(self._options["log"] + ".paused").touch()
        until = time.monotonic() + _PAUSE_S
        while not Path(self._options["log"] + ".go").exists() and time.monotonic() < until:
            time.sleep(0.01)


def run(options: dict[str, Any]) -> int:
    """One merge, with its calls counted."""
    from shardmerge.cli import main as command

    for number, stream in ((1, "out"), (2, "err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(f"{options['log']}.{stream}", flags, 0o666), number)
    calls = Calls(options)
    for name in CALLS:
        calls.wrap(name)
    status = command(options["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main() -> None:
    support.shrink(setattr)
    for line in sys.stdin:
        options = json.loads(line)
        if options.get("warm"):
            from shardmerge.merge import merge

            merge(options["recipe"], options["out"], memory_bytes=options["memory_bytes"])
            print(0, flush=True)
            continue
        child = os.fork()
        if child == 0:
            os._exit(run(options))
        if options.get("pid"):
            print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


# --- the side of the tests ----------------------------------------------------------------------


class Merges:
    """A process that merges as it is told; ``with`` ends it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash_child"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Merges:
        return self

    def __exit__(self, *_: object) -> None:
        # With what a test that failed has left paused.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def warm(self, recipe: str, out: Path, memory_bytes: int) -> None:
        """Merge once in the process that all others are forked from: it compiles the kernels."""
        self._tell(warm=True, recipe=recipe, out=str(out), memory_bytes=memory_bytes)
        assert self.answer() == 0

    def run(self, arguments: list[str], log: Path, **options: object) -> int:
        """Exit status of a merge; a negative one is the signal that ended it."""
        self._tell(arguments=arguments, log=str(log), **options)
        return self.answer()

    def start(self, arguments: list[str], log: Path, **options: object) -> int:
        """Begin a merge that pauses; gives its process once it does."""
        self._tell(arguments=arguments, log=str(log), do="pause", pid=True, **options)
        process = self.answer()
        assert process > 1
        paused = Path(f"{log}.paused")
        until = time.monotonic() + _PAUSE_S
        while not paused.exists():
            assert time.monotonic() < until, f"never came to {options}: {log.read_text()}"
            time.sleep(0.01)
        return process

    def go_on(self, log: Path) -> int:
        """Let a paused merge go on; gives its exit status."""
        Path(f"{log}.go").touch()
        return self.answer()

    def answer(self) -> int:
        """The next answer."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def _tell(self, **options: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()


if __name__ == "__main__":
    main()
