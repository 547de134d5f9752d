"""How a recipe and checkpoints can fail to fit together, and what to do about each case. Pure.

A kind of problem is a small value. The tensors that have the same problem are told in one message,
which ends in something that can be pasted into the recipe.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shardmerge.errors import PlanError
from shardmerge.recipe import ModelName

MOST_LISTED = 10
"""Tensors that a message lists, of those that have their own details."""


class Problem(Hashable, Protocol):
    """A kind of problem that several tensors can have."""

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """What is wrong with these tensors and what to do.

        Args:
            names: of all tensors with this problem, in output order.
            details: one text for each; empty texts where the kind says it all.
        """
        ...


@dataclass(slots=True)
class Findings:
    """Problems and notes, gathered over all tensors.

    A note is a default that was used: its text, and the tensors it was used for.
    """

    problems: dict[Problem, list[tuple[str, str]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def problem(self, kind: Problem, name: str = "", detail: str = "") -> None:
        """Note a problem, of the tensor ``name`` if it is one of a tensor."""
        self.problems.setdefault(kind, []).append((name, detail))

    def note(self, text: str, name: str) -> None:
        """Note that a default was used for the tensor ``name``."""
        self.notes.setdefault(text, []).append(name)

    def told(self) -> tuple[str, ...]:
        """All notes, each with its tensors."""
        return tuple(f"{few(names)}: {text}" for text, names in self.notes.items())

    def check(self) -> None:
        """Raise all problems as one.

        Raises:
            PlanError: if there is any.
        """
        if self.problems:
            messages = [
                kind.message([name for name, _ in found], [detail for _, detail in found])
                for kind, found in self.problems.items()
            ]
            raise PlanError("\n".join(messages))


# --- words --------------------------------------------------------------------------------------


def few(names: Iterable[str], count: int = 3) -> str:
    """The first ``count`` names and the number of the others."""
    listed = list(names)
    others = f" and {len(listed) - count:,} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + others


def listing(details: Sequence[str]) -> str:
    """The first details, one on a line, and the number of the others."""
    lines = [f"  {detail}" for detail in details[:MOST_LISTED]]
    if len(details) > MOST_LISTED:
        lines.append(f"  and {len(details) - MOST_LISTED:,} more")
    return "\n".join(lines)


def tensors(count: int) -> str:
    """The number of tensors, in words."""
    return "1 tensor" if count == 1 else f"{count:,} tensors"


def be(count: int) -> str:
    """is or are."""
    return "is" if count == 1 else "are"


def models(names: Iterable[ModelName], link: str = "and") -> str:
    """Models, in a sentence."""
    told = list(dict.fromkeys(str(name) for name in names))
    return f" {link} ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)


def by_value(values: Sequence[tuple[ModelName, str]]) -> str:
    """Each value with the models that have it."""
    holders: dict[str, list[ModelName]] = {}
    for model, value in values:
        holders.setdefault(value, []).append(model)
    return "; ".join(f"{value} in {models(held)}" for value, held in holders.items())


def rule(names: Sequence[str], action: str) -> str:
    """A rule for these tensors, as a recipe has it; numbers become ``*`` where they differ."""
    shapes = Counter(_starred(name) for name in names)
    globs = dict.fromkeys(
        shape if shapes[shape] > 1 else name
        for name, shape in ((name, _starred(name)) for name in names)
    )
    shown = [f'"{glob}"' for glob in list(globs)[:MOST_LISTED]]
    if len(globs) > MOST_LISTED:
        shown.append("...")
    globs_text = shown[0] if len(shown) == 1 else f"[{', '.join(shown)}]"
    return f"rules: [{{tensors: {globs_text}, {action}}}]"


def take_from(model: ModelName) -> str:
    """The ``from`` of a rule."""
    text = str(model)
    return f"from: {text}" if re.fullmatch(r"[\w./@:+~-]*[\w/]", text) else f'from: "{text}"'


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)


# --- problems of tensors ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Missing:
    """Tensors that some inputs lack.

    Args:
        held: models that have them.
        lacking: inputs that do not.
        base: the base model if it has them.
        base_lacks: whether the base model lacks them and the method needs it.
        present: sources that have them.
        least: models that the method needs at least.
        asked: what a rule asks to do about it, if that is not possible.
    """

    held: tuple[ModelName, ...]
    lacking: tuple[ModelName, ...]
    base: ModelName | None
    base_lacks: bool
    present: int
    least: int
    asked: str

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """Where they are, where not, and the rules that solve it."""
        count = len(names)
        first = f"{tensors(count)} {be(count)} not in every input: {few(names)}."
        where = f"{models(self.held)} {'have' if self.held[1:] else 'has'} {_them(count)}, "
        where += f"{models(self.lacking)} {'do' if self.lacking[1:] else 'does'} not"
        return "\n".join([first, f"  {where}.{self._impossible()}", *self._options(names)])

    def _impossible(self) -> str:
        if self.asked == "error":
            return ""
        if self.base_lacks:
            return f" 'missing: {self.asked}' needs the tensor in the base model."
        if self.asked == "base":
            return " 'missing: base' needs a base model that has the tensor."
        return f" 'missing: skip' leaves {self.present} of at least {self.least} models."

    def _options(self, names: Sequence[str]) -> list[str]:
        """One line for each thing that can be done; the first as a whole rule."""
        lacking = models(self.lacking)
        options = []
        if self.base is not None:
            options.append(("missing: base", f"{lacking} as if equal to {self.base}"))
        if not self.base_lacks and self.present >= self.least:
            options.append(("missing: skip", f"merged without {lacking}"))
        options.append((take_from(self.held[0]), "copied from there"))
        options.append(("drop: true", "left out of the output"))
        (action, meaning), *others = options
        return [
            f"  Say what to do: {rule(names, action)}  ({meaning})",
            *(f"    or, in place of '{action}': {other}  ({why})" for other, why in others),
        ]


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Embeddings that differ in their number of rows only. Details tell the shapes."""

    keep: ModelName

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The shapes, and the rule that keeps one model's vocabulary."""
        solution = rule(list(dict.fromkeys(names)), take_from(self.keep))
        return (
            f"The vocabulary sizes differ, so {tensors(len(names))} cannot be merged:\n"
            f"{listing(details)}\n"
            f"  Keep the vocabulary of one model, and its tokenizer: {solution}"
        )


@dataclass(frozen=True, slots=True)
class Shapes:
    """Tensors of different shapes. Details tell the shapes."""

    keep: ModelName

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The shapes."""
        count = len(names)
        return (
            f"{tensors(count)} {be(count)} of different shapes in the models:\n{listing(details)}\n"
            "  Only equal shapes can be merged: check that all are fine-tunes of one base model,\n"
            f"  or take such tensors from one of them: {rule(names[:1], take_from(self.keep))}"
        )


@dataclass(frozen=True, slots=True)
class Kinds:
    """Tensors that are floats in one model and integers in another, or different integers."""

    keep: ModelName

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The dtypes."""
        count = len(names)
        return (
            f"{tensors(count)} {be(count)} stored as different kinds of numbers:\n"
            f"{listing(details)}\n"
            "  Only floating-point tensors are merged; others must be equal. Take them from one "
            f"model: {rule(names, take_from(self.keep))}"
        )


@dataclass(frozen=True, slots=True)
class Fp8:
    """Tensors stored as fp8, in a recipe that does not say what to write."""

    stored_by: tuple[ModelName, ...]

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The tensors and the line that solves it."""
        what = f"{tensors(len(names))} of {models(self.stored_by)} {be(len(names))}"
        return (
            f"{what} stored as fp8: {few(names)}.\n"
            "  Merged values do not fit fp8, so the recipe must say what to write: add "
            "`dtype: bfloat16`."
        )


# --- problems of rules --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TakeFrom:
    """Tensors that a rule takes from a model that lacks them."""

    model: ModelName

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The tensors."""
        count = len(names)
        return (
            f"A rule takes {tensors(count)} {take_from(self.model)}, which does not have "
            f"{_them(count)}: {few(names)}.\n"
            "  Name another model, or make the pattern narrower."
        )


@dataclass(frozen=True, slots=True)
class NotInSlice:
    """Layers that a rule takes from a model that is not a source of their slice."""

    model: ModelName
    where: str

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The tensors and the slice."""
        return (
            f"A rule takes {tensors(len(names))} {take_from(self.model)}, which is not a source of "
            f"{self.where}: {few(names)}.\n"
            "  Which of its layers are meant is then not known. Name one of the slice's sources."
        )


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A pattern of a rule that matches no tensor of the output."""

    where: str
    pattern: str
    near: str | None

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The pattern, and the name that is nearest to it."""
        hint = f" Did you mean '{self.near}'?" if self.near else ""
        return (
            f"{self.where}: '{self.pattern}' matches no tensor of the output.{hint}\n"
            "  Patterns are compared with whole names; * stands for any characters."
        )


# --- problems of extras -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExtraUnnamed:
    """A source without the further checkpoint that the method needs."""

    kind: str
    where: str

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The key to add."""
        return (
            f"{self.where}: {self.kind} is needed to merge {few(names)}.\n"
            f"  Give the checkpoint that holds it: `{self.kind}: <path>` beside `model:`."
        )


@dataclass(frozen=True, slots=True)
class ExtraUnfit:
    """A further checkpoint whose tensors do not fit those of its model. Details tell how."""

    kind: str
    extra: ModelName
    model: ModelName

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The tensors and how they differ."""
        return (
            f"{self.extra}, the {self.kind} of {self.model}, does not fit it in "
            f"{tensors(len(names))}:\n{listing(details)}\n"
            "  It must hold a floating-point tensor of the same name and shape for every tensor\n"
            f"  that is merged. Estimate it again from {self.model}, or copy by a rule (`from:`)."
        )


# --- problems of whole models -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plain:
    """A problem that is not of single tensors."""

    text: str

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True, slots=True)
class Deeper:
    """Layers beyond those of the model that gives the config."""

    donor: ModelName
    layers: int

    def message(self, names: Sequence[str], details: Sequence[str]) -> str:
        """The numbers, and the two ways out."""
        return (
            f"The output would have {tensors(len(names))} of layers beyond the {self.layers} of "
            f"{self.donor}, whose config.json is used: {few(names)}.\n"
            f"  Leave them out ({rule(names, 'drop: true')}),\n"
            "  or say with `slices` which layers are merged."
        )
