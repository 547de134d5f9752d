"""Memory for CUDA devices: where a chunk lies on the device, and pages of the host that are pinned.

Copies run at the rate of the bus only from and to page-locked memory. Locking takes as long as
touching every page, so a worker's memory is locked segment by segment when it is first copied.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from shardmerge.errors import DeviceError
from shardmerge.kernels.compile import LANES, Form
from shardmerge.kernels.cuda_code import COPIES, Program
from shardmerge.kernels.cuda_driver import Bytes, Driver
from shardmerge.kernels.language import HISTOGRAM_BINS
from shardmerge.numerics import CANONICAL_BLOCK

SLOTS = 2
"""Chunks that are under way at a time: one is copied in while another is computed."""

CHUNK_ELEMENTS = 64 * CANONICAL_BLOCK
"""Elements of a chunk where memory allows: shorter copies do not reach the rate of the bus."""

SCRATCH_BYTES = 256 * 2**20
"""Most memory of a slot for the float64 values that totals are made of."""

SEGMENT_BYTES = 32 * 2**20
"""Host memory that is pinned at a time."""

_PAGE_BYTES = 4096
_ALIGN = 256


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def largest_chunk(program: Program) -> int:
    """Elements of a chunk: whole canonical blocks, as many as are worth it."""
    blocks = CHUNK_ELEMENTS // CANONICAL_BLOCK
    if program.form is Form.TOTALS:
        blocks = min(blocks, SCRATCH_BYTES // (8 * program.width * CANONICAL_BLOCK))
    return max(1, blocks) * CANONICAL_BLOCK


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a pass lies in one block of device memory, as offsets.

    The header (flags, parameters, keys) comes first. A slot holds a chunk's inputs, then what is
    computed from them.

    Args:
        chunk: elements that a slot has room for.
        copies: of counts that threads add to.
        counts: their sum.
        slots: where each begins.
        output: within a slot: values of a map, or those that totals are made of.
        lane_sums: within a slot.
        row_sums: within a slot.
        nbytes: of all.
    """

    chunk: int
    copies: int
    counts: int
    slots: tuple[int, ...]
    output: int
    lane_sums: int
    row_sums: int
    nbytes: int

    @classmethod
    def of(cls, program: Program, header_bytes: int, chunk: int) -> Layout:
        """The layout with slots of ``chunk`` elements."""
        counts_bytes = counts_nbytes(program)
        copies = _aligned(header_bytes)
        counts = copies + COPIES * counts_bytes
        slots = counts + counts_bytes
        rows = chunk // CANONICAL_BLOCK * program.width if program.form is Form.TOTALS else 0
        each = 8 * program.width if program.form is Form.TOTALS else program.output_itemsize
        output = _aligned(chunk * sum(program.itemsizes))
        lane_sums = output + _aligned(chunk * each)
        row_sums = lane_sums + _aligned(8 * LANES * rows)
        slot = row_sums + _aligned(8 * rows)
        return cls(
            chunk=chunk,
            copies=copies,
            counts=counts,
            slots=tuple(slots + slot * number for number in range(SLOTS)),
            output=output,
            lane_sums=lane_sums,
            row_sums=row_sums,
            nbytes=slots + SLOTS * slot,
        )


def counts_nbytes(program: Program) -> int:
    """Bytes of the counts of a pass."""
    return 4 * HISTOGRAM_BINS * program.width if program.form is Form.HISTOGRAMS else 0


@dataclass(frozen=True, slots=True)
class _Area:
    """Whole pages of a worker's memory; where each segment is pinned, None where it cannot be."""

    start: int
    stop: int
    segments: dict[int, int | None]


class Pinned:
    """Host memory that copies begin or end in, page-locked where it is used."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        # Memory may be forgotten at any moment, even by the thread that holds the lock.
        self._lock = threading.RLock()
        self._areas: tuple[_Area, ...] = ()

    def add(self, memory: Bytes) -> None:
        """Pin what is copied of ``memory`` as long as it lives."""
        address = memory.ctypes.data
        start = -(-address // _PAGE_BYTES) * _PAGE_BYTES
        stop = (address + memory.nbytes) // _PAGE_BYTES * _PAGE_BYTES
        if start < stop:
            area = _Area(start, stop, {})
            with self._lock:
                self._areas = (*self._areas, area)
            weakref.finalize(memory, self._forget, area).atexit = False

    def _forget(self, area: _Area) -> None:
        with self._lock:
            self._areas = tuple(other for other in self._areas if other is not area)
        with contextlib.suppress(DeviceError):  # where the device failed, nothing is pinned
            self._driver.enter()
            for address in area.segments.values():
                if address is not None:
                    self._driver.unpin(address)

    def pieces(self, address: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """A range of host memory as ranges that a copy may take: none crosses segments."""
        stop = address + nbytes
        area = next((a for a in self._areas if a.start < stop and address < a.stop), None)
        if area is None:
            yield address, nbytes
            return
        edges = {address, stop}
        edges |= {edge for edge in (area.start, area.stop) if address < edge < stop}
        first = (max(address, area.start) // SEGMENT_BYTES + 1) * SEGMENT_BYTES
        edges |= set(range(first, min(stop, area.stop), SEGMENT_BYTES))
        for a, b in itertools.pairwise(sorted(edges)):
            if area.start <= a < area.stop:
                self._pin(area, a // SEGMENT_BYTES)
            yield a, b - a

    def _pin(self, area: _Area, number: int) -> None:
        with self._lock:
            if number not in area.segments:
                first = max(number * SEGMENT_BYTES, area.start)
                last = min((number + 1) * SEGMENT_BYTES, area.stop)
                # Where it cannot be pinned, copies are slower and as right.
                pinned = self._driver.pin(first, last - first)
                area.segments[number] = first if pinned else None
