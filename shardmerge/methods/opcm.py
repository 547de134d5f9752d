"""OPCM: continual merging by orthogonal projection of each new task vector."""

from __future__ import annotations

import enum
import fnmatch
import math
import random
from collections.abc import Sequence
from functools import partial

import numpy as np

from shardmerge.kernels.projection import RANK, TIE, project, workspace_bytes
from shardmerge.methods.api import (
    CONTINUAL,
    METHODS,
    Array,
    Base,
    Expr,
    Floats,
    Matrices,
    Tile,
    Totals,
    merge_method,
    merges,
    merges_matrices,
    non_negative,
    oracle,
    parameter,
    sums,
)
from shardmerge.methods.running import added, norms_of, squares

NOT_PROJECTED = (
    "*embed*",
    "*wte.*",
    "*wpe.*",
    "shared.weight",
    "*.shared.weight",
    "*relative_attention_bias*",
)
"""Names of matrices that are tables of vectors, of which rows are looked up; ``*`` matches dots."""
EXPERTS = "*expert*"
"""Names of tensors of three dimensions that hold a matrix for each expert; others are no such."""


class Projected(enum.Enum):
    """Which tensors are projected."""

    AUTO = "auto"
    """Matrices, but not embeddings; of three dimensions those of experts."""
    ALWAYS = "always"
    NEVER = "never"


def _matrix_bytes(rows: int, columns: int) -> int:
    """The sum, the task vector and what is left of it, in float32."""
    return 3 * 4 * rows * columns + workspace_bytes(rows, columns)


@merge_method("opcm", base=Base.REQUIRED, adds=True, among=(METHODS, CONTINUAL))
class Opcm:
    """Merge models one after the other, each orthogonal to what is there; keep the mean norm.

    Of each new task vector that part is left out which lies in the directions of the sum so far:
    with the singular value decomposition S = U diag(s) V^T of a matrix of the sum, the block of the
    first r rows and columns, and the diagonal, of U^T delta V; r counts the leading singular values
    whose mass stays within ``alpha``. The sum is scaled so that the merged model is as far from the
    base model as the models are on average.

        S_1 = delta_1;  S_t = S_(t-1) + clean(delta_t; S_(t-1))
        merged = base + S_T * mean_t(norm(delta_t)) / norm(S_T)

    Passes: one that sums up, matrix by matrix and model by model, with the norms over the model;
        the sum is kept in float32 beside the output; then one that scales and adds. Adding one
        model to a kept sum (``shardmerge continual``) is the same with one model.
    Args:
        alpha: share of the singular values' mass whose directions are protected, at least 0; 1 and
            more protect all.
        project: ``auto``: matrices, but not embeddings (*embed*, *wte.*, *wpe.*, shared.weight,
            *.shared.weight, *relative_attention_bias*), and of three dimensions [E, rows, columns]
            those whose name holds *expert*, as E matrices. ``always`` and ``never`` by a rule. What
            is not projected is added as it is.
        shuffle: add the models in an order drawn from ``seed``, not in the recipe's.
    Shapes: any; a matrix and its transpose are projected alike. A rule may split one that holds
        several (``split: {rows: 3}``).
    Raises:
        MemoryBudgetError: for a matrix that does not fit into memory as a whole.
    Differs: singular values up to 1e-7 of the largest count as zero, in the mass, the block and the
        diagonal: they are what rounding to float32 leaves of a sum of low rank, and the reference
        removes a diagonal that LAPACK happens to choose. A sum of zeros removes nothing; the
        reference drops the diagonal of the matrix. ``alpha`` of 1 or more protects all directions
        of the sum; there it depends on rounding. Parameters of modules that
        have others (class embeddings, ``in_proj_weight``) are merged; there they stay the first
        model's. Tied weights are merged once and counted once. Experts are projected.
    Example:
        >>> merge_arrays(Opcm(alpha=0.5, project=Projected.AUTO, shuffle=False),
        ...              base=[0, 5], models=[[1, 5], [3, 5]])
        [2.0, 5.0]
    Reference: Tang, Yang, Shen, Hu, Zhang, Luo, Du, Tao. Merging Models on the Fly Without
        Retraining: A Sequential Approach to Scalable Continual Model Merging. 2025.
        arXiv:2501.09522, algorithm 1; FusionBench's code where they differ (cross blocks stay).
    """

    alpha: float = parameter(0.5, check=non_negative)
    project: Projected = parameter(Projected.AUTO)
    shuffle: bool = parameter(False)

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is projected, matrix by matrix."""
        if self.project is Projected.NEVER or len(shape) not in (2, 3) or 0 in shape:
            return False
        if self.project is Projected.ALWAYS:
            return True
        if any(fnmatch.fnmatchcase(name, glob) for glob in NOT_PROJECTED):
            return False
        return len(shape) == 2 or fnmatch.fnmatchcase(name, EXPERTS)

    def tables(self) -> tuple[str, ...]:
        """Names of matrices that are not projected, unless a rule says so."""
        return NOT_PROJECTED

    def order(self, count: int, seed: int) -> Sequence[int]:
        """The order in which models are added."""
        order = list(range(count))
        if self.shuffle:
            random.Random(seed).shuffle(order)
        return order

    def scale(self, norms: Sequence[float], total: float) -> float:
        """What the sum is multiplied with: its norm becomes the mean of the task vectors'."""
        return math.fsum(norms) / len(norms) / total if total else 1.0

    @merges
    def merge(self, tile: Tile) -> Expr:
        """Add the task vectors, of a tensor that is not projected."""
        return added(tile)

    @merges_matrices(workspace=_matrix_bytes)
    def merge_matrices(self, matrices: Matrices) -> tuple[Array, tuple[float, ...]]:
        """Add what is left of each task vector, one after the other."""
        total, found = matrices.extra("state"), []
        for model in range(matrices.models):
            delta = matrices.delta(model)
            found.append(squares(delta))
            if total is not None:
                delta = matrices.linear(partial(project, alpha=self.alpha), total, delta)
                delta += total
            total = delta.astype(np.float32, copy=False)
        assert total is not None
        return total, (*found, squares(total))

    @sums
    def norms(self, tile: Tile, written: Expr) -> Totals:
        """Sums of squares of each task vector, and of the sum."""
        return norms_of(tile, written)


@oracle(Opcm)
def formula(
    base: Floats,
    models: Sequence[Floats],
    *,
    alpha: float,
    project: Projected,
    shuffle: bool,
) -> Floats:
    """The definition on one whole tensor, by full singular value decompositions."""
    method = Opcm(alpha=alpha, project=project, shuffle=shuffle)
    deltas = [models[place] - base for place in method.order(len(models), 0)]
    total = deltas[0]
    for delta in deltas[1:]:
        if method.whole("tensor", base.shape):
            matrices = zip(
                total.reshape(-1, *base.shape[-2:]),
                delta.reshape(-1, *base.shape[-2:]),
                strict=True,
            )
            delta = np.stack([cleaned(t, d, alpha) for t, d in matrices]).reshape(base.shape)
        total = total + delta
    norm = float(np.linalg.norm(total))
    mean = float(np.mean([np.linalg.norm(delta) for delta in deltas]))
    return base + total * (mean / norm if norm else 1.0)


def cleaned(total: Floats, delta: Floats, alpha: float) -> Floats:
    """What is left of a task vector beside the sum so far."""
    u, s, vt = np.linalg.svd(total)
    if not s[0]:
        return delta
    s = s[s > RANK * s[0]]
    mass = np.cumsum(s)
    leading = len(s) if alpha >= 1 else int((mass <= (alpha + TIE) * mass[-1]).sum())
    inner = u.T @ delta @ vt.T
    inner[range(len(s)), range(len(s))] = 0
    inner[:leading, :leading] = 0
    left: Floats = u @ inner @ vt
    return left
