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

import threadpoolctl

_LOCK = threading.Lock()
_USERS: list[Any] = []
"""What gives the threads back, once for each who computes now."""


@cache
def _controller() -> threadpoolctl.ThreadpoolController:
    import numpy.linalg  # noqa: F401  only libraries that are loaded can be told

    return threadpoolctl.ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra uses one thread; until the last who asked for it leaves."""
    with _LOCK:
        if not _USERS:
            _take_control()
        _USERS.append(_USERS[0] if _USERS else _controller().limit(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with _LOCK:
            limit = _USERS.pop()
            if not _USERS:
                _take_control()
                limit.restore_original_limits()
                _take_control()


def _take_control() -> None:
    """Let this thread set what is one number for the process.

    Since version 3.8 threadpoolctl does nothing, and says nothing, in other threads than the first
    that did; here all of them mean the same.
    """
    controller = getattr(threadpoolctl, "OpenBLASController", None)
    clear = getattr(controller, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)
