"""Eight text classification tasks: the demonstration's four, and four more made in the same way.

=========  ===========================================  ==========================================
operator   a line of code with an operator hidden       which operator it is
method     a line of code with a called method hidden   which method it is
verb       a docstring with its first word hidden       what the function does
value      a name that is given a value                 of which type the value is
=========  ===========================================  ==========================================

Each was kept because fine-tuning makes the base model better at it by far more than 8 points.
Texts are split by hashes into train and test as in :mod:`benchmarks.demo.tasks`; the first training
texts of that order, which depends on hashes too, are set apart to choose parameters of merges with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.demo.corpus import Snippet
from benchmarks.demo.tasks import Task, build_tasks, labelled, split
from benchmarks.quality.corpus import read_hidden

_OPERATORS = {
    "==": "a test whether two values are equal",
    "is": "a test for None or for the same object",
    "is not": "a test that something is not None or not the same object",
    "in": "a test whether a collection contains an item",
    "not in": "a test that an item is missing from a collection",
    "<": "a comparison, less than",
    ">": "a comparison, greater than",
    "+": "an addition, or two strings joined",
    "-": "a subtraction, a difference",
    "*": "a multiplication, a product",
    "%": "a string filled in with values, or a remainder",
    "&": "a bitwise and, with a mask of bits",
}

_METHODS = {
    "append": "an item added to the end of a list",
    "join": "strings or parts of a path joined together",
    "write": "data written to a file or a stream",
    "get": "a value looked up in a mapping, with a default",
    "format": "values formatted into a string",
    "split": "a string split into parts",
    "startswith": "a check of the beginning of a string",
    "read": "data read from a file or a stream",
    "replace": "something replaced by something else",
    "close": "a file or a connection closed",
    "items": "keys and values of a mapping",
    "lower": "a string in lower case",
    "pop": "an item removed and returned",
    "compile": "a regular expression or code compiled",
    "encode": "text encoded to bytes",
    "decode": "bytes decoded to text",
}

_VERBS = {
    "it returns something": "return returns get",
    "it creates or makes something": "create make construct generate produce initialize",
    "it sets or changes something": "set add remove register update",
    "it reads or parses something": "read parse extract find",
    "it writes, sends or prints something": "write send print log format",
    "it converts something": "convert encode decode copy",
    "it checks or tests something": "test check true determine",
    "it runs, waits or handles something": "run wait process handle called close open",
}

_VALUES = {
    "NoneType": "None, nothing yet",
    "int": "an integer number",
    "str": "a string of text",
    "bool": "true or false, a flag",
    "List": "a list of items",
    "Dict": "a dictionary, a mapping of keys to values",
    "Tuple": "a tuple of some values",
    "bytes": "raw bytes",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """At most so many examples of each task.

    Args:
        train: To fine-tune on.
        validation: To choose the parameters of merges with; fine-tunes never see them.
        test: To report.
    """

    train: int
    validation: int
    test: int


@dataclass(frozen=True, slots=True)
class Divided:
    """A task whose training examples are divided.

    Args:
        task: The task; its training examples are those that are left to fine-tune on.
        validation: The same task with the validation examples in the place of the test's.
    """

    task: Task
    validation: Task


def build_divided(sizes: Sizes, *, every: int = 1) -> list[Divided]:
    """Return the eight tasks.

    Args:
        sizes: The most examples of each.
        every: Use one file of the standard library of so many, to be quicker.

    Raises:
        ValueError: The standard library here has too little text.
    """
    everything = 1_000_000
    demo = build_tasks(train_size=everything, test_size=everything, every=every)
    # One of each in turn, so that any beginning has tasks of both kinds.
    pairs = zip(demo, _more_tasks(read_hidden(every=every)), strict=True)
    return [divide(task, sizes) for pair in pairs for task in pair]


def divide(task: Task, sizes: Sizes) -> Divided:
    """Set validation examples apart, and limit all."""
    test = task.test[: sizes.test]
    apart, train = task.train[: sizes.validation], task.train[sizes.validation :]
    return Divided(
        task=replace(task, train=train[: sizes.train], test=test),
        validation=replace(task, train=(), test=apart),
    )


def _more_tasks(snippets: Iterable[Snippet]) -> Iterator[Task]:
    kinds: dict[str, list[Snippet]] = {}
    for snippet in snippets:
        kinds.setdefault(snippet.kind, []).append(snippet)
    for kind, table in (("operator", _OPERATORS), ("method", _METHODS), ("value", _VALUES)):
        used = [snippet for snippet in kinds.get(kind, ()) if snippet.label in table]
        yield _task(kind, tuple(table.values()), labelled(used, kind, [*table]))
    yield _task("verb", tuple(_VERBS), _verbs(kinds.get("verb", ()), _VERBS))


def _verbs(snippets: Iterable[Snippet], table: Mapping[str, str]) -> Iterator[tuple[Snippet, int]]:
    position = {word: i for i, words in enumerate(table.values()) for word in words.split()}
    for snippet in snippets:
        if snippet.label in position:
            yield snippet, position[snippet.label]


def _task(name: str, classes: tuple[str, ...], found: Iterable[tuple[Snippet, int]]) -> Task:
    train, test = split(name, found, n_classes=len(classes))
    return Task(name, classes, train, test)
