"""What a process of a cluster does: prove that it can work, then run units of tasks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import llvmlite
import numpy as np

import shardmerge
from shardmerge.errors import ShardmergeError, StoreError
from shardmerge.excerpt import Excerpt, excerpt
from shardmerge.executors.placement import Unit
from shardmerge.kernels.device import CUDA
from shardmerge.memory import inputs_of
from shardmerge.outputs import open_output
from shardmerge.outputs.api import STAGING, ShardWriter
from shardmerge.plan import Plan
from shardmerge.sources.tensor import Segment
from shardmerge.stores import Range, Stores
from shardmerge.work import Done, Shared, Worker

_AT_A_TIME = 16
_TOLD = 3
"""Problems of one node that are told; others are most often the same."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every process that works for a run needs to know; it is sent once.

    Args:
        plan: without a task; those come with each unit.
        out: where the checkpoint is published.
        firsts: one byte of every file that is read.
        matrices: whether some are seen as a whole.
        folder: that relative paths start from.
    """

    plan: Excerpt
    out: str
    firsts: tuple[Segment, ...]
    stores: Stores
    writer: ShardWriter
    matrices: bool
    folder: str

    @classmethod
    def of(cls, plan: Plan, stores: Stores, writer: ShardWriter) -> Job:
        """For all tasks of a plan, in this process's folder."""
        return cls(
            plan=excerpt(plan, ()),
            out=plan.out,
            firsts=_firsts(plan),
            stores=stores,
            writer=writer,
            matrices=any(tensor.whole for tensor in plan.tensors),
            folder=str(Path.cwd()),
        )


@dataclass(frozen=True, slots=True)
class Failed:
    """A task that ended in an error."""

    task: int
    error: ShardmergeError


# --- running units --------------------------------------------------------------------------------


class Site:
    """A process that works for one run; its threads share kernels and connections."""

    def __init__(self, job: Job) -> None:
        # Where it is missing, no relative path would mean anything; the examination tells it.
        with contextlib.suppress(OSError):
            os.chdir(job.folder)
        self._job = job
        self._shared = Shared.of(job.plan, job.stores)
        self._own = threading.local()

    def run(self, unit: Unit, plan: Excerpt, attempt: int) -> list[Done | Failed]:
        """Do the tasks of a unit. What they wrote is durable when this returns."""
        ended: list[Done | Failed] = []
        shards: set[int] = set()
        lost: StoreError | None = None
        for number, decided in unit.tasks:
            task = plan.tasks[number]
            if lost is not None:  # a server that is gone is not asked for each task again
                ended.append(Failed(number, lost))
                continue
            try:
                done = self._worker().run(task, decided, plan, attempt=attempt)
            except ShardmergeError as error:
                ended.append(Failed(number, error))
                lost = error if isinstance(error, StoreError) else None
            else:
                ended.append(done)
                shards |= {receipt.shard for receipt in done.receipts if receipt.nbytes}
        try:
            # Here: another machine cannot make durable what this one still has in its memory.
            self._job.writer.sync(shards)
        except ShardmergeError as error:
            return [
                Failed(done.task, error) if isinstance(done, Done) and done.receipts else done
                for done in ended
            ]
        return ended

    def _worker(self) -> Worker:
        if not hasattr(self._own, "worker"):
            self._own.worker = Worker(self._shared, self._job.writer)
        worker: Worker = self._own.worker
        return worker


# --- before any unit ------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What must be the same in every process of a run."""
    return {
        "python": platform.python_version(),
        "shardmerge": f"{shardmerge.__version__} ({_code()})",
        "numpy": np.__version__,
        "llvmlite": llvmlite.__version__,
    }


@cache
def _code() -> str:
    """A short text that differs with any line of this package."""
    folder = Path(shardmerge.__file__).parent
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def mark_of(node: str) -> str:
    """Name of the file by which a node shows that it reaches OUT."""
    return f"{STAGING}/reached-{node}"


def examine(job: Job, node: str) -> tuple[Mapping[str, str], Sequence[str]]:
    """Versions of this process, and what keeps it from working for a run, in words."""
    with contextlib.suppress(OSError):
        os.chdir(job.folder)
    return versions(), list(_problems(job, node))


def _problems(job: Job, node: str) -> Iterator[str]:
    try:
        open_output(job.out, job.stores).write(mark_of(node), b"")
    except (ShardmergeError, OSError) as problem:
        yield f"does not reach OUT: {problem}"

    if job.plan.device == CUDA:
        from shardmerge.kernels.cuda_driver import lacking

        if missing := lacking():
            yield f"cannot use CUDA: {missing}"
        from shardmerge.kernels.linalg import lacking as no_matrices

        if job.matrices and (missing := no_matrices()):
            yield f"cannot decompose matrices on CUDA: {missing}"

    def unread(first: Segment) -> str:
        byte = memoryview(bytearray(first.nbytes))
        try:
            job.stores.read([Range(first.url, first.offset, byte, first.version)])
        except ShardmergeError as problem:
            return f"cannot read a source: {problem}"
        return ""

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        yield from list(filter(None, pool.map(unread, job.firsts)))[:_TOLD]


def _firsts(plan: Plan) -> tuple[Segment, ...]:
    """One byte of every file that a plan reads."""
    files = {
        (segment.url, segment.version): segment.offset
        for tensor in plan.tensors
        for ref in inputs_of(tensor)
        for segment in ref.all_segments
        if segment.nbytes
    }
    return tuple(Segment(url, offset, 1, version) for (url, version), offset in files.items())
