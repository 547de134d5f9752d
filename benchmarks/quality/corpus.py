"""More snippets of the standard library: code and docstrings, with one thing hidden.

Pure, as :mod:`benchmarks.demo.corpus`, whose files and snippets these are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from benchmarks.demo.corpus import Snippet, snippets_of, standard_modules

MASK = "[MASK]"

#: Operators by their nodes, as they are written.
OPERATORS: dict[type[ast.AST], str] = {
    ast.Eq: "==",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.Lt: "<",
    ast.Gt: ">",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Mod: "%",
    ast.BitAnd: "&",
}

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Found = Iterator[tuple[str, str, str]]


def read_hidden(*, every: int = 1) -> list[Snippet]:
    """Return the snippets of the running Python's standard library, in the order of file names.

    Their kinds say what is hidden, and is the label: ``operator`` and ``method`` (an attribute that
    is called) in a line of code, ``verb`` (the first word) in a function's docstring, ``value``
    (the type of what a name is given; a default too) in an assignment.

    Args:
        every: Read one file of so many, to be quicker.
    """
    snippets: dict[Snippet, None] = {}  # an ordered set: many lines occur again and again
    for source, tree, package in standard_modules(every=every):
        found = _from_tree(tree, source.splitlines())
        snippets.update(dict.fromkeys(snippets_of(found, package)))
    return list(snippets)


def _from_tree(tree: ast.Module, lines: list[str]) -> _Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            yield from _operator(node.left, node.op, node.right, lines)
        elif isinstance(node, ast.Compare):
            yield from _operator(node.left, node.ops[0], node.comparators[0], lines)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield from _method(node.func, lines)
        elif isinstance(node, ast.Assign):
            yield from _assigned(node)
        elif isinstance(node, ast.arguments):
            yield from _defaults(node)
        elif isinstance(node, _FUNCTIONS):
            yield from _verb(ast.get_docstring(node) or "")


def _operator(left: ast.expr, operator: ast.AST, right: ast.expr, lines: list[str]) -> _Found:
    symbol = OPERATORS.get(type(operator))
    if symbol and left.end_lineno == right.lineno and left.end_col_offset is not None:
        place = slice(left.end_col_offset, right.col_offset)
        yield "operator", symbol, _hide(lines[right.lineno - 1], place, symbol)


def _method(called: ast.Attribute, lines: list[str]) -> _Found:
    if called.end_lineno is not None and called.end_col_offset is not None:
        place = slice(called.end_col_offset - len(called.attr), called.end_col_offset)
        yield "method", called.attr, _hide(lines[called.end_lineno - 1], place, called.attr)


def _hide(line: str, place: slice, hidden: str) -> str:
    """Return the line with ``hidden`` masked; nothing where other text is at that place."""
    # The columns of a syntax tree count bytes.
    if not line.isascii() or line[place].strip() != hidden:
        return ""
    return f"{line[: place.start]} {MASK} {line[place.stop :]}"


def _assigned(node: ast.Assign) -> _Found:
    target = node.targets[0]
    if len(node.targets) == 1 and isinstance(target, (ast.Name, ast.Attribute)):
        yield _value(ast.unparse(target), node.value)


def _defaults(node: ast.arguments) -> _Found:
    names = [argument.arg for argument in (*node.posonlyargs, *node.args)]
    # Only the last ones have defaults.
    for name, value in zip(reversed(names), reversed(node.defaults), strict=False):
        yield _value(name, value)


def _value(name: str, value: ast.expr) -> tuple[str, str, str]:
    node = value.value if isinstance(value, ast.Constant) else value
    return "value", type(node).__name__, f"{name} = {MASK}"


def _verb(docstring: str) -> _Found:
    first, _, rest = " ".join(docstring.split("\n\n")[0].split()).partition(" ")
    if len(rest.split()) >= 3:
        yield "verb", first.lower(), f"{MASK} {rest}"
