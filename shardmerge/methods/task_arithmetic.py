"""Task arithmetic: the base model plus a weighted sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardmerge.methods.api import (
    Base,
    Expr,
    Floats,
    PerModel,
    Tile,
    merge_method,
    merges,
    oracle,
    parameter,
    sum_of,
    total_weight,
)


@merge_method("task_arithmetic", base=Base.REQUIRED, inert=("int8_mask", "density", "rescale"))
class TaskArithmetic:
    """Add the weighted sum of task vectors to the base model.

        merged = base + lambda * sum_k(w_k * delta_k)

    Passes: one; every element is read once.
    Args:
        weight: of each model, any finite number; required. Negative weights forget a task.
        normalize: divide the sum by the sum of the weights (by 1 where that is below 1e-8).
        lambda: scale of the sum.
    Shapes: elementwise; any shape.
    Raises: nothing of its own.
    Differs: mergekit rounds deltas, products and sums to the recipe's dtype; here the sum is taken
        in float64 and rounded once.
    Example:
        >>> merge_arrays(TaskArithmetic(weight=(1.0, 0.5), normalize=False, lam=2.0),
        ...              base=[1, 1], models=[[2, 1], [1, 3]])
        [3.0, 3.0]
    Reference: Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi. Editing models
        with task arithmetic. ICLR 2023. arXiv:2212.04089, section 2.
    """

    weight: PerModel[float] = parameter()
    normalize: bool = parameter(False)
    lam: float = parameter(1.0, key="lambda")

    @merges
    def merge(self, tile: Tile) -> Expr:
        """Base plus the scaled sum of weighted task vectors."""
        total = sum_of([w * delta for w, delta in zip(self.weight, tile.deltas, strict=True)])
        if self.normalize:
            total = total / total_weight(self.weight)
        return tile.reference + self.lam * total


@oracle(TaskArithmetic)
def formula(
    base: Floats, models: Sequence[Floats], *, weight: Sequence[float], normalize: bool, lam: float
) -> Floats:
    """The same on whole arrays."""
    deltas = [w * (model - base) for w, model in zip(weight, models, strict=True)]
    total: Floats = np.sum(deltas, axis=0)
    if normalize and abs(sum(weight)) >= 1e-8:
        total = total / sum(weight)
    return base + lam * total
