"""shardmerge alone: wall, CPU, memory and bytes of each method, against a plain read and write.

Merges alternate with ``benchmarks.plain``, which reads the same files in one loop, writes one model
and waits for the disk. ``ratio`` is (wall - start) / plain, where ``start`` is the same merge of
the tiny family: what interpreter, imports and compiled kernels cost whatever the size.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass

from benchmarks import harness
from benchmarks.families import Family, llama, make
from benchmarks.harness import Measured, Report, Workplace, median, mib
from benchmarks.recipes import METHODS, Recipe, recipe

log = logging.getLogger("benchmarks")

HEADS = (
    "method", "runs", "wall s", "CPU s", "peak MiB", "read/input", "start s", "cold start s",
    "plain s", "ratio",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Start:
    """The tiny merge of a method: with kernels not compiled, and after that."""

    cold_s: float
    wall_s: float
    read_bytes: int


class Bench:
    """What the methods share in one start of the script."""

    def __init__(self, place: Workplace, report: Report, memory: str, runs: int) -> None:
        self._place = place
        self._report = report
        self._memory = memory
        self._runs = runs
        self._caches = place.kernel_caches()

    def imports(self) -> None:
        """Measure how long it takes until the program can read its arguments."""
        command = [sys.executable, "-c", "import shardmerge.cli"]
        harness.run(command)  # compiles bytecode, where that is not yet there
        measured = [harness.run(command) for _ in range(max(3, self._runs))]
        fields = {"wall_s": median([m.wall_s for m in measured]), "runs": len(measured)}
        self._report.line("import", **fields, peak_anon_bytes=measured[0].peak_anon_bytes)

    def method(self, chosen: Recipe, tiny: Recipe) -> list[object]:
        """Measure one method; the row of the table."""
        start = self._start(tiny)
        merges, plains = [], []
        for i in range(1, self._runs + 1):
            merges.append(self._merge(chosen, f"run {i}"))
            plains.append(self._plain(chosen))
        return self._summary(chosen, start, merges, plains)

    def _start(self, tiny: Recipe) -> Start:
        cold = self._merge(tiny, "tiny, kernels not compiled")
        warm = [self._merge(tiny, f"tiny, run {i}") for i in range(1, max(3, self._runs) + 1)]
        wall_s = median([m.wall_s for m in warm])
        return Start(round(cold.wall_s, 3), wall_s, warm[0].read_bytes - tiny.input_bytes())

    def _merge(self, chosen: Recipe, note: str) -> Measured:
        log.info("%s, %s", chosen.method, note)
        file = chosen.write(self._place.file(f"{chosen.method}.yaml"))
        out = self._place.fresh("out")
        measured = harness.shardmerge(file, out, memory=self._memory, env=self._caches)
        self._report.line("run", method=chosen.method, note=note, **measured.figures())
        return measured

    def _plain(self, chosen: Recipe) -> float:
        out = self._place.fresh("plain")
        command = [sys.executable, "-m", "benchmarks.plain", str(out), *map(str, chosen.inputs)]
        measured = harness.run(command)
        found = json.loads(measured.stdout)
        load = round(measured.load_before, 3)
        self._report.line("plain", method=chosen.method, **found, load_before=load)
        self._place.fresh("plain")
        return float(found["wall_s"])

    def _summary(
        self, chosen: Recipe, start: Start, merges: list[Measured], plains: list[float]
    ) -> list[object]:
        pairs = zip(merges, plains, strict=True)
        ratio = median([(m.wall_s - start.wall_s) / plain_s for m, plain_s in pairs])
        wall_s, cpu_s = median([m.wall_s for m in merges]), median([m.cpu_s for m in merges])
        peak = max(m.peak_anon_bytes for m in merges)
        # The start reads Python files and libraries; those are not input.
        read = (merges[0].read_bytes - start.read_bytes) / chosen.input_bytes()
        fields = {
            "runs": len(merges), "wall_s": wall_s, "cpu_s": cpu_s, "peak_anon_bytes": peak,
            "input_bytes": chosen.input_bytes(), "read_per_input": round(read, 3),
            "start_s": start.wall_s, "cold_start_s": start.cold_s, "plain_s": median(plains),
            "ratio": ratio, "ratio_with_start": round(wall_s / median(plains), 3),
        }  # fmt: skip
        self._report.line("summary", method=chosen.method, **fields)
        numbers = [f"{wall_s:.2f}", f"{cpu_s:.2f}", mib(peak), f"{read:.2f}"]
        starts = [f"{start.wall_s:.2f}", f"{start.cold_s:.2f}"]
        last = [f"{median(plains):.2f}", f"{ratio:.2f}x"]
        return [chosen.method, len(merges), *numbers, *starts, *last]


def main() -> None:
    """Measure the methods."""
    parser = harness.arguments(__doc__, family="1.1B")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--models", type=int, default=3, help="besides the base model")
    parser.add_argument("--runs", type=int, default=3, help="merges of each method, at least 1")
    parser.add_argument("--memory", default="1GiB", help="budget of a merge")
    args = parser.parse_args()
    place = Workplace(args.dir, "merge")

    def family(name: str) -> Family:
        return make(llama(name), place.families, models=args.models, seed=args.seed)

    chosen, tiny = family(args.family), family("tiny")
    report = Report("merge", args.family, memory=args.memory, models=args.models)
    place.warm(chosen.checkpoints())
    bench = Bench(place, report, args.memory, max(1, args.runs))
    bench.imports()
    rows = [bench.method(recipe(name, chosen), recipe(name, tiny)) for name in args.methods]
    place.fresh("out")
    report.table(HEADS, rows)


if __name__ == "__main__":
    main()
