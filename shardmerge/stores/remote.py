"""What all remote stores share: few large requests, several at a time, repeated until they succeed.

A store gives ``_get``, one checked request; everything else about ranges is here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from shardmerge.errors import Stopped, StoreError
from shardmerge.stores.api import Range, Stat
from shardmerge.stores.retry import Patience

REQUEST_BYTES = 8 << 20
"""The most bytes of one request: its latency is then small beside its transfer."""
GAP_BYTES = 64 << 10
"""Bytes between two ranges that are read and thrown away rather than asked for twice."""
CONNECTIONS = 48
"""Requests at a time, of one store in one process."""

_SMALL_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Request:
    """Bytes ``[start, stop)`` of one object, asked for at once.

    Args:
        into: where they go, in order; a number is that many bytes that nobody wants.
    """

    url: str
    version: str | None
    start: int
    stop: int
    into: tuple[memoryview | int, ...]

    def fill(self, data: memoryview) -> None:
        """Put the bytes that were asked for to their places."""
        position = 0
        for target in self.into:
            count = target if isinstance(target, int) else len(target)
            if not isinstance(target, int):
                target[:] = data[position : position + count]
            position += count


def joined(ranges: Iterable[Range]) -> Iterator[Request]:
    """The requests for some ranges: neighbours together, large ones cut. Pure."""
    held: list[memoryview | int] = []
    start = stop = 0
    last: Range | None = None
    wanted = [item for item in ranges if item.into.nbytes]
    wanted.sort(key=lambda item: (item.url, item.version or "", item.offset))
    for item in wanted:
        for offset, view in _cut(item):
            same = last is not None and (item.url, item.version) == (last.url, last.version)
            gap = offset - stop
            if not (same and 0 <= gap <= GAP_BYTES and offset + len(view) - start <= REQUEST_BYTES):
                if last is not None:
                    yield Request(last.url, last.version, start, stop, tuple(held))
                held, start = [], offset
            elif gap:
                held.append(gap)
            held.append(view)
            stop, last = offset + len(view), item
    if last is not None:
        yield Request(last.url, last.version, start, stop, tuple(held))


def _cut(item: Range) -> Iterator[tuple[int, memoryview]]:
    view = item.into.cast("B")
    for begin in range(0, len(view), REQUEST_BYTES):
        yield item.offset + begin, view[begin : begin + REQUEST_BYTES]


class RemoteStore:
    """Reads ranges by requests; a subclass says how one is made.

    Attributes:
        requests: for ranges, that were answered.
        read_bytes: in these answers.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.requests = self.read_bytes = 0
        self._count = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._owner = 0

    def stat(self, url: str) -> Stat | None:
        """Size and version of the object at ``url``; None where there is none (or a folder)."""
        raise NotImplementedError

    def _get(self, request: Request) -> None:
        """Make one request; TransientError for what may pass."""
        raise NotImplementedError

    def join(self, url: str, name: str) -> str:
        """The URL of ``name`` in the folder ``url``."""
        return f"{url.rstrip('/')}/{name}"

    def read_ranges(self, ranges: Sequence[Range]) -> None:
        """Fill every buffer."""
        for item in ranges:
            if item.offset < 0:
                raise StoreError(f"{item.url}: no byte {item.offset:,}: an offset is at least 0.")
        requests = list(joined(ranges))
        if len(requests) == 1:
            self._fetch(requests[0])
            return
        pool = self._threads()
        futures = [pool.submit(self._fetch, request) for request in requests]
        failed = _first_error(futures)
        if failed is not None:
            raise failed

    def read(self, url: str) -> bytes:
        """All bytes of a small object."""
        found = self.stat(url)
        if found is None:
            raise StoreError(f"{url}: there is no such object. Check the name.")
        if found.size > _SMALL_BYTES:
            raise StoreError(f"{url}: {found.size:,} bytes are too many for a small file.")
        data = bytearray(found.size)
        self.read_ranges([Range(url, 0, memoryview(data), found.version)])
        return bytes(data)

    def _fetch(self, request: Request) -> None:
        if self.patience.is_over:
            raise Stopped(f"stopped before {request.url} was read")
        self.patience.run(lambda: self._get(request), f"reading {request.url}")
        with self._count:
            self.requests += 1
            self.read_bytes += request.stop - request.start

    def _threads(self) -> ThreadPoolExecutor:
        with self._count:
            if self._pool is None or self._owner != os.getpid():  # threads do not survive a fork
                self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="read")
                self._owner = os.getpid()
            return self._pool


def _first_error(futures: Sequence[Future[None]]) -> BaseException | None:
    """Wait for all, since their buffers are not free before; those that have not begun are left."""
    failed: BaseException | None = None
    for future in futures:
        if failed is not None and future.cancel():
            continue
        problem = future.exception()
        failed = failed or problem
    return failed
