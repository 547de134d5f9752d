"""Places that hold bytes. ``open_store`` finds the one that a URL belongs to."""

from __future__ import annotations

import functools
import os
import re

from shardmerge.errors import StoreError
from shardmerge.stores.api import Stat, Store
from shardmerge.stores.local import LocalStore

__all__ = ["LocalStore", "Stat", "Store", "open_store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_store(url: str) -> Store:
    """The store that holds ``url``: local paths and ``file://`` URLs, so far.

    Raises:
        StoreError: for any other scheme.
    """
    match = _SCHEME.match(url)
    if match is None or match[1] == "file":
        return _local_store()
    raise StoreError(
        f"{url}: the scheme {match[1]}:// is not supported yet; local paths and file:// URLs are.\n"
        "  Download the checkpoint, or mount the place that holds it, and give the local path."
    )


@functools.cache
def _local_store() -> LocalStore:
    """One for the process, so that the limit on open files holds for all models together."""
    return LocalStore()


# The lock of a store could be held by a thread that a forked process does not have.
os.register_at_fork(after_in_child=_local_store.cache_clear)
