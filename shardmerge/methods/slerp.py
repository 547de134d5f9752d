"""SLERP: spherical interpolation from the base model to one other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shardmerge.methods.api import (
    Base,
    Decision,
    Expr,
    Floats,
    Tile,
    Totals,
    finite,
    measure,
    merge_method,
    merges,
    oracle,
    parameter,
    settle,
    wide,
)

_PARALLEL = 0.9995
"""Above this cosine the great circle is too short to divide by; the line is taken instead."""
_NO_DIRECTION = 1e-8
"""A tensor with a norm below this is not normalised."""


@merge_method("slerp", base=Base.REQUIRED, models=(1, 1), inert=("int8_mask",))
class Slerp:
    """Interpolate between two models along the great circle, per tensor.

    With ``theta`` the angle between the two tensors as flat vectors:

        merged = sin((1 - t) * theta) / sin(theta) * base + sin(t * theta) / sin(theta) * model

    Nearly parallel tensors (|cosine| above 0.9995) are interpolated along the line.

    Passes: a measure of the inner product and both norms, per tensor; then the merge.
    Args:
        t: 0 gives the base model, 1 the other; required.
    Shapes: any; the angle is between whole tensors.
    Raises:
        RecipeError: for any number of models but two.
    Differs: mergekit sums the inner product in float32; here it is summed in float64 blocks.
    Example:
        >>> merge_arrays(Slerp(t=0.5), base=[2, 0], models=[[0, 2]])
        [1.4142135381698608, 1.4142135381698608]
    Reference: Shoemake. Animating rotation with quaternion curves. SIGGRAPH 1985, section 3.3.
    """

    t: float = parameter(check=finite)

    @measure()
    def products(self, tile: Tile) -> Totals:
        """Inner product of the two tensors, and of each with itself."""
        a, b = wide(tile.reference), wide(tile.models[0])
        return Totals((a * b, a * a, b * b))

    @settle()
    def coefficients(self, products: Sequence[float]) -> Decision:
        """The coefficients of both models."""
        return _coefficients(self.t, *products)

    @merges
    def merge(self, tile: Tile, coefficients: Decision) -> Expr:
        """The combination of both."""
        return coefficients[0] * tile.reference + coefficients[1] * tile.models[0]


def _coefficients(t: float, inner: float, a_square: float, b_square: float) -> tuple[float, float]:
    norms = [math.sqrt(square) for square in (a_square, b_square)]
    cosine = inner
    for norm in norms:
        cosine /= norm if norm > _NO_DIRECTION else 1.0
    if abs(cosine) > _PARALLEL:
        return 1.0 - t, t
    theta = math.acos(cosine)
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


@oracle(Slerp)
def formula(base: Floats, models: Sequence[Floats], *, t: float) -> Floats:
    """The same on whole arrays."""
    a, b = base.ravel(), models[0].ravel()
    unit_a, unit_b = (v / n if (n := np.linalg.norm(v)) > _NO_DIRECTION else v for v in (a, b))
    cosine = float(unit_a @ unit_b)
    if abs(cosine) > _PARALLEL:
        return (1 - t) * base + t * models[0]
    theta = np.arccos(cosine)
    first, second = np.sin((1 - t) * theta), np.sin(t * theta)
    result: Floats = (first * base + second * models[0]) / np.sin(theta)
    return result
