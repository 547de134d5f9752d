"""How a recipe and checkpoints can fail to fit together, and what to do about each case. Pure.

A kind of problem is a small value. The tensors that have the same problem are told in one message,
which ends in something that can be pasted into the recipe.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from shardmerge.errors import PlanError
from shardmerge.layers import place_of
from shardmerge.recipe import ModelName

MOST_LISTED = 10
"""Tensors that a message lists, of those that have their own details."""


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors that have one problem.

    Args:
        names: in output order.
        details: one text for each; empty texts where the kind of problem says it all.
        universe: names of all tensors that the output could have.
    """

    names: Sequence[str]
    details: Sequence[str]
    universe: Sequence[str]

    @property
    def count(self) -> str:
        """The number of tensors, in words."""
        return "1 tensor" if len(self.names) == 1 else f"{len(self.names):,} tensors"

    @property
    def are(self) -> str:
        """The verb that goes with the number."""
        return "is" if len(self.names) == 1 else "are"

    @property
    def them(self) -> str:
        """The pronoun that goes with the number."""
        return "it" if len(self.names) == 1 else "them"

    @property
    def few(self) -> str:
        """The first names."""
        return few(self.names)

    @property
    def listing(self) -> str:
        """The first details, one on a line, and the number of the others."""
        lines = [f"  {detail}" for detail in self.details[:MOST_LISTED]]
        if len(self.details) > MOST_LISTED:
            lines.append(f"  and {len(self.details) - MOST_LISTED:,} more")
        return "\n".join(lines)

    def rule(self, action: str) -> str:
        """A rule for these tensors and no others, as a recipe has it."""
        found = islice(_globs(self.names, self.universe), MOST_LISTED + 1)
        globs = [json.dumps(pattern, ensure_ascii=False) for pattern in found]
        if len(globs) > MOST_LISTED:
            globs[MOST_LISTED:] = ["..."]
        listed = globs[0] if len(globs) == 1 else f"[{', '.join(globs)}]"
        return f"rules: [{{tensors: {listed}, {action}}}]"


class Problem(Hashable, Protocol):
    """A kind of problem that several tensors can have."""

    def message(self, found: Found) -> str:
        """What is wrong with these tensors and what to do."""
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

    def check(self, universe: Sequence[str]) -> None:
        """Raise all problems as one.

        Args:
            universe: names of all tensors that the output could have.
        Raises:
            PlanError: if there is any problem.
        """
        messages = []
        for kind, tensors in self.problems.items():
            names, details = zip(*tensors, strict=True)
            messages.append(kind.message(Found(names, details, universe)))
        if messages:
            raise PlanError("\n".join(messages))


# --- words --------------------------------------------------------------------------------------


def few(names: Sequence[str], count: int = 3) -> str:
    """The first ``count`` names and the number of the others."""
    others = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + others


def models(names: Iterable[ModelName]) -> str:
    """Models, in a sentence."""
    told = list(dict.fromkeys(str(name) for name in names))
    return " and ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)


def by_value(values: Sequence[tuple[ModelName, str]]) -> str:
    """Each value with the models that have it."""
    holders: dict[str, list[ModelName]] = {}
    for model, value in values:
        holders.setdefault(value, []).append(model)
    return "; ".join(f"{value} in {models(held)}" for value, held in holders.items())


def take_from(model: ModelName) -> str:
    """The ``from`` of a rule."""
    return f"from: {_in_recipe(model)}"


_NO_TEXTS = ("true", "false", "yes", "no", "on", "off", "null")
"""What YAML takes for something else than a text."""


def _in_recipe(model: ModelName) -> str:
    """A model as a recipe has it: in quotes where YAML would read something else."""
    text = str(model)
    plain = re.fullmatch(r"(?:[^\W\d]|\.{0,2}/|~/)[\w./@:+~-]*[\w/]|[^\W\d]", text)
    if plain and text.lower() not in _NO_TEXTS:
        return text
    return json.dumps(text, ensure_ascii=False)


def _globs(names: Sequence[str], universe: Sequence[str]) -> Iterator[str]:
    """Patterns that together match all of ``names`` and nothing else, few if easily found."""
    wanted, done = set(names), set[str]()
    for name in dict.fromkeys(names):
        if name in done:
            continue
        pattern, matched = glob.escape(name), {name}
        for wider in _wider(name):
            reached = set(filter(re.compile(fnmatch.translate(wider)).match, universe))
            if len(reached) > 1 and reached <= wanted:
                pattern, matched = wider, reached
                break
        done |= matched
        yield pattern


def _wider(name: str) -> Iterator[str]:
    """Patterns for a tensor and its like: in all layers, and all of its layer."""
    yield re.sub(r"\d+", "*", glob.escape(name))
    place = place_of(name)
    if place is not None:
        yield f"{glob.escape(place.prefix)}{place.layer}.*"


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

    def message(self, found: Found) -> str:
        """Where they are, where not, and the rules that solve it."""
        have, do = ("have" if self.held[1:] else "has"), ("do" if self.lacking[1:] else "does")
        (action, meaning), *others = self._options()
        lines = [
            f"{found.count} {found.are} not in every input: {found.few}.",
            f"  {models(self.held)} {have} {found.them}, {models(self.lacking)} {do} not."
            f"{self._impossible()}",
            f"  Say what to do: {found.rule(action)}  ({meaning})",
            *(f"    or, in place of '{action}': {other}  ({why})" for other, why in others),
        ]
        return "\n".join(lines)

    def _impossible(self) -> str:
        if self.asked == "error":
            return ""
        if self.base_lacks:
            return f" 'missing: {self.asked}' needs the tensor in the base model."
        if self.asked == "base":
            return " 'missing: base' needs a base model that has the tensor."
        return f" 'missing: skip' leaves {self.present} of at least {self.least} models."

    def _options(self) -> list[tuple[str, str]]:
        """What can be done, and what that means."""
        lacking = models(self.lacking)
        options = []
        if self.base is not None:
            options.append(("missing: base", f"{lacking} as if equal to {self.base}"))
        if not self.base_lacks and self.present >= self.least:
            options.append(("missing: skip", f"merged without {lacking}"))
        options.append((take_from(self.held[0]), "copied from there"))
        options.append(("drop: true", "left out of the output"))
        return options


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Embeddings that differ in their number of rows only. Details tell the shapes."""

    keep: ModelName

    def message(self, found: Found) -> str:
        """The shapes, and the rule that keeps one model's vocabulary."""
        return (
            f"The vocabulary sizes differ, so {found.count} cannot be merged:\n{found.listing}\n"
            f"  Keep one model's vocabulary: {found.rule(take_from(self.keep))}\n"
            f"  and its tokenizer: tokenizer_source: {_in_recipe(self.keep)}"
        )


@dataclass(frozen=True, slots=True)
class Shapes:
    """Tensors of different shapes. Details tell the shapes."""

    keep: ModelName

    def message(self, found: Found) -> str:
        """The shapes, and how to go on without merging these tensors."""
        return (
            f"{found.count} {found.are} of different shapes in the models:\n{found.listing}\n"
            "  Only equal shapes can be merged: check that all are fine-tunes of one base model,\n"
            f"  or copy from one of them: {found.rule(take_from(self.keep))}"
        )


@dataclass(frozen=True, slots=True)
class Kinds:
    """Tensors that are floats in one model and integers in another, or different integers."""

    keep: ModelName

    def message(self, found: Found) -> str:
        """The dtypes, and how to go on without merging these tensors."""
        return (
            f"{found.count} {found.are} stored as different kinds of numbers:\n{found.listing}\n"
            "  Only floating-point tensors are merged; others must be equal.\n"
            f"  Copy from one model: {found.rule(take_from(self.keep))}"
        )


@dataclass(frozen=True, slots=True)
class Fp8:
    """Tensors stored as fp8, in a recipe that does not say what to write."""

    stored_by: tuple[ModelName, ...]

    def message(self, found: Found) -> str:
        """The tensors and the line that solves it."""
        return (
            f"{found.count} of {models(self.stored_by)} {found.are} stored as fp8: {found.few}.\n"
            "  Merged values do not fit fp8, so the recipe must say what to write: add "
            "`dtype: bfloat16`."
        )


# --- problems of rules --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TakeFrom:
    """Tensors that a rule takes from a model that lacks them."""

    model: ModelName

    def message(self, found: Found) -> str:
        """The tensors."""
        return (
            f"A rule takes {found.count} from {self.model}, which does not have {found.them}: "
            f"{found.few}.\n  Name another model, or make the pattern narrower."
        )


@dataclass(frozen=True, slots=True)
class NotInSlice:
    """Layers that a rule takes from a model that is not a source of their slice."""

    model: ModelName
    where: str

    def message(self, found: Found) -> str:
        """The tensors and the slice."""
        return (
            f"A rule takes {found.count} from {self.model}, which is not a source of "
            f"{self.where}: {found.few}.\n"
            "  Which of its layers are meant is then not known. Name one of the slice's sources."
        )


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A pattern of a rule that matches no tensor of the output."""

    where: str
    pattern: str
    near: str | None

    def message(self, found: Found) -> str:
        """The pattern, and the name that is nearest to it."""
        hint = f" Did you mean '{self.near}'?" if self.near else ""
        return (
            f"{self.where}: '{self.pattern}' matches no tensor of the output.{hint}\n"
            "  Patterns are compared with whole names; * stands for any characters."
        )


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters that do not make a method for some tensors: none given, or unusable together."""

    text: str

    def message(self, found: Found) -> str:
        """What is wrong, and where."""
        return f"{self.text} (for {found.few})"


# --- problems of extras -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExtraUnnamed:
    """A source without the further checkpoint that the method needs."""

    kind: str
    where: str

    def message(self, found: Found) -> str:
        """The key to add."""
        return (
            f"{self.where}: {self.kind} is needed to merge {found.few}.\n"
            f"  Give the checkpoint that holds it: `{self.kind}: <path>` beside `model:`."
        )


@dataclass(frozen=True, slots=True)
class ExtraUnfit:
    """A further checkpoint whose tensors do not fit those of its model. Details tell how.

    Args:
        own: whether they are of shapes of their own, and not needed of every tensor.
    """

    kind: str
    extra: ModelName
    model: ModelName
    own: bool = False

    def message(self, found: Found) -> str:
        """The tensors and how they differ."""
        told = (
            f"{self.extra}, the {self.kind} of {self.model}, does not fit it in {found.count}:\n"
            f"{found.listing}\n"
        )
        if self.own:
            return (
                f"{told}  For each tensor all models' must hold one, or none.\n"
                f"  Collect it again from {self.model}, or average {found.them}: "
                f"{found.rule('merge_method: linear, parameters: {weight: 1.0}')}"
            )
        return (
            f"{told}  It must hold a floating-point tensor of the same name and shape for every "
            "tensor\n"
            f"  that is merged. Estimate it again from {self.model}, or copy {found.them}: "
            f"{found.rule(take_from(self.model))}"
        )


@dataclass(frozen=True, slots=True)
class NoExtras:
    """Further checkpoints of which none holds anything of any tensor that a method merges."""

    method: str
    kind: str

    def message(self, found: Found) -> str:
        """What that comes from."""
        return (
            f"No {self.kind} checkpoint holds anything for any tensor that {self.method} merges.\n"
            f"  Its tensors have the names of the models': compare them with `shardmerge inspect`."
        )


# --- problems of whole models -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plain:
    """A problem that is not of single tensors."""

    text: str

    def message(self, found: Found) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True, slots=True)
class Deeper:
    """Layers beyond those of the model that gives the config."""

    donor: ModelName
    layers: int

    def message(self, found: Found) -> str:
        """The numbers, and the two ways out."""
        return (
            f"{found.count} {found.are} of layers that {self.donor} does not have: {found.few}.\n"
            f"  Its config.json is used for the output, and it has {self.layers} layers.\n"
            f"  Leave out what is beyond: {found.rule('drop: true')}\n"
            "  or say with `slices` which layers are merged."
        )
