"""What Ray runs for a merge: units on workers, and a witness of what runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.metrics import Counter

from shardmerge.excerpt import Excerpt
from shardmerge.executors.node import Failed, Site
from shardmerge.executors.placement import Unit
from shardmerge.work import Done

_site: tuple[str, Site] | None = None
"""What this process works for, and the run's name: of the last one, if there were several."""
_lock = threading.Lock()


@dataclass(frozen=True)
class Call:
    """What is sent for an attempt of a unit: one value, as Ray writes and reads each by itself.

    Args:
        run: name of the run, and of its ``Watch``.
        job: holds a reference to its ``Job``, which is fetched once by each process.
        plan: with what the unit's tasks need.
    """

    run: str
    job: Sequence[Any]
    unit: Unit
    plan: Excerpt
    attempt: int


def run(call: Call) -> list[Done | Failed]:
    """Do the tasks of a unit."""
    with _running(call):
        ended = _site_of(call.run, call.job).run(call.unit, call.plan, call.attempt)
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

    def run(self, call: Call) -> list[Done | Failed]:
        """Do the tasks of a unit; as many calls at a time as the plan has workers."""
        return run(call)


# --- when units began -----------------------------------------------------------------------------

TELL_S = 0.25
"""Seconds after which a unit that began is told, at the latest."""
_begun: dict[tuple[str, int, int], float] = {}
"""What runs in this process: run, unit, attempt, and since when."""
_teller: threading.Thread | None = None


@contextlib.contextmanager
def _running(call: Call) -> Iterator[None]:
    """Let the run's ``Watch`` know, if it takes long enough."""
    global _teller
    with _lock:
        if _teller is None:
            _teller = threading.Thread(target=_tell, name="teller", daemon=True)
            _teller.start()
    key = call.run, call.unit.number, call.attempt
    _begun[key] = time.monotonic()
    try:
        yield
    finally:
        del _begun[key]


def _tell() -> None:
    """Tell once of each unit that is found running; most of those that are short never are."""
    told: set[tuple[str, int, int]] = set()
    while True:
        time.sleep(TELL_S)
        found = dict(_begun)
        for run, unit, attempt in found.keys() - told:
            age_s = time.monotonic() - found[run, unit, attempt]
            with contextlib.suppress(RayError, ValueError):  # it is gone, or is not there again yet
                ray.get_actor(run).began.remote(unit, attempt, age_s)
                told.add((run, unit, attempt))
        told &= found.keys()


class Watch:
    """Told by workers of units that run: one may have waited for its worker to start."""

    def __init__(self) -> None:
        self._began: dict[tuple[int, int], float] = {}

    def began(self, unit: int, attempt: int, age_s: float) -> None:
        """An attempt of a unit began so long ago."""
        self._began[unit, attempt] = time.monotonic() - age_s

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
    good = [done for done in ended if isinstance(done, Done)]
    for name, of in _COUNTED.items():
        if value := sum(map(of, good)):
            _counters[name].inc(value, tags={"node": good[0].ran.node})
