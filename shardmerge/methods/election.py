"""The sign election of TIES, shared by the methods that end with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardmerge.methods.api import Expr, Floats, Number, sum_of, where


def elected_sum(
    weighted: Sequence[Expr], weights: Sequence[Number], *, normalize: bool, positive: Expr
) -> Expr:
    """Sum of the weighted task vectors whose sign is the elected one.

    Args:
        weighted: weight times task vector, of each model.
        weights: of each model.
        normalize: divide by the sum of the weights that agree (by 1 where that is 0).
        positive: whether the elected sign is +, per element.
    """
    agrees = [(positive & (value > 0.0)) | (~positive & (value < 0.0)) for value in weighted]
    total = sum_of([where(yes, value, 0.0) for yes, value in zip(agrees, weighted, strict=True)])
    if not normalize:
        return total
    mass = sum_of([where(yes, weight, 0.0) for yes, weight in zip(agrees, weights, strict=True)])
    return total / where(mass.equals(0.0), 1.0, mass)


def elected_sum_formula(
    weighted: Floats, weights: Floats, *, normalize: bool, sign: Floats
) -> Floats:
    """The same on whole arrays: ``weighted`` [models, ...], ``weights`` [models], ``sign`` [...]."""

    agrees = np.sign(weighted) == sign
    total: Floats = (weighted * agrees).sum(axis=0)
    if not normalize:
        return total
    mass = np.tensordot(weights, agrees.astype(np.float64), axes=1)
    mass[mass == 0] = 1.0
    return total / mass
