"""Passes on a CUDA device: chunks are copied in, computed and copied out while others move.

A lane is what one call runs on: two streams, device memory and pinned host memory that are taken
once. A stream does its chunks in order, each in the stream's own slot of the memory, so no slot is
overwritten before it was copied out. Several callers, each on a lane of its own, fill what gaps are
left.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardmerge.errors import DeviceError
from shardmerge.kernels.compile import LANES, Array, Form, Kernel
from shardmerge.kernels.cuda_code import (
    ARGUMENTS,
    FOLD,
    GROUP,
    LANE_SUMS,
    MAIN,
    ROW_SUMS,
    Program,
    histograms_program,
    map_program,
    totals_program,
)
from shardmerge.kernels.cuda_driver import Bytes, Driver
from shardmerge.kernels.cuda_memory import (
    SLOTS,
    Layout,
    Pinned,
    counts_nbytes,
    largest_chunk,
)
from shardmerge.kernels.language import HISTOGRAM_BINS, Expr, Histograms, Totals
from shardmerge.numerics import CANONICAL_BLOCK, DType

_FLAGS_BYTES = 8
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A program on the device, with its functions by entry point."""

    program: Program
    functions: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Call:
    """What a kernel was called with; ``inputs`` are those that it reads."""

    count: int
    first: int
    inputs: tuple[int, ...]
    parameters: npt.NDArray[np.float64]
    keys: npt.NDArray[np.uint32]
    output: Array

    @property
    def header_bytes(self) -> int:
        """Bytes of flags, parameters and keys."""
        return _FLAGS_BYTES + self.parameters.nbytes + self.keys.nbytes


class CudaKernel:
    """A pass compiled for a CUDA device."""

    def __init__(self, device: Cuda, driver: Driver, program: Program) -> None:
        self.form = program.form
        self.width = program.width
        self.inputs = program.inputs
        self._device = device
        driver.enter()
        module, functions = driver.load(program)
        self._loaded = _Loaded(program, functions)
        weakref.finalize(self, _unload, driver, module).atexit = False

    def __call__(
        self,
        *,
        count: int,
        first: int,
        inputs: Sequence[int],
        parameters: npt.NDArray[np.float64],
        keys: npt.NDArray[np.uint32],
        output: Array,
    ) -> int:
        """Run over ``count`` elements; see ``Kernel``. All addresses are of the host."""
        if count == 0:
            return 0
        read = tuple(inputs[number] for number in self.inputs)
        call = _Call(count, first, read, parameters, keys, output)
        with self._device.lane() as lane:
            return lane.run(self._loaded, call)


def _unload(driver: Driver, module: int) -> None:
    with contextlib.suppress(DeviceError):  # where the device failed, nothing is loaded
        driver.enter()
        driver.unload(module)


class Cuda:
    """Makes kernels for a CUDA device, and lends them lanes.

    Args:
        timed: whether to add up the time that kernels take, without copies, in ``kernel_ms``.

    Attributes:
        pinned: memory of the host that is copied at the rate of the bus.
    """

    name = "cuda"

    def __init__(self, driver: Driver, *, timed: bool = False) -> None:
        self.kernel_ms = 0.0
        self.pinned = Pinned(driver)
        self._driver = driver
        self._timed = timed
        self._lock = threading.Lock()
        self._idle: list[_Lane] = []

    def compile_map(self, result: Expr, dtypes: Sequence[DType], output: DType) -> Kernel:
        """A kernel that writes ``result`` for every element."""
        return CudaKernel(self, self._driver, map_program(result, dtypes, output))

    def compile_totals(self, totals: Totals, dtypes: Sequence[DType]) -> Kernel:
        """A kernel that writes float64 sums of canonical blocks."""
        return CudaKernel(self, self._driver, totals_program(totals, dtypes))

    def compile_histograms(self, histograms: Histograms, dtypes: Sequence[DType]) -> Kernel:
        """A kernel that adds to u32 counts."""
        return CudaKernel(self, self._driver, histograms_program(histograms, dtypes))

    def pin(self, memory: Bytes) -> None:
        """Copy from and to ``memory`` at the rate of the bus, as long as it lives."""
        self.pinned.add(memory)

    @contextlib.contextmanager
    def lane(self) -> Iterator[_Lane]:
        """A lane for one call; after a failure it is not used again."""
        self._driver.enter()
        with self._lock:
            lane = self._idle.pop() if self._idle else None
        if lane is None:
            lane = _Lane(self._driver, self.pinned, timed=self._timed)
        try:
            yield lane
        except BaseException:
            lane.close()
            raise
        with self._lock:
            self.kernel_ms += lane.take_ms()
            self._idle.append(lane)


class _Lane:
    """Streams and memory of one call at a time."""

    def __init__(self, driver: Driver, pinned: Pinned, *, timed: bool) -> None:
        self._driver = driver
        self._pinned = pinned
        self._timed = timed
        self._timers: list[tuple[int, int]] = []
        self._used_timers = 0
        self._streams = tuple(driver.stream() for _ in range(SLOTS))
        self._events = tuple(driver.event() for _ in range(SLOTS))
        self._memory = self._room = 0
        self._refused: int | None = None
        self._staging: Bytes | None = None

    def run(self, loaded: _Loaded, call: _Call) -> int:
        """All chunks of a call; gives a map's flags."""
        layout = self._fit(loaded.program, call)
        staging = self._stage(call.header_bytes + _result_bytes(loaded.program, call))
        self._begin(loaded.program, layout, call, staging)
        chunks = range(0, call.count, layout.chunk)
        for number, start in enumerate(chunks):
            if 0 < number < SLOTS:  # the stream's first chunk
                self._driver.wait(self._streams[number], self._events[0])
            self._chunk(loaded, layout, call, start, number % SLOTS)
        for other in range(1, min(SLOTS, len(chunks))):
            self._driver.record(self._events[other], self._streams[other])
            self._driver.wait(self._streams[0], self._events[other])
        return self._finish(loaded, layout, call, staging)

    # memory

    def _fit(self, program: Program, call: _Call) -> Layout:
        """A layout that the device has memory for, in chunks as large as that allows."""
        chunk = largest_chunk(program)
        while True:
            layout = Layout.of(program, call.header_bytes, chunk)
            if layout.nbytes <= self._room or self._take(layout.nbytes):
                return layout
            if chunk == CANONICAL_BLOCK:
                raise self._too_little(layout.nbytes)
            chunk = max(1, chunk // CANONICAL_BLOCK // 2) * CANONICAL_BLOCK

    def _take(self, nbytes: int) -> bool:
        """More device memory, in the place of what the lane had; gives whether there was enough."""
        if self._refused is not None and nbytes >= self._refused:
            return False
        self._release()
        address = self._driver.alloc(nbytes)
        if address is None:
            self._refused = nbytes
            return False
        self._memory, self._room = address, nbytes
        return True

    def _release(self) -> None:
        if self._room:
            self._driver.free(self._memory)
            self._memory = self._room = 0

    def _too_little(self, nbytes: int) -> DeviceError:
        free, total = self._driver.memory()
        return DeviceError(
            f"{self._driver.describe()}: {nbytes / _MIB:,.1f} MiB of its memory are needed for "
            f"the smallest chunk ({CANONICAL_BLOCK:,} elements of every input); "
            f"{free / _MIB:,.1f} MiB of {total / _MIB:,.1f} MiB are free.\n"
            "  End what else uses the device, give fewer --threads (each takes as much), or start "
            "over with --fresh --device cpu."
        )

    def _stage(self, nbytes: int) -> Bytes:
        """Pinned host memory for what is in none."""
        if self._staging is None or self._staging.nbytes < nbytes:
            if self._staging is not None:
                self._driver.free_host(self._staging)
                self._staging = None
            self._staging = self._driver.alloc_host(nbytes)
        return self._staging

    def close(self) -> None:
        """Wait for what is under way, and give everything back, as far as the device allows."""
        for stream in self._streams:
            with contextlib.suppress(DeviceError):
                self._driver.synchronize(stream)
        with contextlib.suppress(DeviceError):
            self._release()
        with contextlib.suppress(DeviceError):
            if self._staging is not None:
                self._driver.free_host(self._staging)
        events = [*self._events, *(event for pair in self._timers for event in pair)]
        with contextlib.suppress(DeviceError):
            self._driver.end(self._streams, events)

    # a call

    def _begin(self, program: Program, layout: Layout, call: _Call, staging: Bytes) -> None:
        """Zero flags and counts; parameters and keys to the device."""
        parts = (np.zeros(1, dtype=np.uint64), call.parameters, call.keys)
        header = b"".join(part.tobytes() for part in parts)
        staging[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        stream = self._streams[0]
        self._driver.copy_in(self._memory, staging.ctypes.data, len(header), stream)
        if program.form is Form.HISTOGRAMS:
            copies_bytes = layout.counts - layout.copies
            self._driver.zero(self._memory + layout.copies, copies_bytes, stream)
        self._driver.record(self._events[0], stream)

    def _chunk(self, loaded: _Loaded, layout: Layout, call: _Call, start: int, slot: int) -> None:
        """Copy one chunk in, compute it, copy its result out."""
        program, stream = loaded.program, self._streams[slot]
        count = min(layout.chunk, call.count - start)
        begin = self._memory + layout.slots[slot]
        at = begin
        for address, itemsize in zip(call.inputs, program.itemsizes, strict=True):
            host = address + start * itemsize
            for piece, nbytes in self._pinned.pieces(host, count * itemsize):
                self._driver.copy_in(at + piece - host, piece, nbytes, stream)
            at += layout.chunk * itemsize
        with self._timer(stream):
            self._compute(loaded, layout, call, start, slot)
        if program.form is Form.MAP:
            host = call.output.ctypes.data + start * program.output_itemsize
            for piece, nbytes in self._pinned.pieces(host, count * program.output_itemsize):
                self._driver.copy_out(piece, begin + layout.output + piece - host, nbytes, stream)
        elif program.form is Form.TOTALS:
            assert self._staging is not None
            host = self._staging.ctypes.data + call.header_bytes + _rows(program, start) * 8
            rows_bytes = _rows(program, count) * 8
            self._driver.copy_out(host, begin + layout.row_sums, rows_bytes, stream)

    def _compute(self, loaded: _Loaded, layout: Layout, call: _Call, start: int, slot: int) -> None:
        program = loaded.program
        count = min(layout.chunk, call.count - start)
        begin = self._memory + layout.slots[slot]
        values = self._memory + layout.copies
        if program.form is not Form.HISTOGRAMS:
            values = begin + layout.output
        given = {
            "first": call.first + start,
            "stride": layout.chunk,
            "parameters": self._memory + _FLAGS_BYTES,
            "keys": self._memory + _FLAGS_BYTES + call.parameters.nbytes,
            "flags": self._memory,
        }

        def launch(entry: str, items: int, count: int, inputs: int, output: int) -> None:
            own = {**given, "count": count, "inputs": inputs, "output": output}
            arguments = [own[name] for name in ARGUMENTS]
            self._driver.launch(loaded.functions[entry], items, arguments, self._streams[slot])

        launch(MAIN, -(-count // GROUP), count, begin, values)
        if program.form is Form.TOTALS:
            rows = _rows(program, count)
            lane_sums, row_sums = begin + layout.lane_sums, begin + layout.row_sums
            launch(LANE_SUMS, rows * LANES, count, values, lane_sums)
            launch(ROW_SUMS, rows, rows, lane_sums, row_sums)

    def _finish(self, loaded: _Loaded, layout: Layout, call: _Call, staging: Bytes) -> int:
        """The result of all chunks, to the caller."""
        program, stream = loaded.program, self._streams[0]
        result = staging[call.header_bytes :][: _result_bytes(program, call)]
        if program.form is Form.MAP:
            self._driver.copy_out(result.ctypes.data, self._memory, _FLAGS_BYTES, stream)
        elif program.form is Form.HISTOGRAMS:
            copies, counts = self._memory + layout.copies, self._memory + layout.counts
            own = dict.fromkeys(ARGUMENTS, self._memory) | {"inputs": copies, "output": counts}
            arguments = [own[name] for name in ARGUMENTS]
            bins = program.width * HISTOGRAM_BINS
            with self._timer(stream):
                self._driver.launch(loaded.functions[FOLD], bins, arguments, stream)
            self._driver.copy_out(result.ctypes.data, counts, result.nbytes, stream)
        self._driver.synchronize(stream)
        if program.form is Form.MAP:
            return int(result.view(np.uint64)[0])
        given = call.output.reshape(-1)
        if program.form is Form.TOTALS:
            given[: result.nbytes // 8] = result.view(np.float64)
        else:
            given.view(np.uint32)[:] += result.view(np.uint32)
        return 0

    # time

    @contextlib.contextmanager
    def _timer(self, stream: int) -> Iterator[None]:
        """Note when kernels begin and end, where that is asked for."""
        if not self._timed:
            yield
            return
        if self._used_timers == len(self._timers):
            self._timers.append((self._driver.event(), self._driver.event()))
        start, stop = self._timers[self._used_timers]
        self._used_timers += 1
        self._driver.record(start, stream)
        yield
        self._driver.record(stop, stream)

    def take_ms(self) -> float:
        """Time of the kernels since the last call."""
        used, self._used_timers = self._timers[: self._used_timers], 0
        return sum(self._driver.elapsed_ms(start, stop) for start, stop in used)


def _rows(program: Program, count: int) -> int:
    """Sums that ``count`` elements give: one for each value and block."""
    return -(-count // CANONICAL_BLOCK) * program.width


def _result_bytes(program: Program, call: _Call) -> int:
    """Pinned memory for the result of a call, of what is not copied to the caller's own."""
    if program.form is Form.MAP:
        return _FLAGS_BYTES
    return 8 * _rows(program, call.count) if program.form is Form.TOTALS else counts_nbytes(program)
