"""Sums of task vectors that grow by one model at a time, and the baselines of continual merging."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shardmerge.methods.api import (
    CONTINUAL,
    Array,
    Base,
    Counts,
    Decision,
    Expr,
    Histograms,
    Method,
    Over,
    Tile,
    Totals,
    fraction,
    in_type_of,
    literal,
    measure,
    merge_method,
    merges,
    parameter,
    running_sum,
    settle,
    single,
    sums,
    wide,
)
from shardmerge.methods.ties import Ties

_SQUARED_AT_ONCE = 2**16


def added(tile: Tile) -> Expr:
    """The sum so far and the task vectors; float32 after each, as if each had been added alone.

    A task vector is rounded to float32 first. So it does not matter whether it was computed in
    float64, because another model of the recipe is.
    """
    terms = (*tile.extras.get("state", ()), *tile.deltas)
    return running_sum([single(term) for term in terms])


def norms_of(tile: Tile, written: Expr) -> Totals:
    """Sums of squares of each task vector, and of the sum."""
    values = [single(value) for value in (*tile.deltas, written)]
    return Totals(tuple(wide(value) * wide(value) for value in values))


def squares(values: Array) -> float:
    """The sum of squares of all elements, in float64: the same however it is computed elsewhere."""
    flat = values.reshape(-1)
    blocks = (
        flat[start : start + _SQUARED_AT_ONCE].astype(np.float64)
        for start in range(0, flat.size, _SQUARED_AT_ONCE)
    )
    return math.fsum(float(np.square(block).sum()) for block in blocks)


@merge_method("linear", base=Base.REQUIRED, adds=True, among=(CONTINUAL,))
class RunningMean:
    """The average of all models so far.

        merged = base + sum_t(delta_t) / T

    Reference: FusionBench, continual_weight_average: merged = (t * merged + model) / (t + 1).
    """

    def scale(self, norms: Sequence[float], total: float) -> float:
        """One over the number of models."""
        return 1 / len(norms)

    @merges
    def merge(self, tile: Tile) -> Expr:
        """Add the task vector."""
        return added(tile)

    @sums
    def norms(self, tile: Tile, written: Expr) -> Totals:
        """Sums of squares of each task vector, and of the sum."""
        return norms_of(tile, written)


@merge_method("task_arithmetic", base=Base.REQUIRED, adds=True, among=(CONTINUAL,))
class RunningTaskArithmetic:
    """The base model and the scaled sum of all task vectors so far.

        merged = base + lambda * sum_t(delta_t)

    Args:
        lambda: scale of every task vector.
    Reference: FusionBench, continual_task_arithmetic: merged += 0.3 * delta.
    """

    lam: float = parameter(0.3, key="lambda")

    def scale(self, norms: Sequence[float], total: float) -> float:
        """``lambda``."""
        return self.lam

    @merges
    def merge(self, tile: Tile) -> Expr:
        """Add the task vector."""
        return added(tile)

    @sums
    def norms(self, tile: Tile, written: Expr) -> Totals:
        """Sums of squares of each task vector, and of the sum."""
        return norms_of(tile, written)


@merge_method("ties", base=Base.REQUIRED, adds=True, among=(CONTINUAL,))
class RunningTies:
    """TIES of the sum so far and the new task vector, scaled and added to the sum.

        S_1 = delta_1;  S_t = S_(t-1) + lambda * ties(S_(t-1), delta_t);  merged = base + S_T

    Args:
        density: share of the elements of both that is kept, per tensor, 0 to 1.
        lambda: scale of what is added.
        normalize: divide by the number of values that agree (disjoint mean), else their sum.
    Differs: the reference trims over the whole model; here each tensor keeps its share.
    Reference: FusionBench, continual_ties_merging: merged += 0.5 * ties([merged, delta]).
    """

    density: float = parameter(0.2, check=fraction)
    lam: float = parameter(0.5, key="lambda")
    normalize: bool = parameter(False)

    def first(self) -> Method:
        """What the first model is added by: there is nothing to elect signs with."""
        return RunningTaskArithmetic(lam=1.0)

    def scale(self, norms: Sequence[float], total: float) -> float:
        """The sum is scaled already."""
        return 1.0

    def _ties(self) -> Ties:
        return Ties(
            weight=(1.0, 1.0),
            density=(self.density, self.density),
            normalize=self.normalize,
            rescale=False,
            lam=1.0,
            trim=Over.TENSOR,
        )

    @measure(when=lambda self: self.density < 1, reads=("base", "models", "state"))
    def coarse(self, tile: Tile) -> Histograms:
        """Counts by the upper bits of the magnitudes."""
        return self._ties().coarse(_pair(tile))

    @settle()
    def bins(self, coarse: Counts) -> Decision:
        """The bin that holds each threshold."""
        return self._ties().bins(coarse)

    @measure(when=lambda self: self.density < 1, reads=("base", "models", "state"))
    def fine(self, tile: Tile, bins: Decision) -> Histograms:
        """Counts by the lower bits, inside the bin."""
        return self._ties().fine(_pair(tile), bins)

    @settle()
    def cut(self, coarse: Counts, fine: Counts) -> Decision:
        """Both thresholds."""
        return self._ties().cut(coarse, fine)

    @merges
    def merge(self, tile: Tile, cut: Decision | None) -> Expr:
        """Add what agrees."""
        (state,) = tile.extras["state"]
        merged = self._ties().merge(_pair(tile), cut, None, None)
        return state + in_type_of(merged, self.lam) * merged

    @sums
    def norms(self, tile: Tile, written: Expr) -> Totals:
        """Sums of squares of the task vector, and of the sum."""
        return norms_of(tile, written)


def _pair(tile: Tile) -> Tile:
    """The sum so far and the new task vector, as task vectors over a base model of zeros."""
    (state,), (delta,) = tile.extras["state"], tile.deltas
    return Tile(literal(0.0, delta.type), (state, delta), {})
