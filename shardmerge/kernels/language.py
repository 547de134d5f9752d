"""The expressions that merge methods are written in: arithmetic on one element of every input.

A method's pass is called once with a symbolic tile; what it returns is a small graph of ``Expr``,
which ``kernels.llvm`` turns into one native loop over the elements of real tiles.

Types follow one rule: values are ``f32`` (``f64`` for float64 inputs), numbers of a recipe and of
decisions are ``f64``, and an operation on both is done in ``f64``. So a weighted sum is computed in
float64 and rounded once, on writing, unless a method says otherwise (``in_type_of``). A Python
literal takes the type of its partner.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Type(enum.Enum):
    """Type of an expression."""

    F32 = "f32"
    F64 = "f64"
    U32 = "u32"
    BOOL = "bool"

    @property
    def is_float(self) -> bool:
        """Whether this is one of the two floating types."""
        return self in (Type.F32, Type.F64)


@dataclass(frozen=True, slots=True, eq=False)
class Expr:
    """One operation on one element. Built by operators, never by hand outside this file.

    Args:
        op: name of the operation.
        type: of the result.
        args: operands.
        value: for ``input``, ``parameter``, ``random``: which one; for ``literal``: its value.
    """

    op: str
    type: Type
    args: tuple[Expr, ...] = ()
    value: float | int | bool = 0

    def __bool__(self) -> bool:
        raise TypeError(
            "a kernel cannot branch in Python on a value that is only known when it runs; "
            "use where(condition, a, b)"
        )

    def __add__(self, other: Expr | float) -> Expr:
        return _arithmetic("add", self, other)

    def __radd__(self, other: Expr | float) -> Expr:
        return _arithmetic("add", other, self)

    def __sub__(self, other: Expr | float) -> Expr:
        return _arithmetic("sub", self, other)

    def __rsub__(self, other: Expr | float) -> Expr:
        return _arithmetic("sub", other, self)

    def __mul__(self, other: Expr | float) -> Expr:
        return _arithmetic("mul", self, other)

    def __rmul__(self, other: Expr | float) -> Expr:
        return _arithmetic("mul", other, self)

    def __truediv__(self, other: Expr | float) -> Expr:
        return _arithmetic("div", self, other)

    def __rtruediv__(self, other: Expr | float) -> Expr:
        return _arithmetic("div", other, self)

    def __neg__(self) -> Expr:
        return _unary("neg", self)

    def __abs__(self) -> Expr:
        return _unary("abs", self)

    def __lt__(self, other: Expr | float) -> Expr:
        return _compare("lt", self, other)

    def __le__(self, other: Expr | float) -> Expr:
        return _compare("le", self, other)

    def __gt__(self, other: Expr | float) -> Expr:
        return _compare("gt", self, other)

    def __ge__(self, other: Expr | float) -> Expr:
        return _compare("ge", self, other)

    def equals(self, other: Expr | float) -> Expr:
        """Whether both are equal, per element (``==`` is kept for Python's own identity)."""
        return _compare("eq", self, other)

    def __and__(self, other: Expr | int | bool) -> Expr:
        return _bitwise("and", self, other)

    def __or__(self, other: Expr | int | bool) -> Expr:
        return _bitwise("or", self, other)

    def __xor__(self, other: Expr | int | bool) -> Expr:
        return _bitwise("xor", self, other)

    def __rshift__(self, places: int) -> Expr:
        if self.type is not Type.U32 or not 0 <= places < 32:
            raise TypeError(f">> needs u32 and 0..31 places, got {self.type.value} and {places}")
        return Expr("shr", Type.U32, (self,), places)

    def __invert__(self) -> Expr:
        if self.type is not Type.BOOL:
            raise TypeError(f"~ needs a condition, got {self.type.value}")
        return Expr("not", Type.BOOL, (self,))


Number = Expr | float
"""A parameter or decision: a number in Python's eyes, a symbol while a kernel is being made."""


def literal(value: float | int | bool, type: Type) -> Expr:
    """A constant of the given type."""
    return Expr("literal", type, (), value)


def parameter(number: int) -> Expr:
    """Number ``number`` of the float64 values that are given to the kernel when it runs."""
    return Expr("parameter", Type.F64, (), number)


def _cast(x: Expr, type: Type) -> Expr:
    return x if x.type is type else Expr("cast", type, (x,))


def _unify(a: Expr | float, b: Expr | float) -> tuple[Expr, Expr]:
    """Both as expressions of one type: a literal takes its partner's, float32 grows to float64."""
    if not isinstance(a, Expr):
        if not isinstance(b, Expr):
            raise TypeError("one operand must be an expression")
        return literal(a, b.type), b
    if not isinstance(b, Expr):
        return a, literal(b, a.type)
    if a.type is not b.type:
        if not (a.type.is_float and b.type.is_float):
            raise TypeError(f"cannot combine {a.type.value} with {b.type.value}")
        return _cast(a, Type.F64), _cast(b, Type.F64)
    return a, b


def _arithmetic(op: str, left: Expr | float, right: Expr | float) -> Expr:
    a, b = _unify(left, right)
    if not a.type.is_float:
        raise TypeError(f"{op} needs floating values, got {a.type.value}")
    return Expr(op, a.type, (a, b))


def _unary(op: str, x: Expr) -> Expr:
    if not x.type.is_float:
        raise TypeError(f"{op} needs a floating value, got {x.type.value}")
    return Expr(op, x.type, (x,))


def _compare(op: str, left: Expr | float, right: Expr | float) -> Expr:
    a, b = _unify(left, right)
    if a.type is Type.BOOL:
        raise TypeError("conditions cannot be ordered")
    return Expr(op, Type.BOOL, (a, b))


def _bitwise(op: str, left: Expr, right: Expr | int | bool) -> Expr:
    a, b = _unify(left, right)
    if a.type.is_float:
        raise TypeError(f"{op} needs conditions or u32, got {a.type.value}")
    return Expr(op, a.type, (a, b))


def where(condition: Expr, a: Expr | float, b: Expr | float) -> Expr:
    """``a`` where ``condition`` holds, else ``b``."""
    if condition.type is not Type.BOOL:
        raise TypeError(f"where needs a condition, got {condition.type.value}")
    x, y = _unify(a, b)
    return Expr("where", x.type, (condition, x, y))


def wide(x: Number) -> Expr:
    """``x`` as float64. Exact."""
    return _cast(x, Type.F64) if isinstance(x, Expr) else literal(x, Type.F64)


def single(x: Expr) -> Expr:
    """``x`` rounded to float32."""
    return _cast(x, Type.F32)


def magnitude_key(x: Expr) -> Expr:
    """The bits of float32 ``|x|`` as u32: they order as the magnitudes do."""
    return Expr("bits", Type.U32, (abs(single(x)),))


def sum_of(values: Sequence[Number]) -> Expr:
    """Sum over models, in their order, in float64."""
    total = wide(values[0])
    for value in values[1:]:
        total = total + wide(value)
    return total


def in_type_of(value: Expr, number: Number) -> Expr:
    """A parameter or decision, rounded to the type of ``value``."""
    return _cast(wide(number), value.type)


def running_sum(values: Sequence[Expr]) -> Expr:
    """Sum over models, in their order, in their own type."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


@dataclass(frozen=True, slots=True)
class Tile:
    """One element of every input, as expressions: what a pass of a method sees.

    Args:
        base: of the base model; None where the method has none.
        models: of each model, in the recipe's order.
        extras: of each further checkpoint that the models name (``fisher``), by kind.
    """

    base: Expr | None
    models: tuple[Expr, ...]
    extras: Mapping[str, tuple[Expr, ...]]

    @property
    def reference(self) -> Expr:
        """The base model's element, of a method that always has one."""
        if self.base is None:
            raise TypeError("this method has no base model")
        return self.base

    @property
    def deltas(self) -> tuple[Expr, ...]:
        """Task vectors: model - base, rounded to the type of the inputs."""
        return tuple(model - self.reference for model in self.models)

    def random(self, model: int) -> Expr:
        """A uniform u32 that depends on seed, model, tensor and the element's flat index alone."""
        return Expr("random", Type.U32, (), model)


@dataclass(frozen=True, slots=True)
class Totals:
    """A summary: float64 sums over the elements. The settling pass gets a tuple of floats."""

    values: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Histograms:
    """A summary: counts of ``keys`` (u32 below 65,536), one histogram each, where ``only`` holds.

    The settling pass gets int64 counts of shape [number of keys, 65536].
    """

    keys: tuple[Expr, ...]
    only: tuple[Expr, ...] | None = None


HISTOGRAM_BINS = 65_536
