"""RegMean: linear layers merged so that their outputs stay nearest to those of each model."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from shardmerge.kernels.regression import (
    FLOOR,
    NotPositive,
    gram_problem,
    product,
    reduce_non_diagonal,
    solve,
    workspace_bytes,
)
from shardmerge.methods.api import (
    Base,
    Expr,
    ExtraTensor,
    Floats,
    Matrices,
    PerModel,
    Tile,
    Wide,
    fraction,
    merge_method,
    merges,
    merges_matrices,
    non_negative,
    oracle,
    parameter,
    sum_of,
)

GRAM = "gram"
"""Kind of the further checkpoint, and in its ``config.json`` the key of what it says of itself."""
ROWS = "rows"
"""Key, in that, of the names of the weights that hold the inputs in rows; all others do not."""


class Side(enum.Enum):
    """Where a weight has its inputs."""

    AUTO = "auto"
    """As the Gram matrices' config or their shapes say."""
    COLUMNS = "columns"
    """[outputs, inputs], as ``torch.nn.Linear``."""
    ROWS = "rows"
    """[inputs, outputs], as GPT-2's ``Conv1D``."""


@merge_method("regmean", base=Base.UNUSED, extras=(GRAM,))
class RegMean:
    """Merge linear layers so that their outputs are nearest to each model's on that model's inputs.

    Each model of the recipe names a checkpoint ``gram:`` that holds, under the names of the linear
    layers' weights, the Gram matrices of their inputs: the mean of x x^T over tokens x, as
    ``shardmerge gram`` collects them. With them the least squares problem has a closed solution.

        G~_k = r * G_k + (1 - r) * diag(G_k)
        merged = mean + sum_k(w_k * (W_k - mean) G~_k) (sum_k(w_k * G~_k))^-1
        mean = sum_k(w_k * W_k) / sum_k(w_k)

    That is the paper's W^T = (sum_k G~_k)^-1 sum_k G~_k W_k^T with its unknown shifted by the mean.
    All other tensors (biases, norms, embeddings) are the mean.

    Passes: one; every matrix and its Gram matrices are read once and solved for in float64.
    Args:
        reduce_non_diagonal: r, from 0 to 1; by how much inputs count as going together. At 0 every
            input of a layer is averaged by itself.
        weight: w_k of each model, at least 0.
        inputs: where weights have their inputs. ``columns``: [out, in], as torch.nn.Linear;
            ``rows``: [in, out], as GPT-2's Conv1D; ``auto``: as config.json beside the Gram
            matrices says ({"gram": {"rows": [names]}}), or the shape where it is not square.
        gram: of each model, the checkpoint of its Gram matrices; beside ``model:``.
    Shapes: a weight [out, in] has Gram matrices [in, in]; experts [E, out, in] have [E, in, in].
        Float32 or float64. A weight that only some models have them for is refused, and so are
        Gram matrices that fit no side of their weight.
    Raises:
        RecipeError: for weights that are all 0.
        PlanError: for Gram matrices that do not fit; for a square weight of which neither the
            recipe nor a config says where the inputs are; where no tensor has Gram matrices.
        CheckpointError: for matrices that are no sums of x x^T: of a negative diagonal or negative
            eigenvalues, or not symmetric.
        MemoryBudgetError: for a matrix that does not fit into memory with its Gram matrices.
    Differs: the reference inverts the sum, whatever it is. Here, where the sum is singular the
        result stays the mean in all directions of which no model has seen inputs. These are, after
        the diagonal was scaled to ones, the eigenvectors of eigenvalues of up to 4 * 2^-24 *
        sqrt(n) for n inputs, about six times what rounding to float32 makes of zero. With r below
        1 only inputs that were always zero are such. The default r is the paper's 0.9; its T5 took
        0.1, FusionBench 0.1 to 0.95.
    Example:
        >>> merge_arrays(RegMean(reduce_non_diagonal=1.0, weight=(1.0, 1.0), inputs=Side.AUTO),
        ...              models=[[[4, 0]], [[0, 8]]], gram=[[[1, 0], [0, 3]], [[1, 0], [0, 1]]])
        [[2.0, 2.0]]
    Reference: Jin, Ren, Preotiuc-Pietro, Cheng. Dataless Knowledge Fusion by Merging Weights of
        Language Models. ICLR 2023. arXiv:2212.09849, equation 2 and algorithm 1.
    """

    reduce_non_diagonal: float = parameter(0.9, check=fraction)
    weight: PerModel[float] = parameter(1.0, check=non_negative)
    inputs: Side = parameter(Side.AUTO)

    def problems(self) -> Iterator[str]:
        """Weights that are all zero have no mean."""
        if not any(self.weight):
            yield "all weights are 0; give at least one model a weight above 0"

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor that has Gram matrices is solved for."""
        return len(shape) in (2, 3) and 0 not in shape

    def fits(self, shape: tuple[int, ...], extra: ExtraTensor) -> str:
        """Why these are no Gram matrices of a tensor's inputs; empty where they are."""
        if not self.whole(extra.name, shape):
            return f"the tensor's shape is {list(shape)}, and only matrices have inputs"
        if extra.dtype not in ("float32", "float64"):
            return f"its dtype is {extra.dtype}; it must be float32 or float64"
        sides = self._sides(shape, extra)
        if not sides:
            asked = self._said(extra)
            where = "rows or columns" if asked is Side.AUTO else asked.value
            return (
                f"its shape is {list(extra.shape)}, which is not that of inputs in {where} of a "
                f"weight of {list(shape)}"
            )
        if len(sides) > 1:
            return (
                f"the weight is {shape[-2]} x {shape[-1]}, and nothing says whether its inputs are "
                "its columns (torch.nn.Linear) or its rows (Conv1D): give `inputs: columns` or "
                "`inputs: rows` in the parameters"
            )
        return ""

    def fitted(
        self, shape: tuple[int, ...], extras: Mapping[str, Sequence[ExtraTensor]]
    ) -> RegMean | str:
        """The method that knows where a tensor's inputs are; or what the models differ in."""
        sides = [self._sides(shape, extra)[0] for extra in extras[GRAM]]
        if len(set(sides)) > 1:
            told = ", ".join(side.value for side in sides)
            return f"{GRAM}: the models' Gram matrices are of the weight's {told}, in this order"
        return dataclasses.replace(self, inputs=sides[0])

    def _sides(self, shape: tuple[int, ...], extra: ExtraTensor) -> list[Side]:
        """Where the inputs can be."""
        said = self._said(extra)
        lengths = {Side.COLUMNS: shape[-1], Side.ROWS: shape[-2]}
        return [
            side
            for side, length in lengths.items()
            if said in (side, Side.AUTO) and extra.shape == (*shape[:-2], length, length)
        ]

    def _said(self, extra: ExtraTensor) -> Side:
        """Where the recipe or the config of the Gram matrices says that they are."""
        facts = extra.config.get(GRAM)
        if self.inputs is not Side.AUTO or not isinstance(facts, Mapping):
            return self.inputs
        rows = facts.get(ROWS)
        return Side.ROWS if isinstance(rows, list) and extra.name in rows else Side.COLUMNS

    @merges
    def merge(self, tile: Tile) -> Expr:
        """The mean, of a tensor that has no Gram matrices."""
        total = sum_of([w * model for w, model in zip(self.weight, tile.models, strict=True)])
        return total / sum_of(self.weight)

    @merges_matrices(workspace=workspace_bytes)
    def merge_matrices(self, matrices: Matrices) -> tuple[Wide, tuple[float, ...]]:
        """The solution, as a deviation from the first model, which is added to it at the end."""
        first = matrices.model(0)
        mean, moments = np.zeros_like(first), np.zeros_like(first)
        total, across = self._weighted_gram(matrices, 0, first.shape)
        turned = moments.T if across else moments
        for number in range(1, matrices.models):
            gram, _ = self._weighted_gram(matrices, number, first.shape)
            apart = matrices.model(number)
            apart -= first
            turned += matrices.linear(product, apart.T if across else apart, gram)
            total += gram
            del gram
            apart *= self.weight[number]
            mean += apart
            del apart
        mean /= sum(self.weight)
        turned -= matrices.linear(product, mean.T if across else mean, total)
        try:
            solved = matrices.linear(solve, total, turned)
        except NotPositive as problem:
            raise matrices.unfit(GRAM, str(problem)) from None
        mean += solved.T if across else solved
        mean += first
        return mean, ()

    def _weighted_gram(
        self, matrices: Matrices, number: int, shape: tuple[int, ...]
    ) -> tuple[Wide, bool]:
        """w_k * G~_k, [n, n]; and whether the weight's n inputs are its rows."""
        gram = matrices.wide_extra(GRAM, number)
        problem = gram_problem(gram)
        if problem:
            raise matrices.unfit(GRAM, problem, number)
        reduce_non_diagonal(gram, self.reduce_non_diagonal, self.weight[number])
        across = self.inputs is Side.ROWS or len(gram) != shape[-1]
        return gram, across


@oracle(RegMean)
def formula(
    base: Floats | None,
    models: Sequence[Floats],
    *,
    gram: Sequence[Floats],
    reduce_non_diagonal: float,
    weight: Sequence[float],
    inputs: Side,
) -> Floats:
    """Equation 2 on one whole tensor, by pseudo-inverses, with the mean where they see nothing."""
    mean: Floats = np.sum([w * model for w, model in zip(weight, models, strict=True)], axis=0)
    mean = mean / sum(weight)
    if not gram:
        return mean
    if inputs is Side.ROWS or gram[0].shape[-1] != mean.shape[-1]:
        turned = [np.swapaxes(model, -1, -2) for model in models]
        found = formula(
            base,
            turned,
            gram=gram,
            reduce_non_diagonal=reduce_non_diagonal,
            weight=weight,
            inputs=Side.COLUMNS,
        )
        return np.swapaxes(found, -1, -2)
    share, ones = reduce_non_diagonal, np.eye(mean.shape[-1])
    reduced = [w * (share + (1 - share) * ones) * g for w, g in zip(weight, gram, strict=True)]
    total = np.sum(reduced, axis=0)
    moments = np.sum([(m - mean) @ g for m, g in zip(models, reduced, strict=True)], axis=0)
    found = mean.reshape(-1, *mean.shape[-2:]).copy()
    for block, own, moment in zip(
        found, total.reshape(-1, *ones.shape), moments.reshape(found.shape), strict=True
    ):
        block += moment @ seen_inverse(own)
    return found.reshape(mean.shape)


def seen_inverse(total: Floats) -> Floats:
    """The inverse of a sum of Gram matrices in the directions that it has seen, [n, n]."""
    scale = np.sqrt(np.where(total.diagonal() > 0, total.diagonal(), 1.0))
    values, vectors = np.linalg.eigh(total / scale / scale[:, None])
    seen = values > FLOOR * np.sqrt(len(total))
    inverse = (vectors[:, seen] / values[seen]) @ vectors[:, seen].T / scale / scale[:, None]
    unseen = np.linalg.qr(vectors[:, ~seen] / scale[:, None])[0]
    left: Floats = inverse - inverse @ unseen @ unseen.T
    return left
