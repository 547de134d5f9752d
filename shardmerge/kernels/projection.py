"""The projection of OPCM: a task vector without what the sum of earlier ones already says.

Reference: Tang, Yang, Shen, Hu, Luo, Tao. Merging Models on the Fly Without Retraining: A
Sequential Approach to Scalable Continual Model Merging. 2025. arXiv:2501.09522, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
"""A numpy array, or a tensor of the namespace that ``project`` is given."""
Spectrum = npt.NDArray[np.float64]
"""Descending eigenvalues or singular values, in numpy whatever the namespace."""

RANK = 1e-7
"""Singular values up to this share of the largest count as zero: the directions of smaller ones are
what rounding to float32 made of them."""
TIE = 1e-12
"""A share of the singular values is above alpha where it is larger by this part of their sum."""

_PANEL = 512
"""Columns that are multiplied at a time."""
_LARGEST_EXPONENT = 900
"""Of a factor, and far enough from the largest that float64 has."""
_EPSILON = float(np.finfo(np.float64).eps)
_TOLERANCE = 3e-8
"""Error of the result, as a share of the task vector, that inaccurate eigenvectors may cause by the
estimate; the true one is at most three times as large in what was tried, and mostly far smaller."""
_STEP = 0.1
"""The vectors of singular values down to this share of the largest are never taken again: a Gram
matrix of their own would be little more accurate."""


def project(total: Array, delta: Array, alpha: float, *, xp: ModuleType = np) -> Array:
    """The part of a task vector that is merged into the sum of earlier ones.

    In the singular basis of ``total``, the task vector loses its diagonal and its leading r x r
    block; r is the number of leading singular values that sum up to at most ``alpha`` of the sum of
    all. Everything else is kept.

        total = U diag(s) V^T,    P = U^T delta V,    P[i, i] = 0,    P[:r, :r] = 0
        result = U P V^T, with U and V completed to square

    U comes from the Gram matrix of the smaller side, in float64. Where that cannot tell singular
    vectors apart, their span gets a Gram matrix of its own, and so on. V is computed from U, in
    float64 where singular values are small. Products are in the precision of the inputs where
    their errors stay in proportion to the result. For float32 the result is within 1e-6 of that of
    a float64 SVD.

    Args:
        total: float32 or float64 [m, n], any strides, at any scale; not written to.
        delta: float32 or float64 [m, n], any strides; not written to.
        alpha: share of the sum of singular values, at least 0.
        xp: namespace of the arrays: numpy or torch.
    Returns:
        float32 [m, n] if both inputs are float32, else float64. Full of NaN if an input holds a
        value that is not finite.
    Differs: where the reference gives what its rounding makes of it, this result is defined.
        Singular values up to 1e-7 of the largest count as zero: they have no share in the sum, and
        their directions are neither in the block nor on the diagonal. If ``total`` is zero, nothing
        is removed. From alpha = 1 on, the block is of all singular values that are not zero. A
        share that is above ``alpha`` by 1e-12 or less is not above it. The vectors of equal
        singular values, and with them the diagonal, stay arbitrary; where only float32's rounding
        sets singular values apart, two float64 SVDs are 3e-6 from each other.
    """
    single = total.dtype == xp.float32 and delta.dtype == xp.float32
    precision = xp.float32 if single else xp.float64
    result: Array = xp.empty_like(delta, dtype=precision)
    if 0 in total.shape:
        return result
    largest = max(float(total.max()), -float(total.min()))
    if not (math.isfinite(largest) and bool(xp.isfinite(delta).all())):
        result[:] = math.nan
        return result
    result[:] = delta
    if largest == 0:
        return result
    tall = total.shape[0] > total.shape[1]
    if tall:
        total, delta = total.T, delta.T
    # A power of two: a factor of total changes no bit.
    scale = 2.0 ** min(-math.frexp(largest)[1], _LARGEST_EXPONENT)
    removed, right = _factors(total, delta, alpha, scale, precision, xp)
    for columns, panel in zip(_panels(total, _PANEL), right, strict=True):
        panel = xp.asarray(panel, dtype=removed.dtype)
        if tall:  # the product has the result's order of elements
            result[columns] -= panel.T @ removed.T
        else:
            result[:, columns] -= removed @ panel
    return result


def workspace_bytes(rows: int, columns: int) -> int:
    """Upper bound of what ``project`` takes for float32 inputs, besides them and its result.

    With k and n its sides: eigenvectors take five float64 k x k, LAPACK's and the Gram matrix
    included, and one more, the vectors so far, from the second Gram matrix on; or, for few rows,
    panels of the matrix more than that. The right singular vectors are float32 [k, n], beside four
    float64 k x k or three and panels.
    """
    short, long = sorted((rows, columns))
    panels = 24 * short * min(long, _PANEL)
    gram = 24 * short * short + max(panels, 16 * short * min(long, short))
    eigenvectors = 48 * short * short
    products = 4 * short * long + max(32 * short * short, 24 * short * short + panels)
    return max(gram, eigenvectors, products) + _BLAS_BYTES


_BLAS_BYTES = 8 << 20
"""What a BLAS thread touches of its buffers."""


def _factors(
    total: Array, delta: Array, alpha: float, scale: float, precision: object, xp: ModuleType
) -> tuple[Array, list[Array]]:
    """What is removed, as a product.

    Args:
        total: [m, n], m at most n; ``delta`` too.
        delta: the task vector.
        alpha: share of the sum of singular values.
        scale: of ``total`` to about 1.
        precision: dtype of the result.
        xp: namespace of the arrays.
    Returns:
        the factor [m, rank], and panels of columns of the right singular vectors' [rank, n].
    """
    left, singular = _left(total, scale, xp)
    leading = _leading(singular, alpha)
    # Where most is removed, its rounding is not in proportion to what is left.
    working = precision if leading <= len(singular) // 2 else xp.float64
    near = _near(singular, len(total), scale) if working == xp.float32 else 0
    right = _right(total, scale, left, singular, near, precision, xp)
    left = xp.asarray(left, dtype=working)
    block: Any = 0.0
    diagonal: Any = 0.0
    for columns, panel in zip(_panels(delta, _PANEL), right, strict=True):
        rotated = left.T @ xp.asarray(delta[:, columns], dtype=working)
        panel = xp.asarray(panel, dtype=working)
        block += rotated[:leading] @ panel[:leading].T
        diagonal += xp.einsum("ij,ij->i", rotated[leading:], panel[leading:])
        del rotated, panel
    removed: Array = xp.empty_like(left)
    removed[:, :leading] = left[:, :leading] @ block
    removed[:, leading:] = left[:, leading:] * diagonal
    return removed, right


def _left(total: Array, scale: float, xp: ModuleType) -> tuple[Array, Spectrum]:
    """Left singular vectors, float64 [m, rank], and singular values [rank].

    The error of a Gram matrix is a share of its largest eigenvalue; what is far below it is lost.
    So eigenvectors are taken as long as they can be told from their neighbours, and the span of the
    others is rotated by the eigenvectors of a Gram matrix with only them in it. The vectors taken
    are in it by the square of their error alone.
    """
    values, vectors = _eigen(_gram(total, scale, None, xp), xp)
    done = 0
    floor = RANK**2 * values[0]
    while True:
        noise = 16 * _EPSILON * values[done]
        done += _told_apart(values[done:], max(total.shape))
        if done == len(values) or values[done] + noise <= floor:
            break
        basis = vectors[:, done:]
        values[done:], rotation = _eigen(_gram(total, scale, basis, xp), xp)
        vectors[:, done:] = basis @ rotation
        del rotation
    rank = int(np.count_nonzero(values[:done] > floor))
    return vectors[:, :rank], np.sqrt(values[:rank])


def _gram(total: Array, scale: float, basis: Array | None, xp: ModuleType) -> Array:
    """Minus the Gram matrix of the rows, in ``basis`` if one is given; float64 [k, k].

    Minus, so that ascending eigenvalues are descending singular values.
    """
    gram: Any = 0.0
    for columns in _panels(total, max(total.shape[0], _PANEL)):
        panel = xp.asarray(total[:, columns], dtype=xp.float64) * scale
        if basis is not None:
            panel = basis.T @ panel
        gram -= panel @ panel.T
        del panel
    negated: Array = gram
    return negated


def _eigen(gram: Array, xp: ModuleType) -> tuple[Spectrum, Array]:
    """Eigenvalues of what ``gram`` is minus of, at least 0; and its eigenvectors [k, k]."""
    values, vectors = xp.linalg.eigh(gram)
    return np.maximum(-np.array(values.tolist()), 0.0), vectors


def _told_apart(values: Spectrum, longer: int) -> int:
    """Number of leading eigenvectors of a Gram matrix that are accurate enough.

    Args:
        values: its eigenvalues.
        longer: larger side of the matrix.
    """
    gaps = values - np.append(values[1:], 0.0)
    gaps = np.minimum(gaps, np.append(np.inf, gaps[:-1]))
    angles = np.minimum(_EPSILON * values[0] / np.maximum(gaps, _EPSILON * values[0]), 1.0)
    # An angle turns one pair of vectors, and so one diagonal element of the task vector's m * n.
    error = 2 * np.sqrt(np.cumsum(angles**2) / (len(values) * longer))
    accurate = int(np.searchsorted(error, _TOLERANCE, side="right"))
    return max(accurate, int(np.count_nonzero(values >= _STEP**2 * values[0])))


def _leading(singular: Spectrum, alpha: float) -> int:
    """Number of leading singular values that have at most ``alpha`` of the sum."""
    if alpha >= 1:
        return len(singular)
    sums = np.cumsum(singular)
    return int(np.searchsorted(sums, (alpha + TIE) * sums[-1], side="right"))


def _near(singular: Spectrum, rows: int, scale: float) -> int:
    """Number of leading right singular vectors that products in float32 give.

    Rounding puts them off by its share of the singular values' root mean square over their own.
    """
    if not 2.0**-100 < scale < 2.0**100:
        return 0  # the factors would leave the range of float32
    mean = math.sqrt(float(np.sum(singular**2)) / rows)
    return int(np.count_nonzero(singular >= mean / 4))


def _right(
    total: Array,
    scale: float,
    left: Array,
    singular: Spectrum,
    near: int,
    precision: object,
    xp: ModuleType,
) -> list[Array]:
    """Panels of the right singular vectors, as rows.

    The leading ``near`` are multiplied in ``precision``, the others in float64.
    """
    column = xp.empty_like(left[0])
    column[:] = xp.asarray(1 / singular)  # to the device of left
    rows = left.T * column[:, None]
    rounded, exact = xp.asarray(rows[:near] * scale, dtype=precision), rows[near:]
    right: list[Array] = []
    for columns in _panels(total, _PANEL):
        panel = total[:, columns]
        leading = rounded @ xp.asarray(panel, dtype=precision)
        others = exact @ (xp.asarray(panel, dtype=xp.float64) * scale)
        right.append(xp.concatenate([leading, xp.asarray(others, dtype=precision)]))
        del leading, others
    return right


def _panels(matrix: Array, width: int) -> Iterator[slice]:
    """Ranges of columns of a matrix, one after another."""
    return (slice(at, at + width) for at in range(0, matrix.shape[1], width))
