"""What stands in for Fisher information where no data is at hand."""

from __future__ import annotations

from shardmerge.methods.api import (
    STAND_INS,
    Base,
    Expr,
    Tile,
    literal,
    merge_method,
    merges,
    wide,
)


@merge_method("task_vector_squared", base=Base.REQUIRED, models=(1, 1), among=(STAND_INS,))
class TaskVectorSquared:
    """Square the task vector: what fine-tuning has changed most counts most.

    F = (model - base)^2

    In float64, rounded once: 0 below 2.6e-23 in float32.
    """

    @merges
    def merge(self, tile: Tile) -> Expr:
        """The square of the difference."""
        (model,) = tile.models
        delta = wide(model) - wide(tile.reference)
        return delta * delta


@merge_method("adam", base=Base.UNUSED, models=(1, 1), among=(STAND_INS,))
class SecondMoment:
    """Take Adam's second moment: the decaying mean of squared gradients of batches.

    F = exp_avg_sq, as it is stored: without the correction of its bias

    Reference: Kingma, Ba. Adam: A Method for Stochastic Optimization. ICLR 2015. arXiv:1412.6980.
    """

    @merges
    def merge(self, tile: Tile) -> Expr:
        """The stored value."""
        (moment,) = tile.models
        return moment


@merge_method("untrained", base=Base.UNUSED, models=(1, 1), among=())
class Untrained:
    """Give 0: a parameter that was not trained has no second moment."""

    @merges
    def merge(self, tile: Tile) -> Expr:
        """0, whatever the parameter is."""
        (value,) = tile.models
        return literal(0.0, value.type)
