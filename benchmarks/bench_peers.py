"""The same recipes in mergekit and in shardmerge: outputs compared first, then timed in turn.

Both read the same warm files and run with their defaults on the CPU. mergekit does not wait for
its output to reach the disk and shardmerge does: ``flush_s`` is what a program that needs the
bytes durable would still pay after each.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.compare import Difference, compare
from benchmarks.families import Family, llama, make
from benchmarks.harness import Measured, Report, Workplace, median, mib
from benchmarks.recipes import Recipe, recipe

log = logging.getLogger("benchmarks")

PROGRAMS = ("mergekit", "shardmerge")
REQUIREMENTS = ("torch==2.13.0", "mergekit==0.1.5")
PACKAGES = ("mergekit", "torch", "transformers", "safetensors")

# What share of elements may differ by more than a few roundings. mergekit computes in bfloat16,
# and of equal magnitudes at the threshold of TIES it keeps some, where shardmerge keeps all.
BEYOND = {"linear": 0.0001, "task_arithmetic": 0.001, "ties": 0.05}
RUNS = {"linear": 3, "task_arithmetic": 3, "dare_ties": 2, "ties": 1}


class DisagreementError(RuntimeError):
    """The two outputs are not the same model, so timing them would mean nothing."""


@dataclass(frozen=True, slots=True)
class Peer:
    """mergekit in its own virtual environment."""

    venv: Path
    versions: dict[str, str]

    @classmethod
    def at(cls, venv: Path) -> Peer:
        """The environment ``venv``, which is made if it does not exist."""
        python = venv / "bin" / "python"
        if not (venv / "bin" / "mergekit-yaml").exists():
            log.info("making %s with %s", venv, ", ".join(REQUIREMENTS))
            # Its own words go to stderr: stdout is for figures.
            for command in (
                [sys.executable, "-m", "venv", str(venv)],
                [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS],
            ):
                subprocess.run(command, check=True, stdout=sys.stderr)
        code = (
            "import json\nfrom importlib.metadata import version\n"
            f"print(json.dumps({{name: version(name) for name in {PACKAGES}}}))"
        )
        asked = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
        return cls(venv, json.loads(asked.stdout))

    def merge(self, recipe_file: Path, out: Path) -> Measured:
        """Measure one merge with mergekit's defaults, and a seed for the methods that draw."""
        program = self.venv / "bin" / "mergekit-yaml"
        command: list[str | Path] = [program, recipe_file, out, "--no-cuda", "--random-seed", "1"]
        return harness.run(command, env={"HF_HUB_OFFLINE": "1"})


@dataclass(frozen=True, slots=True)
class Run:
    """One timed merge."""

    measured: Measured
    flush_s: float


class Match:
    """One recipe in both programs."""

    def __init__(self, peer: Peer, place: Workplace, report: Report, memory: str) -> None:
        """Take what the recipes of one start of the script share."""
        self._peer = peer
        self._place = place
        self._report = report
        self._memory = memory
        self._caches = place.kernel_caches()
        self._start_s = {"mergekit": 0.0, "shardmerge": 0.0}

    def warm_up(self, tiny: Recipe) -> None:
        """Measure what a merge of next to nothing takes: interpreter and imports."""
        file = tiny.write(self._place.file(f"tiny-{tiny.method}.yaml"))
        for program in PROGRAMS:
            self._merge(program, file, 0)  # bytecode, kernels, libraries in the page cache
            runs = [self._merge(program, file, i).measured.wall_s for i in (1, 2, 3)]
            self._start_s[program] = median(runs)
        self._place.fresh("kernels")  # so that the first run of each method compiles its own

    def play(self, chosen: Recipe, family: Family, runs: int) -> list[object]:
        """Compare, time ``runs`` pairs, report; the row of the table."""
        method = chosen.method
        file = chosen.write(self._place.file(f"{method}.yaml"))
        # Run 0 does not count: it brings the outputs to compare, and compiles our kernels.
        theirs, cold = (self._merge(program, file, 0) for program in PROGRAMS)
        ours_at, theirs_at = self._place.file("shardmerge"), self._place.file("mergekit")
        self._check(method, compare(ours_at, theirs_at, family.base))
        pairs = []
        for i in range(1, runs + 1):
            a, b = (self._merge(program, file, i) for program in PROGRAMS)
            pairs.append((a, b))
            ratio = round(a.measured.wall_s / b.measured.wall_s, 3)
            self._report.line("pair", method=method, run=i, ratio=ratio)
        return self._summary(method, pairs or [(theirs, cold)], cold)

    def _merge(self, program: str, file: Path, i: int) -> Run:
        out = self._place.fresh(program)
        log.info("%s %s, run %d", program, file.stem, i)
        if program == "mergekit":
            measured = self._peer.merge(file, out)
        else:
            measured = harness.shardmerge(file, out, memory=self._memory, env=self._caches)
        run = Run(measured, _flush(out))
        fields = {"recipe": file.stem, "program": program, "run": i}
        self._report.line("run", **fields, **measured.figures(), flush_s=round(run.flush_s, 3))
        return run

    def _check(self, method: str, found: Difference) -> None:
        if method in BEYOND:
            error = found.disagreement(share=BEYOND[method])
        else:
            error = found.random_disagreement()
        self._report.line("compare", method=method, **asdict(found), error=error)
        if error:
            raise DisagreementError(f"{method}: shardmerge and mergekit disagree: {error}")

    def _summary(self, method: str, pairs: Sequence[tuple[Run, Run]], cold: Run) -> list[object]:
        start_s = self._start_s
        fields: dict[str, dict[str, float]] = {}
        for k, program in enumerate(PROGRAMS):
            measured = [pair[k].measured for pair in pairs]
            fields[program] = {
                "wall_s": median([m.wall_s for m in measured]),
                "cpu_s": median([m.cpu_s for m in measured]),
                "peak_anon_bytes": max(m.peak_anon_bytes for m in measured),
                "flush_s": median([pair[k].flush_s for pair in pairs]),
                "start_s": start_s[program],
            }
        walls = [(a.measured.wall_s, b.measured.wall_s) for a, b in pairs]
        ratio = median([a / b for a, b in walls])
        net = median([(a - start_s["mergekit"]) / (b - start_s["shardmerge"]) for a, b in walls])
        cold_s = round(cold.measured.wall_s, 3)
        ratios = {"ratio": ratio, "ratio_without_start": net}
        self._report.line(
            "summary", method=method, pairs=len(pairs), **ratios, cold_s=cold_s, **fields
        )
        times = [f"{fields[p][key]:.1f}" for key in ("wall_s", "cpu_s") for p in PROGRAMS]
        memory = [mib(fields[p]["peak_anon_bytes"]) for p in PROGRAMS]
        return [
            method,
            len(pairs),
            *times,
            *memory,
            f"{cold_s:.1f}",
            f"{ratio:.1f}x",
            f"{net:.1f}x",
        ]


HEADS = (
    "method", "pairs", "mergekit s", "ours s", "mergekit CPU s", "ours CPU s", "mergekit MiB",
    "ours MiB", "ours cold s", "ratio", "without start",
)  # fmt: skip


def _flush(folder: Path) -> float:
    started = time.perf_counter()
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return time.perf_counter() - started


def main() -> None:
    """Compare and time."""
    parser = harness.arguments(__doc__, family="1.1B")
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--models", type=int, default=3, help="besides the base model")
    runs = f"timed pairs of each method (default: {RUNS}); 0: report the run that is compared"
    parser.add_argument("--runs", type=int, help=runs)
    parser.add_argument("--memory", default="1GiB", help="budget of shardmerge")
    parser.add_argument("--mergekit-venv", type=Path, default=Path(".venvs/mergekit"))
    _main(parser.parse_args())


def _main(args: argparse.Namespace) -> None:
    place = Workplace(args.dir, "peers")
    family, tiny = (
        make(llama(name), place.families, models=args.models, seed=args.seed)
        for name in (args.family, "tiny")
    )
    peer = Peer.at(args.mergekit_venv.absolute())
    report = Report("peers", args.family, peer=peer.versions, memory=args.memory)
    place.warm(family.checkpoints())
    match = Match(peer, place, report, args.memory)
    match.warm_up(recipe("linear", tiny))
    rows = []
    for method in args.methods:
        runs = RUNS[method] if args.runs is None else args.runs
        rows.append(match.play(recipe(method, family), family, runs))
    place.fresh("mergekit")
    place.fresh("shardmerge")
    report.table(HEADS, rows)


if __name__ == "__main__":
    main()
