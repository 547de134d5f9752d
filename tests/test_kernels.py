"""Kernels against numpy: every bit of loads, roundings, random numbers, sums and counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.kernels.compile import (
    LANES,
    OUTPUT_BIT,
    compile_histograms,
    compile_map,
    compile_totals,
)
from shardmerge.kernels.language import (
    Expr,
    Histograms,
    Tile,
    Totals,
    Type,
    magnitude_key,
    parameter,
    where,
    wide,
)
from shardmerge.numerics import CANONICAL_BLOCK, DType, philox4x32, philox_key, philox_stream

NO_KEYS = np.zeros((1, 2), dtype=np.uint32)
NUMPY = {DType.F64: np.float64, DType.F32: np.float32, DType.BF16: np.uint16, DType.F16: np.uint16}
TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16}


def source(number: int = 0, *, double: bool = False) -> Expr:
    return Expr("input", Type.F64 if double else Type.F32, (), number)


def run(kernel, arrays, output, *, parameters=(), keys=NO_KEYS, first=0):
    bits = kernel(
        count=len(arrays[0]),
        first=first,
        inputs=[array.ctypes.data for array in arrays],
        parameters=np.array(parameters, dtype=np.float64),
        keys=keys,
        output=output,
    )
    return bits


def every_half() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_every_half_is_read_exactly(dtype):
    codes = every_half()
    values = np.empty(len(codes), dtype=np.float32)
    run(compile_map(source(), [dtype], DType.F32), [codes], values)
    expected = torch.from_numpy(codes.view(np.int16)).view(TORCH[dtype]).float().numpy()
    assert np.array_equal(values, expected, equal_nan=True)
    assert np.array_equal(np.signbit(values), np.signbit(expected))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_every_half_survives_a_copy(dtype):
    codes = every_half()
    written = np.empty_like(codes)
    run(compile_map(source(), [dtype], dtype), [codes], written)
    before = torch.from_numpy(codes.view(np.int16)).view(TORCH[dtype])
    after = torch.from_numpy(written.view(np.int16)).view(TORCH[dtype])
    assert torch.equal(before.isnan(), after.isnan())
    known = ~before.isnan().numpy()
    assert np.array_equal(codes[known], written[known])


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_float32_is_rounded_as_torch_rounds(dtype):
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 200_003, dtype=np.uint32)
    edges = (every_half().astype(np.uint32) << 16)[:, None] + np.array(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001], dtype=np.uint32
    )
    values = np.concatenate([bits, edges.ravel()]).view(np.float32)
    written = np.empty(len(values), dtype=np.uint16)
    run(compile_map(source(), [DType.F32], dtype), [values], written)
    expected = torch.from_numpy(values).to(TORCH[dtype])
    got = torch.from_numpy(written.view(np.int16)).view(TORCH[dtype])
    assert torch.equal(got.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(got[known], expected[known])


def rounded_once(value: float, mantissa_bits: int, least_exponent: int) -> float:
    """Nearest even with unbounded precision in between, by scaling to an integer."""
    if value == 0 or not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1] - 1, least_exponent) - mantissa_bits
    return math.ldexp(round(value / math.ldexp(1.0, exponent)), exponent)


@pytest.mark.parametrize(
    ("dtype", "mantissa", "least"), [(DType.BF16, 7, -126), (DType.F16, 10, -14)]
)
def test_float64_is_rounded_once(dtype, mantissa, least):
    """Values next to the middle of two neighbours, where rounding by way of float32 goes wrong."""
    rng = np.random.default_rng(2)
    middle = np.ldexp(rng.integers(2**mantissa, 2 ** (mantissa + 1), 5000) + 0.5, -mantissa)
    nudge = np.ldexp(rng.choice([-1.0, 0.0, 1.0], 5000), -rng.integers(26, 50, 5000))
    values = middle * (1 + nudge) * np.ldexp(1.0, rng.integers(-20, 12, 5000))
    written = np.empty(len(values), dtype=np.uint16)
    run(compile_map(source(double=True), [DType.F64], dtype), [values], written)
    got = torch.from_numpy(written.view(np.int16)).view(TORCH[dtype]).double().numpy()
    assert got.tolist() == [rounded_once(value, mantissa, least) for value in values]


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_non_finite_inputs_and_results_are_told_apart(dtype):
    count = 3 * LANES + 5
    double = dtype is DType.F64
    kernel = compile_map(source(0, double=double) * source(1, double=double), [dtype, dtype], dtype)
    one = {DType.BF16: 0x3F80, DType.F16: 0x3C00}.get(dtype, 1)
    nan = {DType.BF16: 0x7FC0, DType.F16: 0x7E00}.get(dtype, np.nan)
    infinity = {DType.BF16: 0xFF80, DType.F16: 0xFC00}.get(dtype, -np.inf)
    large = {DType.BF16: 0x7F00, DType.F16: 0x7B00, DType.F32: 3e38, DType.F64: 1e308}[dtype]
    for place in (0, LANES - 1, LANES, count - 1):
        a, b = (np.full(count, one, dtype=NUMPY[dtype]) for _ in range(2))
        out = np.empty(count, dtype=NUMPY[dtype])
        assert run(kernel, [a, b], out) == 0
        a[place] = nan
        assert run(kernel, [a, b], out) & 3 == 1
        a[place], b[place] = one, infinity
        assert run(kernel, [a, b], out) & 3 == 2
        a[place] = b[place] = large
        assert run(kernel, [a, b], out) == 1 << OUTPUT_BIT


@pytest.mark.parametrize("count", [3, 62, 63, 64, 70])
def test_an_overflow_is_seen_with_any_number_of_inputs(count):
    """Inputs from number 62 on share a bit; the output keeps its own."""
    total = source(0)
    for number in range(1, count):
        total = total + source(number)
    arrays = [np.full(5, 60000.0, dtype=np.float32) for _ in range(count)]
    kernel = compile_map(total, [DType.F32] * count, DType.F16)
    out = np.empty(5, dtype=np.uint16)
    assert run(kernel, arrays, out) == 1 << OUTPUT_BIT
    arrays[-1][2] = np.nan
    assert run(kernel, arrays, out) == 1 << OUTPUT_BIT | 1 << min(count - 1, 62)


def test_philox_known_answers():
    """The vectors that the authors publish with Random123."""
    full = 0xFFFFFFFF
    cases = [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([full] * 4, full << 32 | full, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0 << 32 | 0xA4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in cases:
        got = philox4x32(np.array([counter], dtype=np.uint32), key)[0]
        assert got.tolist() == expected


@pytest.mark.parametrize("first", [0, CANONICAL_BLOCK, 2**34, 2**40])
def test_random_numbers_are_the_stream_of_the_flat_index(first):
    key = philox_key(7, 1, "x")
    keys = np.array([[0, 0], [key & 0xFFFFFFFF, key >> 32]], dtype=np.uint32)
    count = 5 * LANES + 7
    zeros = np.zeros(count, dtype=np.float32)
    tile = Tile(None, (source(),), {})
    kernel = compile_map(wide(tile.random(1)) + tile.models[0], [DType.F32], DType.F64)
    got = np.empty(count)
    run(kernel, [zeros], got, keys=keys, first=first)
    assert np.array_equal(got, philox_stream(key, first, count))


def test_totals_add_blocks_in_the_stated_order():
    rng = np.random.default_rng(3)
    count = 2 * CANONICAL_BLOCK + 3 * LANES + 11
    values = rng.standard_normal(count).astype(np.float32) * 10.0 ** rng.integers(-8, 8, count)
    values = values.astype(np.float32)
    x = source()
    kernel = compile_totals(Totals((wide(x), wide(x) * wide(x))), [DType.F32])
    got = np.zeros((3, 2))
    run(kernel, [values], got)
    for block in range(3):
        part = values[block * CANONICAL_BLOCK : (block + 1) * CANONICAL_BLOCK].astype(np.float64)
        for column, terms in enumerate((part, part * part)):
            lanes = np.zeros(LANES)
            for index, term in enumerate(terms):
                lanes[index % LANES] += term
            total = lanes[0]
            for lane in lanes[1:]:
                total = total + lane
            assert got[block, column] == total


@pytest.mark.parametrize("count", [0, 1, LANES - 1, LANES, 5 * LANES + 3, 100_000])
def test_histograms_count_every_element_once(count):
    rng = np.random.default_rng(4)
    values = rng.standard_normal(count).astype(np.float32)
    key = magnitude_key(source())
    upper = np.zeros((1, 65536), dtype=np.uint32)
    run(compile_histograms(Histograms((key >> 15,)), [DType.F32]), [values], upper)
    bits = np.abs(values).view(np.uint32)
    assert np.array_equal(upper[0], np.bincount(bits >> 15, minlength=65536))
    bin_ = int(bits[0] >> 15) if count else 0
    lower = np.zeros((1, 65536), dtype=np.uint32)
    inside = wide(key >> 15).equals(parameter(0))
    kernel = compile_histograms(Histograms((key & 0x7FFF,), only=(inside,)), [DType.F32])
    run(kernel, [values], lower, parameters=[bin_])
    expected = np.bincount(bits[bits >> 15 == bin_] & 0x7FFF, minlength=65536)
    assert np.array_equal(lower[0], expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=70), st.floats(-2, 2))
def test_arithmetic_is_numpy_s(values, weight):
    x = source()
    expr = where(abs(x) >= 1.0, parameter(0) * x, x / 3.0)
    array = np.array(values, dtype=np.float32)
    got = np.empty(len(array))
    run(compile_map_once(expr), [array], got, parameters=[weight])
    with np.errstate(all="ignore"):
        third = (array / np.float32(3)).astype(np.float64)
        expected = np.where(np.abs(array) >= 1, weight * array.astype(np.float64), third)
    assert np.array_equal(got, expected, equal_nan=True)


_COMPILED = {}


def compile_map_once(expr):
    """The expression is always the same; compiling it for each example would only take time."""
    return _COMPILED.setdefault("kernel", compile_map(expr, [DType.F32], DType.F64))


def test_a_kernel_writes_nothing_else():
    count = 2 * LANES + 3
    values = np.ones(count, dtype=np.float32)
    out = np.full(count + 2 * LANES, 7, dtype=np.float32)
    run(compile_map(source(), [DType.F32], DType.F32), [values], out[LANES:])
    assert (out[:LANES] == 7).all() and (out[LANES + count :] == 7).all()
    assert (values == 1).all()


def test_branching_in_python_is_refused():
    with pytest.raises(TypeError, match="use where"):
        bool(source() > 0.0)
