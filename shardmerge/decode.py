"""Stored elements to values, where they are not the values themselves; before a kernel runs.

8-bit floats become float32 and are multiplied by the scales of their blocks; to other floats a
matrix of low rank is added (an adapter).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shardmerge.kernels.lowrank import LANES, add_product, fill_columns, fill_rows, panels_shape
from shardmerge.numerics import DType, to_floats
from shardmerge.sources.tensor import BlockScale, Decode, LowRank, TensorRef, reads
from shardmerge.stores.api import Range

_TAKE_ELEMENTS = 2**16
"""Elements looked up at a time: numpy makes 8-byte indices of them first."""
_CONVERTED = 2**14
"""Elements of a factor that are converted at a time."""

Take = Callable[[int], npt.NDArray[np.uint8]]
"""Gives a buffer of so many bytes."""


def is_coded(ref: TensorRef) -> bool:
    """Whether stored elements are not the values."""
    return ref.decode is not None or ref.dtype.is_fp8


def value_dtype(ref: TensorRef) -> DType:
    """The dtype in which a kernel reads a tensor: what is decoded is float32, or float64."""
    if not is_coded(ref):
        return ref.dtype
    return DType.F64 if ref.dtype is DType.F64 else DType.F32


class Decoder(Protocol):
    """Decodes one input, tile after tile."""

    def wanted(self, start: int, stop: int) -> list[Range]:
        """What to read beside the stored elements ``[start, stop)``."""

    def decode(
        self, start: int, raw: npt.NDArray[np.uint8], values: npt.NDArray[np.floating]
    ) -> None:
        """Fill ``values`` with those of the elements from ``start`` on, whose bytes are ``raw``."""


def decoder_of(ref: TensorRef, take: Take, tile: int) -> Decoder:
    """The decoder of a tensor, for at most ``tile`` elements at a time."""
    if isinstance(ref.decode, LowRank):
        return _Sums(ref, ref.decode, take)
    return _Blocks(ref, take(decoder_bytes(ref, tile)))


def decoder_bytes(ref: TensorRef, count: int) -> int:
    """The most memory that a decoder takes for ``count`` consecutive elements."""
    if isinstance(ref.decode, LowRank):
        return sum(_buffers(ref, ref.decode)) + 4 * 64
    if ref.decode is None:
        return 0
    rows = ref.decode.rows * ref.shape[1]
    block_rows = min(count // rows + 2, ref.decode.scale.shape[0])
    return block_rows * ref.decode.scale.shape[1] * ref.decode.scale.dtype.itemsize


def read_beside(ref: TensorRef, start: int, stop: int) -> int:
    """Bytes that are read with elements ``[start, stop)``, beside their own."""
    if isinstance(ref.decode, LowRank):
        return ref.decode.left.nbytes + ref.decode.right.nbytes
    if ref.decode is None:
        return 0
    first, last = scale_range(ref, start, stop)
    return (last - first) * ref.decode.scale.dtype.itemsize


def kind_of(decode: Decode) -> object:
    """Equal for those that differ in addresses and numbers alone."""
    if isinstance(decode, LowRank):
        left, right = decode.left, decode.right
        return (left.shape, right.shape, left.dtype, right.dtype, decode.transposed)
    return (decode.rows, decode.columns, decode.scale.shape, decode.scale.dtype)


# --- 8-bit floats ---------------------------------------------------------------------------------


class _Blocks:
    """8-bit floats, with or without block scales."""

    def __init__(self, ref: TensorRef, scales: npt.NDArray[np.uint8]) -> None:
        self._ref = ref
        self._scales = scales

    def wanted(self, start: int, stop: int) -> list[Range]:
        if not isinstance(self._ref.decode, BlockScale):
            return []
        first, last = scale_range(self._ref, start, stop)
        return reads(self._ref.decode.scale, first, last, self._scales.data)

    def decode(
        self, start: int, raw: npt.NDArray[np.uint8], values: npt.NDArray[np.floating]
    ) -> None:
        decode_blocks(self._ref, start, raw, self._scales, values)


@cache
def fp8_values(dtype: DType) -> npt.NDArray[np.float32]:
    """The float32 value of each of the 256 codes of an fp8 dtype.

    Reference: Micikevicius et al. FP8 formats for deep learning. 2022. arXiv:2209.05433, table 1.
    """
    exponent_bits = 4 if dtype is DType.F8_E4M3 else 5
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (codes & (2**mantissa_bits - 1)) / 2.0**mantissa_bits
    normal = (1.0 + fraction) * 2.0 ** (exponent - bias)
    subnormal = fraction * 2.0 ** (1 - bias)
    values = sign * np.where(exponent == 0, subnormal, normal)
    if dtype is DType.F8_E4M3:
        values[(codes & 0x7F) == 0x7F] = np.nan  # the only NaN; there is no infinity
    else:
        special = exponent == 31
        values[special] = np.where(fraction[special] == 0, sign[special] * np.inf, np.nan)
    decoded: npt.NDArray[np.float32] = values.astype(np.float32)
    return decoded


def scale_range(ref: TensorRef, start: int, stop: int) -> tuple[int, int]:
    """The elements of the scales, as a flat range, that elements ``[start, stop)`` need."""
    if not isinstance(ref.decode, BlockScale) or stop <= start:
        return 0, 0
    rows, across = ref.decode.rows * ref.shape[1], ref.decode.scale.shape[1]
    return start // rows * across, -(-stop // rows) * across


def decode_blocks(
    ref: TensorRef,
    start: int,
    raw: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    values: npt.NDArray[np.floating],
) -> None:
    """Fill ``values`` with the float32 values of the elements from ``start`` on.

    Args:
        raw: their codes.
        scales: the stored bytes of the elements that ``scale_range`` gives.
    """
    table = fp8_values(ref.dtype)
    for start_of_slice in range(0, len(raw), _TAKE_ELEMENTS):
        here = slice(start_of_slice, start_of_slice + _TAKE_ELEMENTS)
        np.take(table, raw[here], out=values[here], mode="clip")
    if isinstance(ref.decode, BlockScale):
        _scale(ref, ref.decode, start, scales, values)


def _scale(
    ref: TensorRef,
    decode: BlockScale,
    start: int,
    scales: npt.NDArray[np.uint8],
    values: npt.NDArray[np.floating],
) -> None:
    """Multiply each element by the scale of its block; whole rows of blocks at a time."""
    columns = ref.shape[1]
    first = start // columns // decode.rows
    position = 0
    while position < len(values):
        block_row = (start + position) // columns // decode.rows
        factors = _scale_row(decode, block_row - first, columns, scales)
        end = min(len(values), (block_row + 1) * decode.rows * columns - start)
        offset = (start + position) % columns
        if offset:  # the rest of a row that began before
            stop = min(end, position + columns - offset)
            values[position:stop] *= factors[offset : offset + stop - position]
            position = stop
        whole = (end - position) // columns * columns
        values[position : position + whole].reshape(-1, columns)[:] *= factors
        position += whole
        values[position:end] *= factors[: end - position]
        position = end


def _scale_row(
    decode: BlockScale, row: int, columns: int, scales: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """The scale of each column in one row of blocks."""
    nbytes = decode.scale.shape[1] * decode.scale.dtype.itemsize
    raw = scales[row * nbytes : (row + 1) * nbytes]
    if decode.scale.dtype is DType.BF16:
        values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view(np.float32)
    return np.repeat(values, decode.columns)[:columns]


# --- matrices of low rank -------------------------------------------------------------------------


def _buffers(ref: TensorRef, decode: LowRank) -> tuple[int, int, int, int]:
    """Bytes of both factors as they are stored, and as they are used."""
    rows, columns = ref.shape
    panels, rank, lanes = panels_shape(decode.rank, columns)
    return decode.left.nbytes, decode.right.nbytes, 8 * rows * rank, 8 * panels * rank * lanes


class _Sums:
    """Stored elements plus a matrix of low rank, whose factors are read once."""

    def __init__(self, ref: TensorRef, decode: LowRank, take: Take) -> None:
        self._ref = ref
        self._factors = decode
        rows, self._columns = ref.shape
        stored_left, stored_right, left, right = map(take, _buffers(ref, decode))
        self._stored = stored_left, stored_right
        self._left = left.view(np.float64).reshape(rows, decode.rank)
        self._panels = right.view(np.float64).reshape(panels_shape(decode.rank, self._columns))
        self._is_there = False

    def wanted(self, start: int, stop: int) -> list[Range]:
        if self._is_there:
            return []
        left, right = self._factors.left, self._factors.right
        return [
            *reads(left, 0, left.numel, self._stored[0].data),
            *reads(right, 0, right.numel, self._stored[1].data),
        ]

    def decode(
        self, start: int, raw: npt.NDArray[np.uint8], values: npt.NDArray[np.floating]
    ) -> None:
        if not self._is_there:
            self._convert()
        size = self._ref.dtype.itemsize
        for first in range(0, len(values), _TAKE_ELEMENTS):
            stored = raw[first * size : (first + _TAKE_ELEMENTS) * size]
            values[first : first + _TAKE_ELEMENTS] = to_floats(stored, self._ref.dtype)
        scale = self._factors.scale
        add_product(values, start, self._left, self._panels, self._columns, scale)

    def _convert(self) -> None:
        transposed = self._factors.transposed
        left = self._left.T if transposed else self._left
        for first, rows in _rows_of(self._factors.left, self._stored[0]):
            left[first : first + len(rows)] = rows
        fill = fill_columns if transposed else fill_rows
        for first, rows in _rows_of(self._factors.right, self._stored[1]):
            fill(self._panels, first, rows)
        self._is_there = True


def _rows_of(
    factor: TensorRef, stored: npt.NDArray[np.uint8]
) -> Iterator[tuple[int, npt.NDArray[np.floating]]]:
    """The values of some rows of a stored factor at a time, with the number of the first."""
    count, width = factor.shape
    step = max(1, _CONVERTED // width // LANES) * LANES
    size = width * factor.dtype.itemsize
    for first in range(0, count, step):
        part = stored[first * size : min(count, first + step) * size]
        yield first, to_floats(part, factor.dtype).reshape(-1, width)
