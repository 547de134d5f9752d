"""Fisher merging: the average of models, weighted per element by Fisher information."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from shardmerge.methods.api import (
    Base,
    Decision,
    Expr,
    Floats,
    Number,
    Over,
    PerModel,
    Tile,
    Totals,
    measure,
    merge_method,
    merges,
    non_negative,
    oracle,
    parameter,
    settle,
    sum_of,
    where,
    wide,
)

SMALL = (
    "elements of F are often far below the epsilon of 1e-6 that merge_method: fisher adds to them; "
    "a recipe should then say parameters: {epsilon: 1.0e-12}, or less"
)
"""What whoever makes an F should know."""


@merge_method("fisher", base=Base.UNUSED, extras=("fisher",), inert=("int8_mask",))
class Fisher:
    """Average models, each element weighted by the model's diagonal Fisher information.

    Each model of the recipe names a checkpoint ``fisher:`` that holds, under the same tensor names,
    the diagonal Fisher information of its parameters.

        merged = sum_k(w_k * n_k * (F_k + epsilon) * model_k) / sum_k(w_k * n_k * (F_k + epsilon))

    Passes: with ``normalize``, a measure of the norm of each F over the whole model, which reads
        only F; then the merge.
    Args:
        weight: of each model, at least 0.
        normalize: n_k = 1 / (norm of F_k over the model + epsilon), so that no model counts more
            only because its gradients are larger; else n_k = 1.
        epsilon: added to every F, at least 0; with F = 0 everywhere this is the plain average. It
            should be far below F: where it is above, models are weighed as a whole, by n_k.
        fisher: of each model, the checkpoint that holds F; beside ``model:``.
    Shapes: elementwise; any shape; F has the shape of its tensor.
    Raises:
        RecipeError: for weights that are all 0.
        NonFiniteError: where all F are 0 with epsilon 0: a division of 0 by 0; and for F below 0,
            which no mean of squares is: it counts as NaN.
    Differs: the authors' code puts a floor of 1e-6 under the target model's F only; here epsilon is
        added to all, as FusionBench and MergeLM do. A common factor of all n_k cancels, so they
        are not divided by their sum.
    Example:
        >>> merge_arrays(Fisher(weight=(1.0, 1.0), normalize=False, epsilon=0.0),
        ...              models=[[4, 0], [0, 4]], fisher=[[3, 1], [1, 1]])
        [3.0, 2.0]
    Reference: Matena, Raffel. Merging Models with Fisher-Weighted Averaging. NeurIPS 2022.
        arXiv:2111.09832, equation 4.
    """

    weight: PerModel[float] = parameter(1.0, check=non_negative)
    normalize: bool = parameter(True)
    epsilon: float = parameter(1e-6, check=non_negative)

    def problems(self) -> Iterator[str]:
        """Weights that are all zero have no average."""
        if not any(self.weight):
            yield "all weights are 0; give at least one model a weight above 0"

    @measure(over=Over.MODEL, when=lambda self: self.normalize, reads=("fisher",))
    def squares(self, tile: Tile) -> Totals:
        """Sums of squares of each Fisher information."""
        return Totals(tuple(wide(f) * wide(f) for f in tile.extras["fisher"]))

    @settle(same=("epsilon",))
    def scales(self, squares: Sequence[float]) -> Decision:
        """Each model's scale: the inverse norm, relative to the largest one."""
        norms = [math.sqrt(square) + self.epsilon for square in squares]
        smallest = min(norms)
        return tuple(smallest / norm if norm else 1.0 for norm in norms)

    @merges
    def merge(self, tile: Tile, scales: Decision | None) -> Expr:
        """The average, weighted per element."""
        weights: Sequence[Number] = self.weight
        if scales is not None:
            weights = [w * n for w, n in zip(weights, scales, strict=True)]
        masses = [
            w * (where(f < 0, math.nan, wide(f)) + self.epsilon)
            for w, f in zip(weights, tile.extras["fisher"], strict=True)
        ]
        total = sum_of([m * model for m, model in zip(masses, tile.models, strict=True)])
        return total / sum_of(masses)


@oracle(Fisher)
def formula(
    base: Floats | None,
    models: Sequence[Floats],
    *,
    fisher: Sequence[Floats],
    weight: Sequence[float],
    normalize: bool,
    epsilon: float,
) -> Floats:
    """Equation 4 on whole arrays. One array is the whole model."""
    inverse = [1.0 / (np.linalg.norm(f) + epsilon) if normalize else 1.0 for f in fisher]
    masses = [
        w * n / sum(inverse) * (f + epsilon)
        for w, n, f in zip(weight, inverse, fisher, strict=True)
    ]
    total: Floats = np.sum([m * model for m, model in zip(masses, models, strict=True)], axis=0)
    mass: Floats = np.sum(masses, axis=0)
    return total / mass
