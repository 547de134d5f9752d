"""Linear: the weighted average of models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
)


@merge_method("linear", base=Base.INPUT, inert=("int8_mask",))
class Linear:
    """Average models by weight.

    With equal weights this is the plain average of fine-tunes, or a model soup.

        merged = sum_k(w_k * model_k) / sum_k(w_k)

    Passes: one; every element is read once.
    Args:
        weight: of each model, any finite number; required.
        normalize: divide by the sum of the weights.
    Shapes: elementwise; any shape.
    Raises:
        RecipeError: with ``normalize``, for weights whose sum is 0.
    Differs: mergekit divides by a zero sum of weights without an error and writes infinities. A
        ``base_model`` counts as one of the models, as there.
    Example:
        >>> merge_arrays(Linear(weight=(3.0, 1.0), normalize=True), models=[[4, 0], [0, 4]])
        [3.0, 1.0]
    Reference: Wortsman et al. Model soups: averaging weights of multiple fine-tuned models improves
        accuracy without increasing inference time. ICML 2022. arXiv:2203.05482, section 2.
    """

    weight: PerModel[float] = parameter()
    normalize: bool = parameter(True)

    def problems(self) -> Iterator[str]:
        """A zero sum of weights has no average."""
        if self.normalize and abs(sum(self.weight)) < 1e-8:
            yield f"the weights {list(self.weight)} sum to 0; give others, or normalize: false"

    @merges
    def merge(self, tile: Tile) -> Expr:
        """The weighted sum, divided by the sum of weights."""
        total = sum_of([w * model for w, model in zip(self.weight, tile.models, strict=True)])
        return total / sum_of(self.weight) if self.normalize else total


@oracle(Linear)
def formula(
    base: Floats | None, models: Sequence[Floats], *, weight: Sequence[float], normalize: bool
) -> Floats:
    """The weighted average, on whole arrays."""
    total: Floats = np.sum([w * model for w, model in zip(weight, models, strict=True)], axis=0)
    return total / sum(weight) if normalize else total
