"""The projection of OPCM: accuracy against a float64 SVD, laws, corners, and its memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from shardmerge.kernels import projection
from shardmerge.kernels.projection import RANK, TIE, project, workspace_bytes

Matrix = npt.NDArray[np.floating]
Maker = Callable[[np.random.Generator, int, int], Matrix]

ALPHAS = [0.0, 0.3, 0.5, 0.9, 0.99]
ERROR = 1e-6
"""Relative to the result, in the Frobenius norm."""
CLUSTERED = 4e-6
"""The same for singular values that only float32's rounding sets apart: there, float64 SVDs by
LAPACK's gesdd and gesvd are 2e-6 to 3e-6 from each other. Ours was within 1e-6 of gesdd's."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of BLAS, as in the engine; several wait for each other on a busy machine."""
    with threadpool_limits(1):
        yield


def by_svd(total: Matrix, delta: Matrix, alpha: float) -> npt.NDArray[np.float64]:
    """What ``project`` does, from a full SVD in float64."""
    left, singular, right = np.linalg.svd(total.astype(np.float64), full_matrices=True)
    rank = int(np.sum(singular > RANK * singular[:1]))
    sums = np.cumsum(singular[:rank])
    leading = rank if alpha >= 1 else int(np.sum(sums <= (alpha + TIE) * sums[-1:]))
    inside = left.T @ delta.astype(np.float64) @ right.T
    inside[range(rank), range(rank)] = 0
    inside[:leading, :leading] = 0
    return left @ inside @ right


def error(found: Matrix, expected: Matrix, *, of: Matrix | None = None) -> float:
    """Relative to ``of``, or to what is expected."""
    size = float(np.linalg.norm(expected if of is None else of))
    return float(np.linalg.norm(found - expected)) / size if size else float(np.abs(found).max())


# --- families of matrices -----------------------------------------------------------------------


def rotated(random: np.random.Generator, rows: int, columns: int, singular: Matrix) -> Matrix:
    """A float32 matrix of these singular values, before it was rounded."""
    left = np.linalg.qr(random.standard_normal((rows, len(singular))))[0]
    right = np.linalg.qr(random.standard_normal((columns, len(singular))))[0]
    return ((left * singular) @ right.T).astype(np.float32)


def spectrum(singular: Callable[[npt.NDArray[np.float64]], Matrix]) -> Maker:
    """Matrices whose singular values are a function of their place, from 0 to 1."""

    def make(random: np.random.Generator, rows: int, columns: int) -> Matrix:
        places = np.arange(min(rows, columns)) / max(1, min(rows, columns) - 1)
        return rotated(random, rows, columns, singular(places))

    return make


def low_rank(rank: int) -> Maker:
    """Products of Gaussian factors, rounded to float32: as of LoRA."""

    def make(random: np.random.Generator, rows: int, columns: int) -> Matrix:
        inner = min(rank, rows, columns)
        left, right = (
            random.standard_normal((rows, inner)),
            random.standard_normal((inner, columns)),
        )
        return (left @ right).astype(np.float32)

    return make


def exact_low_rank(random: np.random.Generator, rows: int, columns: int) -> Matrix:
    """Whole numbers: no rounding fills the null space."""
    left, right = random.integers(-8, 9, (rows, 3)), random.integers(-8, 9, (3, columns))
    return (left @ right).astype(np.float32)


def at_the_cutoff(random: np.random.Generator, rows: int, columns: int) -> Matrix:
    """Low rank and noise whose singular values are on both sides of what counts as zero."""
    signal = low_rank(4)(random, rows, columns).astype(np.float64)
    noise = random.standard_normal((rows, columns))
    ratio = np.linalg.norm(signal, 2) / np.linalg.norm(noise, 2)
    return (signal + 2 * RANK * ratio * noise).astype(np.float32)


FAMILIES: dict[str, Maker] = {
    "gaussian": lambda random, *shape: random.standard_normal(shape).astype(np.float32),
    "geometric to 1e-6": spectrum(lambda place: 10 ** (-6 * place)),
    "power law": spectrum(lambda place: 1 / (1 + 1000 * place)),
    "steep power law": spectrum(lambda place: 1 / (1 + 1000 * place) ** 2),
    "one far above": spectrum(lambda place: np.where(place == 0, 1e4, 1 + place)),
    "half at 1e-2": spectrum(lambda place: np.where(place < 0.5, 1, 1e-2)),
    "half at 1e-6": spectrum(lambda place: np.where(place < 0.5, 1, 1e-6)),
    "rank 4": low_rank(4),
    "rank 16": low_rank(16),
    "rank 64": low_rank(64),
    "exact rank 3": exact_low_rank,
    "at the cutoff": at_the_cutoff,
}
SHAPES = [(1, 1), (1, 9), (9, 1), (7, 7), (40, 33), (24, 90), (64, 64)]


def pair(family: str, rows: int, columns: int, *, seed: int = 0) -> tuple[Matrix, Matrix]:
    random = np.random.default_rng(seed)
    total = FAMILIES[family](random, rows, columns)
    return total, (1e-3 * random.standard_normal((rows, columns))).astype(np.float32)


def allowed(family: str) -> float:
    return CLUSTERED if family.startswith("half") else ERROR


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_a_float64_svd(family):
    for shape, alpha in itertools.product(SHAPES, ALPHAS):
        total, delta = pair(family, *shape)
        found, expected = project(total, delta, alpha), by_svd(total, delta, alpha)
        assert found.dtype == np.float32 and found.shape == shape
        # Nothing but rounding is left of a single row and column.
        of = delta if shape == (1, 1) else expected
        assert error(found, expected, of=of) <= allowed(family), (shape, alpha)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("gaussian", (512, 1408)),
        ("geometric to 1e-6", (512, 1408)),
        ("rank 64", (512, 1408)),
        ("power law", (256, 256)),
        ("steep power law", (704, 256)),
        ("half at 1e-2", (256, 256)),
        ("half at 1e-6", (256, 704)),
        ("one far above", (256, 256)),
        ("at the cutoff", (256, 704)),
    ],
)
def test_agrees_with_a_float64_svd_on_a_larger_matrix(family, shape):
    total, delta = pair(family, *shape)
    assert error(project(total, delta, 0.5), by_thin_svd(total, delta, 0.5)) <= allowed(family)


def by_thin_svd(total: Matrix, delta: Matrix, alpha: float) -> npt.NDArray[np.float64]:
    """The same as ``by_svd``, without the vectors of the longer side's null space."""
    left, singular, right = np.linalg.svd(total.astype(np.float64), full_matrices=False)
    left, right = left[:, singular > RANK * singular[0]], right[singular > RANK * singular[0]]
    sums = np.cumsum(singular[: len(right)])
    leading = int(np.sum(sums <= (alpha + TIE) * sums[-1]))
    inside = left.T @ delta @ right.T
    removed = np.diag(np.diag(inside))
    removed[:leading, :leading] = inside[:leading, :leading]
    return delta - left @ removed @ right


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.integers(2, 40),
    st.integers(2, 40),
    st.floats(0, 0.99),
    st.integers(0, 2**32),
)
def test_agrees_with_a_float64_svd_at_any_shape(family, rows, columns, alpha, seed):
    total, delta = pair(family, rows, columns, seed=seed)
    expected = by_svd(total, delta, alpha)
    # Of the smallest matrices a block can be nearly all.
    of = max(expected, delta / 10, key=np.linalg.norm)
    assert error(project(total, delta, alpha), expected, of=of) <= allowed(family)


def test_a_task_vector_much_like_the_sum_is_as_accurate():
    total, noise = pair("power law", 60, 80)
    delta = total + noise
    for alpha in ALPHAS:
        found, expected = project(total, delta, alpha), by_svd(total, delta, alpha)
        assert error(found, expected, of=delta) <= ERROR


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_inputs_stay_float64(family):
    total, delta = (array.astype(np.float64) for array in pair(family, 40, 90))
    found, expected = project(total, delta, 0.5), by_svd(total, delta, 0.5)
    assert found.dtype == np.float64
    assert error(found, expected) <= (CLUSTERED if family.startswith("half") else 2e-7)


def test_float64_of_one_input_is_enough():
    total, delta = pair("gaussian", 20, 30)
    for mixed in ((total.astype(np.float64), delta), (total, delta.astype(np.float64))):
        found = project(*mixed, 0.5)
        assert found.dtype == np.float64
        assert error(found, by_svd(total, delta, 0.5)) <= 1e-10


# --- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(48, 48), (30, 80)])
def test_the_transposed_gives_the_transposed(family, shape):
    total, delta = pair(family, *shape)
    found = project(total, delta, 0.5)
    assert error(project(total.T, delta.T, 0.5).T, found) <= allowed(family)
    copies = project(total.T.copy(), delta.T.copy(), 0.5)
    assert error(copies.T, found) <= allowed(family)


@pytest.mark.parametrize("exponent", [-110, -40, 1, 40, 110])
def test_the_scale_of_the_sum_does_not_matter(exponent):
    total, delta = pair("power law", 40, 60)
    found = project(total, delta, 0.5)
    scaled = total * np.float32(2.0**exponent)
    if abs(exponent) <= 90:  # beyond, other products are in float64
        assert np.array_equal(project(scaled, delta, 0.5), found)
    assert error(project(scaled, delta, 0.5), found) <= ERROR
    huge = project(total.astype(np.float64) * 2.0 ** (8 * exponent), delta, 0.5)
    assert np.array_equal(huge, project(total.astype(np.float64), delta, 0.5))


def test_is_linear_in_the_task_vector():
    total, one = pair("gaussian", 50, 40)
    other = pair("gaussian", 50, 40, seed=1)[1]
    both = project(total, one, 0.5) + project(total, other, 0.5)
    assert error(project(total, one + other, 0.5), both) <= ERROR
    again = project(total, project(total, one, 0.5), 0.5)
    assert error(again, project(total, one, 0.5)) <= ERROR


@pytest.mark.parametrize("family", FAMILIES)
def test_gives_the_same_bits_twice(family):
    total, delta = pair(family, 32, 700)
    assert np.array_equal(project(total, delta, 0.5), project(total.copy(), delta.copy(), 0.5))


def test_panels_do_not_matter(monkeypatch):
    total, delta = pair("geometric to 1e-6", 60, 200)
    found = project(total, delta, 0.3)
    monkeypatch.setattr(projection, "_PANEL", 7)
    assert error(project(total, delta, 0.3), found) <= ERROR


def test_inputs_are_not_written():
    for shape in ((30, 50), (50, 30)):
        for kind in (np.float32, np.float64):
            arrays = [array.astype(kind) for array in pair("geometric to 1e-6", *shape)]
            before = [array.copy() for array in arrays]
            for array in arrays:
                array.flags.writeable = False
            result = project(*arrays, 0.5)
            assert all(map(np.array_equal, arrays, before))
            assert not any(np.shares_memory(result, array) for array in arrays)


@pytest.mark.parametrize(
    "step", [(slice(None), slice(5, 41)), (slice(None, None, -2), slice(0, 99, 3))]
)
def test_views_of_any_strides_give_what_copies_give(step):
    total, delta = (array[step] for array in pair("gaussian", 60, 120))
    expected = by_svd(total, delta, 0.5)
    assert error(project(total, delta, 0.5), expected) <= ERROR
    assert error(project(np.asfortranarray(total), delta, 0.5), expected) <= ERROR


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(33, 40), (90, 24), (1, 9)])
def test_torch_gives_the_same(family, shape):
    total, delta = pair(family, *shape)
    tensors = torch.from_numpy(total), torch.from_numpy(delta)
    for alpha in (0.5, 0.99):
        found = project(*tensors, alpha, xp=torch)
        assert found.dtype == torch.float32
        assert error(found.numpy(), project(total, delta, alpha), of=delta) <= allowed(family)
        wide = project(*(tensor.double() for tensor in tensors), alpha, xp=torch)
        assert wide.dtype == torch.float64


def test_torch_has_the_same_corners():
    zero, one = torch.zeros(3, 4), torch.ones(3, 4)
    assert project(zero[:0], one[:0], 0.5, xp=torch).shape == (0, 4)
    assert torch.equal(project(zero, one, 0.5, xp=torch), one)
    for total, delta in ((one, one / zero), (one / zero, one)):
        assert project(total, delta, 0.5, xp=torch).isnan().all()


# --- corners ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_an_empty_matrix_stays_empty(shape):
    assert project(np.zeros(shape, np.float32), np.zeros(shape, np.float32), 0.5).shape == shape


def test_nothing_is_removed_for_a_sum_of_zero():
    delta = pair("gaussian", 6, 8)[1]
    result = project(np.zeros_like(delta), delta, 0.5)
    assert np.array_equal(result, delta) and not np.shares_memory(result, delta)


def test_by_hand():
    """Shares of 3, 2 and 1 are 1/2, 5/6 and 1: a half is the first, also where it is just that."""
    total = np.diag([3, 2, 1]).astype(np.float32)
    delta = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    only_diagonal = [[0, 2, 3], [4, 0, 6], [7, 8, 0]]
    block_of_two = [[0, 0, 3], [0, 0, 6], [7, 8, 0]]
    for alpha, expected in ((0, only_diagonal), (0.5, only_diagonal), (0.84, block_of_two),
                            (0.99, block_of_two), (1, np.zeros((3, 3)))):  # fmt: skip
        assert np.allclose(project(total, delta, alpha), expected, atol=1e-6), alpha


def test_a_share_of_just_alpha_is_not_above_it():
    total = np.diag([4, 2, 1, 1]).astype(np.float32)
    delta = np.ones((4, 4), dtype=np.float32)
    result = project(total[:, :], delta, 0.75)
    assert np.allclose(result[:2, :2], 0) and np.allclose(result[0, 2:], 1)


def test_alpha_from_one_on_removes_the_whole_block():
    for alpha in (1, 1.5):
        total, delta = pair("gaussian", 20, 50)
        expected = by_svd(total, delta, alpha)
        assert error(project(total, delta, alpha), expected) <= ERROR
        # Nothing is left in the row space.
        assert np.abs(project(total, delta, alpha) @ total.T).max() <= 1e-6
        square = pair("gaussian", 20, 20)
        assert error(project(*square, alpha), np.zeros((20, 20)), of=square[1]) <= ERROR


def test_what_rounding_makes_of_a_null_space_counts_as_zero():
    """The result is that of the factors, though the sum's other singular values are not zero."""
    random = np.random.default_rng(0)
    left, right = random.standard_normal((60, 4)), random.standard_normal((4, 90))
    delta = random.standard_normal((60, 90))
    singular = np.linalg.svd((left @ right).astype(np.float32).astype(np.float64))[1]
    assert 0 < singular[4] < RANK * singular[0]
    for alpha in (0, 0.5, 0.999999, 1):
        found = project((left @ right).astype(np.float32), delta, alpha)
        assert error(found, by_svd(left @ right, delta, alpha)) <= ERROR


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (64, 400)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rounding_stays_below_what_counts_as_zero(shape, rank):
    total = low_rank(rank)(np.random.default_rng(rank), *shape).astype(np.float64)
    singular = np.linalg.svd(total, compute_uv=False)
    assert np.all(singular[rank:] < 0.8 * RANK * singular[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (9, 5)])
def test_what_is_not_finite_shows_in_the_result(value, place, shape):
    arrays = pair("gaussian", *shape)
    arrays[place][-1, -1] = value
    for kind in (np.float32, np.float64):
        assert np.isnan(project(*(array.astype(kind) for array in arrays), 0.5)).all()


@pytest.mark.filterwarnings("error")
def test_extreme_values_are_no_reason_to_fail():
    total, delta = pair("gaussian", 12, 20)
    expected = by_svd(total, delta, 0.5)
    for factor in (1e37, 1e-37):
        assert error(project(total * np.float32(factor), delta, 0.5), expected) <= 1e-5
    for factor in (1e300, 1e-300):
        assert error(project(total.astype(np.float64) * factor, delta, 0.5), expected) <= ERROR
    assert np.isfinite(project(total.astype(np.float64) * 1e-320, delta, 0.5)).all()


# --- memory -------------------------------------------------------------------------------------

PEAK = """
import sys, threading
import numpy as np
from shardmerge.kernels.projection import project

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def sample():
    while not ended.wait(0.001):
        peaks.append(anonymous())

rows, columns, first, alpha = int(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:])
random = np.random.default_rng(0)
total = random.standard_normal((rows, columns), dtype=np.float32)
total[0] *= first
delta = random.standard_normal((rows, columns), dtype=np.float32)
project(total[:8, :8], delta[:8, :8], alpha)
ended, peaks, before = threading.Event(), [], anonymous()
sampler = threading.Thread(target=sample)
sampler.start()
result = project(total, delta, alpha)
ended.set()
sampler.join()
print(max(peaks) - before - result.nbytes)
"""


@pytest.mark.parametrize(
    ("shape", "first", "alpha"),
    [
        ((64, 4000), 1, 0.9),
        ((300, 1500), 1, 0.5),
        ((1024, 1024), 1, 0.5),
        ((1024, 1024), 1e5, 1),
        ((1536, 1024), 1, 0.9),
    ],
)
def test_memory_is_within_the_promise(shape, first, alpha):
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    arguments = [str(value) for value in (*shape, first, alpha)]
    command = [sys.executable, "-c", PEAK, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, promised = int(ran.stdout), workspace_bytes(*shape)
    assert peak <= promised
    assert min(shape) < 1024 or promised <= 1.5 * peak


def test_memory_does_not_depend_on_the_side():
    assert workspace_bytes(300, 7000) == workspace_bytes(7000, 300)
    assert workspace_bytes(0, 0) >= 0
