"""Passthrough: one model's tensors as they are, or scaled."""

from __future__ import annotations

from collections.abc import Sequence

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
)


@merge_method("passthrough", base=Base.UNUSED, models=(1, 1), inert=("int8_mask",))
class Passthrough:
    """Take one model's tensors unchanged: for stacking layers of several models with ``slices``.

        merged = scale * model

    Passes: one; every element is read once.
    Args:
        scale: factor of the model.
    Shapes: elementwise; any shape.
    Raises:
        RecipeError: for more than one model in a slice.
    Differs: nothing.
    Example:
        >>> merge_arrays(Passthrough(scale=(2.0,)), models=[[1, -3]])
        [2.0, -6.0]
    Reference: Goddard et al. Arcee's MergeKit: A Toolkit for Merging Large Language Models. 2024.
        arXiv:2403.13257, section 3.
    """

    scale: PerModel[float] = parameter(1.0)

    @merges
    def merge(self, tile: Tile) -> Expr:
        """The model, scaled."""
        return self.scale[0] * tile.models[0]


@oracle(Passthrough)
def formula(base: Floats | None, models: Sequence[Floats], *, scale: Sequence[float]) -> Floats:
    """The same on whole arrays."""
    return scale[0] * models[0]
