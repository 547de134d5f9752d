"""The sign election of TIES, shared by the methods that end with it.

It is computed in the type of the inputs, like the implementations that users compare with: where
weighted values cancel up to rounding (bfloat16 models with weights like 0.3 and 0.4 have many such
elements), the sign that rounding leaves decides, and a wider type would elect others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardmerge.methods.api import Expr, Floats, Number, in_type_of, running_sum, where


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
    kept = [where(yes, value, 0.0) for yes, value in zip(agrees, weighted, strict=True)]
    total = running_sum(kept)
    if not normalize:
        return total
    own = [in_type_of(total, weight) for weight in weights]
    mass = running_sum([where(yes, w, 0.0) for yes, w in zip(agrees, own, strict=True)])
    return total / where(mass.equals(0.0), 1.0, mass)


def elected_sum_formula(
    weighted: Floats, weights: Floats, *, normalize: bool, sign: Floats
) -> Floats:
    """On whole arrays: ``weighted`` [models, ...], ``weights`` [models], ``sign`` [...]."""

    agrees = np.sign(weighted) == sign
    total: Floats = (weighted * agrees).sum(axis=0)
    if not normalize:
        return total
    mass = np.tensordot(weights, agrees.astype(np.float64), axes=1)
    return total / np.where(mass == 0, 1.0, mass)
