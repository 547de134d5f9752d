"""Which task next, what is durable, when to stop. Knows no tensors and no kernels."""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from shardmerge.errors import Stopped
from shardmerge.executors.api import Executor
from shardmerge.ledger import Ledger
from shardmerge.methods.api import Decision, Kind, Over, Pass, info_of, levels_of
from shardmerge.outputs.api import PartKey, Receipt, ShardWriter
from shardmerge.plan import MeasureTask, MergeTask, Plan, Task, scope_key
from shardmerge.records import TaskRecord, record_of
from shardmerge.summaries import Summary, Summing, settle
from shardmerge.work import Done

COMMIT_BYTES = 512 * 2**20
"""Bytes of parts that become durable, and enter the ledger, together."""
COMMIT_S = 5.0
"""Seconds after which they do so anyway."""
_TICK_S = 0.2
_STOPPED = "stopped; run the same command again to go on from here."


class Progress(Protocol):
    """Told of every task that ended."""

    def start(
        self,
        *,
        tasks: int,
        tasks_done: int,
        all_bytes: int,
        done_bytes: int,
        write_bytes: int,
        written_bytes: int,
    ) -> None:
        """What there is to do, and what an earlier run has done of it."""

    def task(self, done: Done, task: Task) -> None:
        """One task ended."""


@dataclass(slots=True)
class _Measuring:
    """A pass of one scope whose tasks are not all done.

    Args:
        left: tasks that are not done.
        summing: what the others gave.
    """

    left: int = 0
    summing: Summing = field(default_factory=Summing)


def execute(
    plan: Plan,
    executor: Executor,
    ledger: Ledger,
    writer: ShardWriter,
    *,
    progress: Progress,
    stop: threading.Event,
    parts: Set[PartKey] | None = None,
) -> None:
    """Run every task whose parts the ledger does not have.

    Args:
        parts: those that are wanted; None: all.
    Raises:
        Stopped: ``stop`` was set; everything that was written is in the ledger.
        ShardmergeError: of the first task that failed; likewise.
    """
    with _Committer(ledger, writer) as committer:
        _Drive(plan, ledger, committer, progress, parts).run(executor, stop)


def measure(
    tasks: Sequence[MeasureTask],
    executor: Executor,
    decided: Mapping[str, Decision],
    *,
    ended: Callable[[Done], None],
    stop: threading.Event,
) -> Summing:
    """The sum of what measuring tasks give, whose decisions are all there.

    Args:
        ended: is told of each.
    """
    summing, left, flying = Summing(), deque(tasks), 0
    while left or flying:
        if stop.is_set():
            raise Stopped(_STOPPED)
        while left and executor.has_room():
            task = left.popleft()
            executor.submit(task, {key: decided[key] for key in task.needs})
            flying += 1
        done = executor.next_done(_TICK_S)
        if done is not None and done.partial is not None:
            summing.add(done.partial)
            ended(done)
            flying -= 1
    return summing


class _Committer:
    """Makes receipts durable in groups, on a thread of its own so that tasks go on meanwhile."""

    def __init__(self, ledger: Ledger, writer: ShardWriter) -> None:
        self._ledger = ledger
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._receipts: list[Receipt] = []
        self._tasks: list[TaskRecord] = []
        self._decisions: dict[str, Decision] = {}
        self._bytes = 0
        self._last = time.monotonic()
        self._running: Future[None] | None = None

    def add(self, receipts: tuple[Receipt, ...], task: TaskRecord) -> None:
        """A task ended: receipts of parts that are written, not yet durable."""
        self._receipts += receipts
        self._tasks.append(task)
        self._bytes += sum(receipt.nbytes for receipt in receipts)

    def decide(self, key: str, decision: Decision) -> None:
        """A decision to keep."""
        self._decisions[key] = decision

    def tick(self) -> None:
        """Start a commit if one is due and none is running. Raises the error of an earlier one."""
        due = self._bytes >= COMMIT_BYTES or time.monotonic() - self._last >= COMMIT_S
        if due and (self._running is None or self._running.done()):
            self._start()

    def _start(self) -> None:
        if self._running is not None:
            self._running.result()
        receipts, self._receipts = self._receipts, []
        decisions, self._decisions = self._decisions, {}
        tasks, self._tasks = self._tasks, []
        self._bytes, self._last = 0, time.monotonic()
        self._running = self._thread.submit(self._commit, receipts, decisions, tasks)

    def _commit(
        self,
        receipts: Sequence[Receipt],
        decisions: Mapping[str, Decision],
        tasks: Sequence[TaskRecord],
    ) -> None:
        # Parts end before their receipts are made, so this covers every byte that these prove.
        self._writer.sync({receipt.shard for receipt in receipts})
        self._ledger.record(receipts, decisions, tasks)

    def __enter__(self) -> _Committer:
        return self

    def __exit__(self, *_: object) -> None:
        # Also after an error: what was written stays, whatever ended the run. But nothing after a
        # commit that failed: a later sync may succeed without the bytes that the first one lost.
        with self._thread:
            self._start()
            if self._running is not None:
                self._running.result()


class _Drive:
    """The state of one run: tasks that wait for decisions, passes that wait for tasks."""

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        committer: _Committer,
        progress: Progress,
        parts: Set[PartKey] | None,
    ) -> None:
        self._plan = plan
        self._parts = parts
        self._committer = committer
        self._progress = progress
        self._decided: dict[str, Decision] = dict(ledger.decisions)
        self._receipts = ledger.receipts
        self._tasks = {task.number: task for task in self._to_do()}
        self._waiting: dict[str, list[int]] = {}
        self._missing: dict[int, int] = {}
        self._ready: list[int] = []
        self._measuring: dict[int, dict[str, _Measuring]] = {}
        self._summaries: dict[int, dict[str, Summary]] = {}
        self._flying = 0
        for task in self._tasks.values():
            self._enter(task)

    def _to_do(self) -> list[Task]:
        """Merges with parts that are not written, and the measures that they still wait for."""
        merges = [t for t in self._plan.tasks if isinstance(t, MergeTask) and self._unfinished(t)]
        missing = {key for task in merges for key in task.needs} - set(self._decided)
        wanted = {scope_key(key) for key in missing}
        measures: list[Task] = []
        for task in reversed(self._plan.tasks):
            if isinstance(task, MeasureTask) and self._plan.scopes[task.scope].key in wanted:
                # All measures of the scope: summaries are not kept, only decisions are.
                measures.append(task)
                wanted |= {scope_key(key) for key in task.needs if key not in self._decided}
        return [*reversed(measures), *merges]

    def _unfinished(self, task: MergeTask) -> bool:
        keys = {(part.shard, part.number) for part in task.parts}
        wanted = keys if self._parts is None else keys & self._parts
        return bool(wanted - self._receipts.keys())

    def _concerns(self, task: Task) -> bool:
        """Whether a task is one of this run's, done or not."""
        if self._parts is None or task.number in self._tasks:
            return True
        return isinstance(task, MergeTask) and not self._parts.isdisjoint(
            (part.shard, part.number) for part in task.parts
        )

    def _enter(self, task: Task) -> None:
        if isinstance(task, MeasureTask):
            passes = self._measuring.setdefault(task.scope, {})
            passes.setdefault(task.step, _Measuring()).left += 1
        missing = [key for key in task.needs if key not in self._decided]
        for key in missing:
            self._waiting.setdefault(key, []).append(task.number)
        self._missing[task.number] = len(missing)
        if not missing:
            heapq.heappush(self._ready, task.number)

    def run(self, executor: Executor, stop: threading.Event) -> None:
        """Submit, collect, settle, until nothing is left."""
        self._announce()
        try:
            while self._ready or self._flying:
                if stop.is_set():
                    raise Stopped(_STOPPED)
                self._submit(executor)
                done = executor.next_done(_TICK_S)
                if done is not None:
                    self._finish(done)
                self._committer.tick()
        except BaseException:
            self._rescue(executor)
            raise
        if self._waiting:
            raise AssertionError(f"nothing decides {sorted(self._waiting)[:3]}")

    def _submit(self, executor: Executor) -> None:
        """Keep every worker busy."""
        while self._ready and executor.has_room():
            task = self._tasks[heapq.heappop(self._ready)]
            executor.submit(task, {key: self._decided[key] for key in task.needs})
            self._flying += 1

    def _announce(self) -> None:
        tasks = [task for task in self._plan.tasks if self._concerns(task)]
        all_bytes = sum(task.read_bytes + task.write_bytes for task in tasks)
        left_bytes = sum(task.read_bytes + task.write_bytes for task in self._tasks.values())
        self._progress.start(
            tasks=len(tasks),
            tasks_done=len(tasks) - len(self._tasks),
            all_bytes=all_bytes,
            done_bytes=all_bytes - left_bytes,
            write_bytes=sum(task.write_bytes for task in tasks),
            written_bytes=sum(
                receipt.nbytes
                for key, receipt in self._receipts.items()
                if self._parts is None or key in self._parts
            ),
        )

    def _rescue(self, executor: Executor) -> None:
        """Keep what ended while the executor was stopping."""
        executor.stop()
        for _ in range(self._flying):
            # Only the first error is told; the same command meets the others again.
            with contextlib.suppress(Exception):
                done = executor.next_done(0)
                if done is not None:
                    self._finish(done)

    def _finish(self, done: Done) -> None:
        self._flying -= 1
        task = self._tasks[done.task]
        self._committer.add(done.receipts, record_of(self._plan, done))
        self._progress.task(done, task)
        if isinstance(task, MeasureTask) and done.partial is not None:
            measuring = self._measuring[task.scope][task.step]
            measuring.left -= 1
            measuring.summing.add(done.partial)
            if measuring.left == 0:
                self._measured(task.scope, task.step, measuring.summing.summary())

    def _measured(self, scope: int, step: str, summary: Summary) -> None:
        """A pass is complete: settle what can be, and forget what is no longer needed."""
        del self._measuring[scope][step]
        summaries = self._summaries.setdefault(scope, {})
        summaries[step] = summary
        self._settle(scope, summaries)
        if not self._measuring[scope]:
            del self._measuring[scope], self._summaries[scope]

    def _settle(self, scope: int, summaries: Mapping[str, Summary]) -> None:
        """Take every decision that these summaries allow, and wake what waits for it."""
        plan_scope = self._plan.scopes[scope]
        method = plan_scope.method
        info = info_of(method)
        levels = levels_of(method)
        for candidate in info.passes[:-1]:
            if candidate.kind is not Kind.SETTLE or levels[candidate.name] is None:
                continue
            key = plan_scope.decision(candidate.name)
            known = self._known(scope, info.passes, levels)
            if key not in self._decided and all(
                n in summaries or n in known for n in candidate.needs
            ):
                self._decide(key, settle(method, candidate, summaries, known))

    def _known(
        self, scope: int, passes: tuple[Pass, ...], levels: Mapping[str, Over | None]
    ) -> dict[str, Decision | None]:
        """Decisions of a scope that were taken, by the name of the pass."""
        plan_scope = self._plan.scopes[scope]
        found: dict[str, Decision | None] = {}
        for step in passes[:-1]:
            if step.kind is Kind.SETTLE:
                if levels[step.name] is None:
                    found[step.name] = None
                elif plan_scope.decision(step.name) in self._decided:
                    found[step.name] = self._decided[plan_scope.decision(step.name)]
        return found

    def _decide(self, key: str, decision: Decision) -> None:
        self._decided[key] = decision
        self._committer.decide(key, decision)
        for number in self._waiting.pop(key, ()):
            self._missing[number] -= 1
            if self._missing[number] == 0:
                heapq.heappush(self._ready, number)
