"""What a state of continual merging says about itself: its models in their order. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardmerge.recipe import ModelName

RECORD = "shardmerge_state.json"
KEEP = 2
"""Steps whose sums are kept, if not said otherwise: the last, and one to go back to."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint that a state knows.

    Args:
        name: for people.
        versions: of its files, as they were read; of an adapter's too.
        content: digest of its tensors' names, dtypes and shapes, and of elements of some of them.
    """

    name: str
    url: str
    revision: str | None
    versions: Mapping[str, str]
    content: str = ""
    adapter: ModelName | None = None
    any_base: bool = False

    @classmethod
    def of(
        cls, name: str, model: ModelName, versions: Mapping[str, str], content: str = ""
    ) -> Model:
        """A model that a recipe would name so."""
        place = (model.url, model.revision)
        return cls(name, *place, versions, content, model.adapter, model.any_base)

    @property
    def model(self) -> ModelName:
        """As a recipe names it."""
        return ModelName(self.url, self.revision, self.adapter, self.any_base)


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
        fingerprint: of the plan that made the sum.
        versions: of the files of the sum, as they were written.
    """

    number: int
    model: Model
    norm: float
    total: float
    scale: float
    added: float
    folder: str | None
    fingerprint: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        """Refuse what is no number.

        Raises:
            ValueError: for a record that somebody has changed.
        """
        if not all(isinstance(value, float) for value in (self.norm, self.total, self.scale)):
            raise ValueError(f"step {self.number} has a norm or scale that is no number")


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


def kept(steps: Sequence[Step], keep: int) -> tuple[Step, ...]:
    """The steps, of which the last ``keep`` have their sums."""
    first = max(0, len(steps) - keep)
    return (*(replace(step, folder=None) for step in steps[:first]), *steps[first:])


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
    fields["base"] = _model_from(values["base"])
    fields["pending"] = None if pending is None else _model_from(pending)
    fields["steps"] = tuple(Step(**{**step, "model": _model_from(step["model"])}) for step in steps)
    return Record(**fields)  # type: ignore[arg-type]


def _model_from(values: Any) -> Model:
    adapter = values.get("adapter")
    return Model(**{**values, "adapter": None if adapter is None else ModelName(**adapter)})
