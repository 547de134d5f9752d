"""A pass of a method and the dtypes of a task, to a compiled kernel and the numbers it is run with.

The pass is called once with symbols in the place of tiles, of the recipe's numbers and of
decisions, so one kernel serves every layer whatever its weights are.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shardmerge.kernels.compile import Kernel
from shardmerge.kernels.device import Cpu, Device
from shardmerge.kernels.language import Expr, Histograms, Tile, Totals, Type, parameter
from shardmerge.methods.api import Decisions, Kind, Method, Pass
from shardmerge.numerics import DType

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The dtypes of a task's tensors, in the order of the kernel's inputs: base, models, extras.

    Args:
        wide: whether values are computed in float64 (a float64 input, or ``dtype: float64``).
    """

    base: DType | None
    models: tuple[DType, ...]
    extras: tuple[tuple[str, tuple[DType, ...]], ...] = ()
    wide: bool = False

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """All of them, in order."""
        first = () if self.base is None else (self.base,)
        return (*first, *self.models, *(dtype for _, extra in self.extras for dtype in extra))

    def tile(self) -> Tile:
        """The symbolic tile."""
        number = iter(range(len(self.dtypes)))
        kind = Type.F64 if self.wide or DType.F64 in self.dtypes else Type.F32

        def take(count: int) -> tuple[Expr, ...]:
            return tuple(Expr("input", kind, (), next(number)) for _ in range(count))

        base = None if self.base is None else take(1)[0]
        models = take(len(self.models))
        return Tile(base, models, {name: take(len(extra)) for name, extra in self.extras})


def numbers_of(method: Method, step: Pass, decisions: Decisions) -> npt.NDArray[np.float64]:
    """The float64 values that a kernel of ``step`` is run with, in the order of its symbols."""
    values: list[float] = []

    def take(value: float) -> float:
        values.append(value)
        return value

    _substitute(method, step, decisions, take)
    return np.array(values, dtype=np.float64)


def _substitute(
    method: Method, step: Pass, decisions: Decisions, replace: Callable[[float], S]
) -> tuple[Method, list[tuple[S, ...] | None]]:
    """The method and the decisions that ``step`` takes, every float replaced, in fixed order."""
    symbolic = object.__new__(type(method))
    for item in dataclasses.fields(method):
        value = getattr(method, item.name)
        if _is_number(value):
            value = replace(value)
        elif isinstance(value, tuple):
            value = tuple(replace(item) if _is_number(item) else item for item in value)
        object.__setattr__(symbolic, item.name, value)
    given = [decisions[name] for name in step.needs]
    return symbolic, [
        None if decision is None else tuple(replace(number) for number in decision)
        for decision in given
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _static(method: Method) -> tuple[object, ...]:
    """What the code of a kernel depends on, of a method's fields."""

    def shape(value: object) -> object:
        if _is_number(value):
            return "number"
        return tuple(map(shape, value)) if isinstance(value, tuple) else value

    return tuple(shape(getattr(method, item.name)) for item in dataclasses.fields(method))


class Kernels:
    """Compiled kernels of one device (None: this machine's CPUs), each made once."""

    def __init__(self, device: Device | None = None) -> None:
        self.device: Device = device or Cpu()
        self._made: dict[object, Kernel] = {}
        self._lock = threading.Lock()

    def get(
        self,
        method: Method,
        step: Pass,
        inputs: Inputs,
        decisions: Decisions,
        output: DType | None = None,
    ) -> Kernel:
        """The kernel of one pass.

        Args:
            output: dtype that a merging pass writes, or that a sum reads as its last input.
        """
        lengths = tuple(None if (d := decisions[n]) is None else len(d) for n in step.needs)
        key = (type(method), step.name, _static(method), inputs, lengths, output)
        with self._lock:
            if key not in self._made:
                self._made[key] = _compile(method, step, inputs, decisions, output, self.device)
            return self._made[key]


def _compile(
    method: Method,
    step: Pass,
    inputs: Inputs,
    decisions: Decisions,
    output: DType | None,
    device: Device,
) -> Kernel:
    symbols = iter(range(2**31))
    symbolic, given = _substitute(method, step, decisions, lambda _: parameter(next(symbols)))
    dtypes: Sequence[DType] = inputs.dtypes
    tile = inputs.tile()
    if step.kind is Kind.SUM and output is not None:
        kind = Type.F64 if output is DType.F64 else Type.F32
        written = Expr("input", kind, (), len(dtypes))
        return device.compile_totals(step.function(symbolic, tile, written), (*dtypes, output))
    result: Expr | Totals | Histograms = step.function(symbolic, tile, *given)
    if isinstance(result, Totals):
        return device.compile_totals(result, dtypes)
    if isinstance(result, Histograms):
        return device.compile_histograms(result, dtypes)
    if output is None:
        raise TypeError(f"{step.name} returns values, but nothing is to be written")
    return device.compile_map(result, dtypes, output)
