"""The second run of a method that adds: the base model and the scaled sum of task vectors."""

from __future__ import annotations

from shardmerge.methods.api import (
    Base,
    Decision,
    Expr,
    Tile,
    given,
    merge_method,
    merges,
    wide,
)


@merge_method("scaled", base=Base.REQUIRED, models=(1, 1), among=())
class Scaled:
    """Scale a sum that was kept, and add it to the base model.

    merged = base + scale * sum
    """

    @given
    def scale(self) -> Decision:
        """What the sum is multiplied with."""
        raise NotImplementedError

    @merges
    def merge(self, tile: Tile, scale: Decision) -> Expr:
        """Add, in float64, and round once."""
        (total,) = tile.models
        return wide(tile.reference) + wide(total) * scale[0]
