"""How far two checkpoints are apart, tensor by tensor, in float64 and in little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardmerge.numerics import DType
from shardmerge.sources import open_checkpoint
from shardmerge.sources.tensor import BlockScale, TensorRef, reads
from shardmerge.stores import Stores

TILE_ELEMENTS = 1 << 19
"""Elements compared at a time. With the float64 copies and what numpy needs, below 32 MiB."""

Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """How one tensor of two checkpoints differs.

    The numbers are of the elements that are finite in both, in float64; all are 0 (``cosine`` is 1)
    unless ``status`` is "compared".

    Args:
        name: of the tensor.
        status: "compared", "only in a", "only in b" or "shapes differ".
        dtype_a: as the header names it; None where the tensor is not there. ``dtype_b`` likewise.
        shape_a: None where the tensor is not there. ``shape_b`` likewise.
        differing: number of elements with another value. NaN equals NaN here, and 0 equals -0.
        non_finite: number of elements that are NaN or infinite in a or in b.
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        norm_a: L2 norm. ``norm_b``, and ``norm_diff`` of a - b, likewise.
        cosine: of the angle between a and b; 1 where both are zero, 0 where one is.
    """

    name: str
    status: str
    dtype_a: str | None = None
    dtype_b: str | None = None
    shape_a: tuple[int, ...] | None = None
    shape_b: tuple[int, ...] | None = None
    differing: int = 0
    non_finite: int = 0
    max_abs: float = 0.0
    mean_abs: float = 0.0
    norm_a: float = 0.0
    norm_b: float = 0.0
    norm_diff: float = 0.0
    cosine: float = 1.0

    def line(self) -> str:
        """The difference in one line."""
        if self.status != "compared":
            shapes = (
                f" ({self.shape_a} and {self.shape_b})" if self.shape_a and self.shape_b else ""
            )
            return f"{self.name}: {self.status}{shapes}"
        if self.same:
            return f"{self.name}: same"
        dtypes = f" {self.dtype_a}/{self.dtype_b}" if self.dtype_a != self.dtype_b else ""
        return (
            f"{self.name}:{dtypes} {self.differing} differ, max {self.max_abs:.3e}, "
            f"mean {self.mean_abs:.3e}, norms {self.norm_a:.6g} {self.norm_b:.6g}, "
            f"of the difference {self.norm_diff:.6g}, cosine {self.cosine:.9f}"
            + (f", {self.non_finite} NaN or infinite" if self.non_finite else "")
        )

    @property
    def same(self) -> bool:
        """Whether both checkpoints have this tensor with the same dtype, shape and values."""
        return self.status == "compared" and self.dtype_a == self.dtype_b and self.differing == 0


def diff(a_url: str, b_url: str, stores: Stores | None = None) -> Iterator[TensorDiff]:
    """Compare two checkpoints: the tensors of a in its order, then those that only b has.

    Raises:
        CheckpointError: for a checkpoint that cannot be opened.
        StoreError: for bytes that could not be read.
    """
    stores = stores or Stores()
    a, b = (open_checkpoint(url, None, stores).tensors for url in (a_url, b_url))
    return compare(a, b, stores)


def compare(
    a: Mapping[str, TensorRef], b: Mapping[str, TensorRef], stores: Stores
) -> Iterator[TensorDiff]:
    """Compare tensors by name: those of a in its order, then those that only b has."""
    readers = _Reader(stores), _Reader(stores)
    for name in [*a, *(name for name in b if name not in a)]:
        yield _tensor_diff(name, a.get(name), b.get(name), readers)


def _tensor_diff(
    name: str, a: TensorRef | None, b: TensorRef | None, readers: tuple[_Reader, _Reader]
) -> TensorDiff:
    status, sums = "compared", _Sums()
    if a is None or b is None:
        status = "only in b" if a is None else "only in a"
    elif a.shape != b.shape:
        status = "shapes differ"
    else:
        sums = _sums(a, b, readers)
    finite = a.numel - sums.non_finite if a is not None else 0
    return TensorDiff(
        name=name,
        status=status,
        dtype_a=a.dtype.value if a is not None else None,
        dtype_b=b.dtype.value if b is not None else None,
        shape_a=a.shape if a is not None else None,
        shape_b=b.shape if b is not None else None,
        differing=sums.differing,
        non_finite=sums.non_finite,
        max_abs=sums.max_abs,
        mean_abs=sums.sum_abs / finite if finite else 0.0,
        norm_a=math.sqrt(sums.aa),
        norm_b=math.sqrt(sums.bb),
        norm_diff=math.sqrt(sums.dd),
        cosine=_cosine(sums.aa, sums.bb, sums.ab),
    )


def _cosine(aa: float, bb: float, ab: float) -> float:
    if aa == 0 or bb == 0:
        return 1.0 if aa == bb else 0.0
    return max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb)))


# --- sums over tiles ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sums:
    """Sums over the elements that are finite in both: squares of a, of b, of a - b, products."""

    aa: float = 0.0
    bb: float = 0.0
    dd: float = 0.0
    ab: float = 0.0
    sum_abs: float = 0.0
    max_abs: float = 0.0
    differing: int = 0
    non_finite: int = 0


def _sums(a: TensorRef, b: TensorRef, readers: tuple[_Reader, _Reader]) -> _Sums:
    sums = _Sums()
    with np.errstate(all="ignore"):  # infinities are counted, not warned about
        for start in range(0, a.numel, TILE_ELEMENTS):
            stop = min(start + TILE_ELEMENTS, a.numel)
            x, y = (
                reader.values(tensor, start, stop)
                for reader, tensor in zip(readers, (a, b), strict=True)
            )
            differing = None
            if a.dtype is b.dtype and not a.dtype.is_float:
                # float64 would round large 64-bit integers to the same value
                raw_a, raw_b = (reader.stored(a.dtype, stop - start) for reader in readers)
                differing = int(np.count_nonzero(raw_a != raw_b))
            _add(sums, x, y, differing)
    return sums


def _add(sums: _Sums, x: Float64, y: Float64, differing: int | None) -> None:
    """Add one tile. ``x`` and ``y`` are overwritten."""
    finite = np.isfinite(x)
    finite &= np.isfinite(y)
    unequal = x != y
    broken = x.size - int(np.count_nonzero(finite))
    if broken:
        unequal &= ~(np.isnan(x) & np.isnan(y))
        x[~finite] = 0
        y[~finite] = 0
    sums.non_finite += broken
    sums.differing += int(np.count_nonzero(unequal)) if differing is None else differing
    sums.aa += _dot(x, x)
    sums.bb += _dot(y, y)
    sums.ab += _dot(x, y)
    x -= y
    sums.dd += _dot(x, x)
    np.abs(x, out=x)
    sums.sum_abs += float(x.sum())
    sums.max_abs = max(sums.max_abs, float(x.max()))


def _dot(x: Float64, y: Float64) -> float:
    """The inner product without BLAS, whose threads make the last digits depend on the machine."""
    return float(np.einsum("i,i", x, y))


# --- from bytes to values -------------------------------------------------------------------------


class _Reader:
    """Reads tiles of tensors as float64, always into the same buffers."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._raw = np.empty(TILE_ELEMENTS * 8, np.uint8)
        self._values = np.empty(TILE_ELEMENTS, np.float64)

    def stored(self, dtype: DType, count: int) -> npt.NDArray[np.generic]:
        """The stored elements of the tile that was read last."""
        return self._raw[: count * dtype.itemsize].view(_NUMPY[dtype])

    def values(self, tensor: TensorRef, start: int, stop: int) -> Float64:
        """Elements ``[start, stop)``, valid until the next call; the block scales are applied."""
        raw = self._raw[: (stop - start) * tensor.dtype.itemsize]
        self._stores.read(reads(tensor, start, stop, raw.data))
        values = self._values[: stop - start]
        to_float64(raw, tensor.dtype, values)
        if isinstance(tensor.decode, BlockScale):
            _apply_scales(values, start, tensor.shape[1], tensor.decode, self._stores)
        return values


_NUMPY: dict[DType, str] = {
    DType.F64: "<f8",
    DType.F32: "<f4",
    DType.F16: "<f2",
    DType.BF16: "<u2",
    DType.F8_E4M3: "u1",
    DType.F8_E5M2: "u1",
    DType.I64: "<i8",
    DType.U64: "<u8",
    DType.I32: "<i4",
    DType.U32: "<u4",
    DType.I16: "<i2",
    DType.U16: "<u2",
    DType.I8: "i1",
    DType.U8: "u1",
    DType.BOOL: "u1",
}
"""The numpy type of the stored elements; numpy has none for bfloat16 and fp8, so their bits."""


def to_float64(raw: Bytes, dtype: DType, out: Float64) -> None:
    """Stored elements as numbers, exactly (64-bit integers beyond 2**53 are rounded).

    Args:
        raw: uint8, shape [count * itemsize], little-endian.
        dtype: of the stored elements.
        out: float64, shape [count]; overwritten.
    """
    stored = raw.view(_NUMPY[dtype])
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN like others
        _to_float64(stored, dtype, out)


def _to_float64(stored: npt.NDArray[np.generic], dtype: DType, out: Float64) -> None:
    if dtype is DType.BF16:
        out[:] = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif dtype is DType.F8_E5M2:  # the upper byte of a float16
        out[:] = (stored.astype(np.uint16) << np.uint16(8)).view(np.float16)
    elif dtype is DType.F8_E4M3:
        out[:] = _E4M3[stored]
    else:
        out[:] = stored


def _e4m3_values() -> Float64:
    """The value of each code: 4 exponent bits of bias 7, no infinity, one NaN per sign."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    magnitude[code & 127 == 127] = np.nan
    return np.where(code & 128, -magnitude, magnitude)


_E4M3 = _e4m3_values()


def _apply_scales(
    values: Float64, start: int, columns: int, decode: BlockScale, stores: Stores
) -> None:
    """Multiply consecutive elements of a matrix, from flat index ``start`` on, by their scales.

    Args:
        values: float64, shape [count]; overwritten.
        start: flat index of the first.
        columns: of the matrix.
        decode: the scales.
    """
    scale = decode.scale
    first = start // columns // decode.rows
    last = (start + len(values) - 1) // columns // decode.rows + 1
    across = scale.shape[1]
    raw = np.empty((last - first) * across * scale.dtype.itemsize, np.uint8)
    stores.read(reads(scale, first * across, last * across, raw.data))
    factors = np.empty((last - first) * across)
    to_float64(raw, scale.dtype, factors)
    by_block = factors.reshape(last - first, across)
    for begin, row, rows, column, width in _rectangles(start, start + len(values), columns):
        place = values[begin : begin + rows * width].reshape(rows, width)
        block_rows = np.arange(row, row + rows) // decode.rows - first
        block_columns = np.arange(column, column + width) // decode.columns
        place *= by_block[block_rows[:, None], block_columns]


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The flat range ``[start, stop)`` of a matrix as at most three rectangles.

    Yields:
        position in the range, first row, rows, first column, columns: the end of a row, whole
        rows, the beginning of a row.
    """
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        rows = 1 if column else max(1, (stop - position) // columns)
        width = min(columns - column, stop - position)
        yield position - start, row, rows, column, width
        position += rows * width
