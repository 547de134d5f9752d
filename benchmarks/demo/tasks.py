"""Four text classification tasks, made from the standard library's own words and code.

=========  ===========================================  ==========================================
topic      a docstring or comment                       which area of the library it belongs to
keyword    a line of code without its first word        which keyword is missing
origin     a sentence                                   where it was written: a comment, ...
name       the body of a function without its name      what the name says that it does
=========  ===========================================  ==========================================

Texts are split into train and test by a hash of their letters, so that a text (and the same text
with other numbers or layout) is on one side only, in every task, on every machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.demo.corpus import Snippet, read_standard_library

TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Example:
    """A text and the position of its class in :attr:`Task.classes`."""

    text: str
    target: int


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task.

    Args:
        name: Its short name.
        classes: A sentence for each class; its embedding by the base model is the frozen head.
        train: Examples to fine-tune on.
        test: Held-out examples.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]


_TOPICS = {
    "networks, sockets and web servers": "http urllib socket socketserver ssl ftplib smtplib imaplib"
    " poplib nntplib telnetlib xmlrpc wsgiref ipaddress cgi webbrowser",
    "e-mail messages and mailboxes": "email mailbox mimetypes quopri",
    "threads, processes and asynchronous tasks": "asyncio multiprocessing threading concurrent queue"
    " subprocess selectors sched signal asyncore",
    "unit tests, debugging and profiling": "unittest doctest pdb bdb trace traceback profile cProfile"
    " pstats timeit tracemalloc cmd logging",
    "files, folders and archives": "tarfile zipfile shutil pathlib os posixpath ntpath genericpath"
    " tempfile gzip bz2 lzma glob fnmatch filecmp fileinput _pyio io zipapp",
    "numbers, statistics, dates and times": "_pydecimal decimal fractions statistics numbers datetime"
    " _pydatetime calendar random zoneinfo _strptime colorsys",
    "data formats such as XML, HTML, JSON and CSV": "xml html json csv configparser plistlib tomllib"
    " pickle pickletools pprint gettext",
    "the Python language: imports, types, source code": "importlib inspect ast dis typing enum"
    " dataclasses functools abc types pkgutil symtable tokenize codeop _collections_abc contextlib",
}

_KEYWORDS = {
    "if": "an if statement, a condition",
    "while": "a while loop, repeated as long as a condition holds",
    "for": "a for loop over items",
    "with": "a with statement, a context manager",
    "return": "a return statement, the value of a function",
    "raise": "a raise statement, an exception is raised",
    "def": "a function definition",
    "class": "a class definition",
    "import": "an import of a module",
    "except": "an except clause, an exception is caught",
}

_ORIGINS = {
    "comment": "a comment between lines of code",
    "function": "the docstring of a function, what it does and returns",
    "class": "the docstring of a class, what an object is",
    "message": "an error message, what went wrong",
}

_IDENTIFIERS = {
    "class": "the name of a class, a kind of object",
    "function": "the name of a function, an action",
    "constant": "the name of a constant, a fixed value",
    "variable": "the name of a variable or an argument",
}

_EXC={"ValueError":"a value that is not allowed","TypeError":"an object of the wrong type","RuntimeError":"something called in the wrong state or order","OSError":"a failure of the operating system or a file","NotImplementedError":"something that is not supported", "ImportError":"a module that cannot be imported"}

_NAMES = {
    "set up a new object": "init new setup",
    "get or find a value": "get find lookup select getitem getattr",
    "set, change or update a value": "set update replace setitem setattr setstate",
    "check whether something is true": "is has check contains can should",
    "read or load data": "read load recv readline readinto receive fetch",
    "write, send or print data": "write save dump send print sendall put log",
    "add or register an item": "add append register insert extend push",
    "remove, delete or clear items": "remove del delete discard clear pop delitem unregister",
    "create or open something": "create make open build start connect",
    "parse, decode or convert data": "parse decode convert encode unquote quote loads compile",
    "close, stop or end something": "close stop exit end shutdown cleanup terminate kill abort",
    "compare two objects": "eq lt le gt ge ne cmp compare hash",
    "describe an object as text": "repr str format",
}


def build_tasks(*, train_size: int, test_size: int) -> list[Task]:
    """Return the four tasks, with at most so many examples to train on and to test with.

    Args:
        train_size: Most examples in :attr:`Task.train`.
        test_size: Most examples in :attr:`Task.test`.

    Raises:
        ValueError: The standard library here has too little text (sources left out, or zipped).
    """
    snippets = read_standard_library()
    tasks = []
    for name, classes, labelled in (
        ("topic", tuple(_TOPICS), _topic(snippets)),
        ("keyword", tuple(_KEYWORDS.values()), _keyword(snippets)),
        ("origin", tuple(_ORIGINS.values()), _origin(snippets)),
        ("name", tuple(_NAMES), _name(snippets)),
        ("identifier", tuple(_IDENTIFIERS.values()), _identifier(snippets)),
        ("exception", tuple(_EXC.values()), _exc(snippets)),
    ):
        train, test = _split(name, labelled, n_classes=len(classes))
        tasks.append(Task(name, classes, train[:train_size], test[:test_size]))
    return tasks


def _words_to_class(table: dict[str, str]) -> dict[str, int]:
    return {word: i for i, words in enumerate(table.values()) for word in words.split()}


def _topic(snippets: Iterable[Snippet]) -> Iterator[tuple[Snippet, int]]:
    packages = _words_to_class(_TOPICS)
    for snippet in snippets:
        if snippet.kind in ("function", "class", "comment") and snippet.package in packages and len(snippet.key.split())>=8:
            yield snippet, packages[snippet.package]


def _keyword(snippets: Iterable[Snippet]) -> Iterator[tuple[Snippet, int]]:
    positions = {keyword: i for i, keyword in enumerate(_KEYWORDS)}
    for snippet in snippets:
        if snippet.kind == "line":
            yield snippet, positions[snippet.label]


def _origin(snippets: Iterable[Snippet]) -> Iterator[tuple[Snippet, int]]:
    positions = {kind: i for i, kind in enumerate(_ORIGINS)}
    for snippet in snippets:
        if snippet.kind in positions:
            yield snippet, positions[snippet.kind]


def _name(snippets: Iterable[Snippet]) -> Iterator[tuple[Snippet, int]]:
    positions = _words_to_class(_NAMES)
    for snippet in snippets:
        if snippet.kind == "body":
            # The first word of get_value or getValue.
            word = re.split(r"_|(?<=[a-z])(?=[A-Z])", snippet.label)[0].lower()
            if word in positions:
                yield snippet, positions[word]


def _exc(snippets):
    positions = {keyword: i for i, keyword in enumerate(_EXC)}
    for snippet in snippets:
        if snippet.kind == "message" and snippet.label in positions:
            yield snippet, positions[snippet.label]


def _identifier(snippets: Iterable[Snippet]) -> Iterator[tuple[Snippet, int]]:
    positions = {kind: i for i, kind in enumerate(_IDENTIFIERS)}
    for snippet in snippets:
        if snippet.kind == "identifier" and len(snippet.key) > 2:
            yield snippet, positions[snippet.label]


def _split(
    name: str, labelled: Iterable[tuple[Snippet, int]], *, n_classes: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Drop duplicates, split and order, classes in turn: all by hashes of the texts alone."""
    unique: dict[str, tuple[Snippet, int]] = {}
    labels: dict[str, set[int]] = {}
    for snippet, target in labelled:
        unique.setdefault(snippet.key, (snippet, target))
        labels.setdefault(snippet.key, set()).add(target)
    certain = [item for key, item in unique.items() if len(labels[key]) == 1]
    ordered = sorted(certain, key=lambda item: item[0].draw(f"order of {name}"))
    sides: tuple[list[tuple[int, Example]], list[tuple[int, Example]]] = ([], [])
    seen: Counter[tuple[bool, int]] = Counter()
    for snippet, target in ordered:
        is_test = snippet.draw("test") < TEST_SHARE
        rank = seen[is_test, target]  # first of its class, second, ...
        seen[is_test, target] += 1
        sides[is_test].append((rank, Example(snippet.text, target)))
    # By rank (the sort is stable): one example of each class in turn, so any beginning is balanced.
    train, test = ([e for _, e in sorted(side, key=lambda pair: pair[0])] for side in sides)
    if len(test) < 10 * n_classes:
        raise ValueError(f"task {name}: the standard library here has only {len(test)} test texts")
    return tuple(train), tuple(test)
