"""Numbers: dtypes, random numbers that do not depend on tiling, exact sums, checksums that combine.

Nothing here knows about files, tensors' names or merge methods.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt

CANONICAL_BLOCK = 65_536
"""Elements per partial sum. Float summaries are summed over these blocks of the flat index and the
blocks are combined exactly, so that the result does not depend on how a tensor was cut."""


class DType(enum.Enum):
    """An element type as the safetensors format names it.

    ``torch_name`` is the name that recipes, ``config.json`` and torch use.
    """

    itemsize: int
    torch_name: str
    is_float: bool

    F64 = ("F64", 8, "float64", True)
    F32 = ("F32", 4, "float32", True)
    BF16 = ("BF16", 2, "bfloat16", True)
    F16 = ("F16", 2, "float16", True)
    F8_E4M3 = ("F8_E4M3", 1, "float8_e4m3fn", True)
    F8_E5M2 = ("F8_E5M2", 1, "float8_e5m2", True)
    I64 = ("I64", 8, "int64", False)
    U64 = ("U64", 8, "uint64", False)
    I32 = ("I32", 4, "int32", False)
    U32 = ("U32", 4, "uint32", False)
    I16 = ("I16", 2, "int16", False)
    U16 = ("U16", 2, "uint16", False)
    I8 = ("I8", 1, "int8", False)
    U8 = ("U8", 1, "uint8", False)
    BOOL = ("BOOL", 1, "bool", False)

    def __new__(cls, code: str, itemsize: int, torch_name: str, is_float: bool) -> DType:
        """A member whose value is its safetensors name."""
        member = object.__new__(cls)
        member._value_ = code
        member.itemsize = itemsize
        member.torch_name = torch_name
        member.is_float = is_float
        return member

    @property
    def is_fp8(self) -> bool:
        """Whether this is one of the 8-bit floating-point types."""
        return self.is_float and self.itemsize == 1


DTYPE_BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DType}


def to_floats(stored: npt.NDArray[np.uint8], dtype: DType) -> npt.NDArray[np.floating]:
    """The values of stored elements, flat: float64 for float64, else float32; exact."""
    if dtype is DType.F64:
        return stored.view(np.float64)
    if dtype is DType.F32:
        return stored.view(np.float32)
    if dtype is DType.F16:
        return stored.view(np.float16).astype(np.float32)
    if dtype is DType.BF16:
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"{dtype.torch_name} has no values of its own")


def to_stored(values: npt.NDArray[np.floating], dtype: DType) -> npt.NDArray[np.uint8]:
    """The stored bytes of values, flat: rounded once, to nearest, ties to even.

    Args:
        values: float32 or float64, any shape.
        dtype: float64, float32, float16 or bfloat16.
    """
    flat = values.reshape(-1)
    if dtype is DType.BF16:
        return _to_bfloat16(flat).view(np.uint8)
    kinds = {DType.F64: np.float64, DType.F32: np.float32, DType.F16: np.float16}
    with np.errstate(over="ignore"):  # infinity is the nearest
        return np.ascontiguousarray(flat, dtype=kinds[dtype]).view(np.uint8)


def _to_bfloat16(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32).copy()
    if values.dtype == np.float64:
        # Rounded to odd, a float32 holds all that the second rounding has to know of a float64.
        larger = np.abs(single.astype(np.float64)) > np.abs(values)
        inexact = single.astype(np.float64) != values
        bits -= larger
        bits |= inexact
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    nan = np.isnan(single)
    rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype(np.uint16)


def promote(dtypes: Iterable[DType]) -> DType:
    """The smallest floating dtype that holds every value of ``dtypes``: of both halves, float32.

    Args:
        dtypes: at least one floating dtype.
    Raises:
        ValueError: for an integer dtype, or none at all.
    """
    kinds = set(dtypes)
    if not kinds or any(not dtype.is_float for dtype in kinds):
        raise ValueError(f"promote needs floating dtypes, got {sorted(d.value for d in kinds)}")
    if len(kinds) == 1:
        return kinds.pop()
    if DType.F64 in kinds:
        return DType.F64
    # Either of the halves holds every fp8 value.
    larger = {dtype for dtype in kinds if not dtype.is_fp8} or {DType.F16}
    return larger.pop() if len(larger) == 1 else DType.F32


# --- random numbers -----------------------------------------------------------------------------

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10


def philox_key(seed: int, position: int, tensor: str) -> int:
    """The 64-bit Philox key of one model's random numbers for one output tensor.

    Args:
        seed: the recipe's seed.
        position: the model's place in the recipe, from 0.
        tensor: the name of the output tensor.
    """
    text = f"{seed}\0{position}\0{tensor}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def philox4x32(counter: npt.NDArray[np.uint32], key: int) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 random numbers.

    Args:
        counter: shape [n, 4], 128-bit counters as little-endian words.
        key: 64 bits.
    Returns:
        shape [n, 4].
    Reference: Salmon, Moraes, Dror, Shaw. Parallel Random Numbers: As Easy as 1, 2, 3. SC 2011,
        section 4.3.
    """
    c0, c1, c2, c3 = (counter[:, word].astype(np.uint64) for word in range(4))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    low = np.uint64(0xFFFFFFFF)
    for _ in range(PHILOX_ROUNDS):
        p0 = np.uint64(PHILOX_M0) * c0
        p1 = np.uint64(PHILOX_M1) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + PHILOX_W0) & 0xFFFFFFFF, (k1 + PHILOX_W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def philox_stream(key: int, first: int, count: int) -> npt.NDArray[np.uint32]:
    """One random 32-bit number for each flat index in ``[first, first + count)``; shape [count].

    The counter is ``index // 4`` and the number its word ``index % 4``: it depends on nothing else,
    and one block of Philox serves four elements.
    """
    block = np.arange(first // 4, (first + count + 3) // 4, dtype=np.uint64)
    counter = np.zeros((len(block), 4), dtype=np.uint32)
    counter[:, 0] = block & np.uint64(0xFFFFFFFF)
    counter[:, 1] = block >> np.uint64(32)
    return philox4x32(counter, key).reshape(-1)[first % 4 :][:count]


# --- exact sums ---------------------------------------------------------------------------------


def expansion(terms: Iterable[float]) -> tuple[float, ...]:
    """The exact sum of float64 numbers as a few of them, of which none overlaps another.

    ``math.fsum`` of several such sums is that of all their terms, whatever was added up where.

    Reference: Shewchuk. Adaptive precision floating-point arithmetic. 1997, figure 7.
    """
    found: list[float] = []
    for term in terms:
        left = []
        for part in found:
            large, small = (term, part) if abs(term) >= abs(part) else (part, term)
            term = large + small
            rest = small - (term - large)
            if rest:
                left.append(rest)
        found = [*left, term]
    return tuple(found) if all(map(math.isfinite, found)) else (sum(found),)


class ExactSums:
    """Sums of float64 values, rounded once when they are asked for.

    Terms come in any order and number; memory stays the same. For each exponent, the whole-number
    mantissas are added up, in two halves that cannot overflow.
    Reference: Kulisch. Computer arithmetic and validity. 2013, chapter 8 (the complete register).

    Args:
        width: number of sums.
    """

    def __init__(self, width: int) -> None:
        self._halves = np.zeros((2, width, _EXPONENTS), dtype=np.int64)
        self._special: list[set[str]] = [set() for _ in range(width)]

    def add(self, terms: npt.NDArray[np.float64]) -> None:
        """Add one term to each sum for every row of ``terms`` [rows, width]."""
        for column, values in enumerate(terms.T):
            finite = np.isfinite(values)
            if not finite.all():
                self._special[column].update(map(str, values[~finite]))
                values = values[finite]
            mantissas, exponents = np.frexp(values)
            whole = (mantissas * 2.0**_MANTISSA_BITS).astype(np.int64)
            places = exponents + _BIAS
            np.add.at(self._halves[0, column], places, whole >> _HALF_BITS)
            np.add.at(self._halves[1, column], places, whole & (2**_HALF_BITS - 1))

    def state(self) -> dict[str, npt.NDArray[np.int64]]:
        """What was added so far, for ``add_state`` of another."""
        special = [[kind in found for kind in _SPECIAL] for found in self._special]
        return {"halves": self._halves, "special": np.array(special, dtype=np.int64)}

    def add_state(self, state: Mapping[str, npt.NDArray[np.int64]]) -> None:
        """Add all the terms that another has added."""
        self._halves += state["halves"]
        for found, row in zip(self._special, state["special"], strict=True):
            found.update(kind for kind, there in zip(_SPECIAL, row, strict=True) if there)

    def rounded(self) -> tuple[float, ...]:
        """The sums; infinite where too large, NaN or infinite as the terms are."""
        return tuple(map(self._rounded, range(len(self._special))))

    def _rounded(self, column: int) -> float:
        if self._special[column]:
            kinds = self._special[column]
            return float(*kinds) if len(kinds) == 1 else math.nan
        high, low = self._halves[:, column]
        total = sum(
            ((int(high[place]) << _HALF_BITS) + int(low[place])) << int(place)
            for place in np.flatnonzero(high | low)
        )
        try:
            return float(Fraction(total, 2 ** (_BIAS + _MANTISSA_BITS)))
        except OverflowError:
            return math.inf if total > 0 else -math.inf


_SPECIAL = ("nan", "inf", "-inf")
_MANTISSA_BITS, _HALF_BITS = 53, 26
_BIAS = 1074
_EXPONENTS = _BIAS + 1024 + 1
"""Places for the exponents that ``frexp`` gives: from -1073 to 1024."""


# --- checksums ----------------------------------------------------------------------------------

_CRC32_POLYNOMIAL = 0xEDB88320


def _gf2_times(matrix: list[int], vector: int) -> int:
    product, row = 0, 0
    while vector:
        if vector & 1:
            product ^= matrix[row]
        vector >>= 1
        row += 1
    return product


def _gf2_square(matrix: list[int]) -> list[int]:
    return [_gf2_times(matrix, row) for row in matrix]


def crc32_combine(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two byte strings joined, from the CRC-32 of each and the length of the second.

    Appending n zero bytes is a linear map on the CRC's 32 bits; it is applied by repeated squaring.
    """
    operator = [_CRC32_POLYNOMIAL] + [1 << bit for bit in range(31)]  # one zero bit
    for _ in range(3):
        operator = _gf2_square(operator)  # one zero byte
    while second_bytes:
        if second_bytes & 1:
            first = _gf2_times(operator, first)
        operator = _gf2_square(operator)
        second_bytes >>= 1
    return first ^ second
