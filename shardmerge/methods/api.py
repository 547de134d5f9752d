"""What a merge method is made of. A method imports this module, and nothing else of ours.

A method is one file and one class: its fields are its parameters, its methods are its passes, its
docstring is its page.

    @merge_method("linear", base=Base.INPUT)
    class Linear:
        weight: PerModel[float] = parameter(check=finite)

        @merges
        def merge(self, tile: Tile) -> Expr: ...

Passes run in this order: each ``@measure`` reads every element and keeps a summary, each
``@settle`` turns summaries into a decision (a few numbers), and the one ``@merges`` reads again and
writes. A pass asks for an earlier result by naming it as an argument; a wrong name is refused at
import.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast, dataclass_transform

import numpy as np
import numpy.typing as npt

from shardmerge.kernels.language import (
    HISTOGRAM_BINS,
    Expr,
    Histograms,
    Number,
    Tile,
    Totals,
    in_type_of,
    literal,
    magnitude_key,
    running_sum,
    single,
    sum_of,
    where,
    wide,
)

__all__ = [
    "CONTINUAL",
    "HISTOGRAM_BINS",
    "METHODS",
    "STAND_INS",
    "Array",
    "Base",
    "Counts",
    "Decision",
    "Expr",
    "ExtraTensor",
    "Floats",
    "Histograms",
    "Matrices",
    "Method",
    "MethodInfo",
    "Number",
    "Over",
    "PerModel",
    "Tile",
    "Totals",
    "Wide",
    "describe",
    "finite",
    "fraction",
    "given",
    "in_type_of",
    "info_of",
    "levels_of",
    "literal",
    "magnitude_key",
    "measure",
    "merge_method",
    "merges",
    "merges_matrices",
    "non_negative",
    "oracle",
    "parameter",
    "running_sum",
    "settle",
    "single",
    "sum_of",
    "sums",
    "total_weight",
    "where",
    "wide",
]

T = TypeVar("T")
PerModel = tuple[T, ...]
"""A parameter that each model of the recipe gives its own value of."""

Decision = tuple[float, ...]
"""What a settling pass decides: a few numbers, the only thing that is sent to the merging tasks."""

Counts = npt.NDArray[np.int64]
"""What a settling pass gets of ``Histograms``: shape [keys, 65536]."""

Floats = npt.NDArray[np.float64]
"""Whole tensors as an oracle sees them: float64, any shape."""

Array = npt.NDArray[np.floating[Any]]
"""A matrix as a pass over whole matrices sees it: float32 or float64, shape [rows, columns]."""

Wide = npt.NDArray[np.float64]
"""The same where it is float64 whatever is stored."""

Method = Any
"""An instance of a merge method's class."""


class Base(enum.Enum):
    """What a method does with ``base_model``."""

    REQUIRED = "required"
    """Task vectors are taken from it."""
    INPUT = "input"
    """It is merged like every other model, with a weight of its own."""
    UNUSED = "unused"
    """Only its configuration and tokenizer are used."""


class Over(enum.Enum):
    """What a measuring pass is taken over."""

    TENSOR = "tensor"
    MODEL = "model"


# --- checks of parameters -----------------------------------------------------------------------

Check = Callable[[float], str | None]


def finite(value: float) -> str | None:
    """Any number but NaN and infinity."""
    return None if math.isfinite(value) else "must be a finite number"


def fraction(value: float) -> str | None:
    """A number from 0 to 1."""
    return None if 0 <= value <= 1 else "must be from 0 to 1"


def non_negative(value: float) -> str | None:
    """A finite number of at least 0."""
    return None if math.isfinite(value) and value >= 0 else "must be finite and at least 0"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as recipes see it.

    Args:
        name: of the field.
        key: in recipes (``lambda`` for ``lam``).
        kind: ``float``, ``bool`` or an Enum.
        per_model: whether each model gives its own value.
        default: None where it must be given.
        check: gives what is wrong with a number, or None.
    """

    name: str
    key: str
    kind: type
    per_model: bool
    default: float | bool | enum.Enum | None
    check: Check

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is None


def parameter(default: Any = None, *, key: str | None = None, check: Check = finite) -> Any:
    """A field of a method. Without a default, a recipe must give it.

    Args:
        default: for a per-model parameter, the default of each model.
        key: its name in recipes, where it differs from the field's.
        check: of each number.
    """
    return dataclasses.field(metadata={"key": key, "check": check, "default": default})


def total_weight(weights: Sequence[Number]) -> Expr:
    """Sum of the weights, to divide by: 1 where it is next to nothing, as mergekit."""
    total = sum_of(weights)
    return where(abs(total) < 1e-8, 1.0, total)


# --- passes -------------------------------------------------------------------------------------


class Kind(enum.Enum):
    """Kinds of passes."""

    MEASURE = "measure"
    SETTLE = "settle"
    GIVEN = "given"
    """A decision that is known before the first task, from what an earlier run has summed up."""
    MERGE = "merge"
    MATRIX = "matrix"
    SUM = "sum"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a method.

    Args:
        needs: names of the earlier results it takes.
        over: for a measure: a constant, or the name of the field that says it.
        when: for a measure: whether these parameters need it; its result is None where not.
        reads: for a measure: the inputs it reads (``base``, ``models``, or a kind of extras).
        same: for a settle over the model: fields that must be the same for all its tensors.
        workspace: for a matrix pass: bytes that it takes for a matrix, beside the stored inputs.
    """

    kind: Kind
    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    over: Over | str = Over.TENSOR
    when: Callable[[Any], bool] | None = None
    reads: tuple[str, ...] = ("base", "models")
    same: tuple[str, ...] = ()
    workspace: Callable[..., int] | None = None

    def over_of(self, method: Method) -> Over:
        """What this measure is taken over, for ``method``'s parameters."""
        return getattr(method, self.over) if isinstance(self.over, str) else self.over

    def needed(self, method: Method) -> bool:
        """Whether ``method``'s parameters need this measure."""
        return self.when is None or self.when(method)


F = TypeVar("F", bound=Callable[..., Any])


def measure(
    *,
    over: Over | str = Over.TENSOR,
    when: Callable[[Any], bool] | None = None,
    reads: tuple[str, ...] = ("base", "models"),
) -> Callable[[F], F]:
    """Mark a pass that reads every element and returns ``Totals`` or ``Histograms``."""
    return lambda function: _mark(function, Kind.MEASURE, over=over, when=when, reads=reads)


def settle(*, same: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Mark a pure pass that turns summaries (and earlier decisions) into a ``Decision``.

    It is not called, and its result is None, where one of the results it names is None.
    """
    return lambda function: _mark(function, Kind.SETTLE, same=same)


def given(function: F) -> F:
    """Mark a decision over the model that a run is given instead of measuring it.

    The function is not called; its docstring says what the decision holds.
    """
    return _mark(function, Kind.GIVEN)


def merges(function: F) -> F:
    """Mark the pass whose result is written."""
    return _mark(function, Kind.MERGE)


def merges_matrices(*, workspace: Callable[..., int]) -> Callable[[F], F]:
    """Mark the pass that takes the place of ``@merges`` where a method needs whole matrices.

    It is called as ``function(self, matrices)`` with ``Matrices`` and returns the result, float32
    or float64, and the sums of the ``@sums`` pass (none without one). The method says by
    ``whole(name, shape)`` for which tensors; of those, a method with ``extras`` sees as a whole
    those that the further checkpoints hold. It may say by ``tables()`` which names (globs) of
    matrices are none for it.

    Args:
        workspace: bytes that it takes for a matrix of so many rows and columns, its result and all
            values that it asks for included. With ``extras`` it is also given the number of rows
            of the matrices that these hold.
    """
    return lambda function: _mark(function, Kind.MATRIX, workspace=workspace)


def sums(function: F) -> F:
    """Mark a pass that returns ``Totals`` of the inputs and of what was written of them.

    It is called as ``function(self, tile, written)`` for every tile that was merged. The sums over
    the model are published with the result: ``Output`` of a run that another goes on from.
    """
    return _mark(function, Kind.SUM)


def _mark(function: F, kind: Kind, **options: Any) -> F:
    names = list(inspect.signature(function).parameters)[1:]
    needs = {Kind.SETTLE: tuple(names), Kind.MATRIX: (), Kind.SUM: ()}.get(kind, tuple(names[1:]))
    function.__dict__["merge_pass"] = Pass(kind, function.__name__, function, needs, **options)
    return function


# --- methods ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A registered method.

    Args:
        models: how many models it takes besides the base (for ``Base.INPUT``: with it).
        extras: kinds of further checkpoints that each model names (``fisher``). They hold a tensor
            of the same name and shape for every tensor, unless the method ``fits``.
        inert: parameters of mergekit's that are accepted and have no effect here.
        random: whether it draws random numbers, so that the order of models matters.
        adds: whether what its merge pass gives is not a model but a sum of task vectors, in
            float32, which is scaled and added to the base model by a second run.
        matrix_pass: takes the place of the merge pass for tensors of whole matrices.
        sum_pass: what is summed up while merging.
    """

    name: str
    cls: type
    base: Base
    models: tuple[int, int | None]
    extras: tuple[str, ...]
    inert: tuple[str, ...]
    random: bool
    adds: bool
    parameters: tuple[Parameter, ...]
    passes: tuple[Pass, ...]
    matrix_pass: Pass | None
    sum_pass: Pass | None

    @property
    def page(self) -> str:
        """The method's documentation."""
        return inspect.cleandoc(self.cls.__doc__ or "")

    @property
    def merge_pass(self) -> Pass:
        """The pass whose result is written."""
        return self.passes[-1]


@functools.lru_cache(maxsize=4096)
def levels_of(method: Method) -> Mapping[str, Over | None]:
    """What each pass but the last is taken over, for a method's parameters; None: not needed.

    A settling pass is taken over the tensor as soon as one of its results is, and is needed where
    all of them are.
    """
    found: dict[str, Over | None] = {}
    for step in info_of(method).passes[:-1]:
        if step.kind is Kind.MEASURE:
            found[step.name] = step.over_of(method) if step.needed(method) else None
            continue
        if step.kind is Kind.GIVEN:
            found[step.name] = Over.MODEL
            continue
        over = [found[need] for need in step.needs]
        found[step.name] = None if None in over else min(over, key=_tensor_first)
    return found


def _tensor_first(over: Over | None) -> bool:
    return over is not Over.TENSOR


METHODS: dict[str, MethodInfo] = {}
"""Every method that a recipe can name; filled by importing the files of this folder."""

CONTINUAL: dict[str, MethodInfo] = {}
"""Every method that adds one model after the other to what is there."""

STAND_INS: dict[str, MethodInfo] = {}
"""What ``shardmerge fisher --from`` can make; no recipe names it."""

ORACLES: dict[str, Callable[..., Floats]] = {}
"""The formula of every method on whole float64 arrays, for tests."""

C = TypeVar("C", bound=type)


@dataclass_transform(field_specifiers=(parameter,), frozen_default=True, kw_only_default=True)
def merge_method(
    name: str,
    *,
    base: Base,
    models: tuple[int, int | None] = (1, None),
    extras: tuple[str, ...] = (),
    inert: tuple[str, ...] = (),
    random: bool = False,
    adds: bool = False,
    among: Sequence[dict[str, MethodInfo]] = (METHODS,),
) -> Callable[[C], C]:
    """Register a class as the merge method ``name`` and make it a frozen dataclass.

    A method may define ``problems(self) -> Iterable[str]``: what is wrong with its parameters taken
    together (a zero sum of weights).

    A method whose ``extras`` are of other shapes than the tensors defines ``fits(self, shape,
    extra) -> str``: why an ``ExtraTensor`` is none for a tensor of that shape, empty where it is
    one; and ``fitted(self, shape, extras) -> Method | str``: what merges the tensor, given one of
    each model, or why nothing can. Tensors of which no model has one are merged element by element.

    A method that ``adds`` defines ``scale(self, norms, total) -> float``: what the sum is
    multiplied with, from the norms of all task vectors in it, in order, and its own. It may define
    ``order(self, count, seed) -> Sequence[int]``: the order in which models are added.

    Args:
        among: where it can be named: ``METHODS``, ``CONTINUAL``, or nowhere.

    Raises:
        TypeError: at import, for a pass that names no earlier result, or not exactly one merge.
    """

    def register(cls: C) -> C:
        made: Any = dataclass(frozen=True, kw_only=True)(cls)
        found: list[Pass] = [
            value.merge_pass for value in vars(cls).values() if hasattr(value, "merge_pass")
        ]
        beside = {step.kind: step for step in found if step.kind in (Kind.MATRIX, Kind.SUM)}
        passes = tuple(step for step in found if step.kind not in beside)
        _check_passes(name, passes)
        made.merge_info = MethodInfo(
            name=name,
            cls=made,
            base=base,
            models=models,
            extras=extras,
            inert=inert,
            random=random,
            adds=adds,
            parameters=_parameters(made),
            passes=passes,
            matrix_pass=beside.get(Kind.MATRIX),
            sum_pass=beside.get(Kind.SUM),
        )
        for registry in among:
            registry[name] = made.merge_info
        return cast(C, made)

    return register


def oracle(method: type) -> Callable[[F], F]:
    """Register a function as the formula of ``method``: whole float64 arrays in, one out.

    It is called as ``formula(base, models, **parameters)``, with each of the method's ``extras`` as
    a further list of arrays, and ``keep`` (a list of boolean masks) where the method is random.
    """

    def register(function: F) -> F:
        ORACLES[info_of(method).name] = function
        return function

    return register


def info_of(method: Method) -> MethodInfo:
    """The registered description of a method, or of its class."""
    info: MethodInfo = method.merge_info
    return info


def describe(method: Method) -> dict[str, object]:
    """A method's name and parameters as plain values, by recipe key: for plans and fingerprints."""
    info = info_of(method)

    def plain(value: object) -> object:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value.value if isinstance(value, enum.Enum) else value

    values = {item.key: plain(getattr(method, item.name)) for item in info.parameters}
    return {"merge_method": info.name, "parameters": values}


def problems_of(method: Method) -> tuple[str, ...]:
    """What is wrong with a method's parameters taken together."""
    find: Callable[[], Iterable[str]] | None = getattr(method, "problems", None)
    return tuple(find()) if find else ()


def _parameters(cls: type) -> tuple[Parameter, ...]:
    hints = typing.get_type_hints(cls)
    found = []
    for item in dataclasses.fields(cls):
        hint, per_model = hints[item.name], False
        if typing.get_origin(hint) is tuple:
            hint, per_model = typing.get_args(hint)[0], True
        found.append(
            Parameter(
                name=item.name,
                key=item.metadata["key"] or item.name,
                kind=hint,
                per_model=per_model,
                default=item.metadata["default"],
                check=item.metadata["check"],
            )
        )
    return tuple(found)


def _check_passes(name: str, passes: tuple[Pass, ...]) -> None:
    known: set[str] = set()
    for step in passes:
        wrong = [need for need in step.needs if need not in known]
        if wrong:
            raise TypeError(
                f"{name}.{step.name} asks for {', '.join(wrong)}; earlier results are "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        known.add(step.name)
    if [step.kind for step in passes].count(Kind.MERGE) != 1 or passes[-1].kind is not Kind.MERGE:
        raise TypeError(f"{name} needs exactly one @merges pass, and it must be the last")


Decisions = Mapping[str, Decision | None]
"""Decisions by the name of the settling pass; None where it was not needed."""


# --- whole matrices -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExtraTensor:
    """A tensor of a further checkpoint, as a plan knows it.

    Args:
        name: in that checkpoint.
        shape: of it.
        dtype: ``float32``, ``bfloat16``, ...
        config: of that checkpoint: its parsed ``config.json``, or an empty map.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    config: Mapping[str, object]


class Matrices(Protocol):
    """One matrix of every input: what a pass that needs whole matrices sees.

    What is asked for is read then, and belongs to the pass.
    """

    @property
    def models(self) -> int:
        """How many models there are."""

    def model(self, model: int) -> Wide:
        """The values of a model, [rows, columns]."""

    def delta(self, model: int) -> Array:
        """The task vector of a model: model - base; float32, once rounded, [rows, columns]."""

    def extra(self, kind: str) -> Array | None:
        """The first matrix of further checkpoints of this kind; float32, [rows, columns]. None
        where there is none.
        """

    def wide_extra(self, kind: str, model: int) -> Wide:
        """The matrix of a model's further checkpoint of this kind, of whatever shape."""

    def unfit(self, kind: str, why: str, model: int | None = None) -> Exception:
        """What to raise for a further checkpoint (all of this kind, without ``model``) whose values
        the pass cannot use.
        """

    def linear(self, function: Callable[..., Any], *matrices: Array) -> Array:
        """``function(*matrices, xp=...)`` where kernels run; ``xp`` is numpy or torch."""
