"""Folders of installed servers: complete, or made anew."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.servers.processes import ServerError

VENVS = Path(__file__).parents[2] / ".venvs"
STAMP = "installed"
"""Written last: a folder without it, or with another content in it, is an unfinished install."""


def is_installed(folder: Path, content: str) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text() == content


def install(folder: Path, content: str, fill: Callable[[Path], None]) -> None:
    """Fill a folder, unless that was done before.

    Args:
        content: what is installed, one line each; another content is installed anew.
        fill: installs into the empty folder.
    """
    if is_installed(folder, content):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fill(folder)
    (folder / STAMP).write_text(content)


def main(name: str, install_it: Callable[[], None]) -> None:
    """The command line of a server's module: ``--install`` and nothing else."""
    if sys.argv[1:] != ["--install"]:
        sys.exit("usage: python -m MODULE --install")
    try:
        install_it()
    except ServerError as error:
        sys.exit(f"{name} cannot be installed: {' '.join(str(error).split())}")
