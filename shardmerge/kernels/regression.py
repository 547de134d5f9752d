"""The solve of RegMean: one matrix whose outputs are nearest to those of several on their inputs.

Reference: Jin, Ren, Preotiuc-Pietro, Cheng. Dataless Knowledge Fusion by Merging Weights of
Language Models. ICLR 2023. arXiv:2212.09849, equation 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from shardmerge.kernels.linalg import Matrix

FLOOR = 4.0 * 2.0**-24
"""Times the square root of the number of inputs: eigenvalues of a sum of Gram matrices with a
diagonal of ones that are not above this count as zero. Rounding to float32 alone makes about a
sixth of it."""
ASYMMETRY = 1e-3
"""The most by which a Gram matrix and its transpose may differ, as a share of its diagonal's
largest element."""

_PANEL = 256
"""Rows or columns that are worked on at a time."""


class NotPositive(Exception):
    """A sum of Gram matrices has an eigenvalue that none can have; says which."""


def gram_problem(gram: Matrix) -> str:
    """Why a matrix cannot be a sum of x x^T; empty where it can. NaN and infinity are none.

    Args:
        gram: float64 [n, n].
    """
    diagonal = gram.diagonal()
    if (diagonal < 0).any():
        where = int(np.argmin(diagonal))
        return f"its diagonal holds {diagonal[where]:.3g} at {where}: a mean of squares is never"
    largest = float(diagonal.max(initial=0.0))
    for rows in _panels(len(gram)):
        apart = float(np.abs(gram[rows] - gram[:, rows].T).max(initial=0.0))
        if apart > ASYMMETRY * largest:
            return (
                f"it differs from its transpose by {apart:.3g}, where the largest element of its "
                f"diagonal is {largest:.3g}"
            )
    return ""


def reduce_non_diagonal(gram: Matrix, share: float, weight: float) -> None:
    """Multiply by ``weight``, and all that is not on the diagonal by ``share`` too; in place."""
    diagonal = gram.diagonal() * weight
    gram *= share * weight
    gram.reshape(-1)[:: len(gram) + 1] = diagonal


def product(left: Matrix, right: Matrix, *, xp: ModuleType = np) -> Matrix:
    """The product of two matrices."""
    result: Matrix = left @ right
    return result


def solve(total: Matrix, moments: Matrix, *, xp: ModuleType = np) -> Matrix:
    """The smallest X for which ``X @ total`` is nearest to ``moments``.

    The diagonal of ``total`` is scaled to ones. Where then no eigenvalue is below ``FLOOR`` times
    the square root of n, which a Cholesky factor of what is left without so much of the diagonal
    proves, X is had from a Cholesky factor. Else eigenvectors of such eigenvalues count as
    directions that ``total`` says nothing about: X is zero along them.

    Args:
        total: float64 [n, n], symmetric and positive semidefinite but for rounding; overwritten.
        moments: float64 [m, n]; overwritten.
        xp: namespace of the arrays: numpy or torch.
    Returns:
        float64 [m, n]. Full of NaN if an input holds a value that is not finite.
    Raises:
        NotPositive: for eigenvalues further below zero than the floor is above it.
    """
    if not bool(xp.isfinite(total).all()) or not bool(xp.isfinite(moments).all()):
        moments[:] = math.nan
        return moments
    if not len(total):
        return moments
    floor = FLOOR * math.sqrt(len(total))
    diagonal = xp.diagonal(total)
    # An input that was always zero: its row and column are zeros, whatever they are divided by.
    scale = xp.sqrt(xp.where(diagonal > 0, diagonal, xp.ones_like(diagonal)))
    total /= scale[:, None]
    total /= scale[None, :]
    moments /= scale[None, :]
    factor = _safe_factor(total, floor, xp)
    if factor is not None:
        _substitute(factor, moments, xp)
        moments /= scale[None, :]
        return moments
    return _by_eigenvectors(total, moments, scale, floor, xp)


def workspace_bytes(rows: int, columns: int, side: int) -> int:
    """Upper bound of what a matrix takes while it is solved for, and before: all float64.

    Three matrices stay while one more is multiplied. The sum of the Gram matrices and its
    decomposition take as much as six of it, more than it and another while it is made.
    """
    matrix, gram = 8 * rows * columns, 8 * side * side
    return 5 * matrix + 6 * gram + _BLAS_BYTES


_BLAS_BYTES = 8 << 20
"""What a BLAS thread touches of its buffers."""


def _set_diagonal(matrix: Matrix, value: float) -> None:
    matrix.reshape(-1)[:: len(matrix) + 1] = value


def _safe_factor(total: Matrix, floor: float, xp: ModuleType) -> Matrix | None:
    """The Cholesky factor; None where an eigenvalue is below ``floor``. Sets the diagonal to 1."""
    try:
        _set_diagonal(total, 1.0 - floor)
        xp.linalg.cholesky(total)
    except xp.linalg.LinAlgError:
        return None
    finally:
        _set_diagonal(total, 1.0)
    factor: Matrix = xp.linalg.cholesky(total)
    return factor


def _substitute(factor: Matrix, values: Matrix, xp: ModuleType) -> None:
    """Multiply from the right by the inverse of ``factor @ factor.T``, in place.

    Args:
        factor: lower triangular [n, n].
        values: [m, n].
    """
    for here in _panels(len(factor)):
        values[:, here] -= values[:, : here.start] @ factor[here, : here.start].T
        values[:, here] = xp.linalg.solve(factor[here, here], values[:, here].T).T
    for here in reversed(list(_panels(len(factor)))):
        values[:, here] -= values[:, here.stop :] @ factor[here.stop :, here]
        values[:, here] = xp.linalg.solve(factor[here, here].T, values[:, here].T).T


def _by_eigenvectors(
    total: Matrix, moments: Matrix, scale: Matrix, floor: float, xp: ModuleType
) -> Matrix:
    """The same by the eigenvectors whose eigenvalues are above ``floor``.

    Args:
        total: [n, n] with a diagonal of 1.
        moments: [m, n], divided by ``scale``.
        scale: [n], roots of the diagonal as it was.
    """
    values, vectors = xp.linalg.eigh(total)
    if float(values[0]) < -floor:
        raise NotPositive(
            f"with a diagonal of ones the sum of the Gram matrices has the eigenvalue "
            f"{float(values[0]):.3g}; of sums of x x^T none is negative"
        )
    unseen = int((values <= floor).sum())
    seen = vectors[:, unseen:]
    solved = (moments @ seen) / values[unseen:]
    moments[:] = solved @ seen.T
    moments /= scale[None, :]
    # Smallest as they are, not as they are scaled: nothing along what no input had a part of.
    total[:, :unseen] = vectors[:, :unseen] / scale[:, None]
    del vectors, seen, solved
    basis = xp.linalg.qr(total[:, :unseen])[0]
    moments -= (moments @ basis) @ basis.T
    return moments


def _panels(length: int) -> Iterator[slice]:
    """Consecutive ranges that make up ``range(length)``."""
    return (slice(at, min(at + _PANEL, length)) for at in range(0, length, _PANEL))
