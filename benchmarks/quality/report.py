"""The tables, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from benchmarks.quality.candidates import Candidate
from benchmarks.quality.figures import Run, Spread, relative, spread

_FIGURES = ("accuracy", "relative", "of base", "std", "min", "max", "transfer")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: a model, or the models that a method made of several orders.

    Args:
        kind: ``reference``, ``at once`` or ``in sequence``.
        candidate: The method and its parameters.
        finals: The accuracies (0 to 1) by task of each model.
        runs: How each model of a sequence came about; else empty.
    """

    kind: str
    candidate: Candidate
    finals: tuple[Mapping[str, float], ...]
    runs: tuple[Run, ...] = ()

    @property
    def accuracy(self) -> Spread:
        """The mean accuracy over the tasks, as it spreads over the orders."""
        return spread([fmean(final.values()) for final in self.finals])

    @property
    def backward_transfer(self) -> Spread | None:
        """The backward transfer as it spreads over the orders, if there is any."""
        return spread([run.backward_transfer for run in self.runs]) if self.runs else None


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate that was tried on the validation examples, and its mean accuracy there."""

    kind: str
    candidate: Candidate
    accuracy: float


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that was measured.

    Args:
        base: The base model's accuracies (0 to 1) by task.
        own: Each fine-tune's accuracy on its own task.
        rows: The methods' lines.
        choices: What was tried to choose their parameters.
        seconds: What each stage took.
    """

    base: Mapping[str, float]
    own: Mapping[str, float]
    rows: Sequence[Row]
    choices: Sequence[Choice]
    seconds: Mapping[str, float]

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The lines of the base model and of the fine-tunes, and the methods'."""
        references = (("base", self.base), ("own fine-tune", self.own))
        return (
            *(Row("reference", Candidate(name), (found,)) for name, found in references),
            *self.rows,
        )


def tables(result: Result) -> str:
    """Return the tasks, the parameters that were tried and the methods as text, in percent."""
    lines = [f"{'task':<18}{'base':>10}{'fine-tune':>10}{'gain':>10}"]
    for task, own in result.own.items():
        base = result.base[task]
        lines.append(f"{task:<18}{_percents(base, own, own - base)}")
    lines += ["", "Accuracy on validation examples, by which parameters were chosen:"]
    for choice in result.choices:
        parameters = choice.candidate.parameters
        name = f"{choice.kind:<14}{choice.candidate.method:<18}{parameters:<26}"
        lines.append(f"{name}{_percents(choice.accuracy)}")
    heads = "".join(f"{head:>10}" for head in _FIGURES)
    lines += ["", f"{'':<14}{'method':<18}{'parameters':<26}{heads}"]
    kind = ""
    for row in result.all_rows:
        shown, kind = "" if row.kind == kind else row.kind, row.kind
        lines.append(f"{shown:<14}{_method(row, result)}")
    return "\n".join(line.rstrip() for line in lines)


def _method(row: Row, result: Result) -> str:
    figures = _percents(
        row.accuracy.mean, _relative(row, result.own).mean, _relative(row, result.base).mean
    )
    if row.runs and row.backward_transfer:
        of_orders = row.accuracy
        figures += _percents(
            of_orders.std, of_orders.least, of_orders.most, row.backward_transfer.mean
        )
    return f"{row.candidate.method:<18}{row.candidate.parameters:<26}{figures}"


def _percents(*shares: float) -> str:
    return "".join(f"{100 * share:10.1f}" for share in shares)


def _relative(row: Row, reference: Mapping[str, float]) -> Spread:
    return spread([relative(final, reference) for final in row.finals])


def as_dict(result: Result) -> dict[str, object]:
    """Return the result for ``--json``."""
    return {
        "base": _rounded(result.base),
        "fine_tune": _rounded(result.own),
        "choices": [
            {"kind": c.kind, **_named(c.candidate), "accuracy": round(c.accuracy, 4)}
            for c in result.choices
        ],
        "rows": [_row(row, result) for row in result.all_rows],
        "seconds": {what: round(s, 1) for what, s in result.seconds.items()},
    }


def _named(candidate: Candidate) -> dict[str, object]:
    return {"method": candidate.method, "parameters": dict(candidate.settings)}


def _row(row: Row, result: Result) -> dict[str, object]:
    transfer = row.backward_transfer
    return {
        "kind": row.kind,
        **_named(row.candidate),
        "accuracy": _rounded(asdict(row.accuracy)),
        "relative": _rounded(asdict(_relative(row, result.own))),
        "of_base": _rounded(asdict(_relative(row, result.base))),
        "backward_transfer": _rounded(asdict(transfer)) if transfer else None,
        "finals": [_rounded(final) for final in row.finals],
        "runs": [
            {"order": run.order, "after": [_rounded(step) for step in run.after]}
            for run in row.runs
        ],
    }


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}
