"""Compare two merged checkpoints, tensor by tensor, with the base model as the measure."""

from __future__ import annotations

import math
import operator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoint import THREADS, Stored, read_bf16, stored_tensors

FEW = 4  # bfloat16 roundings


class LayoutError(ValueError):
    """Two outputs do not hold the same tensors."""


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums over the elements of a task vector."""

    kept: int = 0
    total: float = 0.0
    magnitude: float = 0.0
    square: float = 0.0

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.kept + other.kept,
            self.total + other.total,
            self.magnitude + other.magnitude,
            self.square + other.square,
        )


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over the elements of both outputs."""

    elements: int = 0
    equal: int = 0
    beyond: int = 0
    ours: _Moments = _Moments()
    theirs: _Moments = _Moments()

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.elements + other.elements,
            self.equal + other.equal,
            self.beyond + other.beyond,
            self.ours + other.ours,
            self.theirs + other.theirs,
        )


@dataclass(frozen=True, slots=True)
class TaskVector:
    """What one output adds to the base model: statistics over all elements."""

    kept_share: float
    mean: float
    mean_magnitude: float
    std: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How two outputs differ.

    Args:
        elements: of each output.
        equal_share: of elements with the same value.
        beyond_share: of elements that differ by more than ``FEW`` bfloat16 roundings, at the
            largest magnitude of both outputs and the base model.
        worst_tensor: the one with the largest such share.
        worst_share: that share.
        ours: the task vector of the first output.
        theirs: that of the second.
    """

    elements: int
    equal_share: float
    beyond_share: float
    worst_tensor: str
    worst_share: float
    ours: TaskVector
    theirs: TaskVector

    def disagreement(self, *, share: float) -> str | None:
        """For deterministic methods: why the outputs are not the same model, or None."""
        # The worst tensor has a wider limit: a whole tensor that is wrong must not hide in the sum.
        found = (
            ("all tensors", self.beyond_share, share),
            (self.worst_tensor, self.worst_share, 5 * share + 0.02),
        )
        errors = [
            f"{part:.2%} of {where} differs by more than {FEW} bfloat16 roundings, "
            f"at most {limit:.2%} may"
            for where, part, limit in found
            if part > limit
        ]
        return "; ".join(errors) or None

    def random_disagreement(self) -> str | None:
        """For methods that draw masks: why the outputs are not two draws of one model, or None."""
        a, b = self.ours, self.theirs
        chance = 6 / math.sqrt(self.elements)  # six standard errors, for a unit deviation
        errors = []
        if abs(a.kept_share - b.kept_share) > 0.005 + chance:
            errors.append(f"kept shares are {a.kept_share:.2%} and {b.kept_share:.2%}")
        if not abs(a.mean_magnitude - b.mean_magnitude) <= (0.01 + chance) * b.mean_magnitude:
            errors.append(f"mean magnitudes are {a.mean_magnitude:.3g} and {b.mean_magnitude:.3g}")
        # Beyond chance: where weighted deltas cancel, plus is elected, and whether two cancel
        # exactly depends on roundings. That moves the mean, by little.
        slack = chance * math.hypot(a.std, b.std) + 0.005 * b.mean_magnitude
        if not abs(a.mean - b.mean) <= slack:
            errors.append(f"means are {a.mean:.3g} and {b.mean:.3g}")
        return "; ".join(errors) or None


def compare(ours: Path, theirs: Path, base: Path) -> Difference:
    """Read both outputs and the base model once, in chunks.

    Raises:
        LayoutError: tensors, shapes or dtypes are not the same.
    """
    maps = [stored_tensors(folder) for folder in (ours, theirs, base)]
    shapes = [{n: (t.dtype, t.shape) for n, t in tensors.items()} for tensors in maps]
    if shapes[0] != shapes[1]:
        names = sorted(dict(shapes[0].items() ^ shapes[1].items()))
        raise LayoutError(f"{ours} and {theirs} differ in {len(names)} tensors: {names[:5]}")
    if other := [name for name, (dtype, _) in shapes[0].items() if dtype != "BF16"]:
        raise LayoutError(f"{ours}: {len(other)} tensors are not bfloat16: {other[:5]}")
    triples = [(a, maps[1][name], maps[2][name]) for name, a in maps[0].items()]
    with ThreadPoolExecutor(THREADS) as pool:
        each = list(pool.map(_tensor, triples))
    sums = reduce(operator.add, each)
    worst_share, worst = max((s.beyond / s.elements, n) for s, n in zip(each, maps[0], strict=True))
    return Difference(
        elements=sums.elements,
        equal_share=sums.equal / sums.elements,
        beyond_share=sums.beyond / sums.elements,
        worst_tensor=worst,
        worst_share=worst_share,
        ours=_task_vector(sums.ours, sums.elements),
        theirs=_task_vector(sums.theirs, sums.elements),
    )


def _tensor(triple: tuple[Stored, Stored, Stored]) -> _Sums:
    return reduce(operator.add, (_chunk(*values) for values in read_bf16(triple)), _Sums())


def _chunk(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], base: NDArray[np.float32]
) -> _Sums:
    largest = np.maximum(np.maximum(np.abs(ours), np.abs(theirs)), np.abs(base))
    power = (largest.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    # A bfloat16 has 8 significant bits. Written so that a NaN counts as beyond.
    within = np.abs(ours - theirs) <= power * np.float32(FEW * 2.0**-7)
    return _Sums(
        elements=ours.size,
        equal=int(np.count_nonzero(ours == theirs)),
        beyond=ours.size - int(np.count_nonzero(within)),
        ours=_moments(ours - base),
        theirs=_moments(theirs - base),
    )


def _moments(delta: NDArray[np.float32]) -> _Moments:
    return _Moments(
        kept=int(np.count_nonzero(delta)),
        total=float(delta.sum(dtype=np.float64)),
        magnitude=float(np.abs(delta).sum(dtype=np.float64)),
        square=float(np.square(delta).sum(dtype=np.float64)),
    )


def _task_vector(sums: _Moments, elements: int) -> TaskVector:
    mean = sums.total / elements
    return TaskVector(
        kept_share=sums.kept / elements,
        mean=mean,
        mean_magnitude=sums.magnitude / elements,
        std=math.sqrt(max(0.0, sums.square / elements - mean * mean)),
    )
