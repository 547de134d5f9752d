"""Four text classification tasks, made from the standard library's own words and code.

=========  ===========================================  ==========================================
topic      a paragraph of a docstring, or a comment     which area of the library it belongs to
keyword    a line of code with its first word hidden    which statement it is
naming     an identifier                                what it names: a class, a function, ...
exception  the message of an exception                  what kind of problem it reports
=========  ===========================================  ==========================================

The four kinds of text are different, as are the tasks of models that people merge.
Texts are split into train and test by a hash of their letters, so that a text (and the same text
with other numbers or layout) is on one side only, in every task, on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
    "networks, sockets and web servers": """
        http urllib socket socketserver ssl ftplib smtplib imaplib poplib nntplib telnetlib xmlrpc
        wsgiref ipaddress cgi webbrowser
    """,
    "e-mail messages and mailboxes": "email mailbox mimetypes quopri",
    "threads, processes and asynchronous tasks": """
        asyncio multiprocessing threading concurrent queue subprocess selectors sched signal
        asyncore
    """,
    "unit tests, debugging and profiling": """
        unittest doctest pdb bdb trace traceback profile cProfile pstats timeit tracemalloc cmd
        logging
    """,
    "files, folders and archives": """
        tarfile zipfile shutil pathlib os posixpath ntpath genericpath tempfile gzip bz2 lzma glob
        fnmatch filecmp fileinput _pyio io zipapp
    """,
    "numbers, statistics, dates and times": """
        _pydecimal decimal fractions statistics numbers datetime _pydatetime calendar random
        zoneinfo _strptime colorsys
    """,
    "data formats such as XML, HTML, JSON and CSV": """
        xml html json csv configparser plistlib tomllib pickle pickletools pprint gettext
    """,
    "the Python language: imports, types, source code": """
        importlib inspect ast dis typing enum dataclasses functools abc types pkgutil symtable
        tokenize codeop _collections_abc contextlib
    """,
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

_NAMED = {
    "class": "the name of a class, a kind of object",
    "function": "the name of a function, an action",
    "constant": "the name of a constant, a fixed value",
    "variable": "the name of a variable or an argument",
}

_EXCEPTIONS = {
    "a value that is not allowed": """
        ValueError StatisticsError OverflowError OptionError IndexError KeyError AddressValueError
    """,
    "an object of the wrong type, or without an attribute": "TypeError AttributeError",
    "something not possible now, or not supported": """
        RuntimeError AssertionError URLError NotImplementedError UnsupportedOperation
        NotSupportedErr InvalidStateError
    """,
    "data, a file or a message that cannot be read": """
        Error error OSError HeaderParseError ReadError EOFError PicklingError UnpicklingError
        BadZipFile BadGzipFile SyntaxError ParsingError CompressionError ExtractError ZipImportError
        error_proto NetrcParseError UnicodeError
    """,
}


def build_tasks(*, train_size: int, test_size: int, every: int = 1) -> list[Task]:
    """Return the four tasks, with at most so many examples to train on and to test with.

    Args:
        train_size: Most examples in :attr:`Task.train`.
        test_size: Most examples in :attr:`Task.test`.
        every: Use one file of the standard library of so many, to be quicker.

    Raises:
        ValueError: The standard library here has too little text (sources left out, or zipped).
    """
    snippets = read_standard_library(every=every)
    tasks = []
    for name, classes, found in (
        ("topic", tuple(_TOPICS), _topic(snippets)),
        ("keyword", tuple(_KEYWORDS.values()), labelled(snippets, "line", [*_KEYWORDS])),
        ("naming", tuple(_NAMED.values()), labelled(snippets, "identifier", [*_NAMED])),
        ("exception", tuple(_EXCEPTIONS), _exception(snippets)),
    ):
        train, test = split(name, found, n_classes=len(classes))
        tasks.append(Task(name, classes, train[:train_size], test[:test_size]))
    return tasks


def _words_to_class(table: dict[str, str]) -> dict[str, int]:
    return {word: i for i, words in enumerate(table.values()) for word in words.split()}


def _topic(snippets: Iterable[Snippet]) -> Iterator[tuple[Snippet, int]]:
    packages = _words_to_class(_TOPICS)
    for snippet in snippets:
        if snippet.kind == "prose" and snippet.package in packages:
            yield snippet, packages[snippet.package]


def _exception(snippets: Iterable[Snippet]) -> Iterator[tuple[Snippet, int]]:
    names = _words_to_class(_EXCEPTIONS)
    for snippet in snippets:
        if snippet.kind == "message" and snippet.label in names:
            yield snippet, names[snippet.label]


def labelled(
    snippets: Iterable[Snippet], kind: str, labels: Sequence[str]
) -> Iterator[tuple[Snippet, int]]:
    """Yield the snippets of ``kind`` with the positions of their labels in ``labels``."""
    for snippet in snippets:
        if snippet.kind == kind and len(snippet.key) > 2:
            yield snippet, labels.index(snippet.label)


def split(
    name: str, found: Iterable[tuple[Snippet, int]], *, n_classes: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split and order, the classes in turn, by hashes of the texts alone.

    Of texts that are the same one is kept, and none where their classes differ.
    """
    unique: dict[str, tuple[Snippet, int]] = {}
    doubtful: set[str] = set()
    for snippet, target in found:
        key = snippet.key
        if unique.setdefault(key, (snippet, target))[1] != target:
            doubtful.add(key)
    certain = [item for key, item in unique.items() if key not in doubtful]
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
