"""The table: accuracy of every model on every task, and how much of the fine-tunes it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Args:
        model: Its name.
        kind: ``base``, ``fine-tune`` or ``merge``.
        accuracies: Share of right answers, from 0 to 1, by task.
        note: What to know about it, in a few words.
    """

    model: str
    kind: str
    accuracies: dict[str, float]
    note: str = ""

    @property
    def mean(self) -> float:
        """The mean accuracy over the tasks, from 0 to 1."""
        return fmean(self.accuracies.values())

    def relative(self, single: dict[str, float]) -> float:
        """Return the mean over the tasks of accuracy / accuracy of the task's own fine-tune."""
        return fmean(self.accuracies[task] / own for task, own in single.items() if own)


def own_accuracies(rows: Sequence[Row]) -> dict[str, float]:
    """Return the accuracy of each fine-tune on its own task, by task."""
    return {row.model: row.accuracies[row.model] for row in rows if row.kind == "fine-tune"}


def table(rows: Sequence[Row]) -> str:
    """Return the table as text: one line for each row, accuracies in percent."""
    single = own_accuracies(rows)
    names = "".join(f"{task:>11}" for task in single)
    lines = [f"{'':<11}{'model':<16}{names}{'mean':>11}{'relative':>11}"]
    kind = ""
    for row in rows:
        shown = "" if row.kind == kind else row.kind
        kind = row.kind
        cells = "".join(f"{100 * row.accuracies[task]:11.1f}" for task in single)
        means = f"{100 * row.mean:11.1f}{100 * row.relative(single):10.1f}%"
        line = f"{shown:<11}{row.model:<16}{cells}{means}  {row.note}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def as_dict(row: Row, single: dict[str, float]) -> dict[str, object]:
    """Return the row for ``--json``."""
    return {
        "model": row.model,
        "kind": row.kind,
        "accuracy": {task: round(value, 4) for task, value in row.accuracies.items()},
        "mean": round(row.mean, 4),
        "relative": round(row.relative(single), 4),
        "note": row.note,
    }
