"""From a pass to a compiled kernel: what makes another kernel, and what only other numbers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.kernels import trace
from shardmerge.kernels.compile import Form
from shardmerge.kernels.trace import Inputs, Kernels, numbers_of
from shardmerge.methods.api import METHODS, Base, Over, merge_method, merges, parameter
from shardmerge.methods.dare import DareLinear, Rescale
from shardmerge.methods.fisher import Fisher
from shardmerge.methods.linear import Linear
from shardmerge.methods.passthrough import Passthrough
from shardmerge.methods.slerp import Slerp
from shardmerge.methods.ties import Ties
from shardmerge.numerics import DType

F32, BF16, F64 = DType.F32, DType.BF16, DType.F64


@pytest.fixture
def compiled(monkeypatch):
    """The passes that were compiled, in order."""
    made: list[str] = []
    compile_ = trace._compile

    def counted(method, step, *others):
        made.append(step.name)
        return compile_(method, step, *others)

    monkeypatch.setattr(trace, "_compile", counted)
    return made


def linear(*weights: float, normalize: bool = True) -> Linear:
    return Linear(weight=weights, normalize=normalize)


def merge_kernel(kernels, method, inputs, output=F32, decisions=None):
    return kernels.get(
        method, METHODS[method.merge_info.name].merge_pass, inputs, decisions, output
    )


def apply(kernel, method, inputs, *arrays, decisions=None):
    """What a merge kernel gives for float32 arrays."""
    flat = [np.array(array, dtype=np.float32) for array in arrays]
    got = np.empty(flat[0].size, dtype=np.float32)
    kernel(
        count=got.size,
        first=0,
        inputs=[array.ctypes.data for array in flat],
        parameters=numbers_of(method, METHODS[method.merge_info.name].merge_pass, decisions),
        keys=np.zeros((len(inputs.models), 2), dtype=np.uint32),
        output=got,
    )
    return got.tolist()


# --- what kernels depend on ---------------------------------------------------------------------


def test_one_kernel_serves_all_weights(compiled):
    kernels, inputs = Kernels(), Inputs(None, (F32, F32))
    first = merge_kernel(kernels, linear(1.0, 1.0), inputs)
    for weights in ((0.0, 2.0), (-3.0, 1e30), (1, 2)):
        assert merge_kernel(kernels, linear(*weights), inputs) is first
    assert compiled == ["merge"]


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.integers(1, 64).map(float)] * 2), st.booleans())
def test_it_is_run_with_the_weights_of_each_tensor(weights, normalize):
    """In the order of its symbols: exchanging two would be seen."""
    inputs, method = Inputs(None, (F32, F32)), linear(*weights, normalize=normalize)
    got = apply(merge_kernel(SHARED, method, inputs), method, inputs, [1, 0], [0, 1])
    total = sum(weights) if normalize else 1.0
    assert got == [float(np.float32(w / total)) for w in weights]


SHARED = Kernels()


def test_statics_numbers_of_models_dtypes_and_outputs_make_other_kernels(compiled):
    kernels, two = Kernels(), Inputs(None, (F32, F32))
    found = [
        merge_kernel(kernels, linear(1.0, 1.0), two),
        merge_kernel(kernels, linear(1.0, 1.0, normalize=False), two),
        merge_kernel(kernels, linear(1.0, 1.0, 1.0), Inputs(None, (F32, F32, F32))),
        merge_kernel(kernels, linear(1.0, 1.0), Inputs(None, (F32, BF16))),
        merge_kernel(kernels, linear(1.0, 1.0), Inputs(None, (F32, F32), wide=True)),
        merge_kernel(kernels, linear(1.0, 1.0), two, output=BF16),
        merge_kernel(kernels, Passthrough(scale=(1.0,)), Inputs(None, (F32,))),
    ]
    assert len(set(map(id, found))) == len(found) == len(compiled)


def ties(density: float, trim: Over = Over.TENSOR) -> Ties:
    return Ties(
        weight=(1.0,), density=(density,), normalize=True, rescale=False, lam=1.0, trim=trim
    )


def test_a_decision_that_is_not_needed_makes_another_kernel(compiled):
    """Without thresholds there is nothing to compare with."""
    kernels, inputs = Kernels(), Inputs(F32, (F32,))
    none = {"cut": None, "scales": None, "majority": None}
    plain = merge_kernel(kernels, ties(1.0), inputs, decisions=none)
    cut = none | {"cut": (1.0,)}
    trimmed = merge_kernel(kernels, ties(0.5), inputs, decisions=cut)
    assert trimmed is not plain
    assert merge_kernel(kernels, ties(0.2), inputs, decisions=none | {"cut": (7.0,)}) is trimmed
    assert merge_kernel(kernels, ties(1.0, Over.MODEL), inputs, decisions=none) is not plain
    assert apply(trimmed, ties(0.5), inputs, [0, 0], [2, 0.5], decisions=cut) == [2, 0]
    assert compiled == ["merge"] * 3


def test_enums_are_statics(compiled):
    kernels, inputs = Kernels(), Inputs(F32, (F32,))
    none = {"scales": None}
    for rescale in (Rescale.NONE, Rescale.INV_KEEP, Rescale.NONE):
        method = DareLinear(
            weight=(1.0,), density=(0.5,), normalize=False, lam=1.0, rescale=rescale
        )
        merge_kernel(kernels, method, inputs, decisions=none)
    assert compiled == ["merge"] * 2


def test_caches_are_their_own(compiled):
    inputs = Inputs(None, (F32,))
    assert merge_kernel(Kernels(), linear(1.0), inputs) is not merge_kernel(
        Kernels(), linear(1.0), inputs
    )
    assert compiled == ["merge"] * 2


# --- numbers, inputs and forms ------------------------------------------------------------------


def test_numbers_are_parameters_then_the_decisions_that_are_named():
    method = Fisher(weight=(3.0, 5.0), normalize=True, epsilon=0.5)
    step = METHODS["fisher"].merge_pass
    assert numbers_of(method, step, {"scales": (0.25, 1.0)}).tolist() == [3, 5, 0.5, 0.25, 1]
    unneeded = {"scales": None, "other": (9.0,)}
    assert numbers_of(method, step, unneeded).tolist() == [3, 5, 0.5]


def test_inputs_are_base_models_extras():
    inputs = Inputs(BF16, (F32, BF16), (("fisher", (F64, F32)),))
    assert inputs.dtypes == (BF16, F32, BF16, F64, F32)
    tile = inputs.tile()
    numbers = [tile.reference, *tile.models, *tile.extras["fisher"]]
    assert [expr.value for expr in numbers] == [0, 1, 2, 3, 4]


def test_a_measure_that_reads_only_extras_does_not_touch_the_models():
    method = Fisher(weight=(1.0, 1.0), normalize=True, epsilon=0.0)
    step = METHODS["fisher"].passes[0]
    inputs = Inputs(None, (F32, F32), (("fisher", (F32, F32)),))
    kernel = Kernels().get(method, step, inputs, {})
    assert (kernel.form, kernel.width, kernel.inputs) == (Form.TOTALS, 2, (2, 3))
    values = np.array([3, 4], dtype=np.float32)
    sums = np.zeros((1, 2))
    kernel(
        count=2,
        first=0,
        inputs=[0, 0, values.ctypes.data, values.ctypes.data],
        parameters=numbers_of(method, step, {}),
        keys=np.zeros((1, 2), dtype=np.uint32),
        output=sums,
    )
    assert sums.tolist() == [[25, 25]]


def test_forms_follow_from_what_a_pass_returns():
    kernels, inputs = Kernels(), Inputs(F32, (F32,))
    coarse, *_ = METHODS["ties"].passes
    assert kernels.get(ties(0.5), coarse, inputs, {}).form is Form.HISTOGRAMS
    products = METHODS["slerp"].passes[0]
    assert kernels.get(Slerp(t=0.5), products, inputs, {}).form is Form.TOTALS
    merge = METHODS["slerp"].merge_pass
    decisions = {"coefficients": (0.5, 0.5)}
    assert kernels.get(Slerp(t=0.5), merge, inputs, decisions, F32).form is Form.MAP
    with pytest.raises(TypeError, match="nothing is to be written"):
        kernels.get(Slerp(t=0.5), merge, inputs, decisions)


def test_a_pass_that_branches_on_a_number_is_refused():
    """The number is only known when the kernel runs: one branch would serve all tensors."""

    @merge_method("branching", base=Base.UNUSED)
    class Branching:
        scale: float = parameter()

        @merges
        def merge(self, tile):
            return tile.models[0] if self.scale > 0 else -tile.models[0]

    try:
        with pytest.raises(TypeError, match="use where"):
            merge_kernel(Kernels(), Branching(scale=1.0), Inputs(None, (F32,)))
    finally:
        del METHODS["branching"]


# --- threads ------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_get_one_kernel(compiled):
    """Each for one of four kinds of inputs: four kernels, however many ask."""
    kernels, threads = Kernels(), 16
    formats = [Inputs(None, (a, b)) for a in (F32, BF16) for b in (F32, BF16)]
    start = threading.Barrier(threads)

    def ask(number: int):
        start.wait()
        inputs = formats[number % len(formats)]
        return merge_kernel(kernels, linear(1.0, float(number)), inputs)

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(ask, range(threads)))
    assert compiled == ["merge"] * len(formats)
    for number, kernel in enumerate(found):
        assert kernel is found[number % len(formats)]


def test_one_kernel_runs_on_many_threads_at_once():
    """It keeps nothing between calls: each thread's numbers and buffers are its own."""
    inputs = Inputs(None, (F32, F32))
    kernel = merge_kernel(SHARED, linear(1.0, 1.0), inputs)

    def run(number: int):
        method = linear(float(number), 1.0)
        ones = np.ones(50_000)
        got = apply(kernel, method, inputs, number * ones, ones)
        return set(got) == {float(np.float32((number * number + 1) / (number + 1)))}

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(1, 41)))
