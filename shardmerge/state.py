"""What a state of continual merging says about itself: its models in their order. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardmerge.recipe import ModelName

RECORD = "shardmerge_state.json"
KEEP = 2
"""Steps whose sums are kept, if not said otherwise: the last, and one to go back to."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint that a state knows.

    Args:
        name: for people.
        versions: of its files, as they were read.
    """

    name: str
    url: str
    revision: str | None
    versions: Mapping[str, str]

    @property
    def model(self) -> ModelName:
        """As a recipe names it."""
        return ModelName(self.url, self.revision)


@dataclass(frozen=True, slots=True)
class Step:
    """A model that was added.

    Args:
        number: from 1.
        norm: Euclidean norm of its task vector.
        total: norm of the sum after it.
        scale: what the sum is multiplied with to give the merged model's task vector; 1 / lambda.
        added: seconds since 1970.
        folder: of its sum, in the state; None once it is no longer kept.
    """

    number: int
    model: Model
    norm: float
    total: float
    scale: float
    added: float
    folder: str | None


@dataclass(frozen=True, slots=True)
class Record:
    """What a state says about itself.

    Args:
        parameters: of the method, by recipe key.
        rules: a YAML list, as in a recipe; empty for none.
        keep: steps whose sums stay.
        pending: the model whose step was begun and is not complete.
    """

    version: str
    method: str
    parameters: Mapping[str, float | bool | str]
    rules: str
    keep: int
    base: Model
    steps: tuple[Step, ...]
    pending: Model | None = None


def dropped(steps: Sequence[Step], keep: int) -> list[Step]:
    """The steps whose sums are there and no longer kept."""
    return [step for step in steps[: max(0, len(steps) - keep)] if step.folder is not None]


def kept(steps: Sequence[Step], keep: int) -> tuple[Step, ...]:
    """The steps, of which the last ``keep`` have their sums."""
    gone = {step.number for step in dropped(steps, keep)}
    return tuple(replace(s, folder=None) if s.number in gone else s for s in steps)


def as_json(record: Record) -> dict[str, object]:
    """What is written."""
    return {"shardmerge state": 1, **dataclasses.asdict(record)}


def record_from(values: dict[str, object]) -> Record:
    """What was written.

    Raises:
        ValueError, KeyError, TypeError: for anything else.
    """
    if values.pop("shardmerge state") != 1:
        raise ValueError("it is of another version")
    fields: dict[str, object] = dict(values)
    pending = values["pending"]
    steps = values["steps"]
    if not isinstance(steps, list):
        raise ValueError("steps are no list")
    fields["base"] = Model(**values["base"])  # type: ignore[arg-type]
    fields["pending"] = None if pending is None else Model(**pending)  # type: ignore[arg-type]
    fields["steps"] = tuple(Step(**{**step, "model": Model(**step["model"])}) for step in steps)
    return Record(**fields)  # type: ignore[arg-type]
