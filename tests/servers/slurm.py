"""A real Slurm of two nodes on this host: munged, slurmctld and two slurmd; needs root.

    python -m tests.servers.slurm --install

installs Debian's packages, which needs apt, and starts nothing. Each daemon lives in a process
namespace of its own, so that whatever a job starts ends with its node.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.servers import install as installs
from tests.servers.processes import Processes, ServerError, free_ports, listens, run

NAME = "Slurm"
FOLDER = installs.VENVS / "slurm"
PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "unshare")
INSTALL_TIMEOUT_S = 900.0
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 60.0
GRACE_S = 90
"""What a preempted job has to end by itself."""
OUTPUT_TAIL_CHARS = 4000

ENDED = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
)
"""States that a job does not leave by itself."""

INIT = """
import os, subprocess, sys
first = subprocess.Popen(sys.argv[1:])
while os.wait()[0] != first.pid:
    pass
"""
"""The first process of a namespace: reaps the orphans; when it ends, the kernel kills the rest."""

ISOLATED = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@dataclass(frozen=True, slots=True)
class Job:
    """What Slurm says about a job."""

    state: str
    exit_code: int
    restarts: int
    fields: Mapping[str, str]
    """Everything, as ``scontrol show job`` names it."""


class Slurm:
    """A cluster that runs, until ``stop`` or the end of a ``with``.

    Partition ``main``, the default, is preempted by ``high``: its jobs get their user signal, then
    have ``GRACE_S`` seconds to end, then are requeued.
    """

    nodes = ("node1", "node2")

    def __init__(
        self, folder: Path, short: Path, env: Mapping[str, str], processes: Processes
    ) -> None:
        self.folder = folder
        self.env = env
        self._short = short
        self._processes = processes

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be started; empty if it can."""
        if absent := [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]:
            return f"{NAME} is not installed ({', '.join(absent)}): make servers, as root"
        if os.geteuid() != 0:
            return f"{NAME} needs root"
        try:
            run([*ISOLATED, "true"], timeout_s=COMMAND_TIMEOUT_S)
        except ServerError as error:
            return f"{NAME} needs process namespaces: {error}"
        return ""

    @classmethod
    def start(cls, folder: Path, *, cpus: int = 2, memory_mib: int = 8000) -> Slurm:
        """Start a new cluster and wait until its nodes are idle.

        Args:
            folder: for its logs and its jobs' outputs.
            cpus: of each node, as Slurm sees it; this host may have fewer.
            memory_mib: likewise.

        Raises:
            ServerError: it is not installed, or does not come up.
        """
        if reason := cls.missing():
            raise ServerError(reason)
        folder = folder.resolve()
        # Sockets are made in here, and their paths must be short.
        short = Path(tempfile.mkdtemp(prefix="slurm-"))
        env = {
            **{name: value for name, value in os.environ.items() if not _is_slurms(name)},
            "PATH": _path(),
            "SLURM_CONF": str(short / "slurm.conf"),
        }
        processes = Processes(folder / "log")
        cluster = cls(folder, short, env, processes)
        try:
            cluster._start_daemons(cpus, memory_mib)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def _start_daemons(self, cpus: int, memory_mib: int) -> None:
        port, *ports = free_ports(1 + len(self.nodes))
        text = _configuration(self._short, port, dict(zip(self.nodes, ports, strict=True)))
        for node, node_port in zip(self.nodes, ports, strict=True):
            (self._short / "spool" / node).mkdir(parents=True)
            text += (
                f"NodeName={node} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={node_port} "
                f"CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 "
                f"RealMemory={memory_mib} State=UNKNOWN\n"
            )
        (self._short / "slurm.conf").write_text(text)
        self._start_munge()
        self._start("slurmctld", ["slurmctld", "-D", "-c"])
        self.wait_until("slurmctld listens", partial(listens, port), START_TIMEOUT_S)
        for node in self.nodes:
            self._start(node, ["slurmd", "-D", "-N", node])
        self.wait_until("the nodes are idle", self._all_idle, START_TIMEOUT_S)

    def _start_munge(self) -> None:
        key = self._short / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        sock = self._short / "munge.sock"
        files: list[str | Path] = []
        for option, name in (("pid", "pid"), ("log", "log"), ("seed", "seed")):
            files.append(f"--{option}-file={self._short / f'munged.{name}'}")
        # --force: it warns, and does not refuse, where other users cannot reach its socket.
        options = [f"--key-file={key}", f"--socket={sock}", "--num-threads=2"]
        self._start("munged", ["munged", "--foreground", "--force", *options, *files])
        self.wait_until("munged's socket is there", sock.exists, START_TIMEOUT_S)

    def _start(self, name: str, command: Sequence[str | Path]) -> None:
        init: list[str | Path] = [*ISOLATED, sys.executable, "-c", INIT]
        self._processes.start(name, [*init, _program(str(command[0])), *command[1:]], self.env)

    def _all_idle(self) -> bool:
        try:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
        except ServerError:
            return False
        return states == ["idle"] * len(self.nodes)

    # --- jobs -----------------------------------------------------------------------------------

    def submit(
        self,
        script: Path | str,
        *arguments: str | Path,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Submit a batch script from the cluster's folder.

        Args:
            script: its path, or its text if it begins with ``#!``.
            arguments: the script's own.
            options: sbatch's.
            env: added to the environment that the job inherits.

        Returns:
            the job's number.
        """
        if isinstance(script, str) and script.startswith("#!"):
            path = self.folder / f"script-{secrets.token_hex(4)}.sh"
            path.write_text(script)
            script = path
        return int(self.run("sbatch", "--parsable", *options, script, *arguments, env=env))

    def run(
        self, program: str, *arguments: str | Path, env: Mapping[str, str] | None = None
    ) -> str:
        """What one of Slurm's commands, or another program, writes to stdout.

        Raises:
            ServerError: it failed.
        """
        return run(
            [_program(program), *arguments],
            timeout_s=COMMAND_TIMEOUT_S,
            env={**self.env, **(env or {})},
            cwd=self.folder,
        )

    def job(self, job: int | str) -> Job:
        """A job, or one element of an array: ``12_0``."""
        fields = dict(
            pair.partition("=")[::2]
            for pair in self.run("scontrol", "show", "job", "-o", str(job)).split()
        )
        return Job(
            fields["JobState"],
            int(fields["ExitCode"].split(":")[0]),
            int(fields["Restarts"]),
            fields,
        )

    def output(self, job: int | str) -> str:
        """What a job has written so far."""
        with suppress(FileNotFoundError):
            return Path(self.job(job).fields["StdOut"]).read_text(errors="replace")
        return ""

    def wait(self, job: int | str, states: str | Collection[str], timeout_s: float = 120.0) -> Job:
        """Wait until a job is in one of these states.

        Raises:
            ServerError: it ended in another one, or the time is over; with the end of its output.
        """
        wanted = {states} if isinstance(states, str) else set(states)

        def reached(now: Job) -> bool:
            return now.state in wanted

        return self.wait_for(job, " or ".join(sorted(wanted)), reached, timeout_s)

    def wait_for(
        self, job: int | str, what: str, so: Callable[[Job], bool], timeout_s: float = 120.0
    ) -> Job:
        """Wait until something is so about a job; errors as those of ``wait``."""
        now = self.job(job)

        def ready() -> bool:
            nonlocal now
            now = self.job(job)
            return so(now) or now.state in ENDED

        try:
            self.wait_until(f"job {job}: {what}", ready, timeout_s)
        except ServerError as error:
            raise ServerError(f"{error}\n{self._tell(job)}") from None
        if not so(now):
            raise ServerError(f"job {job} ended as {now.state}, not {what}\n{self._tell(job)}")
        return now

    def wait_until(self, what: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Ask again and again; errors have the ends of the daemons' logs."""
        self._processes.wait_until(what, ready, timeout_s)

    def preempt(self, job: int | str) -> int:
        """Submit a job that takes all nodes of the cluster from another for a moment."""
        options = [f"--nodes={len(self.nodes)}", "--exclusive", "--partition=high", "--time=5"]
        high = self.submit("#!/bin/sh\nexit 0\n", options=[*options, "--output=/dev/null"])
        self.wait_for(high, f"preempts job {job}", lambda now: now.state != "PENDING", GRACE_S + 60)
        return high

    def hurry(self, job: int | str, timeout_s: float = 60.0) -> None:
        """Start a requeued job soon: Slurm lets it wait until its old credentials have expired."""
        # One that starts in the second in which its last run was killed is killed too.
        update = ["scontrol", "update", f"jobid={job}", "StartTime=now+2"]
        updated = False

        def started() -> bool:
            nonlocal updated
            if not updated and self.job(job).state == "PENDING":
                # Refused as long as the job's last run is not cleaned up.
                with suppress(ServerError):
                    self.run(*update)
                    updated = True
            # A short one may already have ended.
            return self.job(job).state in ENDED | {"RUNNING"}

        self.wait_until(f"job {job} starts again", started, timeout_s)

    def cancel(self, job: int | str) -> None:
        self.run("scancel", str(job))

    def processes_of(self, job: int) -> list[str]:
        """Command lines of what a job has started and what runs still, by its environment."""
        return left(f"SLURM_JOB_ID={job}", f"SLURM_CONF={self.env['SLURM_CONF']}")

    def lose(self, node: str) -> None:
        """Kill a node with everything on it, as a power cut does."""
        self._processes.kill(node)

    # --- the end --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Kill the cluster and its jobs, and wait until all are gone; again does nothing."""
        self._processes.stop()
        # The kernel kills a namespace's processes when its first one is gone: soon, not at once.
        if self._short.exists():
            conf = f"SLURM_CONF={self.env['SLURM_CONF']}"
            waiter = Processes(self.folder / "log")
            try:
                waiter.wait_until("nothing is left", lambda: not left(conf), STOP_TIMEOUT_S)
            finally:
                waiter.stop()
            shutil.rmtree(self._short, ignore_errors=True)

    def __enter__(self) -> Slurm:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _tell(self, job: int | str) -> str:
        try:
            shown = self.run("scontrol", "show", "job", str(job))
            return f"{shown}\n[output]\n{self.output(job)[-OUTPUT_TAIL_CHARS:]}"
        except ServerError as error:
            return str(error)


def left(*settings: str) -> list[str]:
    """Command lines of all processes with these settings in their environment, but our own."""
    wanted = [setting.encode() for setting in settings]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            if all(each in environment for each in wanted):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def _configuration(short: Path, port: int, nodes: Mapping[str, int]) -> str:
    """slurm.conf, without the nodes' own lines."""
    settings: dict[str, object] = {
        "ClusterName": "tests",
        "SlurmctldHost": f"{_host()}(127.0.0.1)",
        "SlurmctldPort": port,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job waits so long before it starts again; by default two minutes.
        "AuthInfo": f"socket={short}/munge.sock,cred_expire=20",
        "StateSaveLocation": short / "state",
        "SlurmdSpoolDir": short / "spool" / "%n",
        "SlurmctldPidFile": short / "slurmctld.pid",
        "SlurmdPidFile": short / "slurmd-%n.pid",
        # No cgroups: they may belong to another than us.
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SchedulerType": "sched/backfill",
        # Look for jobs to start every second, not every minute.
        "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
        "MpiDefault": "none",
        # A busy machine answers late, and a node that is down for that would fail a test.
        "SlurmdTimeout": 120,
        "MessageTimeout": 60,
        "ReturnToService": 2,
        "KillWait": 20,
        # So that the state of a job that has ended can be asked for.
        "MinJobAge": 3600,
        "JobRequeue": 1,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
        # Nodes have the CPUs and the memory that we say, whatever this host has.
        "SlurmdParameters": "config_overrides",
    }
    (short / "state").mkdir()
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [
        f"PartitionName=main Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE PriorityTier=1 "
        f"PreemptMode=REQUEUE GraceTime={GRACE_S}",
        f"PartitionName=high Nodes={','.join(nodes)} MaxTime=INFINITE PriorityTier=10 "
        "PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def _is_slurms(name: str) -> bool:
    """Whether a variable tells a job about itself: these tests may run in one."""
    return re.match(r"(SLURM|SBATCH|SRUN|SINFO|SQUEUE|SCANCEL)", name) is not None


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _path() -> str:
    """PATH with the folders of Debian's daemons, which are not in everybody's."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/bin"])


def _program(name: str) -> str:
    found = shutil.which(name, path=_path())
    if found is None:
        raise ServerError(f"no {name} here: make servers")
    return found


def install() -> None:
    """Install Debian's packages, unless Slurm's programs are there."""

    def fill(folder: Path) -> None:
        if _absent():
            _apt()

    if _absent():
        shutil.rmtree(FOLDER, ignore_errors=True)
    installs.install(FOLDER, "\n".join(PACKAGES), fill)


def _absent() -> bool:
    return any(shutil.which(name, path=_path()) is None for name in PROGRAMS)


def _apt() -> None:
    if shutil.which("apt-get") is None:
        raise ServerError("it comes as Debian packages, and there is no apt-get here")
    if os.geteuid() != 0:
        raise ServerError("that needs root")
    # The run level of a machine that is being repaired: the packages start no daemons.
    env = {**os.environ, "RUNLEVEL": "1", "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-q", "install", "-y", "--no-install-recommends", *PACKAGES]
    try:
        run(command, timeout_s=INSTALL_TIMEOUT_S, env=env)
    except ServerError:
        run(["apt-get", "-q", "update"], timeout_s=INSTALL_TIMEOUT_S)
        run(command, timeout_s=INSTALL_TIMEOUT_S, env=env)


if __name__ == "__main__":
    installs.main(NAME, install)
