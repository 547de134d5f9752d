"""What Ray runs for a merge: units on workers, and a witness of when they begin."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.util.metrics import Counter

from shardmerge.executors.node import Failed, Site
from shardmerge.executors.placement import Unit
from shardmerge.work import Done

_site: tuple[str, Site] | None = None
"""What this process works for, and the run's name: of the last one, if there were several."""
_lock = threading.Lock()


def run(run: str, job: Sequence[Any], watch: Any, unit: Unit, attempt: int) -> list[Done | Failed]:
    """Do the tasks of a unit.

    Args:
        run: name of the run.
        job: holds a reference to its ``Job``, which is fetched once by each process.
        watch: a ``Watch``.
    """
    watch.began.remote(unit.number, attempt)
    ended = _site_of(run, job).run(unit, attempt)
    _count(ended)
    return ended


def _site_of(run: str, job: Sequence[Any]) -> Site:
    global _site
    with _lock:
        if _site is None or _site[0] != run:
            _site = run, Site(ray.get(job[0]))
        return _site[1]


class Holder:
    """A process that keeps a GPU, its context and its pinned buffers."""

    def run(
        self, name: str, job: Sequence[Any], watch: Any, unit: Unit, attempt: int
    ) -> list[Done | Failed]:
        """Do the tasks of a unit; as many calls at a time as the plan has workers."""
        return run(name, job, watch, unit, attempt)


class Watch:
    """Told by workers when they begin: a unit may have waited for its worker to start."""

    def __init__(self) -> None:
        self._began: dict[tuple[int, int], float] = {}

    def began(self, unit: int, attempt: int) -> None:
        """An attempt of a unit begins now."""
        self._began[unit, attempt] = time.monotonic()

    def ages(self, ended: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """Seconds since each attempt began, but of those that have ended."""
        for key in ended:
            self._began.pop(key, None)
        now = time.monotonic()
        return {key: now - began for key, began in self._began.items()}


# Ray's types do not know what its decorators add.
run_unit: Any = ray.remote(max_retries=0)(run)
HolderActor: Any = ray.remote(max_restarts=-1, max_task_retries=0)(Holder)
WatchActor: Any = ray.remote(num_cpus=0, max_restarts=-1)(Watch)


# --- metrics --------------------------------------------------------------------------------------

_COUNTED: Mapping[str, Callable[[Done], float]] = {
    "shardmerge_tasks": lambda _: 1.0,
    "shardmerge_read_bytes": lambda done: done.read_bytes,
    "shardmerge_written_bytes": lambda done: sum(r.nbytes for r in done.receipts),
    "shardmerge_read_seconds": lambda done: done.seconds.read,
    "shardmerge_kernel_seconds": lambda done: done.seconds.kernel,
    "shardmerge_write_seconds": lambda done: done.seconds.write,
}
"""Prometheus counters (``ray_..._total``), and what a task that ended adds to each."""
_counters: dict[str, Counter] = {}


def _count(ended: Iterable[Done | Failed]) -> None:
    with _lock:  # a counter is made once in a process
        for name in _COUNTED:
            if name not in _counters:
                _counters[name] = Counter(name, tag_keys=("node",))
    for done in ended:
        if isinstance(done, Done):
            for name, of in _COUNTED.items():
                if value := of(done):
                    _counters[name].inc(value, tags={"node": done.ran.node})
