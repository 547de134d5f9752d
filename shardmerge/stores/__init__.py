"""Places that hold bytes. ``Stores`` finds the one that a URL belongs to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import cast

from shardmerge.stores.api import Range, Stat, Store, is_remote, scheme_of
from shardmerge.stores.http import Http, HttpStore
from shardmerge.stores.local import LocalStore
from shardmerge.stores.remote import RemoteStore
from shardmerge.stores.retry import Patience
from shardmerge.stores.settings import Settings

__all__ = ["Range", "Settings", "Stat", "Store", "Stores", "is_remote"]


class Stores:
    """All stores of one process, opened when first asked for. Threads share them.

    Attributes:
        settings: of all of them.
        patience: of all requests to servers.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        secrets: Mapping[str, str] | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self._secrets = dict(secrets or {})
        self.patience = Patience(self.settings.patience_minutes, stopping or threading.Event())
        self.http = Http()
        self._opened: dict[str, Store] = {}
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[type[Stores], tuple[Settings, Mapping[str, str]]]:
        """Another process opens its own."""
        return (Stores, (self.settings, dict(self._secrets)))

    def open(self, url: str) -> Store:
        """The store that holds ``url``.

        Raises:
            StoreError: for a scheme that nothing installed here knows.
        """
        scheme = scheme_of(url)
        with self._opening:
            if scheme not in self._opened:
                self._opened[scheme] = _MAKERS.get(scheme, _portable)(self, scheme)
            return self._opened[scheme]

    def public(self, url: str) -> str:
        """The URL without login and query, which are kept for requests: it may be shown.

        Raises:
            StoreError: for a web address that cannot be, or that only these tell from another.
        """
        if scheme_of(url) not in ("http", "https"):
            return url
        return cast(HttpStore, self.open(url)).public(url)

    def read(self, ranges: Iterable[Range]) -> None:
        """Fill the buffers of ranges of any stores."""
        by_scheme = sorted(ranges, key=lambda item: scheme_of(item.url))
        for _, group in groupby(by_scheme, key=lambda item: scheme_of(item.url)):
            together = list(group)
            self.open(together[0].url).read_ranges(together)

    @property
    def requests(self) -> tuple[int, int]:
        """Requests for ranges that were made to servers, and the bytes that came."""
        remote = [store for store in self._opened.values() if isinstance(store, RemoteStore)]
        return sum(s.requests for s in remote), sum(s.read_bytes for s in remote)


def _local(_: Stores, __: str) -> Store:
    return LocalStore()


def _http(stores: Stores, _: str) -> Store:
    return HttpStore(stores.patience.for_server(), stores.http, stores._secrets)


# What these import takes half a second, and a local merge needs none of it.


def _s3(stores: Stores, _: str) -> Store:
    from shardmerge.stores.s3 import S3Store

    return S3Store(stores.settings, stores.patience, stores.http)


def _hub(stores: Stores, _: str) -> Store:
    from shardmerge.stores.hub import HubStore

    return HubStore(stores.patience.for_server(), stores.http)


def _portable(stores: Stores, scheme: str) -> Store:
    from shardmerge.stores.portable import PortableStore

    return PortableStore(scheme, stores.patience.for_server())


_MAKERS: dict[str, Callable[[Stores, str], Store]] = {
    "file": _local,
    "http": _http,
    "https": _http,
    "s3": _s3,
    "hf": _hub,
}
"""Stores by scheme; any other is fsspec's."""
