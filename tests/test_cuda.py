"""Kernels for CUDA give the CPU's bits: on an emulated device, and on a real one where one is.

What cannot be compared is the payload of a NaN: processors choose it as they like.
"""

from __future__ import annotations

import gc
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmerge import arrays, methods
from shardmerge.arrays import merge_raw
from shardmerge.errors import DeviceError
from shardmerge.kernels import cuda_code, cuda_memory
from shardmerge.kernels.compile import OUTPUT_BIT, Kernel
from shardmerge.kernels.cuda import Cuda
from shardmerge.kernels.cuda_code import map_program, to_ptx
from shardmerge.kernels.cuda_driver import NvidiaDriver
from shardmerge.kernels.cuda_memory import Layout, Pinned
from shardmerge.kernels.device import Cpu
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
from shardmerge.kernels.trace import Kernels
from shardmerge.numerics import DType
from shardmerge.testing.laws import cases, loaded
from shardmerge.window import Arena
from tests.emulated_cuda import EmulatedDriver

BLOCK = 65_536
NAN = {DType.BF16: 0x7FC1, DType.F16: 0x7E00, DType.F32: np.nan, DType.F64: np.nan}
INFINITY = {DType.BF16: 0xFF80, DType.F16: 0x7C00, DType.F32: np.inf, DType.F64: -np.inf}
NUMPY = {DType.F64: np.float64, DType.F32: np.float32, DType.BF16: np.uint16, DType.F16: np.uint16}


# --- two devices side by side ---------------------------------------------------------------------


def assert_same(a: np.ndarray, b: np.ndarray, dtype: DType) -> None:
    """The same bytes; where they differ, NaN on both sides."""
    a, b = (x.reshape(-1).view(np.uint8) for x in (a, b))
    if not np.array_equal(a, b):
        whole = len(a) // dtype.itemsize * dtype.itemsize
        a, b = (x[:whole].view(NUMPY[dtype]) for x in (a, b))
        bits = f"u{dtype.itemsize}"
        differ = a.view(bits) != b.view(bits)
        assert np.isnan(loaded(a[differ], dtype)).all()
        assert np.isnan(loaded(b[differ], dtype)).all()


class Both:
    """A device whose kernels run on the CPU and on another, and must give the same."""

    name = "both"

    def __init__(self, other: Cuda) -> None:
        self._other = other

    def compile_map(self, result: Expr, dtypes: Sequence[DType], output: DType) -> Kernel:
        pair = (d.compile_map(result, dtypes, output) for d in (Cpu(), self._other))
        return compared(*pair, output)

    def compile_totals(self, totals: Totals, dtypes: Sequence[DType]) -> Kernel:
        return compared(*(d.compile_totals(totals, dtypes) for d in (Cpu(), self._other)))

    def compile_histograms(self, histograms: Histograms, dtypes: Sequence[DType]) -> Kernel:
        return compared(*(d.compile_histograms(histograms, dtypes) for d in (Cpu(), self._other)))

    def pin(self, memory: np.ndarray) -> None:
        self._other.pin(memory)


def compared(cpu: Kernel, other: Kernel, dtype: DType = DType.F64) -> Kernel:
    assert (cpu.form, cpu.width, cpu.inputs) == (other.form, other.width, other.inputs)

    class Compared:
        form, width, inputs = cpu.form, cpu.width, cpu.inputs

        def __call__(self, *, output: np.ndarray, **given: object) -> int:
            mine = output.copy()
            flags = cpu(output=output, **given)
            assert other(output=mine, **given) == flags
            assert_same(output, mine, dtype)
            return flags

    return Compared()


@pytest.fixture(params=["emulated", "real"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """A device with chunks of two blocks."""
    monkeypatch.setattr(cuda_memory, "CHUNK_ELEMENTS", 2 * BLOCK)
    if request.param == "real":
        request.getfixturevalue("real_cuda")
        yield Cuda(NvidiaDriver())
    else:
        yield Cuda(EmulatedDriver())


# --- laws -----------------------------------------------------------------------------------------

SHAPES = ((), (1,), (3, 5), (33,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (3 * BLOCK + 7,), (0,))
POKES = st.lists(st.tuples(st.integers(0, 63), st.integers(0, 2**20), st.booleans()), max_size=3)


@pytest.mark.parametrize("name", methods.names())
def test_every_pass_of_a_method_gives_the_bits_of_the_cpu(name, cuda, monkeypatch):
    """Any dtypes, parameters and counts, several chunks, and inputs that hold NaN or infinity."""
    monkeypatch.setattr(arrays, "_KERNELS", Kernels(Both(cuda)))
    info = methods.get(name)

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(info, shapes=SHAPES), POKES, st.sampled_from([2, 64]))
    def law(case, pokes, blocks):
        flat = case.arrays()
        for which, place, infinite in pokes:
            number = which % len(flat)
            if flat[number].size:
                special = INFINITY if infinite else NAN
                at = place % flat[number].size
                flat[number][at] = special[case.inputs.dtypes[number]]
        with np.errstate(all="ignore"):
            merge_raw(
                case.method, case.inputs, flat, output=case.output, seed=3, tile=blocks * BLOCK
            )

    law()


@pytest.mark.parametrize("name", methods.names())
def test_ptx_rounds_every_operation_by_itself(name, monkeypatch):
    """No contraction, no flushing of subnormals, no approximation, in any pass of any method."""
    seen: list[str] = []

    def checked(form: str) -> Callable[..., Kernel]:
        def compile_(*given: object) -> Kernel:
            ptx = to_ptx(getattr(cuda_code, f"{form}_program")(*given), 80)
            seen.append(ptx)
            assert ".target sm_80" in ptx and ".visible .entry kernel" in ptx
            assert not re.search(r"\bfma\.|\bmad\.[\w.]*f(32|64)|\.ftz|\.approx|\.full", ptx)
            for operation in re.findall(r"\b(?:add|sub|mul|div|sqrt)\.[\w.]*f(?:32|64)\b", ptx):
                assert ".rn." in operation
            return getattr(Cpu(), f"compile_{form}")(*given)

        return compile_

    compilers = {f"compile_{form}": checked(form) for form in ("map", "totals", "histograms")}
    writer = SimpleNamespace(name="ptx", pin=lambda _: None, **compilers)
    monkeypatch.setattr(arrays, "_KERNELS", Kernels(writer))

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(methods.get(name), shapes=[(33,)]))
    def law(case):
        case.run()

    law()
    assert seen


def source(number: int = 0) -> Expr:
    return Expr("input", Type.F32, (), number)


def busy(tile: Tile) -> Expr:
    """An expression with every kind of operation."""
    x, y = tile.models
    drawn = wide(tile.random(1)) * 2.0**-32
    kept = where((abs(x) >= 0.5) & ~(y > 2.0), x / 3.0 - y, -x)
    return wide(kept) * parameter(0) + where(drawn < 0.5, drawn, parameter(1))


PAIR = Tile(None, (source(0), source(1)), {})
HALF_DTYPES = (DType.BF16, DType.F16)


def pair_of(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    single = rng.standard_normal(count).astype(np.float32)
    half = rng.standard_normal(count).astype(np.float16)
    return [(single.view(np.uint32) >> 16).astype(np.uint16), half.view(np.uint16)]


def call(kernel: Kernel, given: Sequence[np.ndarray], output: np.ndarray, first: int = 0) -> int:
    return kernel(
        count=len(given[0]),
        first=first,
        inputs=[array.ctypes.data for array in given],
        parameters=np.array([0.7, -1.25]),
        keys=np.array([[1, 2], [0xDEADBEEF, 7]], dtype=np.uint32),
        output=output,
    )


@pytest.mark.parametrize("first", [0, BLOCK, 2**34, 2**40 + 4])
@pytest.mark.parametrize("count", [1, 3, 4, 5, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 2])
def test_a_map_of_random_numbers_has_the_cpu_s_bits(cuda, count, first):
    kernel = Both(cuda).compile_map(busy(PAIR), HALF_DTYPES, DType.BF16)
    out = np.full(count + 8, 7, dtype=np.uint16)
    call(kernel, pair_of(count), out, first)
    assert (out[count:] == 7).all()


@pytest.mark.parametrize("number", [0, 1, OUTPUT_BIT])
def test_flags_of_any_chunk_are_seen(cuda, number):
    kernel = cuda.compile_map(source(0) * source(1), HALF_DTYPES, DType.F16)
    count = 5 * BLOCK + 3
    for place in (0, BLOCK + 1, 2 * BLOCK, count - 1):
        given = [np.full(count, one, dtype=np.uint16) for one in (0x3F80, 0x3C00)]
        if number == OUTPUT_BIT:
            given[0][place], given[1][place] = 0x7F00, 0x7B00
        else:
            given[number][place] = NAN[HALF_DTYPES[number]]
        found = call(kernel, given, np.empty(count, dtype=np.uint16))
        assert found == 1 << OUTPUT_BIT | 1 << number if number < 2 else found == 1 << OUTPUT_BIT
    clean = [np.full(count, one, dtype=np.uint16) for one in (0x3F80, 0x3C00)]
    assert call(kernel, clean, np.empty(count, dtype=np.uint16)) == 0


def test_counts_are_added_to_what_is_there(cuda):
    key = magnitude_key(source(0) - source(1))
    found = Histograms((key >> 15, key & 0x7FFF), (key > key, source(0) > 0.0))
    kernel = Both(cuda).compile_histograms(found, HALF_DTYPES)
    counts = np.arange(2 * BLOCK, dtype=np.uint32).reshape(2, BLOCK)
    for count in (1, 5 * BLOCK + 1):
        given, before = pair_of(count), counts.sum(dtype=np.int64)
        call(kernel, given, counts)
        assert counts.sum(dtype=np.int64) - before == (loaded(given[0], DType.BF16) > 0).sum()


def test_every_nan_is_counted_in_one_bin(cuda):
    """Whatever sign and payload a processor gives to the difference of two infinities."""
    kernel = Both(cuda).compile_histograms(
        Histograms((magnitude_key(source(0) - source(1)) >> 15,)), HALF_DTYPES
    )
    given = [np.array(codes, dtype=np.uint16) for codes in ([0x7F80, 0xFFFF, 0], [0x7C00, 0, 0])]
    counts = np.zeros((1, BLOCK), dtype=np.uint32)
    call(kernel, given, counts)
    assert counts[0, 0x7FC00000 >> 15] == 2 and counts[0, 0] == 1


def test_totals_fill_their_rows_and_no_others(cuda):
    kernel = Both(cuda).compile_totals(
        Totals((wide(source(0)), wide(source(0)) * wide(source(1)), wide(PAIR.random(1)))),
        HALF_DTYPES,
    )
    for count in (1, 31, 33, BLOCK + 1, 5 * BLOCK + 40):
        sums = np.full((8, 3), -1.0)
        call(kernel, pair_of(count), sums)
        assert (sums[-(-count // BLOCK) :] == -1).all()


def test_many_threads_may_call_at_a_time(cuda):
    count, threads = 5 * BLOCK + 9, 6
    kernel = cuda.compile_map(busy(PAIR), HALF_DTYPES, DType.F32)
    expected = np.empty(count, dtype=np.float32)
    call(Cpu().compile_map(busy(PAIR), HALF_DTYPES, DType.F32), pair_of(count), expected)
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(3):
            got = np.empty(count, dtype=np.float32)
            call(kernel, pair_of(count), got)
            if not np.array_equal(got, expected):
                wrong.append(number)

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_time_of_kernels_is_told_apart():
    cuda = Cuda(EmulatedDriver(), timed=True)
    call(
        cuda.compile_map(busy(PAIR), HALF_DTYPES, DType.F32),
        pair_of(BLOCK),
        np.empty(BLOCK, dtype=np.float32),
    )
    assert cuda.kernel_ms > 0


# --- memory ---------------------------------------------------------------------------------------


def test_without_memory_for_a_chunk_half_of_it_is_tried(monkeypatch):
    monkeypatch.setattr(cuda_memory, "CHUNK_ELEMENTS", 16 * BLOCK)
    count = 9 * BLOCK + 5
    program = map_program(busy(PAIR), HALF_DTYPES, DType.F32)
    header_bytes = 8 + 2 * 8 + 2 * 8
    two, one = (Layout.of(program, header_bytes, n * BLOCK).nbytes for n in (2, 1))
    expected = np.empty(count, dtype=np.float32)
    call(Cpu().compile_map(busy(PAIR), HALF_DTYPES, DType.F32), pair_of(count), expected)
    for memory_bytes, chunks, asked in ((two, 5, 4), (one, 10, 5)):
        driver = EmulatedDriver(memory_bytes=memory_bytes)
        kernel = Cuda(driver).compile_map(busy(PAIR), HALF_DTYPES, DType.F32)
        for _ in range(2):
            got = np.empty(count, dtype=np.float32)
            call(kernel, pair_of(count), got)
            assert np.array_equal(got, expected)
        assert driver.calls["launch"] == 2 * chunks
        assert driver.calls["alloc"] == asked  # what was refused is not asked for again
    kernel = Cuda(EmulatedDriver(memory_bytes=one - 1)).compile_map(
        busy(PAIR), HALF_DTYPES, DType.F32
    )
    with pytest.raises(
        DeviceError, match=r"(?s)needed for the smallest chunk.*are free.*--threads"
    ):
        call(kernel, pair_of(count), expected)


def test_a_lane_is_taken_once_and_given_back_after_a_failure():
    driver = EmulatedDriver(failing={"copy_out": 4})
    cuda = Cuda(driver)
    kernel = cuda.compile_map(busy(PAIR), HALF_DTYPES, DType.F32)
    out = np.empty(BLOCK, dtype=np.float32)
    call(kernel, pair_of(BLOCK), out)
    with pytest.raises(DeviceError, match="copy_out gave CUDA_ERROR"):
        call(kernel, pair_of(BLOCK), out)
    assert not driver.allocated and not driver.streams
    call(kernel, pair_of(BLOCK), out)
    call(kernel, pair_of(BLOCK), out)
    assert driver.calls["alloc"] == 2 and driver.calls["stream"] == 4


def test_modules_are_unloaded_with_their_kernels():
    driver = EmulatedDriver()
    kernel = Cuda(driver).compile_map(busy(PAIR), HALF_DTYPES, DType.F32)
    assert driver.modules
    del kernel
    gc.collect()
    assert not driver.modules


@pytest.mark.parametrize("pins", [True, False])
def test_what_is_copied_of_a_worker_s_memory_is_pinned_piece_by_piece(monkeypatch, pins):
    monkeypatch.setattr(cuda_memory, "SEGMENT_BYTES", 3 * 4096)
    driver = EmulatedDriver(pins=pins)
    driver.enter()
    pinned, arena = Pinned(driver), Arena(100_000)
    pinned.add(arena.memory)
    start = arena.memory.ctypes.data
    for offset, nbytes in ((0, 10), (0, 100_000), (50_000, 1), (99_990, 10), (12_288, 12_288)):
        pieces = list(pinned.pieces(start + offset, nbytes))
        assert pieces[0][0] == start + offset and sum(n for _, n in pieces) == nbytes
        for (a, n), (b, _) in itertools.pairwise(pieces):
            assert a + n == b
        for address, size in pieces:
            driver._check_host(address, size)
    assert driver.calls["pin"] <= 10
    other = np.empty(20, dtype=np.uint8)
    assert list(pinned.pieces(other.ctypes.data, 20)) == [(other.ctypes.data, 20)]
    del arena
    gc.collect()
    assert not driver.pinned and driver.calls["unpin"] == (driver.calls["pin"] if pins else 0)
