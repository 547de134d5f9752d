"""The inputs of one output tensor in memory: what is there, what has to be read, where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardmerge.decode import Decoder, decoder_of, is_coded, value_dtype
from shardmerge.errors import MemoryBudgetError
from shardmerge.sources.tensor import TensorRef, reads
from shardmerge.stores.api import Range


class Arena:
    """One block of memory that a worker takes all its buffers from; pages are used when touched."""

    def __init__(self, nbytes: int) -> None:
        try:
            self._bytes = np.empty(nbytes, dtype=np.uint8)
        except MemoryError:
            raise MemoryBudgetError(
                f"this machine does not give {nbytes / 2**30:.1f} GiB to one worker.\n"
                "  Give a --memory that it has."
            ) from None
        self._used = 0

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """All of it."""
        return self._bytes

    def clear(self) -> None:
        """Give back every buffer."""
        self._used = 0

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Give back the buffers that are taken from now on."""
        used = self._used
        try:
            yield
        finally:
            self._used = used

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """A buffer, aligned for vectors."""
        start = -(-self._used // 64) * 64
        if start + nbytes > len(self._bytes):
            raise AssertionError(f"a task asked for {start + nbytes} of {len(self._bytes)} bytes")
        self._used = start + nbytes
        return self._bytes[start : start + nbytes]


class _Held:
    """One input of a window: its buffers, and which elements are in them."""

    def __init__(self, ref: TensorRef, arena: Arena, room: int, tile: int) -> None:
        self.ref = ref
        self.itemsize = value_dtype(ref).itemsize
        self.values = arena.take(room * self.itemsize)
        self.start = self.stop = 0
        self._raw = self.values[:0]
        self._decoder: Decoder | None = None
        if is_coded(ref):
            self._raw = arena.take(tile * ref.dtype.itemsize)
            self._decoder = decoder_of(ref, arena.take, tile)

    def wanted(self, start: int, stop: int, at: int) -> list[Range]:
        """What to read for elements ``[start, stop)``, which go to place ``at``."""
        if self._decoder is None:
            return reads(self.ref, start, stop, self._values(at, stop - start).data)
        stored = reads(self.ref, start, stop, self._raw.data)
        return [*stored, *self._decoder.wanted(start, stop)]

    def arrived(self, start: int, stop: int, at: int) -> None:
        """Turn what was read into values, where that has to be done."""
        if self._decoder is not None:
            raw = self._raw[: (stop - start) * self.ref.dtype.itemsize]
            kind = np.float64 if self.itemsize == 8 else np.float32
            self._decoder.decode(start, raw, self._values(at, stop - start).view(kind))

    def _values(self, at: int, count: int) -> npt.NDArray[np.uint8]:
        return self.values[at * self.itemsize : (at + count) * self.itemsize]


class Window:
    """The inputs of one output tensor in memory: a tile of each, or all of it (resident)."""

    def __init__(
        self, refs: Sequence[TensorRef], arena: Arena, *, tile: int, resident: bool, numel: int
    ) -> None:
        self._resident = resident
        tile = min(tile, numel)
        self._inputs = [_Held(ref, arena, numel if resident else tile, tile) for ref in refs]

    def missing(self, start: int, stop: int, which: Sequence[int]) -> list[Missing]:
        """What these inputs lack of elements ``[start, stop)``, at most a tile."""
        found = []
        for number in which:
            held = self._inputs[number]
            if self._resident:
                if held.stop < stop:
                    found.append(Missing(held, held.stop, stop, held.stop))
            elif not held.start <= start <= stop <= held.stop:
                found.append(Missing(held, start, stop, 0))
        return found

    def addresses(self, start: int) -> list[int]:
        """Where element ``start`` of every input is; of those that are there."""
        return [
            held.values.ctypes.data + (start - held.start) * held.itemsize for held in self._inputs
        ]

    def view(self, number: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The bytes of elements ``[start, stop)`` of an input."""
        held = self._inputs[number]
        first, last = start - held.start, stop - held.start
        return held.values[first * held.itemsize : last * held.itemsize]


@dataclass(frozen=True, slots=True)
class Missing:
    """Elements ``[start, stop)`` of one input, to be read to place ``at`` of its buffer."""

    held: _Held
    start: int
    stop: int
    at: int

    def ranges(self) -> list[Range]:
        """What to read."""
        return self.held.wanted(self.start, self.stop, self.at)

    def arrived(self) -> None:
        """It was read."""
        self.held.arrived(self.start, self.stop, self.at)
        self.held.start, self.held.stop = self.start - self.at, self.stop
