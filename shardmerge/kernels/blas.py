"""How many threads numpy's linear algebra uses: one for each matrix, side by side.

The result of a decomposition depends on how many threads share it; with one it does not depend on
the machine's CPUs or on how many matrices are computed at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

_LOCK = threading.Lock()
_USERS: list[Any] = []
"""What gives the threads back, once, while anybody computes; and one entry for each who does."""


@cache
def _controller() -> ThreadpoolController:
    import numpy.linalg  # noqa: F401  only libraries that are loaded can be told

    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra uses one thread; until the last who asked for it leaves."""
    with _LOCK:
        _USERS.append(_controller().limit(limits=1, user_api="blas") if not _USERS else _USERS[0])
    try:
        yield
    finally:
        with _LOCK:
            limit = _USERS.pop()
            if not _USERS:
                limit.restore_original_limits()
