"""YAML text as plain values, strictly: no key twice, no custom tag, bounded, YAML 1.2's numbers.

Knows nothing of recipes. A ``Node`` is a value with its place in the text, and the list to which
everything that is wrong is added, so that a user sees all problems at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from shardmerge.errors import RecipeError

MAX_BYTES = 1 << 20
"""Longest text."""
MAX_NODES = 100_000
"""Most values, aliases (``*name``) written out."""
MAX_DEPTH = 32
"""Deepest nesting."""

Tree: TypeAlias = "bool | int | float | str | list[Tree] | dict[str, Tree] | None"
"""A YAML document as plain values."""

_TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def _int(text: str) -> int:
    if len(text) > 100:
        raise ValueError("more digits than any number of a recipe has, or than a float can hold")
    return int(text)


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SCALARS: dict[str, Callable[[str], Tree]] = {
    "null": lambda text: None,
    "bool": lambda text: _BOOLS[text.lower()],
    "int": _int,
    "float": _float,
    "str": str,
    "merge": str,
}


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with numbers as in YAML 1.2 (``1e-3`` is one) and a bound on the nesting."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (none of SafeLoader's: PyYAML reads this name)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One node, unless it is too deep: PyYAML recurses."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            text = f"nested more than {MAX_DEPTH} deep"
            raise yaml.MarkedYAMLError(problem=text, problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _name, _pattern, _first in (
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"(?i:true|false|yes|no|on|off)", "tTfFyYnNoO"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the text and where it stands.

    Args:
        value: plain.
        where: its place as messages name it (``models[1].parameters``).
        problems: what is wrong anywhere in the text; shared by all nodes of it.
        root: whether it is the whole document, whose name the places of its keys leave out.
    """

    value: Tree
    where: str
    problems: list[str]
    root: bool = False

    def wrong(self, text: str) -> None:
        """Add a problem of this value."""
        self.problems.append(f"{self.where}: {text}")

    def at(self, where: str) -> Node:
        """Another place of the same text, to report something there."""
        return Node(None, where, self.problems)

    def pairs(self) -> list[tuple[str, Node]]:
        """Keys and values of a mapping; reports another kind of value."""
        if not isinstance(self.value, dict):
            self.wrong(f"must be a mapping (key: value), not {shown(self.value)}")
            return []
        prefix = "" if self.root else f"{self.where}."
        return [
            (key, Node(value, f"{prefix}{key}", self.problems)) for key, value in self.value.items()
        ]

    def fields(self, known: Iterable[str], instead: Mapping[str, str]) -> dict[str, Node]:
        """The keys of a mapping that are given; null counts as not given.

        Args:
            known: all keys that it may have.
            instead: for keys that are refused by name: what to do.
        """
        known, found = tuple(known), {}
        for key, node in self.pairs():
            if key in known:
                found[key] = node
            elif key in instead:
                self.wrong(f"'{clipped(key)}' {instead[key]}")
            else:
                self.wrong(unknown("key", key, known))
        return {key: node for key, node in found.items() if node.value is not None}

    def entries(self) -> list[Node]:
        """The values of a list of at least one; reports anything else."""
        if not isinstance(self.value, list) or not self.value:
            kind = "an empty list" if self.value == [] else shown(self.value)
            self.wrong(f"must be a list of at least one entry, not {kind}")
            return []
        return [
            Node(value, f"{self.where}[{index}]", self.problems)
            for index, value in enumerate(self.value)
        ]

    def text(self) -> str | None:
        """A text that is not empty; None where another kind of value was reported."""
        if isinstance(self.value, str) and self.value:
            return self.value
        what = "an empty text" if self.value == "" else shown(self.value)
        hint = "; put it in quotes" if isinstance(self.value, bool | int | float) else ""
        self.wrong(f"must be text, not {what}{hint}")
        return None

    def flag(self) -> bool | None:
        """True or false; None where another kind of value was reported."""
        if isinstance(self.value, bool):
            return self.value
        self.wrong(f"must be true or false, not {shown(self.value)}")
        return None

    def whole(self, low: int, high: int) -> int | None:
        """A whole number of this range; None where another kind of value was reported."""
        value = self.value
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        self.wrong(f"must be a whole number from {low} to {high}, not {shown(value)}")
        return None


def read_yaml(text: str, where: str) -> Node:
    """The one document of ``text``; keys given twice and unusable values are among its problems.

    Args:
        text: YAML of at most 1 MiB.
        where: what the text is called in messages.

    Raises:
        RecipeError: for text that is not YAML, is empty or too large, or has several documents.
    """
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        raise RecipeError(f"{where}: has {size:,} bytes; a recipe may have {MAX_BYTES:,}")
    document = _composed(text, where)
    reading = _Reading(where)
    tree = None if document is None else reading.value(document, 0)
    if tree is None and not reading.problems:
        raise RecipeError(f"{where}: is empty; it needs at least merge_method and models")
    return Node(tree, where, reading.problems, root=True)


def clipped(text: str, length: int = 80) -> str:
    """Text for a message: printable, on one line, of at most ``length`` characters."""
    plain = "".join(char if char.isprintable() else "�" for char in text[: length + 1])
    return plain if len(plain) <= length else f"{plain[: length - 3]}..."


def shown(value: object) -> str:
    """A value of the text for a message."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            looks = "; remove the quotes" if _NUMBER.fullmatch(value) else ""
            return f"the text '{clipped(value)}'{looks}"
        case int() if abs(value) >= 10**30:
            return "a number of more than 30 digits"
        case list():
            return "a list"
        case dict():
            return "a mapping"
    return str(value)


def unknown(
    kind: str, name: str, known: Iterable[str], *, of: str = "", has: str = "it has"
) -> str:
    """The problem of a name that is not known: what is known, and what is nearest."""
    known = tuple(known)
    there = f" ({has} {', '.join(known)})" if known else ""
    near = nearest(name, known)
    hint = f". Did you mean '{near}'?" if near else ""
    return f"unknown {kind} '{clipped(name)}'{of}{there}{hint}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be."""
    return next(iter(difflib.get_close_matches(name[:200], tuple(known), n=1)), None)


def _composed(text: str, where: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        if not loader.check_node():
            return None
        document = loader.get_node()
        if not loader.check_node():
            return document
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_syntax(error, where)) from None
    except yaml.YAMLError as error:
        first = clipped(str(error).splitlines()[0], 200)
        raise RecipeError(f"{where}: is not valid YAML: {first}") from None
    except (ValueError, OverflowError):  # PyYAML's chr() of "\UFFFFFFFF", int() of a long %YAML
        raise RecipeError(
            f"{where}: is not valid YAML: a number of an escape (\\U...) or of a "
            "directive (%YAML) is out of range"
        ) from None
    raise RecipeError(
        f"{where}: has several YAML documents (separated by ---); write each recipe to its own file"
    )


def _syntax(error: yaml.MarkedYAMLError, where: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    what = ", ".join(part for part in (error.context, error.problem) if part)
    hint = " (indent with spaces, not tabs)" if "'\\t'" in what else ""
    return f"{where}{place}: is not valid YAML: {clipped(what, 200)}{hint}"


@dataclass
class _Reading:
    """Turns YAML nodes into plain values, counting what aliases repeat."""

    where: str
    problems: list[str] = field(default_factory=list)
    nodes: int = 0

    def value(self, node: yaml.Node, depth: int) -> Tree:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise RecipeError(
                f"{self.where}: grows beyond {MAX_NODES:,} values or a depth of {MAX_DEPTH} when "
                "its aliases (*name) are written out"
            )
        tag = node.tag.removeprefix(_TAG)
        match node:
            case yaml.ScalarNode() if tag in _SCALARS:
                return self._scalar(node, tag)
            case yaml.SequenceNode() if tag == "seq":
                return [self.value(item, depth + 1) for item in node.value]
            case yaml.MappingNode() if tag == "map":
                return self._mapping(node, depth)
        self._refuse(node, f"has the tag {clipped(node.tag)}, which recipes do not have")
        return None

    def _scalar(self, node: yaml.ScalarNode, tag: str) -> Tree:
        text: str = node.value
        if _CONTROL.search(text):
            self._refuse(node, f"line break or control character in {shown(text)}")
            return None
        try:
            return _SCALARS[tag](text)
        except (KeyError, ValueError):
            self._refuse(node, f"'{clipped(text)}' cannot be used as {tag}")
            return None

    def _mapping(self, node: yaml.MappingNode, depth: int) -> Tree:
        found: dict[str, Tree] = {}
        merged: dict[str, Tree] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            value = self.value(value_node, depth + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, "a key must be a word, not a list or mapping")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                self._refuse(
                    key_node,
                    f"key '{clipped(key)}' is given twice (first in line {lines[key]}); remove one",
                )
            elif _CONTROL.search(key):
                self._refuse(key_node, f"control character in the key '{clipped(key)}'")
            elif key_node.tag == f"{_TAG}merge":
                merged = self._merged(key_node, value)
            else:
                found[key] = value
            lines.setdefault(key, line)
        return {**merged, **found}

    def _merged(self, node: yaml.Node, value: Tree) -> dict[str, Tree]:
        """What ``<<: *name`` brings in; of several, the first counts."""
        result: dict[str, Tree] = {}
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                result = {**part, **result}
            else:
                self._refuse(node, f"'<<' takes a mapping, not {shown(part)}")
        return result

    def _refuse(self, node: yaml.Node, text: str) -> None:
        self.problems.append(f"{self.where}, line {node.start_mark.line + 1}: {text}")
