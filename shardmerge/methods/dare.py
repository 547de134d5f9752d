"""DARE: drop random elements of each task vector and rescale the rest, then add or elect signs."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

import numpy as np

from shardmerge.methods.api import (
    Base,
    Decision,
    Expr,
    Floats,
    Number,
    PerModel,
    Tile,
    Totals,
    fraction,
    in_type_of,
    measure,
    merge_method,
    merges,
    oracle,
    parameter,
    running_sum,
    settle,
    sum_of,
    total_weight,
    where,
    wide,
)
from shardmerge.methods.election import elected_sum, elected_sum_formula


class Rescale(enum.Enum):
    """How kept elements make up for the dropped ones."""

    L1 = "l1"
    """Each tensor's sum of magnitudes is restored (mergekit's ``rescale: true``)."""
    INV_KEEP = "inv_keep"
    """Divided by density: the expectation is restored (the paper)."""
    NONE = "none"

    @classmethod
    def _missing_(cls, value: object) -> Rescale | None:
        """mergekit's ``true`` and ``false``."""
        return {True: cls.L1, False: cls.NONE}.get(value) if isinstance(value, bool) else None


class _Dare:
    """What both methods share: random masks and rescaling. Not a method by itself."""

    weight: PerModel[float]
    density: PerModel[float]
    rescale: Rescale

    def problems(self) -> Iterator[str]:
        """A density of 0 leaves nothing to rescale."""
        if self.rescale is Rescale.INV_KEEP and 0 in self.density:
            yield "density 0 with rescale: inv_keep divides by 0; leave the model out instead"

    def _kept(self, tile: Tile) -> list[Expr]:
        """Task vectors with the dropped elements at zero."""
        return [
            where(wide(tile.random(k)) < self.density[k] * 2.0**32, delta, 0.0)
            for k, delta in enumerate(tile.deltas)
        ]

    def _magnitudes(self, tile: Tile) -> Totals:
        """Sums of |delta| before and after dropping."""
        return Totals(tuple(abs(delta) for delta in (*tile.deltas, *self._kept(tile))))

    def _restored(self, sums: Sequence[float]) -> Decision:
        """Ratio of the sums of each model; 1 where one of them is next to nothing."""
        models = len(sums) // 2
        pairs = zip(sums[:models], sums[models:], strict=True)
        return tuple(full / kept if min(full, kept) >= 1e-7 else 1.0 for full, kept in pairs)

    def _weighted(self, tile: Tile, scales: Decision | None) -> list[Expr]:
        """Weight times rescaled task vector."""
        factors: Sequence[Number] = self.weight
        if self.rescale is Rescale.INV_KEEP:
            factors = [w / p for w, p in zip(self.weight, self.density, strict=True)]
        elif scales is not None:
            factors = [w * scale for w, scale in zip(self.weight, scales, strict=True)]
        return [
            in_type_of(delta, factor) * delta
            for factor, delta in zip(factors, self._kept(tile), strict=True)
        ]


def _drops(self: _Dare) -> bool:
    return self.rescale is Rescale.L1 and min(self.density) < 1


@merge_method("dare_linear", base=Base.REQUIRED, inert=("int8_mask",), random=True)
class DareLinear(_Dare):
    """Drop random elements of task vectors, rescale the rest, add them to the base model.

    Each element of a task vector is kept with probability ``density``.

        merged = base + lambda * sum_k(w_k * scale_k * keep_k * delta_k)

    Passes: the merge; with ``rescale: l1``, first a measure of sums of magnitudes per tensor.
    Args:
        weight: of each model, any finite number; required.
        density: probability that an element is kept, 0 to 1.
        normalize: divide by the sum of the weights (by 1 where that is below 1e-8).
        lambda: scale of the merged task vector.
        rescale: ``l1`` (or true): restore each tensor's sum of magnitudes, as mergekit does;
            ``inv_keep``: divide by density, as the paper; ``none`` (or false).
    Shapes: elementwise; any shape.
    Raises:
        RecipeError: for a density outside 0 to 1, or of 0 with ``inv_keep``.
    Differs: the paper and mergekit draw from a global generator, so that every run, device and
        order of tensors gives another model. Here the draw depends only on the recipe's seed, the
        model's place, the tensor's name and the element's index.
    Example:
        >>> merge_arrays(DareLinear(weight=(2.0,), density=(1.0,), normalize=False, lam=1.0,
        ...                         rescale=Rescale.L1), base=[1, 1], models=[[2, 4]])
        [3.0, 7.0]
    Reference: Yu, Yu, Yu, Huang, Li. Language Models are Super Mario: Absorbing Abilities from
        Homologous Models as a Free Lunch. ICML 2024. arXiv:2311.03099, section 3.1.
    """

    weight: PerModel[float] = parameter()
    density: PerModel[float] = parameter(1.0, check=fraction)
    normalize: bool = parameter(False)
    lam: float = parameter(1.0, key="lambda")
    rescale: Rescale = parameter(Rescale.L1)

    @measure(when=_drops)
    def magnitudes(self, tile: Tile) -> Totals:
        """Sums of |delta| before and after dropping."""
        return self._magnitudes(tile)

    @settle()
    def scales(self, magnitudes: Sequence[float]) -> Decision:
        """Each model's scale."""
        return self._restored(magnitudes)

    @merges
    def merge(self, tile: Tile, scales: Decision | None) -> Expr:
        """Base plus the sum of what was kept."""
        total = sum_of(self._weighted(tile, scales))
        if self.normalize:
            total = total / total_weight(self.weight)
        return tile.reference + self.lam * total


@merge_method("dare_ties", base=Base.REQUIRED, inert=("int8_mask",), random=True)
class DareTies(_Dare):
    """Drop random elements of task vectors, rescale the rest, elect signs as TIES does.

    Each element of a task vector is kept with probability ``density``; per element, the sign with
    the larger weighted sum is elected and the values of that sign are added.

        merged = base + lambda * sum_k(w_k * scale_k * keep_k * delta_k * [sign agrees])

    Passes: the merge; with ``rescale: l1``, first a measure of sums of magnitudes per tensor.
    Args:
        weight: of each model, any finite number; required.
        density: probability that an element is kept, 0 to 1.
        normalize: divide by the sum of the weights that agree.
        lambda: scale of the merged task vector.
        rescale: ``l1`` (or true): restore each tensor's sum of magnitudes, as mergekit does;
            ``inv_keep``: divide by density, as the paper; ``none`` (or false).
    Shapes: elementwise; any shape.
    Raises:
        RecipeError: for a density outside 0 to 1, or of 0 with ``inv_keep``.
    Differs: as ``dare_linear``: the draw depends only on the recipe's seed, the model's place, the
        tensor's name and the element's index. A zero sum elects + (mergekit).
    Example:
        >>> merge_arrays(DareTies(weight=(1.0, 1.0), density=(1.0, 1.0), normalize=False, lam=1.0,
        ...                       rescale=Rescale.L1), base=[0, 0], models=[[3, 1], [-1, 1]])
        [3.0, 2.0]
    Reference: Yu, Yu, Yu, Huang, Li. Language Models are Super Mario: Absorbing Abilities from
        Homologous Models as a Free Lunch. ICML 2024. arXiv:2311.03099, sections 3.1 and 3.2.
    """

    weight: PerModel[float] = parameter()
    density: PerModel[float] = parameter(1.0, check=fraction)
    normalize: bool = parameter(False)
    lam: float = parameter(1.0, key="lambda")
    rescale: Rescale = parameter(Rescale.L1)

    @measure(when=_drops)
    def magnitudes(self, tile: Tile) -> Totals:
        """Sums of |delta| before and after dropping."""
        return self._magnitudes(tile)

    @settle()
    def scales(self, magnitudes: Sequence[float]) -> Decision:
        """Each model's scale."""
        return self._restored(magnitudes)

    @merges
    def merge(self, tile: Tile, scales: Decision | None) -> Expr:
        """Elect a sign and add what agrees."""
        weighted = self._weighted(tile, scales)
        positive = running_sum(weighted) >= 0.0
        merged = elected_sum(weighted, self.weight, normalize=self.normalize, positive=positive)
        return tile.reference + in_type_of(merged, self.lam) * merged


def _dropped(
    base: Floats,
    models: Sequence[Floats],
    keep: Sequence[np.ndarray],
    weight: Sequence[float],
    density: Sequence[float],
    rescale: Rescale,
) -> Floats:
    """Weighted, masked, rescaled task vectors, shape [models, ...]."""
    found = []
    for model, mask, w, p in zip(models, keep, weight, density, strict=True):
        delta = model - base
        kept = delta * mask
        before, after = np.abs(delta).sum(), np.abs(kept).sum()
        if rescale is Rescale.INV_KEEP:
            kept = kept / p
        elif rescale is Rescale.L1 and min(before, after) >= 1e-7:
            kept = kept * (before / after)
        found.append(w * kept)
    return np.stack(found)


@oracle(DareLinear)
def linear_formula(
    base: Floats,
    models: Sequence[Floats],
    *,
    keep: Sequence[np.ndarray],
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lam: float,
    rescale: Rescale,
) -> Floats:
    """The same on whole arrays, with the masks given."""
    total: Floats = _dropped(base, models, keep, weight, density, rescale).sum(axis=0)
    if normalize and abs(sum(weight)) >= 1e-8:
        total = total / sum(weight)
    return base + lam * total


@oracle(DareTies)
def ties_formula(
    base: Floats,
    models: Sequence[Floats],
    *,
    keep: Sequence[np.ndarray],
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lam: float,
    rescale: Rescale,
) -> Floats:
    """The same on whole arrays, with the masks given."""
    weighted = _dropped(base, models, keep, weight, density, rescale)
    sign = np.where(weighted.sum(axis=0) >= 0, 1.0, -1.0)
    return base + lam * elected_sum_formula(
        weighted, np.array(weight), normalize=normalize, sign=sign
    )
