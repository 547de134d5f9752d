"""The generated parts of README: ``python -m tests.readme`` writes them, ``--check`` compares.

A part stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import shardmerge
from shardmerge import cli, methods
from shardmerge.methods.api import Base

README = Path(__file__).parent.parent / "README.md"

_BASES = {
    Base.REQUIRED: "required",
    Base.INPUT: "merged like the others",
    Base.UNUSED: "configuration only",
}


def methods_table() -> str:
    """One row per method, from its class and page."""
    rows = ["| method | what it does | base model | parameters |", "|---|---|---|---|"]
    for name in methods.names():
        info = methods.get(name)
        keys = ", ".join(f"`{parameter.key}`" for parameter in info.parameters)
        extras = "".join(f"; each model names `{kind}:`" for kind in info.extras)
        title = info.page.splitlines()[0].replace("``", "`")
        rows.append(f"| `{name}` | {title} | {_BASES[info.base]} | {keys}{extras} |")
    return "\n".join(rows)


def commands() -> str:
    """What ``shardmerge --help`` prints."""
    os.environ["COLUMNS"] = "90"
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.suppress(SystemExit):
        cli.main(["--help"])
    return f"```\n{stream.getvalue().rstrip()}\n```"


def folder_map() -> str:
    """The package's own map of its files."""
    text = shardmerge.__doc__ or ""
    return "```\n" + text.partition("\n\n")[2].partition("\n\n")[2].rstrip() + "\n```"


PARTS: dict[str, Callable[[], str]] = {
    "methods": methods_table,
    "commands": commands,
    "map": folder_map,
}


def generated(text: str) -> str:
    """The text with every part as it should be."""
    for name, make in PARTS.items():
        pattern = re.compile(f"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
        if found != 1:
            sys.exit(f"README.md needs exactly one part '{name}', it has {found}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before = README.read_text()
    after = generated(before)
    if check and before != after:
        sys.exit("README.md is not current; run: make readme")
    if not check:
        README.write_text(after)


if __name__ == "__main__":
    main()
