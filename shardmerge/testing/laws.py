"""Laws of merge methods: ``check_method("ties")``, or one by one in ``METHOD_LAWS``.

They need hypothesis, which is imported only when a law is checked. A failure names the law, and
prints the case that broke it: parameters, dtypes, shape, kind of numbers and seed make it again.
"""

from __future__ import annotations

import dataclasses
import doctest
import enum
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, combinations, cycle, islice, product
from typing import TYPE_CHECKING, TypeVar, cast
from unittest import mock

import numpy as np
import numpy.typing as npt

from shardmerge import arrays, methods
from shardmerge.arrays import Raw, merge_arrays, merge_raw
from shardmerge.kernels.compile import LANES, OUTPUT_BIT, Kernel
from shardmerge.kernels.trace import Inputs, Kernels
from shardmerge.methods.api import (
    ORACLES,
    Base,
    Decisions,
    ExtraTensor,
    Floats,
    Kind,
    Method,
    MethodInfo,
    Over,
    Parameter,
    Pass,
    describe,
    info_of,
    problems_of,
)
from shardmerge.methods.opcm import cleaned
from shardmerge.numerics import CANONICAL_BLOCK, DType, philox_key, philox_stream

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

T = TypeVar("T")

# --- stored numbers -----------------------------------------------------------------------------

Mask = npt.NDArray[np.bool_]

HALF_ULP = {DType.BF16: 2.0**-8, DType.F16: 2.0**-11, DType.F32: 2.0**-24, DType.F64: 2.0**-53}
"""Largest error of one rounding, relative to a normal number."""
_LEAST = {DType.BF16: 2.0**-134, DType.F16: 2.0**-25, DType.F32: 2.0**-150, DType.F64: 0.0}
_LARGEST = {DType.BF16: 3.3e38, DType.F16: 65_000.0, DType.F32: 3.4e38, DType.F64: 1.7e308}


def stored(values: Floats, dtype: DType) -> Raw:
    """Values as a flat array of ``dtype``, as a kernel reads them."""
    flat = np.ascontiguousarray(values, dtype=np.float64).reshape(-1)
    if dtype is DType.F64:
        return flat.copy()
    if dtype is DType.F16:
        return flat.astype(np.float16).view(np.uint16)
    single = flat.astype(np.float32)
    if dtype is DType.F32:
        return single
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def loaded(raw: Raw, dtype: DType) -> Floats:
    """The values of a stored array, as float64."""
    if dtype is DType.BF16:
        bits = raw.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    kind = {DType.F16: np.float16, DType.F32: np.float32, DType.F64: np.float64}[dtype]
    return raw.view(kind).astype(np.float64)


# --- cases --------------------------------------------------------------------------------------


class Numbers(enum.Enum):
    """What inputs and parameters are made of."""

    WHOLE = "whole"
    """Small integers, and parameters that are multiples of 1/4: sums and products are exact, equal
    magnitudes and sums of zero are common, and a formula and a kernel must decide them alike."""
    ROUGH = "rough"
    """Any numbers, so that everything is rounded."""


@dataclass(frozen=True)
class Case:
    """One merge.

    Args:
        output: dtype that is written.
        shape: of the tensor.
        values: of every input, in the order of ``inputs.dtypes``: what its dtype can hold.
        seed: that ``values`` were made from.
    """

    method: Method
    inputs: Inputs
    output: DType
    shape: tuple[int, ...]
    numbers: Numbers
    seed: int
    values: tuple[Floats, ...] = field(repr=False)

    @property
    def info(self) -> MethodInfo:
        """Of the method."""
        return info_of(self.method)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def wide(self) -> bool:
        """Whether kernels compute in float64."""
        return DType.F64 in self.inputs.dtypes

    @property
    def base(self) -> Floats | None:
        """Of the base model."""
        return None if self.inputs.base is None else self.values[0]

    @property
    def models(self) -> tuple[Floats, ...]:
        """Of each model."""
        first = 0 if self.inputs.base is None else 1
        return self.values[first : first + len(self.inputs.models)]

    @property
    def extras(self) -> dict[str, tuple[Floats, ...]]:
        """Of each further checkpoint, by kind."""
        if not self.inputs.extras:
            return dict.fromkeys(self.info.extras, ())
        rest = iter(self.values[-sum(len(kinds) for _, kinds in self.inputs.extras) :])
        return {name: tuple(islice(rest, len(k))) for name, k in self.inputs.extras}

    def arrays(self) -> list[Raw]:
        """The inputs as they are stored."""
        return list(map(stored, self.values, self.inputs.dtypes))

    def run(self, *, tile: int = 64 * CANONICAL_BLOCK, seed: int = 0) -> tuple[bytes, int]:
        """The bytes that are written, and which inputs hold NaN or infinity."""
        merged, flags = merge_raw(
            self.method,
            self.inputs,
            self.arrays(),
            output=self.output,
            tile=tile,
            seed=seed,
            shape=self.shape,
        )
        return merged.tobytes(), flags

    def merged(self) -> Floats:
        """The values that are written."""
        written, flags = self.run()
        assert flags == 0, f"finite inputs are said to hold NaN or infinity: {flags:#x}"
        return loaded(np.frombuffer(written, dtype=np.uint8), self.output).reshape(self.shape)

    def expected(self) -> Floats:
        """What the method's formula gives."""
        given: dict[str, object] = {
            item.name: getattr(self.method, item.name) for item in self.info.parameters
        }
        if self.info.random:
            given["keep"] = self.kept()
        with np.errstate(all="ignore"):
            found = ORACLES[self.info.name](self.base, self.models, **given, **self.extras)
        return np.asarray(found, dtype=np.float64)

    def kept(self) -> list[Mask]:
        """The elements that a method keeps at random, of each model: a share of ``density``."""
        return [
            (_stream(position, self.size) < share * 2.0**32).reshape(self.shape)
            for position, share in enumerate(self.method.density)
        ]


@cache
def _stream(position: int, count: int) -> npt.NDArray[np.uint32]:
    """A model's random numbers in a merge of arrays with seed 0."""
    return philox_stream(philox_key(0, position, "tensor"), 0, count)


@dataclass(frozen=True)
class Setup:
    """What kernels are compiled for: everything about a case but its numbers."""

    inputs: Inputs
    output: DType
    statics: Mapping[str, bool | enum.Enum]


_FORMATS: tuple[tuple[tuple[DType, ...], DType], ...] = (
    ((DType.F32,) * 2, DType.F32),
    ((DType.BF16,) * 4, DType.BF16),
    ((DType.F16,) * 3, DType.F16),
    ((DType.BF16, DType.F16, DType.F32, DType.BF16), DType.F32),
    ((DType.F64,) * 3, DType.F64),
    ((DType.F32,) * 3, DType.BF16),
)
"""Dtypes of a base model and models, and what is written."""


@cache
def setups(info: MethodInfo) -> tuple[Setup, ...]:
    """Setups in which each format, and each combination of bools and Enums, occurs.

    They are not multiplied: compiling a kernel takes longer than all examples that it is run on.
    """
    switches = _switches(info)
    return tuple(
        _setup(info, *_FORMATS[number % len(_FORMATS)], switches[number % len(switches)])
        for number in range(max(len(_FORMATS), len(switches)))
    )


def _setup(
    info: MethodInfo,
    dtypes: Sequence[DType],
    output: DType,
    statics: Mapping[str, bool | enum.Enum],
) -> Setup:
    least, most = info.models
    models = tuple(islice(cycle(dtypes[1:]), max(least, len(dtypes) - 1)))
    models = models[:most]
    base = dtypes[0] if info.base is Base.REQUIRED else None
    beside = tuple(DType.F64 if dtype is DType.F64 else DType.F32 for dtype in models)
    extras = tuple((kind, beside if _is_gram(info) else models) for kind in info.extras)
    return Setup(Inputs(base, models, extras), output, statics)


def _is_gram(info: MethodInfo) -> bool:
    """Whether extras are not as the tensors are, but Gram matrices of their columns or rows."""
    return bool(info.extras) and info.matrix_pass is not None


def _switches(info: MethodInfo) -> list[dict[str, bool | enum.Enum]]:
    """Every combination of bools and Enums that the method accepts."""
    choices: dict[str, list[bool | enum.Enum]] = {
        p.name: [True, False] if p.kind is bool else list(cast("type[enum.Enum]", p.kind))
        for p in info.parameters
        if p.kind is not float
    }

    def accepted(statics: Mapping[str, bool | enum.Enum]) -> bool:
        values = {p.name: (statics.get(p.name, 1.0), p.per_model) for p in info.parameters}
        method = info.cls(**{name: (v,) if many else v for name, (v, many) in values.items()})
        return not problems_of(method)

    chosen = (dict(zip(choices, values, strict=True)) for values in product(*choices.values()))
    return list(filter(accepted, chosen))


def numbers_for(item: Parameter, numbers: Numbers) -> SearchStrategy[float]:
    """Values that a parameter's own check accepts."""
    from hypothesis import strategies as st

    # Thousandths: sums are either rounded to next to nothing, or far from it.
    wanted = st.integers(-3000, 3000) | st.integers(0, 1000)
    if numbers is Numbers.WHOLE:  # few, so that weighted sums of zero are common
        wanted = st.sampled_from([1000, 500, -1000, 1000, 2000, 750, 250, 0])
    return wanted.map(lambda n: n / 1000).filter(lambda value: item.check(value) is None)


def parameters_for(
    info: MethodInfo, setup: Setup, numbers: Numbers, fixed: Mapping[str, float | bool]
) -> SearchStrategy[Method]:
    """The method with any parameters, but for those in ``fixed``."""
    from hypothesis import strategies as st

    chosen: dict[str, SearchStrategy[object]] = {}
    for item in info.parameters:
        value: SearchStrategy[float | bool | enum.Enum]
        if item.name in fixed:
            value = st.just(fixed[item.name])
        elif item.name in setup.statics:
            value = st.just(setup.statics[item.name])
        else:
            value = numbers_for(item, numbers)
        chosen[item.name] = st.tuples(*[value] * _models(setup)) if item.per_model else value
    return st.builds(info.cls, **chosen)


def _models(setup: Setup) -> int:
    return len(setup.inputs.models)


SCALAR, EMPTY, SINGLE = (), (0,), (1,)
SMALL = ((LANES - 1,), (LANES,), (LANES + 1,), (7, 5), (3, 4, 5), (1000,))
AROUND_BLOCK = tuple((CANONICAL_BLOCK + more,) for more in (-1, 0, 1))
SHAPES = (SCALAR, EMPTY, SINGLE, *SMALL * 5, *AROUND_BLOCK)
SEVERAL_BLOCKS = ((2 * CANONICAL_BLOCK + 1,), (3, CANONICAL_BLOCK), (4 * CANONICAL_BLOCK - 7,))


def cases(
    info: MethodInfo,
    *,
    numbers: Iterable[Numbers] = Numbers,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    among: Sequence[Setup] | None = None,
    fixed: Mapping[str, float | bool] | None = None,
) -> SearchStrategy[Case]:
    """Merges of a method.

    Args:
        among: setups to choose from; all where not given.
        fixed: parameters that are not to vary.
    """
    from hypothesis import assume
    from hypothesis import strategies as st

    @st.composite
    def draw_case(draw: DrawFn) -> Case:
        setup = draw(st.sampled_from(setups(info) if among is None else among))
        kind = draw(st.sampled_from(list(numbers)))
        method = draw(parameters_for(info, setup, kind, fixed or {}))
        assume(not problems_of(method) and (kind is Numbers.WHOLE or not _cancel(method)))
        shape, seed = draw(st.sampled_from(shapes)), draw(st.integers(0, 2**32 - 1))
        rng, inputs = np.random.default_rng(seed), setup.inputs
        if not _is_gram(info):
            values = _values(inputs, shape, kind, rng)
            return Case(method, inputs, setup.output, shape, kind, seed, values)
        beside, inputs = inputs.extras, dataclasses.replace(inputs, extras=())
        values = _values(inputs, shape, kind, rng)
        sides = [side for side in shape[-2:] if _has_gram(method, shape, side)]
        if sides:
            inputs = setup.inputs
            values += _grams(beside, (*shape[:-2], draw(st.sampled_from(sides))), kind, rng)
        return Case(method, inputs, setup.output, shape, kind, seed, values)

    return draw_case()


def _cancel(method: Method) -> bool:
    """Whether weights of some models cancel: then rounding decides, which only WHOLE excludes."""
    tuples = [value for value in vars(method).values() if isinstance(value, tuple)]
    return any(
        abs(sum(chosen)) < 1e-6
        for values in tuples
        for count in range(2, len(values) + 1)
        for chosen in combinations(values, count)
        if any(chosen)
    )


def _values(
    inputs: Inputs, shape: tuple[int, ...], numbers: Numbers, rng: np.random.Generator
) -> tuple[Floats, ...]:
    """Values of every input. Extras are positive, as Fisher information is."""
    extras = sum(len(kinds) for _, kinds in inputs.extras)
    dtypes = inputs.dtypes
    scale = rng.choice([0.02, 1.0]) if DType.F16 in dtypes else rng.choice([0.02, 1.0, 30.0])
    apart, common = rng.choice([0.05, 1.0]), rng.standard_normal(shape)
    found = []
    for number, dtype in enumerate(dtypes):
        extra = number >= len(dtypes) - extras
        if numbers is Numbers.WHOLE:
            values = rng.integers(1 if extra else -2, 3, shape).astype(np.float64)
        elif extra:
            values = np.exp(2 * rng.standard_normal(shape))
        else:
            changed = rng.random(shape) < 0.9
            values = scale * (common + apart * changed * rng.standard_normal(shape))
        found.append(loaded(stored(values, dtype), dtype).reshape(shape))
    return tuple(found)


MOST_INPUTS = 256
"""Of a layer in a case: matrices of more have no Gram matrices."""


def _has_gram(method: Method, shape: tuple[int, ...], side: int) -> bool:
    """Whether Gram matrices of so many inputs are those of a tensor, in a case."""
    extra = ExtraTensor("tensor", (*shape[:-2], side, side), "float32", {})
    return side <= MOST_INPUTS and not method.fits(shape, extra)


def _grams(
    kinds: Sequence[tuple[str, Sequence[DType]]],
    shape: tuple[int, ...],
    numbers: Numbers,
    rng: np.random.Generator,
) -> tuple[Floats, ...]:
    """Gram matrices, of twice as many tokens as inputs.

    Args:
        shape: [..., inputs].
    """
    found = []
    for dtype in (dtype for _, dtypes in kinds for dtype in dtypes):
        tokens = rng.standard_normal((*shape[:-1], 2 * shape[-1], shape[-1]))
        if numbers is Numbers.WHOLE:
            tokens = rng.integers(-2, 3, tokens.shape).astype(np.float64)
        gram = np.swapaxes(tokens, -1, -2) @ tokens
        found.append(loaded(stored(gram, dtype), dtype).reshape(gram.shape))
    return tuple(found)


# --- what float32 leaves open -------------------------------------------------------------------

_STEP = 2.0**-30
_DECISION = 2.0**20


def bound(case: Case, expected: Floats) -> Floats:
    """How far rounding may move each element, from how the formula moves with each of its numbers.

    Each input and parameter is changed by a small share: what comes of it, and nothing else, is
    what a rounding of that size can do. A change out of all proportion is a decision (a sign, a
    threshold) that fell the other way; decisions are not errors of rounding and count nothing.
    """
    step = np.float64(_STEP)
    slopes = np.abs(expected)
    for changed in _changed(case, 1.0 + _STEP):
        with np.errstate(all="ignore"):
            response = np.abs(changed.expected() - expected) / step
        slopes = slopes + np.where(response < _DECISION, response, 0.0)
    if case.info.adds:
        # What is kept is rounded to float32, task vectors and sums, before it is scaled; of a
        # matrix every element is a sum over all others.
        slopes = slopes + sum(np.abs(values).max(initial=0.0) for values in case.values)
    # Whole numbers are there for decisions; formulas may be ill-conditioned on them.
    roundings = 1024.0 if case.numbers is Numbers.WHOLE else 16.0
    if case.wide:
        roundings += math.sqrt(case.size)  # float64 sums over elements are rounded like the values
    wide = case.wide and not case.info.adds
    error = roundings * HALF_ULP[DType.F64 if wide else DType.F32] * slopes
    moved: Floats = error + HALF_ULP[case.output] * (np.abs(expected) + error)
    return moved + _LEAST[case.output]


def _changed(case: Case, factor: float) -> Iterable[Case]:
    """The case with one of its numbers changed, for each input and each parameter."""
    for number, values in enumerate(case.values):
        others = list(case.values)
        others[number] = values * factor
        yield dataclasses.replace(case, values=tuple(others))
    for item in case.info.parameters:
        value = getattr(case.method, item.name)
        if item.kind is float and not item.per_model:
            method = dataclasses.replace(case.method, **{item.name: value * factor})
            yield dataclasses.replace(case, method=method)
        elif item.kind is float:
            for k in range(len(value)):
                own = (*value[:k], value[k] * factor, *value[k + 1 :])
                method = dataclasses.replace(case.method, **{item.name: own})
                yield dataclasses.replace(case, method=method)


def undecided(case: Case) -> Mask:
    """Elements where rounding to float32 decides, which the formula in float64 cannot foresee."""
    find = _UNDECIDED.get(case.info.name)
    if find is None or case.base is None:
        return np.zeros(case.shape, dtype=np.bool_)
    return find(case, case.base)


def _ties_undecided(case: Case, base: Floats) -> Mask:
    """Magnitudes that float32 makes equal to a threshold's, and elections that cancel."""
    method, found = case.method, np.zeros(case.shape, dtype=np.bool_)
    votes = []
    for w, share, model in zip(method.weight, method.density, case.models, strict=True):
        delta = model - base
        count, size = int(share * delta.size), np.abs(delta)
        rank = max(1, count) if method.trim is Over.TENSOR else min(delta.size, count + 1)
        threshold = np.sort(size, axis=None)[::-1][rank - 1] if share < 1 else 0.0
        found |= (size < threshold) & (size.astype(np.float32) == np.float32(threshold))
        kept = np.where(size >= threshold, delta, 0.0)
        scale = _restoring(delta, kept) if method.rescale else 1.0
        votes.append(Vote(kept, w * scale, _short(w, scale)))
    if method.rescale and found.any():
        return np.ones(case.shape, dtype=np.bool_)  # one more element changes a scale, and so all
    found |= _cancelling(case, votes)
    if method.trim is Over.MODEL:
        total = np.sum([vote.factor * vote.delta for vote in votes], axis=0)
        if found.any() and abs(np.sign(total).sum()) <= found.sum():
            found |= total == 0  # so close that undecided elections make the majority
    return found


def _dare_undecided(case: Case, base: Floats) -> Mask:
    """Elections that cancel."""
    votes = []
    for number, keep in enumerate(case.kept()):
        w, share = case.method.weight[number], case.method.density[number]
        delta = case.models[number] - base
        kept = keep * delta
        scale = _restoring(delta, kept)
        choices = {
            "l1": Vote(kept, w * scale, _short(w, scale)),
            "inv_keep": Vote(kept, w / (share or 1.0), _short(w) and share in (0.25, 0.5, 1)),
            "none": Vote(kept, w, _short(w)),
        }
        votes.append(choices[case.method.rescale.value])
    return _cancelling(case, votes)


def _restoring(delta: Floats, kept: Floats) -> float:
    before, after = np.abs(delta).sum(), np.abs(kept).sum()
    return 1.0 if min(before, after) < 1e-7 else float(before / after)


@dataclass(frozen=True)
class Vote:
    """What one model counts in an election, ``factor * delta``, and whether that is not rounded."""

    delta: Floats
    factor: float
    exact: bool


def _short(*numbers: float) -> bool:
    """Whether they are multiples of 1/4, so that products with them are not rounded."""
    return all(4 * number == round(4 * number) for number in numbers)


def _cancelling(case: Case, votes: Sequence[Vote]) -> Mask:
    """Elements whose weighted sum is zero within rounding, and is not zero for certain."""
    kind: type[np.float64] | type[np.float32] = np.float64 if case.wide else np.float32
    exact, sizes = np.zeros(case.shape), np.zeros(case.shape)
    rounded = np.zeros(case.shape, dtype=kind)
    for vote in votes:
        exact = exact + vote.factor * vote.delta
        sizes = sizes + np.abs(vote.factor * vote.delta)
        rounded = rounded + np.multiply(kind(vote.factor), vote.delta, dtype=kind)
    near = (np.abs(exact) <= 2.0**-22 * (len(votes) + 2) * sizes) & (sizes > 0)
    certain = (rounded == exact) if all(vote.exact for vote in votes) else False
    mask: Mask = near & ~np.broadcast_to(certain, case.shape)
    return mask


def _opcm_undecided(case: Case, base: Floats) -> Mask:
    """Sums whose singular values lie so close to each other, to zero, or with their mass so close
    to ``alpha``, that rounding to float32 turns their directions."""
    method, found = case.method, False
    if method.whole("tensor", case.shape):
        order = method.order(len(case.models), 0)
        for block in np.ndindex(case.shape[:-2]):
            total, *deltas = (case.models[place][block] - base[block] for place in order)
            for delta in deltas:
                found |= _ill_conditioned(total, method.alpha)
                total = total + cleaned(total, delta, method.alpha)
    return np.full(case.shape, found)


def _ill_conditioned(total: Floats, alpha: float) -> bool:
    s = np.linalg.svd(total, compute_uv=False)
    if not s[0]:
        return False
    mass = np.cumsum(s) / s.sum()
    gaps = -np.diff(s, append=0.0) / s[0]
    return bool(gaps.min() < 0.01 or (alpha < 1 and np.abs(mass - alpha).min() < 1e-4))


_UNDECIDED: Mapping[str, Callable[[Case, Floats], Mask]] = {
    "ties": _ties_undecided,
    "dare_ties": _dare_undecided,
    "opcm": _opcm_undecided,
}
"""Methods that decide in float32: which elements are left out of comparisons, and why.

Measured over 600 cases of each: 0.4 % of the elements of ties, 0.3 % of those of dare_ties.
"""

# --- laws of methods ----------------------------------------------------------------------------

_FULL = {"weight": 1.0, "density": 1.0, "lam": 1.0, "t": 1.0, "scale": 1.0}
"""Parameters with which one model counts in full."""
_NEUTRAL = {"normalize": True, "scale": 1.0}
"""Parameters with which a method without a base model gives what all models agree on."""


def agrees_with_its_oracle(info: MethodInfo) -> None:
    """The kernels give what the formula gives on whole float64 arrays, to float32 accuracy.

    Float64 inputs: to float64 accuracy. What float32 decides is left out (``undecided``).
    """

    def law(case: Case) -> None:
        if case.size == 0:
            assert case.run() == (b"", 0)
            return
        expected = case.expected()
        _assume(np.abs(expected).max() < _LARGEST[case.output])
        _close(case.merged(), expected, bound(case, expected), undecided(case))

    _for_all(law, cases(info), examples=120)


def does_not_depend_on_tiles(info: MethodInfo) -> None:
    """The same bytes and decisions, whatever part of a tensor a kernel is run on at a time."""

    def law(case: Case) -> None:
        whole, seen = _watch(case, tile=64 * CANONICAL_BLOCK)
        for blocks in (1, 2, 3):
            tiled, seen_tiled = _watch(case, tile=blocks * CANONICAL_BLOCK)
            # Bytes seldom show what rounding did to a sum: decisions do.
            assert _decided(seen_tiled) == _decided(seen), f"tiles of {blocks} blocks"
            assert tiled == whole, f"tiles of {blocks} blocks"

    # Not whole numbers: their sums are exact in any order.
    rough = cases(info, numbers=[Numbers.ROUGH], shapes=SEVERAL_BLOCKS)
    _for_all(law, rough, examples=12)


def _decided(seen: Sequence[_Asked]) -> list[Decisions]:
    """The last decisions; none where matrices were merged as a whole."""
    return [asked.decisions for asked in seen[-1:]]


def equal_models_give_that_model(info: MethodInfo) -> None:
    """Models equal to the base model (without one: to each other) give it.

    Bits for halves, the sign of zero aside; 2 ulp of float32 for wider outputs.
    """

    def law(case: Case) -> None:
        same = loaded(stored(case.values[0], DType.BF16), DType.BF16).reshape(case.shape)
        same[np.abs(same) < 2.0**-8] = 0.0  # so that every dtype holds all of it
        extras = sum(map(len, case.extras.values()))
        values = [same] * (len(case.values) - extras) + list(
            case.values[len(case.values) - extras :]
        )
        got = dataclasses.replace(case, values=tuple(values)).merged()
        ulps = 0.0 if case.output in (DType.BF16, DType.F16) else 2.0
        _close(got, same, ulps * 2.0**-23 * np.abs(same))

    fixed = {} if info.base is Base.REQUIRED else _NEUTRAL
    _for_all(law, cases(info, fixed=fixed), examples=30)


def one_model_at_full_strength_gives_it(info: MethodInfo) -> None:
    """A single model with weight, density, lambda, t and scale 1 gives it, to a few roundings."""
    if info.models[0] > 1:
        return
    one = [_setup(info, (DType.F32, DType.F32), DType.F32, chosen) for chosen in _switches(info)]

    def law(case: Case) -> None:
        model = case.models[0]
        size = np.abs(model) + (0.0 if case.base is None else np.abs(case.base))
        _close(case.merged(), model, 4 * HALF_ULP[DType.F32] * size)

    _for_all(law, cases(info, among=one, fixed=_FULL), examples=20)


def order_matters_only_where_declared(info: MethodInfo) -> None:
    """Models in another order, with their parameters, give the same to float32 rounding."""
    several = [setup for setup in setups(info) if _models(setup) > 1]
    if info.random or info.adds or not several:
        return  # the order is a part of the random key, or of the method; or there is none

    def law(case: Case) -> None:
        expected = case.expected()
        _assume(np.abs(expected).max() < _LARGEST[case.output])
        first, most = case.merged(), 2 * bound(case, expected)
        numbers = range(len(case.models))
        for order in {(*numbers[1:], 0), tuple(reversed(numbers))}:
            other = _ordered(case, order)
            _close(other.merged(), first, most, undecided(case) | undecided(other))

    _for_all(law, cases(info, among=several, shapes=(SCALAR, *SMALL)), examples=20)


def _ordered(case: Case, order: Sequence[int]) -> Case:
    """The case with its models, and all that belongs to each, in another order."""

    def take(values: Sequence[T]) -> tuple[T, ...]:
        return tuple(values[k] for k in order)

    inputs = dataclasses.replace(
        case.inputs,
        models=take(case.inputs.models),
        extras=tuple((kind, take(dtypes)) for kind, dtypes in case.inputs.extras),
    )
    own = {p.name: take(getattr(case.method, p.name)) for p in case.info.parameters if p.per_model}
    base = () if case.base is None else (case.base,)
    extras = chain.from_iterable(take(values) for values in case.extras.values() if values)
    return dataclasses.replace(
        case,
        method=dataclasses.replace(case.method, **own),
        inputs=inputs,
        values=(*base, *take(case.models), *extras),
    )


def repeats_itself(info: MethodInfo) -> None:
    """Inputs are not written; a seed gives the same bytes again, another one others if random."""

    def law(case: Case) -> None:
        inputs = case.arrays()
        before = [array.tobytes() for array in inputs]
        merge = partial(merge_raw, case.method, case.inputs, inputs, output=case.output)
        first, again, other = merge(seed=1)[0], merge(seed=1)[0], merge(seed=2)[0]
        assert [array.tobytes() for array in inputs] == before, "an input was written"
        assert first.tobytes() == again.tobytes(), "the same seed gave other bytes"
        assert (first.tobytes() != other.tobytes()) == info.random, "what another seed gave"

    half = {"weight": 1.0, "density": 0.5, "lam": 1.0}
    rough = cases(info, numbers=[Numbers.ROUGH], shapes=[(1000,), (31, 37)], fixed=half)
    _for_all(law, rough, examples=10)


def tells_non_finite_inputs_apart(info: MethodInfo) -> None:
    """NaN and infinity are reported of the inputs that hold them, and crash no pass."""
    from hypothesis import strategies as st

    nan, inf = math.nan, math.inf
    troubles = st.sampled_from([(nan,), (inf,), (inf, -inf), (-inf, inf), (nan, -inf)])

    def law(drawn: tuple[Case, tuple[float, ...], int]) -> None:
        case, trouble, chosen = drawn
        values = [array.copy() for array in case.values]
        bad = 1 + chosen % (2 ** len(values) - 1)  # bits: a set of inputs that is not empty
        for number, array in enumerate(values):
            if bad >> number & 1:  # at both ends, so that several blocks hold some
                places = np.arange(len(trouble)) * (array.size - 1) // max(1, len(trouble) - 1)
                array.reshape(-1)[places] = trouble
        with np.errstate(all="ignore"):
            written, flags = dataclasses.replace(case, values=tuple(values)).run()
        assert flags & ~(1 << OUTPUT_BIT) == bad, f"inputs {bad:b} hold some, {flags:b} are named"
        result = loaded(np.frombuffer(written, dtype=np.uint8), case.output)
        assert bool(flags >> OUTPUT_BIT) == (not np.isfinite(result).all())

    shapes = [SINGLE, SINGLE, (LANES + 1,), (CANONICAL_BLOCK + 1,), (CANONICAL_BLOCK + 1,)]
    drawn = st.tuples(cases(info, shapes=shapes), troubles, st.integers(0, 255))
    _for_all(law, drawn, examples=120)


SECTIONS = ("Passes", "Args", "Shapes", "Raises", "Differs", "Example", "Reference")
"""Of a method's page, in this order."""


def has_a_complete_page(info: MethodInfo) -> None:
    """A title, a formula, every section in order, every parameter; the example runs."""
    lines = info.page.splitlines()
    assert len(lines) > 2 and lines[0].endswith(".") and not lines[1], "a title, then a blank line"
    too_long = [line for line in (info.cls.__doc__ or "").splitlines() if len(line) > 100]
    assert not too_long, f"lines over 100 characters: {too_long}"
    head, *parts = re.split(r"^([A-Z]\w+):", info.page, flags=re.MULTILINE)
    assert tuple(parts[::2]) == SECTIONS, f"sections {parts[::2]}, not {SECTIONS}"
    assert re.search(r"^ {4}\S.* = ", head, flags=re.MULTILINE), "an indented formula"
    sections = dict(zip(SECTIONS, parts[1::2], strict=True))
    empty = [name for name, text in sections.items() if not text.strip()]
    assert not empty, f"nothing under {empty}"
    told = re.findall(r"^ {4}(\w+): \S", sections["Args"], flags=re.MULTILINE)
    wanted = [*(item.key for item in info.parameters), *info.extras]
    assert sorted(told) == sorted(wanted), f"Args tells of {told}, not {wanted}"
    scope = {kind.__name__: kind for kind in (info.cls, *(p.kind for p in info.parameters))}
    example = doctest.DocTestParser().get_doctest(
        inspect.cleandoc(sections["Example"]),
        scope | {"merge_arrays": merge_arrays},
        info.name,
        None,
        None,
    )
    assert example.examples, "an example"
    said: list[str] = []
    failed = doctest.DocTestRunner(verbose=False).run(example, out=said.append).failed
    assert not failed, "".join(said)


def reads_what_it_declares(info: MethodInfo) -> None:
    """A measuring pass reads no input but those that it declares; others may not be in memory."""

    def law(case: Case) -> None:
        inputs = case.inputs
        names = [] if inputs.base is None else ["base"]
        names += ["models"] * len(inputs.models)
        names += [kind for kind, dtypes in inputs.extras for _ in dtypes]
        for seen in _watch(case)[1]:
            if seen.step.kind is Kind.MEASURE:
                read, declared = {names[number] for number in seen.kernel.inputs}, seen.step.reads
                assert read <= set(declared), f"{seen.step.name} reads {read}, not {declared}"

    _for_all(law, cases(info, shapes=[(LANES,)]), examples=20)


@dataclass(frozen=True)
class _Asked:
    """What a merge asked its cache of kernels for, and got."""

    step: Pass
    kernel: Kernel
    decisions: Decisions


class _Watched(Kernels):
    """The same kernels, and which were asked for."""

    def __init__(self, kernels: Kernels) -> None:
        self.seen: list[_Asked] = []
        self._kernels = kernels

    def get(
        self,
        method: Method,
        step: Pass,
        inputs: Inputs,
        decisions: Decisions,
        output: DType | None = None,
    ) -> Kernel:
        kernel = self._kernels.get(method, step, inputs, decisions, output)
        self.seen.append(_Asked(step, kernel, dict(decisions)))
        return kernel


def _watch(case: Case, *, tile: int = CANONICAL_BLOCK) -> tuple[tuple[bytes, int], list[_Asked]]:
    """What a merge gives, and the passes that it ran."""
    watched = _Watched(arrays._KERNELS)
    with mock.patch.object(arrays, "_KERNELS", watched):
        return case.run(tile=tile), watched.seen


def is_described_consistently(info: MethodInfo) -> None:
    """Defaults pass their checks, keys are unique, problems are texts, model counts make sense."""
    keys = [*(item.key for item in info.parameters), *info.inert, *info.extras]
    assert len(set(keys)) == len(keys), f"a key twice in {keys}"
    for item in info.parameters:
        assert item.kind in (float, bool) or issubclass(item.kind, enum.Enum), item.name
        assert item.default is None or isinstance(item.default, item.kind), item.name
        if item.kind is float:
            assert isinstance(item.default, float | None), item.name
            assert item.default is None or item.check(item.default) is None, item.name
            assert item.check(math.nan), f"{item.name} may be NaN"
    least, most = info.models
    assert 1 <= least <= (least if most is None else most)
    assert methods.get(info.name) is info and info.name in ORACLES and setups(info)

    def law(method: Method) -> None:
        texts = problems_of(method)
        assert all(isinstance(text, str) and text.strip() for text in texts), texts
        json.dumps(describe(method))

    for setup in setups(info):
        _for_all(law, parameters_for(info, setup, Numbers.ROUGH, {}), examples=10)


def _close(got: Floats, expected: Floats, most: Floats, left_out: Mask | None = None) -> None:
    """Every element is within ``most`` of what is expected, but for those that are left out."""
    assert got.shape == expected.shape
    wrong = ~(np.abs(got - expected) <= most)
    if left_out is not None:
        wrong &= ~left_out
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.size} elements differ; first [{first}]: "
            f"{got[first]!r}, not {expected[first]!r} within {most[first]:.3g}"
        )


def _assume(condition: object) -> None:
    from hypothesis import assume

    assume(bool(condition))


def _for_all(law: Callable[[T], None], strategy: SearchStrategy[T], *, examples: int) -> None:
    """Hold ``law`` against that many examples."""
    from hypothesis import HealthCheck, given, settings

    # Compiling makes first examples slow, and a kernel is no reason for a deadline.
    quiet = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    quiet(given(strategy)(law))()


Law = Callable[[MethodInfo], None]

METHOD_LAWS: tuple[Law, ...] = (
    is_described_consistently,
    has_a_complete_page,
    reads_what_it_declares,
    agrees_with_its_oracle,
    does_not_depend_on_tiles,
    equal_models_give_that_model,
    one_model_at_full_strength_gives_it,
    order_matters_only_where_declared,
    repeats_itself,
    tells_non_finite_inputs_apart,
)


def check_method(name: str, laws: Iterable[Law] = METHOD_LAWS) -> None:
    """Hold every law against a registered method.

    Raises:
        AssertionError: for the first that is broken; its notes name it.
    """
    info = methods.get(name)
    for law in laws:
        try:
            law(info)
        except Exception as error:
            error.add_note(f"{name} breaks the law {law.__name__}: {inspect.getdoc(law)}")
            raise
