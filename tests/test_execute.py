"""Which task next, what is durable, when to stop; and the promises of executors."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge import execute as execute_module
from shardmerge.errors import OutputError, Stopped, StoreError
from shardmerge.execute import execute
from shardmerge.executors.api import Executor
from shardmerge.executors.local import LocalExecutor
from shardmerge.kernels.compile import NativeKernel
from shardmerge.kernels.language import HISTOGRAM_BINS
from shardmerge.layout import Spec, lay_out
from shardmerge.ledger import Ledger
from shardmerge.numerics import DType
from shardmerge.outputs.api import STAGING, Output, Receipt, ShardWriter
from shardmerge.outputs.local import LEDGER_FILE as LEDGER
from shardmerge.outputs.local import LocalJournal, LocalOutput
from shardmerge.plan import MeasureTask, MergeTask, Plan, Task
from shardmerge.progress import Quiet
from shardmerge.runs import Decided
from shardmerge.stores import Range, Stores
from shardmerge.stores.local import LocalStore
from shardmerge.testing.executors import (
    SAFE_S,
    ExecutorSuite,
    finish,
)
from shardmerge.work import Done
from tests import support
from tests.support import RAN
from tests.test_plan import WAYS, least_bytes, outputs_of, planned
from tests.test_plan import recipe_of as recipe_on_paper


@pytest.fixture(autouse=True)
def small_engine(monkeypatch):
    support.shrink(monkeypatch.setattr)


# --- the promises of executors --------------------------------------------------------------------


class TestLocalExecutor(ExecutorSuite):
    def start(self, plan: Plan, writer: ShardWriter, output: Output) -> Executor:
        return LocalExecutor(plan, writer, Stores())

    def test_a_running_task_ends_between_two_tiles(self, tmp_path, models, writer, monkeypatch):
        plan = self.plan(tmp_path, models, threads=1)
        reads = Gate(monkeypatch)
        with self.started(plan, writer) as executor:
            for task in plan.tasks:
                executor.submit(task, {})
            reads.wait_for(plan.workers)
            stopper = threading.Thread(target=executor.stop)
            stopper.start()
            while not executor._shared.stopping.is_set():
                time.sleep(0.001)
            reads.open()
            stopper.join(SAFE_S)
            assert not stopper.is_alive()
            assert executor.next_done(0) is None
            # Each worker was reading its first tile, and finished that.
            assert reads.count == plan.workers

    def test_at_most_so_many_kernels_at_a_time(self, tmp_path, models, writer, monkeypatch):
        plan = self.plan(tmp_path, models, threads=2)
        assert plan.workers == 4
        running, most = Counter(), []
        real = NativeKernel.__call__

        def call(self, **arguments):
            with running:
                most.append(running.value)
                time.sleep(0.001)
                return real(self, **arguments)

        monkeypatch.setattr(NativeKernel, "__call__", call)
        with self.started(plan, writer) as executor:
            finish(executor, plan.tasks)
        assert max(most) <= 2

    def test_its_threads_end_with_it(self, tmp_path, models, writer):
        before = threading.active_count()
        with self.started(self.plan(tmp_path, models), writer):
            assert threading.active_count() > before
        assert threading.active_count() == before


class Counter:
    """How many threads are inside."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.value += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.value -= 1


class Gate:
    """Holds every read back until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        self._opened = threading.Event()
        self._lock = threading.Lock()
        real = LocalStore.read_ranges

        def read_ranges(store: LocalStore, ranges: Sequence[Range]) -> None:
            with self._lock:
                self.count += 1
            assert self._opened.wait(SAFE_S)
            real(store, ranges)

        monkeypatch.setattr(LocalStore, "read_ranges", read_ranges)

    def wait_for(self, count: int) -> None:
        until = time.monotonic() + SAFE_S
        while self.count < count:
            assert time.monotonic() < until
            time.sleep(0.001)

    def open(self) -> None:
        self._opened.set()


# --- the driver, with an executor that makes results up and ends tasks in any order ---------------


class Paper:
    """An executor of which the test says which task ends next; results are made up.

    Args:
        choose: gives the place of the next task to end, among those that run.
        fail_at: number of ``next_done`` calls after which a task fails.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        slots: int = 3,
        choose: Callable[[int], int] = lambda running: 0,
        fail_at: int | None = None,
    ) -> None:
        self.slots = slots
        self.submitted: list[int] = []
        self.decided: dict[str, tuple[float, ...]] = {}
        self.stopped = 0
        self.counts: list[weakref.ref[object]] = []
        self.most_counts = 0
        self._plan, self._choose, self._left = plan, choose, fail_at
        self._running: list[Task] = []

    def has_room(self) -> bool:
        return len(self._running) < self.slots

    def submit(self, task: Task, decided: Decided) -> None:
        assert not self.stopped, "a task after stop"
        assert self.has_room()
        assert set(decided) == set(task.needs)
        for key, values in decided.items():
            assert self.decided.setdefault(key, values) == values
        self.submitted.append(task.number)
        self._running.append(task)

    def next_done(self, timeout_s: float) -> Done | None:
        alive = sum(ref() is not None for ref in self.counts)
        self.most_counts = max(self.most_counts, alive)
        if not self._running:
            return None
        task = self._running.pop(self._choose(len(self._running)))
        if self._left is not None and not self.stopped:
            self._left -= 1
            if self._left < 0:
                raise StoreError(f"task {task.number} failed")
        return self._result(task)

    def stop(self) -> None:
        self.stopped += 1

    def _result(self, task: Task) -> Done:
        rng = np.random.default_rng(task.number)
        if isinstance(task, MergeTask):
            receipts = (
                Receipt(part.shard, part.number, part.nbytes, int(rng.integers(2**32)))
                for part in task.parts
            )
            return Done(task.number, RAN, tuple(receipts))
        method = self._plan.scopes[task.scope].method
        if task.step in ("coarse", "fine"):
            counts = rng.integers(0, 3, (len(method.weight), HISTOGRAM_BINS))
            self.counts.append(weakref.ref(counts))
            return Done(task.number, RAN, (), counts)
        width = {"products": 3, "magnitudes": 4, "squares": 2, "signs": 1}[task.step]
        return Done(task.number, RAN, (), rng.random((3 * len(task.pieces), width)))


class PaperWriter:
    """Syncs of a writer, and whether they fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.syncs = 0
        self._error = error

    def sync(self, shards) -> None:
        self.syncs += 1
        if self._error is not None:
            raise self._error


SPECS = {f"t.{i}.weight": (DType.BF16, (i % 5, 200)) for i in range(12)}
SPECS |= {f"t.{i}.scale": (DType.F32, ()) for i in range(3)}


def plan_on_paper(way: str, *, streamed: bool = True) -> Plan:
    recipe = recipe_on_paper(WAYS[way])
    outputs = outputs_of(recipe, SPECS, shards=2)
    return planned(recipe, outputs, least_bytes(outputs) if streamed else 2**30)


def drive(plan: Plan, executor: Paper, ledger: Ledger, **options) -> None:
    execute(
        plan,
        executor,
        ledger,
        options.get("writer", PaperWriter()),
        progress=options.get("progress", Quiet()),
        stop=options.get("stop", threading.Event()),
    )


def parts_of(plan: Plan) -> set[tuple[int, int]]:
    return {(part.shard, part.number) for shard in plan.shards for part in shard.parts}


def ledger_at(path: Path) -> Ledger:
    return Ledger(LocalJournal(path / LEDGER), {"recipe": "paper"})


few = settings(max_examples=25, deadline=None)
measured_ways = st.sampled_from(
    ["slerp", "ties", "ties, rescaled", "ties over the model", "dare_linear", "fisher", "linear"]
)


@few
@given(measured_ways, st.booleans(), st.integers(1, 6), st.randoms(use_true_random=False))
def test_every_task_once_in_any_order_of_ends(tmp_path_factory, way, streamed, slots, rng):
    plan = plan_on_paper(way, streamed=streamed)
    first = tmp_path_factory.mktemp("first")
    decisions = []
    for choose in (lambda running: 0, rng.randrange):
        path = first / str(len(decisions))
        path.mkdir()
        ledger = ledger_at(path)
        executor = Paper(plan, slots=slots, choose=choose)
        drive(plan, executor, ledger)
        assert sorted(executor.submitted) == [task.number for task in plan.tasks]
        assert set(ledger.receipts) == parts_of(plan)
        assert executor.decided.items() <= ledger.decisions.items()
        assert {key for task in plan.tasks for key in task.needs} <= ledger.decisions.keys()
        ledger.close()
        decisions.append(ledger.decisions)
    assert decisions[0] == decisions[1]


@few
@given(measured_ways, st.booleans(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_only_what_is_missing_is_done(tmp_path_factory, way, streamed, slots, rng):
    """With any part of the receipts and decisions in the ledger."""
    plan = plan_on_paper(way, streamed=streamed)
    folder = tmp_path_factory.mktemp("quiet")
    quiet = ledger_at(folder)
    drive(plan, Paper(plan), quiet)
    quiet.close()
    folder = tmp_path_factory.mktemp("again")
    ledger = ledger_at(folder)
    kept = [receipt for receipt in quiet.receipts.values() if rng.random() < 0.6]
    known = {key: values for key, values in quiet.decisions.items() if rng.random() < 0.5}
    ledger.record(kept, known)
    executor = Paper(plan, slots=slots, choose=rng.randrange)
    drive(plan, executor, ledger)
    ledger.close()
    assert ledger.decisions.items() <= quiet.decisions.items()
    assert ledger.receipts == quiet.receipts
    done = {(receipt.shard, receipt.number) for receipt in kept}
    tasks = [plan.tasks[number] for number in executor.submitted]
    merges = [task for task in tasks if isinstance(task, MergeTask)]
    assert {task.number for task in merges} == {
        task.number
        for task in plan.tasks
        if isinstance(task, MergeTask)
        and not {(part.shard, part.number) for part in task.parts} <= done
    }
    needed = {key.rpartition("/")[0] for task in merges for key in task.needs if key not in known}
    measured = {plan.scopes[task.scope].key for task in tasks if isinstance(task, MeasureTask)}
    if way == "ties, rescaled":
        assert needed <= measured
    else:
        assert measured == needed


def test_nothing_is_submitted_where_everything_is_there(tmp_path):
    plan = plan_on_paper("ties")
    ledger = ledger_at(tmp_path)
    drive(plan, Paper(plan), ledger)
    again = Paper(plan)
    drive(plan, again, ledger)
    ledger.close()
    assert again.submitted == []


def test_counts_are_forgotten_when_they_are_settled(tmp_path):
    """Each is megabytes; a large model has thousands of measuring tasks."""
    for way in ("ties", "ties over the model"):
        plan = plan_on_paper(way)
        assert sum(isinstance(task, MeasureTask) for task in plan.tasks) > 20
        ledger = ledger_at(tmp_path)
        executor = Paper(plan, slots=2)
        drive(plan, executor, ledger)
        ledger.close()
        (tmp_path / LEDGER).unlink()
        assert executor.most_counts <= 2 * 2 + 2, way


def test_the_first_error_stops_the_run_and_other_receipts_are_kept(tmp_path):
    plan = plan_on_paper("linear")
    ledger = ledger_at(tmp_path)
    executor = Paper(plan, slots=4, fail_at=5)
    with pytest.raises(StoreError, match=r"task 5 failed"):
        drive(plan, executor, ledger)
    ledger.close()
    assert executor.stopped
    # Five ended before, and three more were running and ended while the executor stopped.
    assert len(executor.submitted) == 9
    assert len(ledger_at(tmp_path).receipts) == 8


def test_errors_after_the_first_are_not_told(tmp_path):
    plan = plan_on_paper("linear")

    class Failing(Paper):
        def _result(self, task: Task) -> Done:
            if task.number % 2 == 0:
                raise StoreError(f"task {task.number} failed")
            return super()._result(task)

    ledger = ledger_at(tmp_path)
    with pytest.raises(StoreError, match="task 0 failed"):
        drive(plan, Failing(plan, slots=4), ledger)
    ledger.close()
    assert len(ledger_at(tmp_path).receipts) == 2


def test_a_stop_ends_the_run_and_keeps_what_ended(tmp_path):
    plan = plan_on_paper("linear")
    stop = threading.Event()
    executor = Paper(plan, slots=3)

    class StopsAtThird(Quiet):
        def task(self, done, task):
            super().task(done, task)
            if self.tasks_done == 3:
                stop.set()

    ledger = ledger_at(tmp_path)
    with pytest.raises(Stopped, match="run the same command again"):
        drive(plan, executor, ledger, stop=stop, progress=StopsAtThird())
    ledger.close()
    assert executor.stopped
    assert len(executor.submitted) == 5
    assert len(ledger_at(tmp_path).receipts) == 5
    again = Paper(plan, slots=3)
    ledger = ledger_at(tmp_path)
    drive(plan, again, ledger)
    ledger.close()
    assert sorted([*again.submitted, *executor.submitted]) == [t.number for t in plan.tasks]


@pytest.mark.parametrize("commit_bytes", [1, 2**40])
def test_receipts_enter_the_ledger_only_after_a_sync(tmp_path, monkeypatch, commit_bytes):
    monkeypatch.setattr(execute_module, "COMMIT_BYTES", commit_bytes)
    monkeypatch.setattr(execute_module, "COMMIT_S", 3600.0)
    plan = plan_on_paper("linear")
    synced: list[set[int]] = []
    groups: list[int] = []
    ledger, writer = ledger_at(tmp_path), PaperWriter()
    monkeypatch.setattr(writer, "sync", synced.append)
    real = ledger.record

    def record(receipts, decisions, tasks):
        assert len(synced) == len(groups) + 1
        assert synced[-1] == {receipt.shard for receipt in receipts}
        groups.append(len(receipts))
        real(receipts, decisions, tasks)

    monkeypatch.setattr(ledger, "record", record)
    drive(plan, Paper(plan), ledger, writer=writer)
    ledger.close()
    assert sum(groups) == len(parts_of(plan))
    assert len(groups) == 1 if commit_bytes > 1 else len(groups) > 1


def test_what_could_not_be_synced_never_enters_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(execute_module, "COMMIT_BYTES", 1)
    plan = plan_on_paper("linear")
    ledger = ledger_at(tmp_path)
    writer = PaperWriter(OutputError("no space left"))
    executor = Paper(plan)
    with pytest.raises(OutputError, match="no space left"):
        drive(plan, executor, ledger, writer=writer)
    ledger.close()
    assert writer.syncs == 1
    assert ledger_at(tmp_path).receipts == {}
    assert executor.stopped


def test_a_failed_sync_stops_the_run_soon(tmp_path, monkeypatch):
    """Not only at its end: the rest would be written for nothing."""
    monkeypatch.setattr(execute_module, "COMMIT_BYTES", 1)
    plan = plan_on_paper("linear")
    ledger = ledger_at(tmp_path)

    class Slow(Paper):
        def next_done(self, timeout_s: float) -> Done | None:
            time.sleep(0.01)
            return super().next_done(timeout_s)

    executor = Slow(plan, slots=1)
    with pytest.raises(OutputError):
        drive(plan, executor, ledger, writer=PaperWriter(OutputError("no space left")))
    ledger.close()
    assert len(executor.submitted) < len(plan.tasks)


def test_progress_is_told_of_everything_once(tmp_path):
    plan = plan_on_paper("ties")
    ledger = ledger_at(tmp_path)
    meter = Quiet()
    drive(plan, Paper(plan, choose=random.Random(0).randrange), ledger, progress=meter)
    assert meter.tasks == meter.tasks_done == len(plan.tasks)
    assert meter.done_bytes == meter.all_bytes == plan.read_bytes + plan.output_bytes
    assert meter.written_bytes == meter.write_bytes == plan.output_bytes
    again = Quiet()
    drive(plan, Paper(plan), ledger, progress=again)
    ledger.close()
    assert again.tasks_done == again.tasks and again.written_bytes == plan.output_bytes


def test_a_part_that_ends_after_a_sync_is_synced_again(tmp_path, monkeypatch):
    """A commit while a part is half written must not count for the rest of it."""
    (tmp_path / STAGING).mkdir()
    shards = lay_out([Spec("a", DType.F32, (8,))], [0], None)
    calls = []
    monkeypatch.setattr(os, "fdatasync", lambda file: calls.append("sync"))
    ledger = Ledger(LocalOutput(tmp_path).journal(), {})
    handles = dict(LocalOutput(tmp_path).begin(shards, [0]))
    with closing(LocalOutput(tmp_path).writer(shards, handles)) as writer:
        part = writer.part(shards[0].parts[0])
        part.write(shards[0].header)
        with execute_module._Committer(ledger, writer) as committer:
            committer._commit([Receipt(0, 7, 0, 0)], {}, [])
            part.write(bytes(32))
            calls.append("written")
            committer.add((part.finish([]),), support.RECORD)
    assert calls == ["sync", "written", "sync"]
