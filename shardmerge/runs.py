"""The passes of one output tensor on one worker: read a tile, run a kernel, write a tile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shardmerge.errors import CheckpointError
from shardmerge.excerpt import WorkPlan
from shardmerge.kernels.compile import LAST_INPUT_BIT, OUTPUT_BIT, Form, Kernel
from shardmerge.kernels.language import HISTOGRAM_BINS
from shardmerge.kernels.trace import Kernels, numbers_of
from shardmerge.layout import Piece
from shardmerge.match import OutputTensor
from shardmerge.memory import inputs_of, kernel_inputs, tensor_numel, tile_elements
from shardmerge.methods.api import Counts, Decision, Kind, Over, Pass, info_of, levels_of
from shardmerge.numerics import CANONICAL_BLOCK, philox_key
from shardmerge.outputs.api import PartWriter
from shardmerge.stores import Stores
from shardmerge.summaries import Partial, Summary, combine, settle
from shardmerge.window import Arena, Missing, Window

Decided = Mapping[str, Decision]
"""Decisions by the ledger's keys."""

_MOST_COUNTS = 2**31
"""Elements after which u32 counts are added to the int64 ones, long before they could overflow."""


@dataclass(slots=True)
class Seconds:
    """Where a task's time went."""

    read: float = 0.0
    kernel: float = 0.0
    write: float = 0.0


class Stopping(Exception):
    """Raised inside a worker when the run is being stopped."""


@dataclass(slots=True)
class Context:
    """What the passes of a tensor share with their worker.

    Args:
        plan: of the task, or an excerpt with all that it needs.
        computing: kernels run while holding one, so that other workers read and write meanwhile.
        reading: a worker reads while holding one.
        stopping: set when the run is to stop; a task then ends between two tiles.
    """

    plan: WorkPlan
    stores: Stores
    kernels: Kernels
    computing: threading.Semaphore
    reading: threading.Semaphore
    stopping: threading.Event
    arena: Arena
    seconds: Seconds = field(default_factory=Seconds)
    read_bytes: int = 0
    peak_bytes: int = 0

    def fetch(self, missing: Sequence[Missing]) -> None:
        """Read what is missing, all of it together."""
        if self.stopping.is_set():
            raise Stopping
        if not missing:
            return
        began = time.perf_counter()
        ranges = [item for part in missing for item in part.ranges()]
        with self.reading:
            self.stores.read(ranges)
        for part in missing:
            part.arrived()
        self.read_bytes += sum(item.into.nbytes for item in ranges)
        self.seconds.read += time.perf_counter() - began


def levels_in(tensor: OutputTensor) -> Mapping[str, Over | None]:
    """What each pass of a tensor's method is taken over."""
    return {} if tensor.method is None else levels_of(tensor.method)


class TensorRun:
    """The passes of one output tensor, element by element."""

    def __init__(self, context: Context, number: int, decided: Decided, *, resident: bool) -> None:
        plan = context.plan
        self.number = number
        self._context = context
        self._tensor: OutputTensor = plan.tensors[number]
        self._levels = levels_in(self._tensor)
        # Without a measure over the tensor there is nothing to keep its inputs for.
        self._resident = resident and Over.TENSOR in self._levels.values()
        self._tile = tile_elements(self._tensor, plan.worker_bytes, plan.device)
        numel = tensor_numel(self._tensor)
        self.window = Window(
            inputs_of(self._tensor),
            context.arena,
            tile=self._tile,
            resident=self._resident,
            numel=numel,
        )
        self._output = context.arena.take(min(self._tile, numel) * self._tensor.dtype.itemsize)
        self._decisions = self._given(decided)
        self._keys = _random_keys(self._tensor, plan.seed)
        self._measured = not self._resident
        self.keeps = self._resident
        self._sums: list[npt.NDArray[np.float64]] = []

    def _given(self, decided: Decided) -> dict[str, Decision | None]:
        """Decisions that were taken elsewhere, by the name of the settling pass."""
        found: dict[str, Decision | None] = {}
        for name, over in self._levels.items():
            if over is None:
                found[name] = None
            elif not self._resident or over is Over.MODEL:
                found[name] = decided.get(self._context.plan.key(self.number, name, over))
        return found

    def missing(self, step: Pass | None, piece: Piece) -> list[Missing]:
        """What a pass (None: all of a merge) has to read for a piece of at most a tile."""
        method = self._tensor.method
        if method is None or self._resident:
            which: Sequence[int] = range(len(inputs_of(self._tensor)))
        else:
            which = self._kernel(step or info_of(method).merge_pass).inputs
        return self.window.missing(piece.start, piece.stop, which)

    def settle(self) -> None:
        """All measuring and settling passes over this tensor, on inputs that stay in memory."""
        if self._measured:
            return
        self._measured = True
        method, numel = self._tensor.method, tensor_numel(self._tensor)
        summaries: dict[str, Summary] = {}
        for step in info_of(method).passes[:-1]:
            if self._levels[step.name] is not Over.TENSOR:
                continue
            if step.kind is Kind.MEASURE:
                summaries[step.name] = combine([self.measure(step, 0, numel)])
            else:
                self._decisions[step.name] = settle(method, step, summaries, self._decisions)

    def measure(self, step: Pass, start: int, stop: int) -> Partial:
        """The summary of elements ``[start, stop)``."""
        kernel = self._kernel(step)
        if kernel.form is Form.HISTOGRAMS:
            return self._count(kernel, step, start, stop)
        blocks = -(-(stop - start) // CANONICAL_BLOCK)
        sums = np.zeros((blocks, kernel.width))

        def into(begin: int, _: int) -> npt.NDArray[np.float64]:
            return sums[(begin - start) // CANONICAL_BLOCK :]

        for _ in self._tiles(kernel, step, start, stop, into):
            pass
        return sums

    def _count(self, kernel: Kernel, step: Pass, start: int, stop: int) -> Counts:
        total = np.zeros((kernel.width, HISTOGRAM_BINS), dtype=np.int64)
        counts = np.zeros((kernel.width, HISTOGRAM_BINS), dtype=np.uint32)
        for begin in range(start, stop, _MOST_COUNTS):
            end = min(stop, begin + _MOST_COUNTS)
            for _ in self._tiles(kernel, step, begin, end, lambda *_: counts):
                pass
            total += counts
            counts[:] = 0
        return total

    def merge(self, piece: Piece, sink: PartWriter) -> set[tuple[int, int]]:
        """Compute and write a piece; gives which inputs hold NaN or infinity."""
        if self._tensor.method is None:
            self._copy(piece, sink)
            return set()
        step = info_of(self._tensor.method).merge_pass
        kernel = self._kernel(step)
        size = self._tensor.dtype.itemsize
        flags = 0
        tiles = self._tiles(kernel, step, piece.start, piece.stop, lambda *_: self._output)
        for begin, end, bits in tiles:
            flags |= bits
            self._sum_up(begin, end)
            self._write(sink, self._output[: (end - begin) * size])
        found = {(self.number, k) for k in kernel.inputs if flags >> min(k, LAST_INPUT_BIT) & 1}
        if flags >> OUTPUT_BIT and not found:
            found = {(self.number, -1)}
        return found

    def _sum_up(self, begin: int, end: int) -> None:
        """The sums of a tile that was just merged, where the method wants them."""
        step = info_of(self._tensor.method).sum_pass
        if step is None:
            return
        kernel = self._kernel(step)
        sums = np.zeros((-(-(end - begin) // CANONICAL_BLOCK), kernel.width))
        with self._context.computing:
            began = time.perf_counter()
            kernel(
                count=end - begin,
                first=begin,
                inputs=[*self.window.addresses(begin), self._output.ctypes.data],
                parameters=numbers_of(self._tensor.method, step, self._decisions),
                keys=self._keys,
                output=sums,
            )
            self._context.seconds.kernel += time.perf_counter() - began
        self._sums.append(sums)

    def take_sums(self) -> list[npt.NDArray[np.float64]]:
        """The sums of what was merged since the last call, each of shape [blocks, values]."""
        sums, self._sums = self._sums, []
        return sums

    def _tiles(
        self,
        kernel: Kernel,
        step: Pass,
        start: int,
        stop: int,
        into: Callable[[int, int], npt.NDArray[np.generic]],
    ) -> Iterator[tuple[int, int, int]]:
        """Run the kernel over each tile; yields its elements and the kernel's answer."""
        parameters = numbers_of(self._tensor.method, step, self._decisions)
        for begin in range(start, stop, self._tile):
            end = min(stop, begin + self._tile)
            inputs = self._read(begin, end, kernel.inputs)
            with self._context.computing:
                began = time.perf_counter()
                bits = kernel(
                    count=end - begin,
                    first=begin,
                    inputs=inputs,
                    parameters=parameters,
                    keys=self._keys,
                    output=into(begin, end),
                )
                self._context.seconds.kernel += time.perf_counter() - began
            yield begin, end, bits

    def _read(self, start: int, stop: int, which: Sequence[int]) -> list[int]:
        """Addresses of element ``start`` of every input; those in ``which`` hold it to ``stop``."""
        self._context.fetch(self.window.missing(start, stop, which))
        return self.window.addresses(start)

    def _write(self, sink: PartWriter, data: npt.NDArray[np.uint8]) -> None:
        began = time.perf_counter()
        sink.write(data.data)
        self._context.seconds.write += time.perf_counter() - began

    def _copy(self, piece: Piece, sink: PartWriter) -> None:
        """Copy elements that are no floats; all inputs must hold the same."""
        refs = inputs_of(self._tensor)
        for begin in range(piece.start, piece.stop, self._tile):
            end = min(piece.stop, begin + self._tile)
            self._read(begin, end, range(len(refs)))
            first = self.window.view(0, begin, end)
            for number in range(1, len(refs)):
                if not np.array_equal(first, self.window.view(number, begin, end)):
                    raise CheckpointError(
                        f"{self._tensor.name} holds {self._tensor.dtype.torch_name} and differs "
                        f"between {refs[0].segments[0].url} and {refs[number].segments[0].url}.\n"
                        "  Integers cannot be merged. Say which to take: rules: "
                        f'[{{tensors: "{self._tensor.name}", from: <model>}}], and start over '
                        "with --fresh."
                    )
            self._write(sink, first)

    def _kernel(self, step: Pass) -> Kernel:
        output = self._tensor.dtype if step.kind in (Kind.MERGE, Kind.SUM) else None
        return self._context.kernels.get(
            self._tensor.method, step, kernel_inputs(self._tensor), self._decisions, output
        )


def _random_keys(tensor: OutputTensor, seed: int) -> npt.NDArray[np.uint32]:
    """The Philox key of each model, as two words; shape [models, 2]."""
    if tensor.method is None or not info_of(tensor.method).random:
        return np.zeros((1, 2), dtype=np.uint32)
    keys = [philox_key(seed, position, tensor.name) for position in tensor.positions]
    return np.array([[key & 0xFFFFFFFF, key >> 32] for key in keys], dtype=np.uint32)
