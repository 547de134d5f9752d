"""TIES: trim each task vector, elect one sign per element, average what agrees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shardmerge.methods.api import (
    Base,
    Counts,
    Decision,
    Expr,
    Floats,
    Histograms,
    Number,
    Over,
    PerModel,
    Tile,
    Totals,
    fraction,
    in_type_of,
    magnitude_key,
    measure,
    merge_method,
    merges,
    oracle,
    parameter,
    running_sum,
    settle,
    single,
    where,
    wide,
)
from shardmerge.methods.election import elected_sum, elected_sum_formula

# The bits of |delta| as float32, without its sign, are 31: upper 16 first, then lower 15.
_LOWER_BITS = 15
_LOWER_MASK = (1 << _LOWER_BITS) - 1


@merge_method("ties", base=Base.REQUIRED, inert=("int8_mask",))
class Ties:
    """Merge task vectors by trimming, sign election and disjoint mean.

    Each task vector keeps its ``density`` largest magnitudes. Per element, the sign with the larger
    weighted sum is elected; the values of that sign are averaged by weight, scaled by ``lambda``
    and added to the base model.

        merged = base + lambda * sum_k(w_k * trim(delta_k) * [sign agrees]) / sum_k(w_k * [agrees])

    Passes: two measures find the exact magnitude to trim at (counts by the upper 16 bits of
        |delta|, then by the lower bits inside one of those bins), then the merge; with
        ``trim: model`` a third counts signs, with ``rescale`` one sums magnitudes per tensor.
        With density 1 there is nothing to measure.
    Args:
        weight: of each model, any finite number; required.
        density: share of each task vector's elements that is kept, 0 to 1.
        normalize: divide by the sum of the weights that agree (disjoint mean), else the sum.
        rescale: restore each tensor's sum of magnitudes after trimming, of each model.
        lambda: scale of the merged task vector.
        trim: ``tensor``: each tensor keeps its share; ``model``: the whole model keeps its share,
            as the authors' code.
    Shapes: elementwise; any shape.
    Raises:
        RecipeError: for a density outside 0 to 1; for ``rescale`` with ``trim: model``.
    Differs: every element whose magnitude is at least the max(1, int(density * n))-th largest is
        kept (over a model the int(density * n) + 1-th, as the authors' code): of equal magnitudes
        all or none. mergekit keeps exactly that many, in an unstable order. A zero sum elects +
        with ``trim: tensor`` (mergekit), the model's majority sign with ``trim: model`` (the
        paper), where no majority counts as -. Sums that cancel up to rounding elect the sign that
        float32 leaves, in the order of the models, as mergekit does with ``dtype: float32``.
        Magnitudes are compared as float32, so float64 inputs that are equal in float32 are kept
        or trimmed together.
    Example:
        >>> merge_arrays(Ties(weight=(1.0, 1.0), density=(0.5, 0.5), normalize=True,
        ...                   rescale=False, lam=1.0, trim=Over.TENSOR),
        ...              base=[0, 0, 0, 0], models=[[4, 1, -3, 0], [2, -5, 1, 0]])
        [3.0, -5.0, -3.0, 0.0]
    Reference: Yadav, Tam, Choshen, Raffel, Bansal. TIES-Merging: Resolving Interference When
        Merging Models. NeurIPS 2023. arXiv:2306.01708, algorithm 1.
    """

    weight: PerModel[float] = parameter()
    density: PerModel[float] = parameter(1.0, check=fraction)
    normalize: bool = parameter(True)
    rescale: bool = parameter(False)
    lam: float = parameter(1.0, key="lambda")
    trim: Over = parameter(Over.TENSOR)

    def problems(self) -> Iterator[str]:
        """Magnitudes are restored per tensor only."""
        if self.rescale and self.trim is Over.MODEL:
            yield "rescale: true restores magnitudes per tensor; it needs trim: tensor"

    @measure(over="trim", when=lambda self: min(self.density) < 1)
    def coarse(self, tile: Tile) -> Histograms:
        """Counts of |delta| by its upper bits."""
        return Histograms(tuple(magnitude_key(d) >> _LOWER_BITS for d in tile.deltas))

    @settle(same=("density", "trim"))
    def bins(self, coarse: Counts) -> Decision:
        """The bin of upper bits that holds each model's threshold."""
        return tuple(
            float(_bin_and_rank(counts, self._rank(k, counts))[0])
            for k, counts in enumerate(coarse)
        )

    @measure(over="trim", when=lambda self: min(self.density) < 1)
    def fine(self, tile: Tile, bins: Decision) -> Histograms:
        """Counts of |delta| by its lower bits, inside the bin."""
        keys = [magnitude_key(d) for d in tile.deltas]
        inside = [
            wide(key >> _LOWER_BITS).equals(bin_) for key, bin_ in zip(keys, bins, strict=True)
        ]
        return Histograms(tuple(key & _LOWER_MASK for key in keys), only=tuple(inside))

    @settle(same=("density", "trim"))
    def cut(self, coarse: Counts, fine: Counts) -> Decision:
        """Each model's threshold: the exact magnitude of the last element that is kept."""
        thresholds = []
        for k, counts in enumerate(coarse):
            upper, rank = _bin_and_rank(counts, self._rank(k, counts))
            lower, _ = _bin_and_rank(fine[k], rank)
            bits = np.array([upper << _LOWER_BITS | lower], dtype=np.uint32)
            thresholds.append(float(bits.view(np.float32)[0]))
        return tuple(thresholds)

    @measure(when=lambda self: self.rescale and min(self.density) < 1)
    def magnitudes(self, tile: Tile, cut: Decision | None) -> Totals:
        """Sums of |delta| before and after trimming."""
        full = [abs(delta) for delta in tile.deltas]
        kept = [
            where(single(size) >= in_type_of(single(size), threshold), size, 0.0)
            for size, threshold in zip(full, cut or (), strict=True)
        ]
        return Totals((*full, *kept))

    @settle()
    def scales(self, magnitudes: Sequence[float]) -> Decision:
        """Each model's scale; 1 where one of the sums is next to nothing."""
        models = len(magnitudes) // 2
        pairs = zip(magnitudes[:models], magnitudes[models:], strict=True)
        return tuple(full / kept if min(full, kept) >= 1e-7 else 1.0 for full, kept in pairs)

    @measure(over=Over.MODEL, when=lambda self: self.trim is Over.MODEL)
    def signs(self, tile: Tile, cut: Decision | None) -> Totals:
        """The number of positive less that of negative sums of trimmed task vectors."""
        total = running_sum(self._trimmed(tile, cut))
        return Totals((where(total > 0.0, 1.0, where(total < 0.0, -1.0, 0.0 * total)),))

    @settle()
    def majority(self, signs: Sequence[float]) -> Decision:
        """+1 or -1: the sign of elements whose sum is zero."""
        return (1.0 if signs[0] > 0 else -1.0,)

    @merges
    def merge(
        self,
        tile: Tile,
        cut: Decision | None,
        scales: Decision | None,
        majority: Decision | None,
    ) -> Expr:
        """Elect a sign and add what agrees."""
        weighted = self._trimmed(tile, cut, scales)
        total = running_sum(weighted)
        positive = total >= 0.0
        if majority is not None:
            positive = (total > 0.0) | (total.equals(0.0) & (majority[0] > 0.0))
        merged = elected_sum(weighted, self.weight, normalize=self.normalize, positive=positive)
        return tile.reference + in_type_of(merged, self.lam) * merged

    def _rank(self, model: int, counts: Counts) -> int:
        """How many elements of the model are kept, counted from the largest."""
        total = int(counts.sum())
        kept = int(self.density[model] * total)
        return min(total, max(1, kept) if self.trim is Over.TENSOR else kept + 1)

    def _trimmed(
        self, tile: Tile, cut: Decision | None, scales: Decision | None = None
    ) -> list[Expr]:
        """Weight (and scale) times task vector, zero below the threshold."""
        factors: Sequence[Number] = self.weight
        if scales is not None:
            factors = [w * scale for w, scale in zip(factors, scales, strict=True)]
        weighted = [
            in_type_of(delta, factor) * delta
            for factor, delta in zip(factors, tile.deltas, strict=True)
        ]
        if cut is None:
            return weighted
        magnitudes = [abs(single(delta)) for delta in tile.deltas]
        return [
            where(magnitude >= in_type_of(magnitude, threshold), value, 0.0)
            for value, magnitude, threshold in zip(weighted, magnitudes, cut, strict=True)
        ]


def _bin_and_rank(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest key, and its rank inside that bin (from 1)."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, rank))
    above = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - above


@oracle(Ties)
def formula(
    base: Floats,
    models: Sequence[Floats],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool,
    lam: float,
    trim: Over,
) -> Floats:
    """Algorithm 1 on whole arrays, by sorting. One array is one tensor and the whole model."""
    weighted = []
    for w, share, model in zip(weight, density, models, strict=True):
        delta = model - base
        count = int(share * delta.size)
        rank = max(1, count) if trim is Over.TENSOR else min(delta.size, count + 1)
        threshold = np.sort(np.abs(delta), axis=None)[::-1][rank - 1] if share < 1 else 0.0
        kept = np.where(np.abs(delta) >= threshold, delta, 0.0)
        before, after = np.abs(delta).sum(), np.abs(kept).sum()
        if rescale and min(before, after) >= 1e-7:
            kept = kept * (before / after)
        weighted.append(w * kept)
    total = np.sum(weighted, axis=0)
    sign = np.sign(total)
    majority = 1.0 if trim is Over.TENSOR or sign.sum() > 0 else -1.0
    sign = np.where(sign == 0, majority, sign)
    merged = elected_sum_formula(
        np.stack(weighted), np.array(weight), normalize=normalize, sign=sign
    )
    return base + lam * merged
