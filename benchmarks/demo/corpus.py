"""Text that every machine with Python has: the standard library's own sources, cut into snippets.

Pure: no torch and no network. A snippet remembers what it is and the module it comes from, so that
the tasks (:mod:`benchmarks.demo.tasks`) only have to choose and label.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: Left out: what some distributions ship separately or not at all, tables, and other packages.
_SKIPPED = """
    test tests idlelib tkinter turtle turtledemo lib2to3 distutils ensurepip encodings pydoc_data
    site-packages dist-packages lib-dynload __pycache__ this antigravity
"""

#: The words of a statement which a line can start with, so that the line says which one is missing.
KEYWORDS = ("if", "while", "for", "with", "return", "raise", "def", "class", "import", "except")

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NAMING = (*_DEFINITIONS, ast.arg, ast.Name)
_LINES = (ast.stmt, ast.ExceptHandler)
_MAX_CHARACTERS = 240  # more than the encoder reads; keeps the tokenizer from reading whole pages


@dataclass(frozen=True, slots=True)
class Snippet:
    """A piece of text of the standard library.

    Args:
        text: The text, on one line.
        kind: ``prose`` (a docstring's paragraph or a comment), ``line`` (of code, its first word
            hidden), ``identifier`` or ``message`` (of an exception).
        label: The hidden word of a ``line``; what an ``identifier`` names (``class``, ``function``,
            ``constant``, ``variable``); the exception's name of a ``message``; else empty.
        package: The top-level module, for example ``email``.
    """

    text: str
    kind: str
    label: str
    package: str

    @property
    def key(self) -> str:
        """The text as duplicates are recognised: letters only, without numbers and layout."""
        return re.sub(r"[^a-z]+", " ", self.text.lower()).strip()

    def draw(self, purpose: str) -> float:
        """Return a number in [0, 1) which depends on :attr:`key` and ``purpose`` alone."""
        digest = hashlib.blake2b(f"{purpose}:{self.key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64


def read_standard_library(*, every: int = 1) -> list[Snippet]:
    """Return the snippets of the running Python's standard library, in the order of file names.

    Args:
        every: Read one file of so many, to be quicker.
    """
    snippets: dict[Snippet, None] = {}  # an ordered set: many names and lines occur again and again
    for source, tree, package in standard_modules(every=every):
        lines = source.splitlines()
        found = (*_from_tree(tree, lines), *_comments(lines))
        snippets.update(dict.fromkeys(snippets_of(found, package)))
    return list(snippets)


def standard_modules(*, every: int = 1) -> Iterator[tuple[str, ast.Module, str]]:
    """Yield source, syntax tree and top-level module of each file of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    for path in [path for path in paths if _is_used(path)][::every]:
        try:
            source = (root / path).read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue  # a file that cannot be read is not worth stopping a demonstration
        yield source, tree, path.with_suffix("").parts[0]


def _is_used(path: Path) -> bool:
    parts = path.with_suffix("").parts
    skipped = frozenset(_SKIPPED.split())
    return not (skipped.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")))


def snippets_of(found: Iterable[tuple[str, str, str]], package: str) -> Iterator[Snippet]:
    """Yield a snippet, on one line, for each kind, label and text that is not empty."""
    for kind, label, text in found:
        line = " ".join(text.split())[:_MAX_CHARACTERS]
        if line:
            yield Snippet(text=line, kind=kind, label=label, package=package)


def _from_tree(tree: ast.Module, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS):
            # Later paragraphs of a docstring are often tables, examples and lists.
            for paragraph in (ast.get_docstring(node) or "").split("\n\n")[:2]:
                if _is_prose(paragraph):
                    yield "prose", "", paragraph
        if isinstance(node, _LINES):
            keyword, _, rest = lines[node.lineno - 1].strip().partition(" ")
            if keyword in KEYWORDS:
                yield "line", keyword, f"[MASK] {rest}"
            if isinstance(node, ast.Raise):
                yield "message", *_message(node)
        if isinstance(node, _NAMING):
            yield from _identifiers(node)


def _is_prose(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text)
    return len(words) >= 8 and len("".join(words)) > 0.6 * len(text) and ">>>" not in text


def _message(node: ast.Raise) -> tuple[str, str]:
    if not (isinstance(node.exc, ast.Call) and node.exc.args):
        return "", ""
    strings = [
        part.value
        for part in ast.walk(node.exc.args[0])
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    text = " ".join(strings)
    exception = ast.unparse(node.exc.func).rpartition(".")[2]
    return exception, text if len(re.findall(r"[A-Za-z']{2,}", text)) >= 3 else ""


def _identifiers(node: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Yield the names that ``node`` gives to something, and what it is that it names."""
    if isinstance(node, ast.ClassDef):
        yield "identifier", "class", node.name
    elif isinstance(node, _DEFINITIONS):
        yield "identifier", "function", node.name
    elif isinstance(node, ast.arg):
        yield "identifier", "variable", node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        constant = node.id.isupper() and len(node.id) > 2
        yield "identifier", "constant" if constant else "variable", node.id


def _comments(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    block: list[str] = []
    for line in (*lines, ""):
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#!: "))
        elif block:
            text = " ".join(block)
            block = []
            if _is_prose(text) and not text.startswith("type:"):
                yield "prose", "", text
