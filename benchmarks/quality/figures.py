"""What accuracies come to: relative accuracy, backward transfer, spread. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True, slots=True)
class Run:
    """The accuracies while models were merged one after the other.

    Args:
        order: The tasks, as their models were merged.
        after: For each step, the accuracies (0 to 1) on the tasks merged so far, by task.
    """

    order: tuple[str, ...]
    after: tuple[Mapping[str, float], ...]

    @property
    def final(self) -> Mapping[str, float]:
        """The accuracies when all models are merged, by task."""
        return self.after[-1]

    @property
    def backward_transfer(self) -> float:
        """What later merges changed: the mean over all tasks but the last of end minus begin.

        A task's begin is its accuracy right after its own model was merged. Negative: forgotten.
        """
        earlier = self.order[:-1]
        return fmean(
            self.final[task] - accuracies[task]
            for task, accuracies in zip(earlier, self.after, strict=False)
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, standard deviation (of a sample; 0 for one value), minimum and maximum."""

    mean: float
    std: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Return how ``values``, at least one, spread."""
    std = stdev(values) if len(values) > 1 else 0.0
    return Spread(fmean(values), std, min(values), max(values))


def relative(accuracies: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Return the mean over the tasks in ``accuracies`` of accuracy / reference accuracy."""
    return fmean(value / reference[task] for task, value in accuracies.items())
