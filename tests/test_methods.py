"""Merge methods: the shipped laws for each, and what their pages promise in particular."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardmerge import methods
from shardmerge.arrays import merge_arrays, merge_raw
from shardmerge.errors import UsageError
from shardmerge.kernels.compile import OUTPUT_BIT
from shardmerge.kernels.language import HISTOGRAM_BINS
from shardmerge.kernels.trace import Inputs, Kernels, numbers_of
from shardmerge.methods.api import (
    METHODS,
    ORACLES,
    Base,
    Over,
    levels_of,
    measure,
    merge_method,
    merges,
    problems_of,
    settle,
)
from shardmerge.methods.dare import DareLinear, DareTies, Rescale
from shardmerge.methods.fisher import Fisher
from shardmerge.methods.linear import Linear
from shardmerge.methods.passthrough import Passthrough
from shardmerge.methods.slerp import Slerp
from shardmerge.methods.task_arithmetic import TaskArithmetic
from shardmerge.methods.ties import Ties
from shardmerge.numerics import CANONICAL_BLOCK, DType, philox_key, philox_stream
from shardmerge.summaries import combine
from shardmerge.summaries import settle as settle_pass
from shardmerge.testing import METHOD_LAWS, check_method

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", methods.names())
def test_law(name, law):
    check_method(name, [law])


def test_unknown_methods_are_refused_with_a_hint():
    with pytest.raises(UsageError, match="Did you mean 'ties'"):
        methods.get("tise")


# --- helpers ------------------------------------------------------------------------------------


def merged(method, base, *models, seed=0, tensor="tensor", **extras) -> np.ndarray:
    """Float32 arrays, merged."""
    given_extras = [values for kind in extras.values() for values in kind]
    everything = [*([] if base is None else [base]), *models, *given_extras]
    flat = [np.ascontiguousarray(values, dtype=np.float32) for values in everything]
    inputs = Inputs(
        base=None if base is None else DType.F32,
        models=(DType.F32,) * len(models),
        extras=tuple((kind, (DType.F32,) * len(values)) for kind, values in extras.items()),
    )
    found, flags = merge_raw(method, inputs, flat, output=DType.F32, seed=seed, tensor=tensor)
    assert flags == 0
    return found.view(np.float32)


def ties(models=1, density=1.0, **others) -> Ties:
    settings_ = {"normalize": True, "rescale": False, "lam": 1.0, "trim": Over.TENSOR} | others
    return Ties(weight=(1.0,) * models, density=(density,) * models, **settings_)


def dare(cls=DareLinear, models=1, density=0.5, rescale=Rescale.INV_KEEP, weight=1.0, lam=1.0):
    return cls(
        weight=(weight,) * models,
        density=(density,) * models,
        normalize=False,
        lam=lam,
        rescale=rescale,
    )


# --- ties ---------------------------------------------------------------------------------------


def rank_of(density: float, count: int, trim: Over) -> int:
    return max(1, int(density * count)) if trim is Over.TENSOR else int(density * count) + 1


def largest(deltas: np.ndarray, rank: int) -> np.ndarray:
    """Deltas of at least the ``rank``-th largest magnitude; the others are zero."""
    magnitudes = np.sort(np.abs(deltas))[::-1]
    return np.where(np.abs(deltas) >= magnitudes[min(rank, len(deltas)) - 1], deltas, 0)


SHARES = st.integers(0, 1000).map(lambda n: n / 1000)
TRIMS = st.sampled_from(list(Over))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), SHARES, TRIMS)
def test_ties_keeps_all_of_equal_magnitudes(deltas, density, trim):
    got = merged(ties(density=density, trim=trim), np.zeros(len(deltas)), deltas)
    assert got.tolist() == largest(np.array(deltas), rank_of(density, len(deltas), trim)).tolist()


FINITE_BITS = st.integers(0, 0x7F7FFFFF) | st.integers(0, 0x7F).map(lambda n: n << 15)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(FINITE_BITS, st.booleans()), min_size=1, max_size=60), SHARES, TRIMS)
def test_ties_finds_any_threshold_to_the_bit(bits, density, trim):
    """From subnormals to the largest float32, and on both sides of a bin of upper bits."""
    words = np.array([magnitude | negative << 31 for magnitude, negative in bits], dtype=np.uint32)
    deltas = words.view(np.float32)
    got = merged(ties(density=density, trim=trim), np.zeros(len(deltas)), deltas)
    expected = largest(deltas, rank_of(density, len(deltas), trim))
    assert np.array_equal(got, expected)


def test_ties_of_a_large_tensor_with_few_magnitudes():
    """Two million elements of four magnitudes: one bin holds far more than the rank."""
    rng = np.random.default_rng(0)
    deltas = rng.choice([0.0, 1.0, -1.0, 2.0, 1.0 + 2.0**-23], 2_000_000).astype(np.float32)
    for density in (0.1, 0.25, 0.5, 0.999):
        got = merged(ties(density=density), np.zeros(len(deltas)), deltas)
        expected = largest(deltas, rank_of(density, len(deltas), Over.TENSOR))
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("trim", list(Over))
def test_ties_with_density_0_keeps_the_largest(trim):
    got = merged(ties(density=0.0, trim=trim), [0, 0, 0, 0], [1, -3, 2, 3])
    assert got.tolist() == [0, -3, 0, 3]


@pytest.mark.parametrize("trim", list(Over))
def test_ties_with_density_1_keeps_all(trim):
    method = ties(density=1.0, trim=trim)
    assert merged(method, [0, 0, 0], [1, -3, 2.0**-100]).tolist() == [1, -3, 2.0**-100]
    assert levels_of(method)["coarse"] is None


def test_each_model_of_ties_is_trimmed_by_its_own_density():
    method = Ties(
        weight=(1.0, 1.0),
        density=(0.25, 1.0),
        normalize=False,
        rescale=False,
        lam=1.0,
        trim=Over.TENSOR,
    )
    assert merged(method, [0] * 4, [1, 2, 3, 4], [1, 1, 1, 1]).tolist() == [1, 1, 1, 5]


def test_ties_over_the_model_has_one_threshold_for_all_its_tensors():
    """Counts of several tensors add up before they are settled."""
    rng = np.random.default_rng(1)
    tensors = [rng.integers(-50, 50, count).astype(np.float32) for count in (700, 40, 3)]
    method = ties(density=0.3, trim=Over.MODEL)
    info, inputs = METHODS["ties"], Inputs(DType.F32, (DType.F32,))
    steps = {step.name: step for step in info.passes}
    decisions, summaries, kernels = {}, {}, Kernels()
    for name, settles in (("coarse", "bins"), ("fine", "cut")):
        kernel = kernels.get(method, steps[name], inputs, decisions)
        parts = []
        for tensor in tensors:
            counts = np.zeros((1, HISTOGRAM_BINS), dtype=np.uint32)
            kernel(
                count=len(tensor),
                first=0,
                inputs=[np.zeros_like(tensor).ctypes.data, tensor.ctypes.data],
                parameters=numbers_of(method, steps[name], decisions),
                keys=np.zeros((1, 2), dtype=np.uint32),
                output=counts,
            )
            parts.append(counts.astype(np.int64))
        summaries[name] = combine(parts)
        decisions[settles] = settle_pass(method, steps[settles], summaries, decisions)
    magnitudes = np.sort(np.abs(np.concatenate(tensors)))[::-1]
    assert decisions["cut"] == (magnitudes[int(0.3 * 743)],)


@pytest.mark.parametrize(
    ("others", "elected"),
    [([1, 1], 2), ([-1, -1], -2), ([1, -1], -2)],
    ids=["majority +", "majority -", "none"],
)
def test_a_sum_of_zero_elects_the_majority_of_the_model(others, elected):
    """By hand: the first element is +2 and -2, the others decide. The tensor's own rule is +."""
    models = [2, *others], [-2, *others]
    method = ties(models=2, trim=Over.MODEL)
    assert merged(method, [0, 0, 0], *models).tolist() == [elected, *others]
    assert merged(ties(models=2), [0, 0, 0], *models).tolist() == [2, *others]


def test_the_majority_counts_what_trimming_left():
    """By hand: sums are -, -, -, 0, +; the largest magnitudes leave 0, 0, 0, 0, +."""
    models = [-1, -1, -1, 4, 4], [0, 0, 0, -4, 0]
    method = ties(models=2, density=0.0, trim=Over.MODEL)
    assert merged(method, [0] * 5, *models).tolist() == [0, 0, 0, 4, 4]


def test_ties_restores_magnitudes_where_asked():
    deltas = np.array([1, -5, 2, 0.5], dtype=np.float32)
    got = merged(ties(density=0.5, rescale=True), np.zeros(4), deltas)
    assert np.allclose(got, [0, -5 * 8.5 / 7, 2 * 8.5 / 7, 0], rtol=1e-6)
    assert list(problems_of(ties(rescale=True, trim=Over.MODEL)))


# --- dare ---------------------------------------------------------------------------------------


def test_dare_keeps_what_the_paper_s_masks_keep():
    """Kept fraction, kept value and mean as a run of the authors' rule gave them (goldens)."""
    golden = json.loads((GOLDEN / "papers" / "index.json").read_text())["dare_stats"]
    density, count = 1 - golden["p"], golden["n"]
    got = merged(dare(density=density), np.zeros(count), np.ones(count))
    deviation = math.sqrt(density * (1 - density) / count)
    for kept in (float((got != 0).mean()), golden["kept_fraction"]):
        assert abs(kept - density) < 4 * deviation
    for mean in (float(got.mean(dtype=np.float64)), golden["mean"]):
        assert abs(mean - 1) < 4 * deviation / density
    assert np.unique(got).tolist() == [0, pytest.approx(golden["kept_value"], rel=1e-6)]


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_dare_keeps_the_share_that_density_says(density):
    count = 400_000
    got = merged(dare(density=density, rescale=Rescale.NONE), np.zeros(count), np.ones(count))
    share = float((got != 0).mean())
    assert abs(share - density) <= 5 * math.sqrt(density * (1 - density) / count)


def kept_by(position=0, tensor="tensor", seed=0, count=200_000) -> np.ndarray:
    """What dare keeps of one model, by merging: the other models' task vectors are zero."""
    zeros, ones = np.zeros(count), np.ones(count)
    models = [ones if k == position else zeros for k in range(2)]
    method = dare(models=2, rescale=Rescale.NONE)
    return merged(method, zeros, *models, seed=seed, tensor=tensor) != 0


def test_dare_s_masks_know_nothing_of_each_other():
    """Of other models, tensors and seeds; nor of themselves some elements on."""
    one = kept_by()
    others = [kept_by(position=1), kept_by(tensor="other"), kept_by(seed=1)]
    others += [np.roll(one, shift) for shift in (1, 2, 3, 4, 32, CANONICAL_BLOCK)]
    for other in others:
        correlation = np.corrcoef(one, other)[0, 1]
        assert abs(correlation) < 5 / math.sqrt(len(one))


def test_dare_s_masks_are_the_documented_stream():
    key = philox_key(7, 1, "layer.weight")
    expected = philox_stream(key, 0, 10_000) < 2**31
    got = kept_by(position=1, tensor="layer.weight", seed=7, count=10_000)
    assert np.array_equal(got, expected)


def test_rescale_is_read_as_mergekit_writes_it():
    assert Rescale(True) is Rescale("l1") is Rescale.L1
    assert Rescale(False) is Rescale("none") is Rescale.NONE
    assert Rescale("inv_keep") is Rescale.INV_KEEP
    for wrong in ("true", 1.5, None, "l2"):
        with pytest.raises(ValueError, match="not a valid Rescale"):
            Rescale(wrong)


@pytest.mark.parametrize("cls", [DareLinear, DareTies])
def test_what_dare_makes_of_kept_elements(cls):
    rng = np.random.default_rng(3)
    count = 5000
    deltas = rng.standard_normal(count).astype(np.float32)
    zeros = np.zeros(count)
    plain = merged(dare(cls, density=0.3, rescale=Rescale.NONE), zeros, deltas)
    kept = plain != 0
    assert np.array_equal(plain[kept], deltas[kept])
    divided = merged(dare(cls, density=0.3, rescale=Rescale.INV_KEEP), zeros, deltas)
    assert np.allclose(divided, plain / 0.3, rtol=1e-6)
    restored = merged(dare(cls, density=0.3, rescale=Rescale.L1), zeros, deltas)
    assert np.array_equal(restored != 0, kept)
    assert np.abs(restored).sum(dtype=np.float64) == pytest.approx(
        np.abs(deltas).sum(dtype=np.float64), rel=1e-6
    )
    ratio = restored[kept] / plain[kept]
    assert np.allclose(ratio, ratio[0], rtol=1e-6)


def test_dare_with_density_0_gives_the_base_or_is_refused():
    base = np.arange(100)
    for rescale in (Rescale.L1, Rescale.NONE):
        method = dare(density=0.0, rescale=rescale)
        assert not problems_of(method)
        assert merged(method, base, base + 1.5).tolist() == base.tolist()
    assert list(problems_of(dare(density=0.0, rescale=Rescale.INV_KEEP)))


@pytest.mark.parametrize(
    "method",
    [
        dare(density=0.0, rescale=Rescale.L1),
        dare(DareTies, density=0.0, rescale=Rescale.L1),
        ties(density=0.5, rescale=True),
    ],
)
def test_sums_that_are_not_finite_restore_nothing(method):
    """A NaN that is dropped leaves a sum of NaN, and 0 of what is kept: no division by it."""
    zeros = np.zeros(100, dtype=np.float32)
    for bad in (np.nan, np.inf):
        model = zeros.copy()
        model[7] = bad
        inputs = Inputs(DType.F32, (DType.F32,))
        got, flags = merge_raw(method, inputs, [zeros, model], output=DType.F32)
        assert flags & 0b11 == 0b10
        assert np.isfinite(got.view(np.float32)).sum() >= 99, "no other element is touched"


# --- slerp --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0, 1.5])
def test_slerp_of_parallel_and_opposite_tensors_is_the_line(t):
    base = np.array([1, -2, 3], dtype=np.float32)
    for factor in (2.0, 1.0, -1.0, -0.5):
        expected = (1 - t) * base + t * factor * base
        assert np.allclose(merged(Slerp(t=t), base, factor * base), expected, rtol=1e-6, atol=1e-7)


def test_slerp_of_nearly_parallel_tensors_is_the_line_too():
    """On either side of a cosine of 0.9995."""
    base = np.array([1, 0], dtype=np.float32)
    for cosine, line in ((0.99951, True), (0.99949, False)):
        model = np.array([cosine, math.sqrt(1 - cosine**2)])
        got = merged(Slerp(t=0.5), base, model)
        on_line = np.allclose(got, (base + model) / 2, rtol=1e-6)
        assert on_line == line
        assert np.allclose(np.linalg.norm(got), 1, rtol=1e-7) != line


def test_slerp_of_a_zero_tensor_is_taken_at_a_right_angle():
    """It has no direction; mergekit's formula then has a cosine of 0."""
    model, zero = np.array([3, 4], dtype=np.float32), np.zeros(2)
    quarter = math.sin(math.pi / 8)
    assert np.allclose(merged(Slerp(t=0.25), zero, model), quarter * model, rtol=1e-6)
    assert np.allclose(merged(Slerp(t=0.75), model, zero), quarter * model, rtol=1e-6)
    assert merged(Slerp(t=0.25), zero, zero).tolist() == [0, 0]


def test_slerp_keeps_the_norm_and_divides_the_angle():
    rng = np.random.default_rng(4)
    a, b = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 1000)))
    angle = math.acos(a @ b)
    for t in (0.0, 0.3, 0.5, 1.0):
        got = merged(Slerp(t=t), a, b).astype(np.float64)
        assert np.linalg.norm(got) == pytest.approx(1, abs=1e-6)
        assert got @ a == pytest.approx(math.cos(t * angle), abs=1e-6)


def test_slerp_of_infinities_of_both_signs_is_reported():
    """Their products add up to no number; that must not raise in the middle of a measure."""
    base = np.ones(2 * CANONICAL_BLOCK, dtype=np.float32)
    base[[0, -1]] = np.inf, -np.inf
    inputs = Inputs(DType.F32, (DType.F32,))
    _, flags = merge_raw(Slerp(t=0.5), inputs, [base, np.ones_like(base)], output=DType.F32)
    assert flags == 1 | 1 << OUTPUT_BIT


# --- fisher and linear --------------------------------------------------------------------------


def fisher(*, normalize: bool, epsilon: float = 0.0) -> Fisher:
    return Fisher(weight=(1.0, 1.0), normalize=normalize, epsilon=epsilon)


def test_fisher_normalised_ignores_the_scale_of_an_information():
    rng = np.random.default_rng(5)
    models, info = rng.standard_normal((2, 500)), np.exp(rng.standard_normal((2, 500)))
    scaled = [info[0], 64 * info[1]]
    for normalize in (True, False):
        method = fisher(normalize=normalize)
        before = merged(method, None, *models, fisher=info)
        after = merged(method, None, *models, fisher=scaled)
        assert np.array_equal(before, after) == normalize


def test_fisher_by_hand():
    """Norms 5 and 10: the masses are 3/5, 4/5 and 6/10, 8/10, so this is the plain average."""
    models, info = [[1.0, 3.0], [3.0, 5.0]], [[3.0, 4.0], [6.0, 8.0]]
    assert merged(fisher(normalize=True), None, *models, fisher=info).tolist() == [2, 4]
    got = merged(fisher(normalize=False), None, *models, fisher=info)
    assert np.allclose(got, [(3 + 18) / 9, (12 + 40) / 12], rtol=1e-6)


def test_no_information_at_all_is_the_average_with_epsilon_and_an_error_without():
    models, info = [[1.0, 3.0], [3.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]
    for normalize in (True, False):
        method = fisher(normalize=normalize, epsilon=1e-6)
        assert merged(method, None, *models, fisher=info).tolist() == [2, 4]
        inputs = Inputs(None, (DType.F32,) * 2, (("fisher", (DType.F32,) * 2),))
        flat = [np.array(v, dtype=np.float32) for v in (*models, *info)]
        method = fisher(normalize=normalize)
        result, flags = merge_raw(method, inputs, flat, output=DType.F32)
        assert flags == 1 << OUTPUT_BIT, "the output alone is not finite"
        assert np.isnan(result.view(np.float32)).all()


def test_a_model_without_information_does_not_count():
    models, info = [[1.0, 3.0], [3.0, 5.0]], [[0.0, 0.0], [2.0, 1.0]]
    assert merged(fisher(normalize=False), None, *models, fisher=info).tolist() == [3, 5]


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        (Linear(weight=(1.0, -1.0), normalize=True), "sum to 0"),
        (Linear(weight=(1.0, -1.0 + 1e-9), normalize=True), "sum to 0"),
        (Linear(weight=(1.0, -1.0), normalize=False), None),
        (Linear(weight=(1.0, -0.999), normalize=True), None),
        (Fisher(weight=(0.0, 0.0), normalize=True, epsilon=1e-6), "all weights are 0"),
        (Fisher(weight=(0.0, 1.0), normalize=True, epsilon=1e-6), None),
    ],
)
def test_weights_without_an_average_are_problems(method, wrong):
    found = problems_of(method)
    assert (wrong is None and not found) or wrong in found[0]


def test_a_zero_sum_of_weights_is_not_divided_by():
    """As mergekit: task arithmetic divides by 1 then, and so do disjoint means."""
    arithmetic = TaskArithmetic(weight=(1.0, -1.0), normalize=True, lam=1.0)
    assert merged(arithmetic, [1, 1], [3, 1], [1, 5]).tolist() == [3, -3]
    method = Ties(
        weight=(1.0, -1.0),
        density=(1.0, 1.0),
        normalize=True,
        rescale=False,
        lam=1.0,
        trim=Over.TENSOR,
    )
    assert merged(method, [0, 0], [2, 3], [-3, 1]).tolist() == [5, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([DType.F32, DType.F16]),
    st.tuples(*[st.integers(-300, 300).map(lambda n: n / 100)] * 3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_weighted_sums_are_rounded_once(output, weight, normalize, seed):
    """Their bits are those of the float64 formula, rounded to what is written."""
    rng = np.random.default_rng(seed)
    base, *models = rng.standard_normal((4, 500)).astype(np.float32)
    linear = Linear(weight=weight, normalize=normalize)
    added = TaskArithmetic(weight=weight, normalize=normalize, lam=0.7)
    assume(not problems_of(linear))
    for method, first in ((linear, None), (added, base)):
        everything = models if first is None else [first, *models]
        inputs = Inputs(None if first is None else DType.F32, (DType.F32,) * 3)
        got, _ = merge_raw(method, inputs, everything, output=output)
        given_models = [model.astype(np.float64) for model in models]
        if first is None:
            expected = ORACLES["linear"](None, given_models, weight=weight, normalize=normalize)
        else:  # task vectors have the dtype of the inputs
            zero, deltas = np.zeros(500), [(model - base).astype(np.float64) for model in models]
            expected = base + ORACLES["task_arithmetic"](
                zero, deltas, weight=weight, normalize=normalize, lam=0.7
            )
        kind = {DType.F32: np.float32, DType.F16: np.float16}[output]
        assert np.array_equal(got.view(kind), expected.astype(kind))


# --- passes -------------------------------------------------------------------------------------

T, M = Over.TENSOR, Over.MODEL
TIES_PASSES = ("coarse", "bins", "fine", "cut", "magnitudes", "scales", "signs", "majority")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Linear(weight=(1.0,), normalize=True), {}),
        (TaskArithmetic(weight=(1.0,), normalize=False, lam=1.0), {}),
        (Passthrough(scale=(1.0,)), {}),
        (Slerp(t=0.5), {"products": T, "coefficients": T}),
        (fisher(normalize=True), {"squares": M, "scales": M}),
        (fisher(normalize=False), {"squares": None, "scales": None}),
        (dare(rescale=Rescale.L1), {"magnitudes": T, "scales": T}),
        (dare(rescale=Rescale.L1, density=1.0), {"magnitudes": None, "scales": None}),
        (dare(DareTies, rescale=Rescale.NONE), {"magnitudes": None, "scales": None}),
        (dare(DareTies, rescale=Rescale.INV_KEEP), {"magnitudes": None, "scales": None}),
        (ties(), dict.fromkeys(TIES_PASSES)),
        (ties(density=0.5), dict.fromkeys(TIES_PASSES) | dict.fromkeys(TIES_PASSES[:4], T)),
        (
            ties(density=0.5, rescale=True),
            dict.fromkeys(TIES_PASSES) | dict.fromkeys(TIES_PASSES[:6], T),
        ),
        (
            ties(density=0.5, trim=M),
            dict.fromkeys(TIES_PASSES, M) | {"magnitudes": None, "scales": None},
        ),
        (ties(trim=M), dict.fromkeys(TIES_PASSES) | {"signs": M, "majority": M}),
    ],
)
def test_what_each_pass_is_taken_over(method, expected):
    assert levels_of(method) == expected


def test_one_density_below_1_makes_ties_measure():
    method = Ties(
        weight=(1.0, 1.0),
        density=(1.0, 0.5),
        normalize=True,
        rescale=False,
        lam=1.0,
        trim=Over.TENSOR,
    )
    assert levels_of(method)["cut"] is T


def test_a_pass_that_asks_for_what_there_is_not_is_refused_at_import():
    with pytest.raises(TypeError, match=r"broken\.merge asks for treshold; earlier .* threshold"):

        @merge_method("broken", base=Base.UNUSED)
        class Broken:
            @measure()
            def sums(self, tile): ...

            @settle()
            def threshold(self, sums): ...

            @merges
            def merge(self, tile, treshold): ...

    assert "broken" not in METHODS


def test_a_pass_cannot_ask_for_a_later_one():
    with pytest.raises(TypeError, match="asks for later; earlier results are none"):

        @merge_method("broken", base=Base.UNUSED)
        class Broken:
            @settle()
            def early(self, later): ...

            @measure()
            def later(self, tile): ...

            @merges
            def merge(self, tile): ...


def test_a_method_merges_once_and_last():
    with pytest.raises(TypeError, match="exactly one @merges pass"):

        @merge_method("broken", base=Base.UNUSED)
        class Early:
            @merges
            def merge(self, tile): ...

            @measure()
            def sums(self, tile): ...

    with pytest.raises(TypeError, match="exactly one @merges pass"):

        @merge_method("broken", base=Base.UNUSED)
        class Never:
            @measure()
            def sums(self, tile): ...

    assert "broken" not in METHODS


# --- a ninth method -----------------------------------------------------------------------------

MAXIMUM = '''
"""Maximum: the largest element of all models."""

import numpy as np

from shardmerge.methods.api import Base, merge_method, merges, oracle, where


@merge_method("maximum", base=Base.UNUSED)
class Maximum:
    """Take the largest element of all models.

        merged = max_k(model_k)

    Passes: one; every element is read once.
    Args: none.
    Shapes: elementwise; any shape.
    Raises: nothing of its own.
    Differs: nothing.
    Example:
        >>> merge_arrays(Maximum(), models=[[1, 4], [3, -2]])
        [3.0, 4.0]
    Reference: none.
    """

    @merges
    def merge(self, tile):
        """The largest."""
        largest = tile.models[0]
        for model in tile.models[1:]:
            largest = where(model > largest, model, largest)
        return largest


@oracle(Maximum)
def formula(base, models):
    """The same on whole arrays."""
    return np.max(models, axis=0)
'''

NINTH = """
import sys
from shardmerge import methods
from shardmerge.methods.api import ORACLES
from shardmerge.testing.laws import agrees_with_its_oracle, check_method

methods.__path__.append(sys.argv[1])  # as if the file were in the folder
methods._scan()
assert methods.names() == tuple(sorted({*sys.argv[2].split(), "maximum"}))
check_method("maximum")
ORACLES["maximum"] = lambda base, models: models[0]
try:
    check_method("maximum", [agrees_with_its_oracle])
except AssertionError as error:
    print(*error.__notes__)
"""


def test_a_ninth_method_is_one_file(tmp_path):
    """In a process of its own, so that no other test sees it; and a law can tell it is wrong."""
    (tmp_path / "maximum.py").write_text(MAXIMUM)
    done = subprocess.run(
        [sys.executable, "-c", NINTH, str(tmp_path), " ".join(methods.names())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "maximum breaks the law agrees_with_its_oracle" in done.stdout


# --- merging in memory --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**32 - 1))
def test_arrays_keep_their_shape(shape, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-9, 9, (2, *shape))
    got = merge_arrays(Linear(weight=(1.0, 1.0), normalize=False), models=[a, b])
    assert got == np.asarray(a + b).tolist()


@pytest.mark.parametrize("normalize", (True, False))
def test_fisher_information_is_never_negative(normalize):
    """A model named in its place, say: the result is NaN, which is not published."""
    method = Fisher(weight=(1.0, 1.0), normalize=normalize, epsilon=1e-6)
    found = merge_arrays(method, models=[[1, 2], [3, 4]], fisher=[[1, -0.5], [1, 1]])
    assert np.isfinite(found[0]) and np.isnan(found[1])
