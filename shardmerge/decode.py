"""Stored 8-bit floats to float32: the one decoding that is done before a kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from shardmerge.numerics import DType
from shardmerge.sources.tensor import BlockScale, TensorRef

_TAKE_ELEMENTS = 2**16
"""Elements looked up at a time: numpy makes 8-byte indices of them first."""

Read = Callable[[TensorRef, int, int, npt.NDArray[np.uint8]], int]
"""Fills a buffer with the stored bytes of elements [start, stop) and gives their number."""


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


def decode_blocks(
    ref: TensorRef,
    start: int,
    raw: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float32],
    read: Read,
) -> int:
    """Fill ``values`` with the float32 values of the elements from ``start`` on, given their codes.

    Returns:
        the bytes of scales that were read.
    """
    table = fp8_values(ref.dtype)
    for start_of_slice in range(0, len(raw), _TAKE_ELEMENTS):
        here = slice(start_of_slice, start_of_slice + _TAKE_ELEMENTS)
        np.take(table, raw[here], out=values[here], mode="clip")
    if ref.decode is None:
        return 0
    return _scale(ref, ref.decode, start, values, read)


def _scale(
    ref: TensorRef,
    decode: BlockScale,
    start: int,
    values: npt.NDArray[np.float32],
    read: Read,
) -> int:
    """Multiply each element by the scale of its block; whole rows of blocks at a time."""
    columns = ref.shape[1]
    read_bytes, position = 0, 0
    while position < len(values):
        row = (start + position) // columns
        block_row = row // decode.rows
        scales, nbytes = _scale_row(decode, block_row, columns, read)
        read_bytes += nbytes
        end = min(len(values), (block_row + 1) * decode.rows * columns - start)
        offset = (start + position) % columns
        if offset:  # the rest of a row that began before
            stop = min(end, position + columns - offset)
            values[position:stop] *= scales[offset : offset + stop - position]
            position = stop
        whole = (end - position) // columns * columns
        values[position : position + whole].reshape(-1, columns)[:] *= scales
        position += whole
        values[position:end] *= scales[: end - position]
        position = end
    return read_bytes


def _scale_row(
    decode: BlockScale, block_row: int, columns: int, read: Read
) -> tuple[npt.NDArray[np.float32], int]:
    """The scale of each column in one row of blocks, and the bytes read for it."""
    scale = decode.scale
    blocks = scale.shape[1]
    raw = np.empty(blocks * scale.dtype.itemsize, dtype=np.uint8)
    nbytes = read(scale, block_row * blocks, (block_row + 1) * blocks, raw)
    if scale.dtype is DType.BF16:
        values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view(np.float32)
    return np.repeat(values, decode.columns)[:columns], nbytes
