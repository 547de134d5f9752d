"""One task on a worker: read a tile, run a kernel, write a tile. Where I/O and kernels meet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shardmerge.decode import decode_blocks
from shardmerge.errors import CheckpointError
from shardmerge.kernels.compile import LAST_INPUT_BIT, OUTPUT_BIT, Form, Kernel
from shardmerge.kernels.language import HISTOGRAM_BINS
from shardmerge.kernels.trace import Kernels, numbers_of
from shardmerge.layout import Piece
from shardmerge.match import OutputTensor
from shardmerge.methods.api import Counts, Decision, Kind, Over, Pass, info_of, levels_of
from shardmerge.numerics import CANONICAL_BLOCK, philox_key
from shardmerge.plan import (
    MeasureTask,
    MergeTask,
    Plan,
    Task,
    inputs_of,
    kernel_inputs,
    tensor_numel,
    tile_elements,
    value_dtype,
)
from shardmerge.shards import PartWriter, Receipt, ShardWriter
from shardmerge.sources.tensor import TensorRef, ranges
from shardmerge.stores import open_store
from shardmerge.summaries import BlockSums, Partial, Summary, combine, settle

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


@dataclass(frozen=True, slots=True)
class Done:
    """What a task gives back: receipts of parts, or a partial summary."""

    task: int
    receipts: tuple[Receipt, ...] = ()
    partial: Partial | None = None
    read_bytes: int = 0
    seconds: Seconds = field(default_factory=Seconds)


class Stopping(Exception):
    """Raised inside a worker when the run is being stopped."""


class Arena:
    """One block of memory that a worker takes all its buffers from; pages are used when touched."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = np.empty(nbytes, dtype=np.uint8)
        self._used = 0

    def clear(self) -> None:
        """Give back every buffer."""
        self._used = 0

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """A buffer, aligned for vectors."""
        start = -(-self._used // 64) * 64
        if start + nbytes > len(self._bytes):
            raise AssertionError(f"a task asked for {start + nbytes} of {len(self._bytes)} bytes")
        self._used = start + nbytes
        return self._bytes[start : start + nbytes]


class Window:
    """The inputs of one output tensor in memory: a tile of each, or all of it (resident)."""

    def __init__(
        self, refs: Sequence[TensorRef], arena: Arena, *, tile: int, resident: bool, numel: int
    ) -> None:
        self._refs = refs
        self._resident = resident
        self._tile = tile
        self._itemsizes = [value_dtype(ref).itemsize for ref in refs]
        room = numel if resident else min(tile, numel)
        self._buffers = [arena.take(room * size) for size in self._itemsizes]
        self._loaded = [0] * len(refs)
        fp8 = any(ref.dtype.is_fp8 for ref in refs)
        self._raw = arena.take(min(tile, numel)) if fp8 else None
        self.read_bytes = 0

    def tile(self, start: int, stop: int, which: Sequence[int]) -> list[int]:
        """Addresses of element ``start`` of every input; those in ``which`` hold it to ``stop``."""
        first = start if self._resident else 0
        for number in which:
            if self._resident:
                while self._loaded[number] < stop:
                    begin = self._loaded[number]
                    end = min(stop, begin + self._tile)
                    self._load(number, begin, end, at=begin)
                    self._loaded[number] = end
            else:
                self._load(number, start, stop, at=0)
        return [
            buffer.ctypes.data + first * size
            for buffer, size in zip(self._buffers, self._itemsizes, strict=True)
        ]

    def view(self, number: int, count: int) -> npt.NDArray[np.uint8]:
        """The bytes of the first ``count`` elements of an input's tile."""
        return self._buffers[number][: count * self._itemsizes[number]]

    def _load(self, number: int, start: int, stop: int, *, at: int) -> None:
        ref, size = self._refs[number], self._itemsizes[number]
        target = self._buffers[number][at * size : (at + stop - start) * size]
        if self._raw is None or not ref.dtype.is_fp8:
            self.read_bytes += read_elements(ref, start, stop, target)
            return
        raw = self._raw[: stop - start]
        self.read_bytes += read_elements(ref, start, stop, raw)
        values = target.view(np.float32)
        self.read_bytes += decode_blocks(ref, start, raw, values, read_elements)


def read_elements(ref: TensorRef, start: int, stop: int, into: npt.NDArray[np.uint8]) -> int:
    """Fill ``into`` with the stored bytes of elements ``[start, stop)``; gives their number."""
    position = 0
    view = into.data
    for segment in ranges(ref, start, stop):
        chunk = view[position : position + segment.nbytes]
        open_store(segment.url).read_into(segment.url, segment.offset, chunk)
        position += segment.nbytes
    return position


@dataclass(slots=True)
class Context:
    """What the passes of a tensor share with their worker.

    Args:
        permits: kernels run while holding one, so that other workers read and write meanwhile.
        stopping: set when the run is to stop; a task then ends between two tiles.
    """

    plan: Plan
    kernels: Kernels
    permits: threading.Semaphore
    stopping: threading.Event
    arena: Arena
    seconds: Seconds = field(default_factory=Seconds)


class Worker:
    """Runs tasks, one at a time, in memory that is taken once."""

    def __init__(
        self,
        plan: Plan,
        writer: ShardWriter,
        kernels: Kernels,
        permits: threading.Semaphore,
        stopping: threading.Event,
    ) -> None:
        arena = Arena(plan.worker_bytes)
        self._context = Context(plan, kernels, permits, stopping, arena)
        self._writer = writer

    def run(self, task: Task, decided: Decided) -> Done:
        """Do a task."""
        self._context.seconds = Seconds()
        if isinstance(task, MeasureTask):
            return self._measure(task, decided)
        return self._merge(task, decided)

    def _start(self, tensor: int, decided: Decided, *, resident: bool) -> _TensorRun:
        self._context.arena.clear()
        return _TensorRun(self._context, tensor, decided, resident=resident)

    def _measure(self, task: MeasureTask, decided: Decided) -> Done:
        method = self._context.plan.scopes[task.scope].method
        step = next(s for s in info_of(method).passes if s.name == task.step)
        counts: Counts | None = None
        blocks: list[BlockSums] = []
        read_bytes = 0
        for piece in task.pieces:
            run = self._start(piece.tensor, decided, resident=False)
            partial = run.measure(step, piece.start, piece.stop)
            read_bytes += run.window.read_bytes
            if isinstance(partial, tuple):
                blocks += partial
            else:
                counts = partial if counts is None else counts + partial
        partial = tuple(blocks) if counts is None else counts
        return Done(task.number, (), partial, read_bytes, self._context.seconds)

    def _merge(self, task: MergeTask, decided: Decided) -> Done:
        receipts, read_bytes = [], 0
        run: _TensorRun | None = None
        for part in task.parts:
            sink = self._writer.part(part)
            if part.number == 0:
                sink.write(self._context.plan.shards[part.shard].header)
            found: set[tuple[int, int]] = set()
            for piece in part.pieces:
                if run is None or run.number != piece.tensor:
                    read_bytes += 0 if run is None else run.window.read_bytes
                    run = self._start(piece.tensor, decided, resident=task.resident)
                found |= run.merge(piece, sink)
            receipts.append(sink.receipt(sorted(found)))
        read_bytes += 0 if run is None else run.window.read_bytes
        return Done(task.number, tuple(receipts), None, read_bytes, self._context.seconds)


class _TensorRun:
    """The passes of one output tensor on one worker."""

    def __init__(self, context: Context, number: int, decided: Decided, *, resident: bool) -> None:
        plan = context.plan
        self.number = number
        self._context = context
        self._tensor: OutputTensor = plan.tensors[number]
        method = self._tensor.method
        self._levels = {} if method is None else levels_of(method)
        # Without a measure over the tensor there is nothing to keep its inputs for.
        self._resident = resident and Over.TENSOR in self._levels.values()
        self._tile = tile_elements(self._tensor, plan.worker_bytes)
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
        self._keys = _random_keys(self._tensor, plan.recipe.seed)
        if self._resident:
            self._measure_all(numel)

    def _given(self, decided: Decided) -> dict[str, Decision | None]:
        """Decisions that were taken elsewhere, by the name of the settling pass."""
        found: dict[str, Decision | None] = {}
        for name, over in self._levels.items():
            if over is None:
                found[name] = None
            elif not self._resident or over is Over.MODEL:
                found[name] = decided.get(self._context.plan.key(self.number, name, over))
        return found

    def _measure_all(self, numel: int) -> None:
        """All measuring and settling passes over this tensor, on inputs that stay in memory."""
        method = self._tensor.method
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
        return (BlockSums(self.number, start // CANONICAL_BLOCK, sums),)

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
            self._write(sink, self._output[: (end - begin) * size])
        found = {(self.number, k) for k in kernel.inputs if flags >> min(k, LAST_INPUT_BIT) & 1}
        if flags >> OUTPUT_BIT and not found:
            found = {(self.number, -1)}
        return found

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
            with self._context.permits:
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
        if self._context.stopping.is_set():
            raise Stopping
        began = time.perf_counter()
        addresses = self.window.tile(start, stop, which)
        self._context.seconds.read += time.perf_counter() - began
        return addresses

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
            first = self.window.view(0, end - begin)
            for number in range(1, len(refs)):
                if not np.array_equal(first, self.window.view(number, end - begin)):
                    raise CheckpointError(
                        f"{self._tensor.name} holds {self._tensor.dtype.torch_name} and differs "
                        f"between {refs[0].segments[0].url} and {refs[number].segments[0].url}.\n"
                        "  Integers cannot be merged. Say which to take: rules: "
                        f'[{{tensors: "{self._tensor.name}", from: <model>}}], and start over '
                        "with --fresh."
                    )
            self._write(sink, first)

    def _kernel(self, step: Pass) -> Kernel:
        output = self._tensor.dtype if step.kind is Kind.MERGE else None
        return self._context.kernels.get(
            self._tensor.method, step, kernel_inputs(self._tensor), self._decisions, output
        )


def _random_keys(tensor: OutputTensor, seed: int) -> npt.NDArray[np.uint32]:
    """The Philox key of each model, as two words; shape [models, 2]."""
    if tensor.method is None or not info_of(tensor.method).random:
        return np.zeros((1, 2), dtype=np.uint32)
    keys = [philox_key(seed, position, tensor.name) for position in tensor.positions]
    return np.array([[key & 0xFFFFFFFF, key >> 32] for key in keys], dtype=np.uint32)
