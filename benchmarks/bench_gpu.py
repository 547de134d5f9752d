"""Passes of merge methods on a CUDA device beside plain copies to it: the bus should be the bound.

Every pass reads its inputs from pinned host memory, as a worker's tiles are, and gives its result
there; the plain copy moves the same bytes to the device and does nothing else. Both are done by
several threads, in turn, in the same run. The time of the kernels alone is taken with one thread.
"""

from __future__ import annotations

import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks import harness
from benchmarks.harness import Report, median
from shardmerge import methods
from shardmerge.kernels.compile import Form, Kernel
from shardmerge.kernels.cuda import Cuda
from shardmerge.kernels.cuda_driver import Driver, NvidiaDriver, lacking
from shardmerge.kernels.cuda_memory import Pinned
from shardmerge.kernels.language import HISTOGRAM_BINS
from shardmerge.kernels.trace import Inputs, Kernels, numbers_of
from shardmerge.methods.api import METHODS, Base, Decision, Kind, Method, info_of, levels_of
from shardmerge.numerics import CANONICAL_BLOCK, DType, philox_key
from shardmerge.summaries import Summary, combine, settle
from shardmerge.window import Arena

MODELS = 3
TILE = 64 * CANONICAL_BLOCK
MS, GB = 1e-3, 1e9

TYPICAL = {"weight": 0.4, "density": 0.5, "t": 0.4, "scale": 1.5}
"""Parameters of any method; the others have their default."""


@dataclass(frozen=True, slots=True)
class Work:
    """A tile of every input, in pinned memory, and a place for results."""

    arrays: tuple[npt.NDArray[np.uint16], ...]
    output: npt.NDArray[np.uint8]
    counts: npt.NDArray[np.uint32]
    sums: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timed:
    """A pass that can be run on a tile.

    Args:
        kernel_ms: of its kernels alone, on one tile.
    """

    name: str
    read_bytes: int
    inputs: tuple[int, ...]
    kernel_ms: float
    run: Callable[[Work], None]


def tile(cuda: Cuda, tensors: int, models: int) -> Work:
    """Random bfloat16 tensors: a base, models near it, and positive ones."""
    rng = np.random.default_rng(0)
    arena = Arena((tensors + 1) * (2 * TILE + 64))
    cuda.pin(arena.memory)
    base = rng.standard_normal(TILE, dtype=np.float32) * 0.02
    arrays = []
    for number in range(tensors):
        values = base + (number > 0) * 0.001 * rng.standard_normal(TILE, dtype=np.float32)
        if number > models:
            values = values * values
        array = arena.take(2 * TILE).view(np.uint16)
        array[:] = values.view(np.uint32) >> 16
        arrays.append(array)
    counts = np.zeros((models, HISTOGRAM_BINS), dtype=np.uint32)
    sums = np.zeros((TILE // CANONICAL_BLOCK, 64))
    return Work(tuple(arrays), arena.take(2 * TILE), counts, sums)


def method_of(name: str) -> tuple[Method, Inputs]:
    """A method with typical parameters, and what it reads."""
    info = METHODS[name]
    least, most = info.models
    models = (DType.BF16,) * max(least, min(MODELS, most or MODELS))
    given: dict[str, object] = {}
    for parameter in info.parameters:
        value = TYPICAL.get(parameter.name, parameter.default)
        given[parameter.name] = (value,) * len(models) if parameter.per_model else value
    base = DType.BF16 if info.base is Base.REQUIRED else None
    extras = tuple((kind, models) for kind in info.extras)
    return info.cls(**given), Inputs(base, models, extras)


def passes(name: str, cuda: Cuda, work: Work) -> list[Timed]:
    """Every pass of a method, with the decisions that the passes before it lead to."""
    method, inputs = method_of(name)
    kernels, levels = Kernels(cuda), levels_of(method)
    keys = [philox_key(0, number, "tensor") for number in range(len(inputs.models))]
    words = np.array([[key & 0xFFFFFFFF, key >> 32] for key in keys], dtype=np.uint32)
    decisions: dict[str, Decision | None] = {}
    summaries: dict[str, Summary] = {}
    found = []
    for step in info_of(method).passes:
        if step.kind is not Kind.MERGE and levels[step.name] is None:
            decisions[step.name] = None
            continue
        if step.kind is Kind.SETTLE:
            decisions[step.name] = settle(method, step, summaries, decisions)
            continue
        output = DType.BF16 if step.kind is Kind.MERGE else None
        kernel = kernels.get(method, step, inputs, decisions, output)
        run = _runner(kernel, numbers_of(method, step, decisions), words)
        run(work)
        if step.kind is Kind.MEASURE:
            counted = kernel.form is Form.HISTOGRAMS
            part = work.counts[: kernel.width].astype(np.int64) if counted else _sums(work, kernel)
            summaries[step.name] = combine([part.copy()])
            work.counts[:] = 0
        before = cuda.kernel_ms
        run(work)
        read = 2 * TILE * len(kernel.inputs)
        kernel_ms = cuda.kernel_ms - before
        found.append(Timed(f"{name} {step.name}", read, kernel.inputs, kernel_ms, run))
    return found


def _sums(work: Work, kernel: Kernel) -> npt.NDArray[np.float64]:
    """The rows of totals, which a kernel writes one after the other."""
    rows = TILE // CANONICAL_BLOCK
    return work.sums.reshape(-1)[: rows * kernel.width].reshape(rows, kernel.width)


def _runner(
    kernel: Kernel, parameters: npt.NDArray[np.float64], keys: npt.NDArray[np.uint32]
) -> Callable[[Work], None]:
    def run(work: Work) -> None:
        outputs: dict[Form, npt.NDArray[np.generic]] = {
            Form.MAP: work.output,
            Form.TOTALS: work.sums,
            Form.HISTOGRAMS: work.counts[: kernel.width],
        }
        kernel(
            count=TILE,
            first=0,
            inputs=[array.ctypes.data for array in work.arrays],
            parameters=parameters,
            keys=keys,
            output=outputs[kernel.form],
        )

    return run


class Copier:
    """Plain copies to the device, from pinned memory, one thread's."""

    def __init__(self, driver: Driver, pinned: Pinned, nbytes: int) -> None:
        self._driver = driver
        self._pinned = pinned
        self._stream = driver.stream()
        memory = driver.alloc(nbytes)
        if memory is None:
            sys.exit(f"the device has no {nbytes} bytes for plain copies")
        self._memory = memory

    def copy(self, work: Work, inputs: tuple[int, ...]) -> None:
        """The same bytes that a pass reads."""
        at = self._memory
        for number in inputs:
            address = work.arrays[number].ctypes.data
            for piece, nbytes in self._pinned.pieces(address, 2 * TILE):
                self._driver.copy_in(at + piece - address, piece, nbytes, self._stream)
            at += 2 * TILE
        self._driver.synchronize(self._stream)

    def close(self) -> None:
        """Give stream and memory back."""
        self._driver.end([self._stream], [])
        self._driver.free(self._memory)


def measure(
    report: Report,
    driver: Driver,
    kernel_ms: float,
    timed: Timed,
    works: list[Work],
    copiers: list[Copier],
    args: Namespace,
) -> list[object]:
    """One pass and the plain copies of its bytes, in turn; a row of the table."""
    rates: dict[str, list[float]] = {"copy": [], "pass": []}
    work: dict[str, Callable[[int], None]] = {
        "copy": lambda number: copiers[number].copy(works[number], timed.inputs),
        "pass": lambda number: timed.run(works[number]),
    }
    for run in range(args.runs + 1):
        for kind, do in work.items():
            wall_s = together(driver, works, args.repeats, do)
            if run:  # run 0 takes memory and pins
                read_bytes = timed.read_bytes * args.repeats * len(works)
                rates[kind].append(read_bytes / wall_s / GB)
    ratios = [a / b for a, b in zip(rates["pass"], rates["copy"], strict=True)]
    copy_ms = timed.read_bytes / (median(rates["copy"]) * GB) / MS
    figures = {
        "gb_per_s": median(rates["pass"]),
        "copy_gb_per_s": median(rates["copy"]),
        "ratio": median(ratios),
        "kernel_ms": round(kernel_ms, 3),
        "copy_ms": round(copy_ms, 3),
    }
    report.line("pass", name=timed.name, runs=args.runs, read_bytes=timed.read_bytes, **figures)
    return [timed.name, *figures.values()]


def together(driver: Driver, works: list[Work], repeats: int, do: Callable[[int], None]) -> float:
    """Seconds until every thread, one for each tile, has done its work so often."""
    barrier = threading.Barrier(len(works) + 1)

    def thread(number: int) -> None:
        driver.enter()
        barrier.wait()
        for _ in range(repeats):
            do(number)
        barrier.wait()

    threads = [threading.Thread(target=thread, args=(n,), daemon=True) for n in range(len(works))]
    for item in threads:
        item.start()
    barrier.wait()
    began = time.perf_counter()
    barrier.wait()
    return time.perf_counter() - began


def main() -> None:
    """Measure every method, or those that are named."""
    parser = harness.arguments(__doc__, family="0.3B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=16, help="tiles of each thread in a run")
    parser.add_argument("--lanes", type=int, default=4, help="threads")
    parser.add_argument("--methods", nargs="*", choices=methods.names(), default=methods.names())
    args = parser.parse_args()
    if reason := lacking():
        sys.exit(f"no CUDA device to measure: {reason}")
    driver = NvidiaDriver()
    driver.enter()
    single, cuda = Cuda(driver, timed=True), Cuda(driver)
    settings = {"device": driver.describe(), "lanes": args.lanes, "tile": TILE, "models": MODELS}
    report = Report("gpu", "random bfloat16", **settings)
    rows = []
    for name in args.methods:
        _, inputs = method_of(name)
        tensors, models = len(inputs.dtypes), len(inputs.models)
        works = [tile(cuda, tensors, models) for _ in range(args.lanes)]
        copied = [Copier(driver, cuda.pinned, 2 * TILE * tensors) for _ in works]
        alone = passes(name, single, tile(single, tensors, models))
        for one, timed in zip(alone, passes(name, cuda, works[0]), strict=True):
            rows.append(measure(report, driver, one.kernel_ms, timed, works, copied, args))
        for item in copied:
            item.close()
    heads = ["", "GB/s", "copy GB/s", "ratio", "kernel ms", "copy ms"]
    report.table(heads, rows)


if __name__ == "__main__":
    main()
