"""Run a command and measure it; say where and when; print JSON lines and one table."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Self

from benchmarks import plain
from benchmarks.families import LLAMAS

log = logging.getLogger("benchmarks")

SAMPLE_S = 0.02
PACKAGES = ("shardmerge", "numpy", "llvmlite", "pyyaml")
ROOT = Path(__file__).resolve().parent.parent


class CommandError(RuntimeError):
    """A measured command failed; the message ends with the last lines it wrote."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run of a command took, its child processes included.

    Args:
        wall_s: from start to exit.
        cpu_s: user and system time.
        peak_anon_bytes: largest sum seen of anonymous and shared memory; mapped files, which the
            kernel can drop, do not count. Sampled every 20 ms: shorter peaks are missed.
        read_bytes: asked for by read calls, cached or not; pages of mapped files do not count.
        written_bytes: given to write calls.
        load_before: the machine's load average over one minute when the run began.
        stdout: what the command printed there.
    """

    wall_s: float
    cpu_s: float
    peak_anon_bytes: int
    read_bytes: int
    written_bytes: int
    load_before: float
    stdout: str

    def figures(self) -> dict[str, object]:
        """The fields for a JSON line, rounded to what they are worth."""
        fields = asdict(self)
        del fields["stdout"]
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in fields.items()}


def run(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> Measured:
    """Run ``command`` from the root of the repository and measure it.

    Raises:
        CommandError: it did not exit with 0.
    """
    argv = [str(part) for part in command]
    os.sync()  # what earlier runs left to be written back is not this run's work
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        child = subprocess.Popen(
            argv, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=out, stderr=err
        )
        try:
            with _Sampler(child.pid) as sampler:
                # Not reaped yet: /proc still knows how much it read.
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
                wall_s = time.perf_counter() - started
        except BaseException:
            child.kill()
            raise
        io = fields(Path(f"/proc/{child.pid}/io"))
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if child.returncode:
        tail = "\n  ".join((stdout + stderr).strip().splitlines()[-20:])
        raise CommandError(f"exit {child.returncode}: {' '.join(argv)}\n  {tail}")
    return Measured(
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_anon_bytes=sampler.peak,
        read_bytes=io.get("rchar", 0),
        written_bytes=io.get("wchar", 0),
        load_before=load,
        stdout=stdout,
    )


class _Sampler(threading.Thread):
    """Keeps the largest sum of anonymous memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            kib = 0
            for pid in _tree(self._pid):
                status = fields(Path(f"/proc/{pid}/status"))
                kib += status.get("RssAnon", 0) + status.get("RssShmem", 0)
            self.peak = max(self.peak, kib * 1024)


def _tree(pid: int) -> list[int]:
    """``pid`` and its descendants; a process that ends meanwhile is left out."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found.extend(int(child) for child in children.read_text().split())
            except OSError:
                continue
    return found


def fields(path: Path) -> dict[str, int]:
    """The numbers of a ``key: number`` file of /proc; empty where it cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    words = ((key, value.split()) for key, value in pairs)
    return {key: int(value[0]) for key, value in words if value and value[0].isdigit()}


def stamp() -> dict[str, object]:
    """Where a figure comes from: machine, commit and versions."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_gib": round(fields(Path("/proc/meminfo")).get("MemTotal", 0) / (1 << 20), 1),
            "system": platform.platform(),
        },
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | installed(PACKAGES),
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Version of each package that is installed here."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    """The commit, with ``+`` where tracked files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return "none"
    return head.stdout.strip() + ("+" if _git("diff", "--quiet", "HEAD").returncode else "")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


class Report:
    """Prints a JSON line per measurement as it comes, and a table of them at the end."""

    def __init__(self, bench: str, family: str, **settings: object) -> None:
        """Take what every line repeats."""
        self._common = {"bench": bench, "family": family, **settings, **stamp()}

    def line(self, kind: str, **fields: object) -> None:
        """Print one JSON line: what was measured first, where and when last."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        print(json.dumps({"kind": kind, **fields, "time": now, **self._common}), flush=True)

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table, its first column to the left and the others to the right."""
        cells = [[str(cell) for cell in row] for row in (heads, *rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
        print()
        for row in cells:
            first, *others = (cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i])
                              for i, cell in enumerate(row))  # fmt: skip
            print("  ".join((first, *others)), flush=True)


def median(values: Sequence[float]) -> float:
    """The median, to a thousandth."""
    return round(statistics.median(values), 3)


def mib(n_bytes: float) -> str:
    """``n_bytes`` in MiB, for a table."""
    return f"{n_bytes / (1 << 20):.0f}"


def size(text: str) -> int:
    """A number of bytes from text such as ``512MiB``."""
    for unit, factor in (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("", 1)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    raise AssertionError


def arguments(doc: str | None, *, family: str) -> argparse.ArgumentParser:
    """The options every script has."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(".bench"), help="inputs and outputs")
    parser.add_argument("--family", choices=LLAMAS, default=family)
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Workplace:
    """Folders of one script: cached families, an output of each name, and our kernel caches."""

    def __init__(self, folder: Path, bench: str) -> None:
        """Empty the script's folder under ``folder``; the families beside it stay."""
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        self.families = folder.resolve() / "families"
        self._work = folder.resolve() / f"bench-{bench}"
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)

    def file(self, name: str) -> Path:
        """A file or folder in the script's own folder, which each start empties."""
        return self._work / name

    def fresh(self, name: str) -> Path:
        """The path of an output that does not exist yet; what had the name is deleted."""
        path = self.file(name)
        shutil.rmtree(path, ignore_errors=True)
        return path

    def warm(self, inputs: Sequence[Path]) -> None:
        """Read ``inputs`` once, so that the first measured run finds them in the page cache."""
        plain.read_and_write(inputs, self.fresh("plain"))
        self.fresh("plain")

    def kernel_caches(self) -> dict[str, str]:
        """The setting that keeps what is cached between runs here, so that a first run is one."""
        return {"XDG_CACHE_HOME": str(self.file("kernels"))}


def shardmerge(
    recipe: Path, out: Path, *, memory: str, env: Mapping[str, str] | None = None
) -> Measured:
    """Measure one merge of ours."""
    command: list[str | Path] = [sys.executable, "-m", "shardmerge", "merge", recipe, out]
    return run([*command, "--overwrite", "--memory", memory], env=env)
