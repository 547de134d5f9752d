"""Stored 8-bit floats to float32: the one decoding that is done before a kernel runs."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from shardmerge.numerics import DType
from shardmerge.sources.tensor import BlockScale, TensorRef

_TAKE_ELEMENTS = 2**16
"""Elements looked up at a time: numpy makes 8-byte indices of them first."""


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
    if ref.decode is None or stop <= start:
        return 0, 0
    rows, across = ref.decode.rows * ref.shape[1], ref.decode.scale.shape[1]
    return start // rows * across, -(-stop // rows) * across


def scale_bytes(ref: TensorRef, count: int) -> int:
    """The most memory that the scales of ``count`` consecutive elements take."""
    if ref.decode is None:
        return 0
    rows = ref.decode.rows * ref.shape[1]
    block_rows = min(count // rows + 2, ref.decode.scale.shape[0])
    return block_rows * ref.decode.scale.shape[1] * ref.decode.scale.dtype.itemsize


def decode_blocks(
    ref: TensorRef,
    start: int,
    raw: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float32],
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
    if ref.decode is not None:
        _scale(ref, ref.decode, start, scales, values)


def _scale(
    ref: TensorRef,
    decode: BlockScale,
    start: int,
    scales: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float32],
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
