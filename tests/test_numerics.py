"""Numbers: dtypes, random streams, exact sums, checksums, and fp8 decoding."""

from __future__ import annotations

import itertools
import math
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.decode import decode_blocks, decoder_bytes, fp8_values, scale_range
from shardmerge.numerics import (
    CANONICAL_BLOCK,
    DTYPE_BY_TORCH_NAME,
    DType,
    ExactSums,
    crc32_combine,
    philox_key,
    philox_stream,
    promote,
)
from shardmerge.sources.tensor import BlockScale, Segment, TensorRef

FLOATS = [dtype for dtype in DType if dtype.is_float]
FP8 = [dtype for dtype in DType if dtype.is_fp8]


# --- dtypes -------------------------------------------------------------------------------------


def test_dtypes_are_torch_s():
    for dtype in DType:
        theirs = getattr(torch, dtype.torch_name)
        assert theirs.itemsize == dtype.itemsize
        assert theirs.is_floating_point == dtype.is_float
        assert DTYPE_BY_TORCH_NAME[dtype.torch_name] is dtype


def values_of(dtype: DType) -> torch.Tensor:
    """Every value of a dtype up to 16 bits; of wider ones, those that tell them apart."""
    kind = getattr(torch, dtype.torch_name)
    if dtype.itemsize == 1:
        values = torch.arange(256, dtype=torch.uint8).view(kind).double()
    elif dtype.itemsize == 2:
        values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(kind).double()
    else:
        info = torch.finfo(kind)
        values = torch.tensor([info.max, info.tiny, 1 + info.eps], dtype=torch.float64)
    return values[values.isfinite()]


def holds(dtype: DType, values: torch.Tensor) -> bool:
    return torch.equal(values.to(getattr(torch, dtype.torch_name)).double(), values)


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations_with_replacement(FLOATS, 2)))
def test_promote_gives_the_smallest_that_holds_both(a, b):
    found = promote([a, b])
    both = torch.cat([values_of(a), values_of(b)])
    assert holds(found, both)
    assert not any(holds(d, both) for d in FLOATS if d.itemsize < found.itemsize)


@given(st.lists(st.sampled_from(FLOATS), min_size=1), st.randoms())
def test_promote_knows_no_order_and_no_number(dtypes, random):
    found = promote(dtypes)
    shuffled = dtypes * 2
    random.shuffle(shuffled)
    assert promote(shuffled) is found
    assert found.itemsize >= max(dtype.itemsize for dtype in dtypes)
    assert promote([found, *dtypes]) is found


def test_promote_by_hand():
    assert promote([DType.BF16, DType.F16]) is DType.F32
    assert promote([DType.F8_E4M3, DType.BF16]) is DType.BF16
    assert promote([DType.F8_E4M3, DType.F8_E5M2]) is DType.F16
    assert promote([DType.F8_E4M3, DType.BF16, DType.F16]) is DType.F32
    assert promote([DType.F64, DType.BF16]) is DType.F64


@pytest.mark.parametrize("dtypes", [[], [DType.I64], [DType.F32, DType.BOOL]])
def test_promote_refuses_what_is_no_float(dtypes):
    with pytest.raises(ValueError, match="floating"):
        promote(dtypes)


# --- random numbers -----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, CANONICAL_BLOCK, 2**34, 2**40]),
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_any_slice_of_the_random_stream_is_the_slice_of_it(key, origin, start, count, more):
    whole = philox_stream(key, origin, start + count + more)
    assert whole.dtype == np.uint32 and len(whole) == start + count + more
    assert np.array_equal(philox_stream(key, origin + start, count), whole[start : start + count])


@given(st.tuples(st.integers(), st.integers(0, 9), st.text()), st.data())
def test_random_keys_are_64_bits_and_their_own(parts, data):
    key = philox_key(*parts)
    assert 0 <= key < 2**64
    other = data.draw(st.tuples(st.integers(), st.integers(0, 9), st.text()))
    assert (philox_key(*other) == key) == (other == parts)


def test_random_bits_are_even():
    """Each of the 32 bits is set in half of a million numbers, to five standard deviations."""
    count = 10**6
    numbers = philox_stream(philox_key(0, 0, "x"), 0, count)
    for bit in range(32):
        share = float((numbers >> np.uint32(bit) & np.uint32(1)).mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(count), bit


# --- exact sums ---------------------------------------------------------------------------------

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def combine_blocks(rows: np.ndarray) -> tuple[float, ...]:
    """In two steps, as of two tasks."""
    sums = ExactSums(rows.shape[1])
    sums.add(rows[: len(rows) // 2])
    sums.add(rows[len(rows) // 2 :])
    assert sums.rounded() == sums.rounded() or any(map(math.isnan, sums.rounded()))
    return sums.rounded()


def rounded(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=30), st.randoms())
def test_blocks_add_up_exactly_in_any_order(rows, random):
    sums = combine_blocks(np.array(rows))
    assert sums == tuple(rounded(sum(map(Fraction, column))) for column in zip(*rows, strict=True))
    random.shuffle(rows)
    assert combine_blocks(np.array(rows)) == sums


@settings(deadline=None)
@given(st.lists(st.sampled_from([math.inf, -math.inf, math.nan, 1.0, 1.7e308])), st.randoms())
def test_blocks_that_are_not_finite_add_up_in_any_order(values, random):
    """A measure of a tensor that holds infinities of both signs must not raise."""
    special = {str(value) for value in values if not math.isfinite(value)}
    (total,) = combine_blocks(np.array([values]).T.reshape(-1, 1))
    if special == {"inf"}:
        assert total == math.inf
    elif special == {"-inf"}:
        assert total == -math.inf
    elif special:
        assert math.isnan(total)
    random.shuffle(values)
    (again,) = combine_blocks(np.array([values]).T.reshape(-1, 1))
    assert again == total or (math.isnan(again) and math.isnan(total))


def test_no_blocks_add_up_to_zero():
    assert combine_blocks(np.zeros((0, 3))) == (0.0, 0.0, 0.0)


# --- checksums ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_crc32_of_joined_bytes(pieces):
    total = zlib.crc32(pieces[0])
    for piece in pieces[1:]:
        total = crc32_combine(total, zlib.crc32(piece), len(piece))
    assert total == zlib.crc32(b"".join(pieces))


def test_crc32_of_large_parts():
    """A shard's part is about 64 MiB; the length's high bits count."""
    first, second = b"head", bytes(2**26 + 3)
    joined = zlib.crc32(second, zlib.crc32(first))
    assert crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == joined


# --- fp8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_codes_are_torch_s(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype.torch_name))
    expected = codes.float().numpy()
    found = fp8_values(dtype)
    assert np.array_equal(found, expected, equal_nan=True)
    known = ~np.isnan(expected)
    assert np.array_equal(np.signbit(found[known]), np.signbit(expected[known]))


def stored_scales(scales: np.ndarray, dtype: DType) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a scale matrix, and the values that they hold."""
    if dtype is DType.F32:
        return scales.view(np.uint8).reshape(-1), scales
    kept = (scales.view(np.uint32) >> 16).astype(np.uint16)
    return kept.view(np.uint8).reshape(-1), (kept.astype(np.uint32) << 16).view(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FP8),
    st.sampled_from([DType.F32, DType.BF16]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 16), st.integers(1, 16)),
    st.data(),
)
def test_block_scales(dtype, scale_dtype, shape, block, data):
    """Any range of elements of any matrix, though blocks do not divide it."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    places = tuple(-(-size // edge) for size, edge in zip(shape, block, strict=True))
    scales = np.exp(rng.standard_normal(places)).astype(np.float32)
    raw_scales, scales = stored_scales(scales, scale_dtype)
    scale = TensorRef("s", scale_dtype, places, (Segment("s", 0, raw_scales.nbytes),))
    where = Segment("w", 0, codes.nbytes)
    ref = TensorRef("w", dtype, shape, (where,), BlockScale(scale, *block))
    start = data.draw(st.integers(0, codes.size))
    stop = data.draw(st.integers(start, codes.size))
    values = np.empty(stop - start, dtype=np.float32)
    first, last = scale_range(ref, start, stop)
    raw = raw_scales[first * scale_dtype.itemsize : last * scale_dtype.itemsize]
    assert raw.nbytes <= decoder_bytes(ref, stop - start)
    decode_blocks(ref, start, codes.reshape(-1)[start:stop], raw, values)
    rows, columns = np.indices(shape)
    full = fp8_values(dtype)[codes] * scales[rows // block[0], columns // block[1]]
    assert np.array_equal(values, full.reshape(-1)[start:stop], equal_nan=True)


@pytest.mark.parametrize("count", [0, 1, 100, 2**16, 3 * 2**16 + 5])
def test_fp8_without_scales(count):
    codes = np.random.default_rng(0).integers(0, 256, count + 7, dtype=np.uint8)
    ref = TensorRef("w", DType.F8_E4M3, (count + 7,), (Segment("w", 0, count + 7),))
    values = np.empty(count, dtype=np.float32)
    assert scale_range(ref, 7, count + 7) == (0, 0)
    decode_blocks(ref, 7, codes[7:], codes[:0], values)
    assert np.array_equal(values, fp8_values(DType.F8_E4M3)[codes[7:]], equal_nan=True)
