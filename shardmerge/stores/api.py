"""What the engine asks of a place that holds bytes. A store knows no formats.

Promises, which ``testing.StoreSuite`` checks for every store:

- ``read_ranges`` fills every buffer with exactly the bytes asked for, or raises.
- ``stat().version`` changes whenever the object's content may have changed, and a range that names
  a version is filled from that version or not at all.
- ``names`` lists plain names in name order, files and folders, these with a trailing ``/``.
- every failure is a ``StoreError`` that names the object and says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shardmerge.errors import SourceChangedError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes and a version text of one object."""

    size: int
    version: str


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes to read.

    Args:
        url: of the object.
        offset: of the first byte.
        into: filled from there on.
        version: as ``stat`` gave it; None for whatever is there.
    """

    url: str
    offset: int
    into: memoryview
    version: str | None = None


class Store(Protocol):
    """A place that holds objects named by URLs."""

    def stat(self, url: str) -> Stat | None:
        """Size and version of the object at ``url``; None where there is none (or a folder)."""

    def is_folder(self, url: str) -> bool:
        """Whether ``url`` names an existing folder."""

    def names(self, url: str) -> list[str]:
        """Names directly in the folder ``url``, in name order; folders end with ``/``."""

    def join(self, url: str, name: str) -> str:
        """The URL of ``name`` in the folder ``url``."""

    def read_ranges(self, ranges: Sequence[Range]) -> None:
        """Fill every buffer.

        Raises:
            StoreError: for an object that ends before a buffer is full, and for any failure.
            SourceChangedError: for an object of another version.
        """

    def read(self, url: str) -> bytes:
        """All bytes of a small object."""


def changed(place: str) -> SourceChangedError:
    """What to tell of an object that is not the one that was planned with."""
    return SourceChangedError(
        f"{place} changed while it was being read. Nothing was published.\n"
        "  Put it back, or run the command again with --fresh to merge it as it is."
    )


def in_name_order(names: Iterable[str]) -> list[str]:
    """Names, folders among them with a ``/`` that does not count."""
    return sorted(names, key=lambda name: name.rstrip("/"))


def scheme_of(url: str) -> str:
    """What stands before ``://``, in lower case; ``file`` for paths."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else "file"


def is_remote(url: str) -> bool:
    """Whether each read of ``url`` is a request to a server, so that few large ones are better."""
    return scheme_of(url) not in ("file", "memory")
