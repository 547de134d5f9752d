"""The picture: accuracy after each merge, and beside it what merging all at once gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # writes files; needs no screen

from matplotlib import pyplot

from benchmarks.quality.figures import relative, spread
from benchmarks.quality.report import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(result: Result, file: Path) -> None:
    """Draw accuracies relative to the fine-tunes' and save the picture as ``file``."""
    figure, axes = pyplot.subplots(figsize=(10, 6))
    sequences = [row for row in result.rows if row.runs]
    n_tasks = len(result.own)
    for row in sequences:
        _sequence(axes, row, result)
    marks = {
        f"{_label(row)}, at once": 100 * relative(row.finals[0], result.own)
        for row in result.rows
        if not row.runs
    }
    base = 100 * relative(result.base, result.own)
    axes.hlines(base, 1, n_tasks + 0.25, color="gray", linestyle=":")
    _marks(axes, {**marks, "base model": base}, right=n_tasks + 0.25)
    axes.set_xticks(range(1, n_tasks + 1))
    axes.set_xlabel("models merged")
    axes.set_ylabel("accuracy on their tasks, % of each task's own fine-tune")
    n_orders = len(sequences[0].runs)
    axes.set_title(f"Merged one by one: mean and standard deviation of {n_orders} orders")
    axes.legend(loc="lower left", framealpha=1, edgecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _sequence(axes: Axes, row: Row, result: Result) -> None:
    steps = range(1, len(result.own) + 1)
    spreads = [
        spread([100 * relative(run.after[step - 1], result.own) for run in row.runs])
        for step in steps
    ]
    means = [found.mean for found in spreads]
    (line,) = axes.plot(steps, means, marker="o", label=_label(row))
    axes.fill_between(
        steps,
        [found.mean - found.std for found in spreads],
        [found.mean + found.std for found in spreads],
        color=line.get_color(),
        alpha=0.15,
        linewidth=0,
    )


def _marks(axes: Axes, heights: dict[str, float], *, right: float) -> None:
    """Draw a short horizontal line at each height right of the last step, its name beside it."""
    gap = (axes.get_ylim()[1] - min(heights.values())) / 32
    lowest = -float("inf")
    for label, height in sorted(heights.items(), key=lambda item: item[1]):
        lowest = max(height, lowest + gap)  # names must not lie on each other
        axes.hlines(height, right, right + 0.3, color="black")
        axes.plot((right + 0.3, right + 0.6), (height, lowest), color="gray", linewidth=0.6)
        axes.text(right + 0.65, lowest, label, va="center", fontsize=8)
    axes.set_xlim(0.8, right + 3.2)


def _label(row: Row) -> str:
    parameters = row.candidate.parameters
    return f"{row.candidate.method} ({parameters})" if parameters else row.candidate.method
