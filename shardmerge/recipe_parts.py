"""The values that a recipe consists of, and what a parameter's setting gives for one tensor."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.methods.api import Parameter
from shardmerge.recipe_yaml import nearest, shown

_LOGIN = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY = re.compile(r"(://[^\s'\"?#]*)[?#][^\s'\"]*?(?=[,\]}]*(?:[\s'\"]|$))")


def public_text(text: str) -> str:
    """A URL, or a text with URLs, without users, passwords, queries and fragments."""
    return _QUERY.sub(r"\1", _LOGIN.sub("", text))


@dataclass(frozen=True, slots=True)
class ModelName:
    """A checkpoint as a recipe names it: a path or URL, and a revision (``path@revision``).

    As text, for messages, it has no login and no query.

    Args:
        adapter: a LoRA adapter that is added to it (``path+adapter``).
        any_base: whether the adapter may have been trained on another checkpoint than this.
    """

    url: str
    revision: str | None = None
    adapter: ModelName | None = None
    any_base: bool = False

    def __str__(self) -> str:
        url = public_text(self.url)
        own = f"{url}@{self.revision}" if self.revision else url
        return f"{own}+{self.adapter}" if self.adapter else own


Scalar = float | bool | str
"""One value of a parameter, as the recipe gives it."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values spread evenly over the layers of a slice; numbers are interpolated, others picked."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Filtered:
    """A value for the tensors whose name contains ``substring`` (None: for all).

    The first match of a list of these counts.
    """

    substring: str | None
    value: Scalar | Gradient


Setting = Scalar | Gradient | tuple[Filtered, ...]
"""A parameter's value anywhere in a recipe."""


@dataclass(frozen=True, slots=True)
class Source:
    """One model of ``models`` or of a slice's ``sources``.

    Args:
        layers: ``layer_range`` [first, last) of a slice's source.
        parameters: by recipe key.
        extras: further checkpoints of this model, by kind (``fisher``).
        where: its place in the recipe, for messages (``models[1]``, ``slices[0].sources[1]``).
    """

    model: ModelName
    layers: tuple[int, int] | None
    parameters: Mapping[str, Setting]
    extras: Mapping[str, ModelName]
    where: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive output layers and the layers of each source that they are merged from.

    Without ``slices`` in the recipe there is one, whose sources have no ``layers``: all of them.
    The base model, where it is only listed, is not among the sources of a method that takes task
    vectors from it: ``sources`` are the models that are merged.

    Args:
        base: the base model, with its layers, where the recipe's method or a rule needs it. Its
            layers are those that the recipe lists it with, else those of the first source.
    """

    sources: tuple[Source, ...]
    base: Source | None
    parameters: Mapping[str, Setting]
    where: str


@dataclass(frozen=True, slots=True)
class Split:
    """Matrices that lie side by side in one tensor (fused qkv, gate and up).

    Args:
        axis: ``rows`` or ``columns``: what is shared out among them.
        sizes: of each, or their number where they are of one size.
    """

    axis: str
    sizes: int | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done differently for output tensors whose name matches one of ``tensors`` (globs).

    Args:
        merge_method: another method; its parameters are those of ``parameters`` and the recipe's.
            It merges the same ``Slice.sources``.
        parameters: of the method, by recipe key; before all others.
        take_from: copy the tensor from this model (key ``from``).
        missing: for a tensor that some inputs lack: ``error`` (default), ``base`` (they count as
            equal to the base model) or ``skip`` (they are left out).
        drop: leave the tensor out of the output.
        split: the matrices that it holds, for methods that see matrices as a whole.
    """

    tensors: tuple[str, ...]
    merge_method: str | None
    parameters: Mapping[str, Setting]
    take_from: ModelName | None
    missing: str | None
    drop: bool
    where: str
    split: Split | None = None


def applicable(setting: Setting, tensor: str) -> Scalar | Gradient | None:
    """What a setting says about ``tensor``; None where no filter matches."""
    if not isinstance(setting, tuple):
        return setting
    for item in setting:
        if item.substring is None or item.substring in tensor:
            return item.value
    return None


def value_at(value: Scalar | Gradient, t: float) -> Scalar:
    """A value at ``t``, from 0 (first layer of the slice) to 1 (last).

    Numbers are interpolated between the two nearest entries, with mergekit's formula and so its
    bits; of others, the entry at or before ``t`` is picked.
    """
    if not isinstance(value, Gradient):
        return value
    entries = value.values
    position = t * (len(entries) - 1)
    index = int(position)
    low, high = entries[index], entries[min(index + 1, len(entries) - 1)]
    if not isinstance(low, float) or not isinstance(high, float):
        return low
    part = position - index
    return (1 - part) * low + part * high


def setting_at(setting: Setting, tensor: str, t: float) -> Scalar | None:
    """The value of a setting for ``tensor`` at ``t``; None where no filter matches."""
    value = applicable(setting, tensor)
    return None if value is None else value_at(value, t)


def wrong_value(parameter: Parameter, value: object) -> str | None:
    """What is wrong with a value for ``parameter``, or None."""
    if parameter.kind is bool:
        return None if isinstance(value, bool) else f"must be true or false, not {shown(value)}"
    if issubclass(parameter.kind, enum.Enum):
        return _wrong_choice(parameter.kind, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"must be a number, not {shown(value)}"
    problem = parameter.check(float(value))
    return f"{problem}, not {shown(value)}" if problem else None


def _wrong_choice(kind: type[enum.Enum], value: object) -> str | None:
    try:
        kind(value)
    except ValueError:
        choices = [str(choice.value) for choice in kind]
        near = nearest(value, choices) if isinstance(value, str) else None
        hint = f". Did you mean '{near}'?" if near else ""
        return f"must be one of {', '.join(choices)}, not {shown(value)}{hint}"
    return None
