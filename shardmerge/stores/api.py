"""What the engine asks of a place that holds bytes. A store knows no formats.

Promises, which ``testing.StoreSuite`` checks for every store:

- ``read_into`` fills the whole buffer with exactly the bytes asked for, or raises.
- ``stat().version`` changes whenever the object's content may have changed.
- ``names`` lists plain names in name order, files and folders, these with a trailing ``/``.
- every failure is a ``StoreError`` that names the object and says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes and a version text of one object."""

    size: int
    version: str


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

    def read_into(self, url: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on; StoreError if there are fewer."""

    def read(self, url: str) -> bytes:
        """All bytes of a small object."""
