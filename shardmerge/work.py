"""One task on a worker: read a tile, run a kernel, write a tile. Where I/O and kernels meet."""

from __future__ import annotations

import dataclasses
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from shardmerge.excerpt import WorkPlan
from shardmerge.kernels.device import open_device
from shardmerge.kernels.trace import Kernels
from shardmerge.layout import Piece
from shardmerge.memory import resident_bytes, tensor_numel, tile_bytes, tile_elements
from shardmerge.methods.api import Over, Pass, info_of
from shardmerge.numerics import expansion
from shardmerge.outputs.api import Receipt, ShardWriter
from shardmerge.plan import MeasureTask, MergeTask, Task
from shardmerge.runs import Context, Decided, Seconds, TensorRun, levels_in
from shardmerge.stores import Stores
from shardmerge.summaries import Partial
from shardmerge.whole import MatrixRun
from shardmerge.window import Arena

Run = TensorRun | MatrixRun

_NODE = socket.gethostname()
_MEMORY = Path("/proc/self/statm")


@dataclass(frozen=True)  # without slots, here and below: pickled three times as fast
class Ran:
    """Where and when a task ran.

    Args:
        node: name of the machine.
        process: its number there.
        attempt: 1, or more where the task was begun before and did not end.
        began: seconds since 1970.
        ended: likewise.
        peak_bytes: anonymous memory of the process while the task had all its buffers.
    """

    node: str
    process: int
    attempt: int
    began: float
    ended: float
    peak_bytes: int


@dataclass(frozen=True)
class Done:
    """What a task gives back: receipts of parts, or a partial summary."""

    task: int
    ran: Ran
    receipts: tuple[Receipt, ...] = ()
    partial: Partial | None = None
    read_bytes: int = 0
    seconds: Seconds = field(default_factory=Seconds)


@dataclass(frozen=True, slots=True)
class Shared:
    """What the workers of one process share."""

    plan: WorkPlan
    stores: Stores
    kernels: Kernels
    computing: threading.Semaphore
    reading: threading.Semaphore
    stopping: threading.Event

    @classmethod
    def of(cls, plan: WorkPlan, stores: Stores) -> Shared:
        """For the workers that a plan wants in one process."""
        return cls(
            plan=plan,
            stores=stores,
            kernels=Kernels(open_device(plan.device)),
            computing=threading.Semaphore(plan.kernels),
            reading=threading.Semaphore(plan.readers),
            stopping=threading.Event(),
        )


class Worker:
    """Runs tasks, one at a time, in memory that is taken once."""

    def __init__(self, shared: Shared, writer: ShardWriter) -> None:
        self._context = Context(
            plan=shared.plan,
            stores=shared.stores,
            kernels=shared.kernels,
            computing=shared.computing,
            reading=shared.reading,
            stopping=shared.stopping,
            arena=Arena(shared.plan.worker_bytes),
        )
        shared.kernels.device.pin(self._context.arena.memory)
        self._writer = writer

    def run(self, task: Task, decided: Decided, plan: WorkPlan, *, attempt: int = 1) -> Done:
        """Do a task of a plan, of which an excerpt is enough."""
        began = time.time()
        context = self._context
        context.plan = plan
        context.seconds = Seconds()
        context.read_bytes = context.peak_bytes = 0
        if isinstance(task, MeasureTask):
            partial = self._measure(task, decided)
            receipts = []
        else:
            partial = None
            receipts = self._merge(task, decided)
        ran = Ran(_NODE, os.getpid(), attempt, began, time.time(), context.peak_bytes)
        return Done(
            task=task.number,
            ran=ran,
            receipts=tuple(receipts),
            partial=partial,
            read_bytes=context.read_bytes,
            seconds=context.seconds,
        )

    def _measure(self, task: MeasureTask, decided: Decided) -> Partial:
        method = self._context.plan.scopes[task.scope].method
        step = next(s for s in info_of(method).passes if s.name == task.step)
        partials: list[Partial] = []
        for piece, run in self._runs(task.pieces, step, decided, resident=False):
            assert isinstance(run, TensorRun)
            partial = run.measure(step, piece.start, piece.stop)
            if partials and partial.dtype != np.float64:
                partials[0] += partial  # counts are large, and there may be many pieces
            else:
                partials.append(partial)
        self._context.peak_bytes = anonymous_bytes()
        return cast(Partial, np.concatenate(partials)) if len(partials) > 1 else partials[0]

    def _merge(self, task: MergeTask, decided: Decided) -> list[Receipt]:
        receipts = []
        last: Run | None = None
        for part in task.parts:
            sink = self._writer.part(part)
            if part.number == 0:
                sink.write(self._context.plan.shards[part.shard].header)
            found: set[tuple[int, int]] = set()
            sums: list[npt.NDArray[np.float64]] = []
            pieces = part.pieces
            if last is not None and last.keeps and pieces[0].tensor == last.number:
                found |= last.merge(pieces[0], sink)
                sums += last.take_sums()
                pieces = pieces[1:]
            for piece, last in self._runs(pieces, None, decided, resident=task.resident):
                found |= last.merge(piece, sink)
                sums += last.take_sums()
            self._context.peak_bytes = max(self._context.peak_bytes, anonymous_bytes())
            began = time.perf_counter()
            receipt = sink.finish(sorted(found))
            receipts.append(dataclasses.replace(receipt, sums=_exact(sums)))
            self._context.seconds.write += time.perf_counter() - began
        return receipts

    def _runs(
        self, pieces: Sequence[Piece], step: Pass | None, decided: Decided, *, resident: bool
    ) -> Iterator[tuple[Piece, Run]]:
        """The passes of each piece; small tensors that lie side by side are read together."""
        plan = self._context.plan
        for group in _together(plan, pieces, resident=resident):
            self._context.arena.clear()
            if plan.tensors[group[0].tensor].whole and step is None:
                yield group[0], MatrixRun(self._context, group[0].tensor)
                continue
            runs = [TensorRun(self._context, p.tensor, decided, resident=resident) for p in group]
            if len(group) > 1:
                ahead = [run.missing(step, p) for p, run in zip(group, runs, strict=True)]
                self._context.fetch([part for parts in ahead for part in parts])
            for piece, run in zip(group, runs, strict=True):
                run.settle()
                yield piece, run


def _exact(sums: Sequence[npt.NDArray[np.float64]]) -> tuple[tuple[float, ...], ...]:
    """The sums over all blocks, none of them rounded."""
    return tuple(expansion(column.tolist()) for column in np.concatenate(sums).T) if sums else ()


def _together(plan: WorkPlan, pieces: Sequence[Piece], *, resident: bool) -> Iterator[list[Piece]]:
    """Consecutive pieces whose inputs fit into a worker's memory at once; larger ones alone."""
    group: list[Piece] = []
    room = 0
    for piece in pieces:
        tensor = plan.tensors[piece.tensor]
        tile = tile_elements(tensor, plan.worker_bytes, plan.device)
        needed = tile_bytes(tensor, tile)
        if resident and Over.TENSOR in levels_in(tensor).values():
            needed = resident_bytes(tensor, plan.device)
        whole = piece.stop - piece.start == tensor_numel(tensor) <= tile and not tensor.whole
        if group and (needed > room or not whole):
            yield group
            group = []
        if not group:
            room = plan.worker_bytes
        group.append(piece)
        room -= needed
        if not whole:
            yield group
            group = []
    if group:
        yield group


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind, now."""
    _, resident, shared, *_ = _MEMORY.read_bytes().split()
    return (int(resident) - int(shared)) * resource.getpagesize()
