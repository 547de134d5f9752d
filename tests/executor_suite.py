"""What every executor promises: a class of tests, and what they stand on."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from shardmerge.errors import CheckpointError, ShardmergeError
from shardmerge.executors.api import Executor
from shardmerge.numerics import DType
from shardmerge.outputs.api import STAGING, ShardWriter
from shardmerge.outputs.local import LocalOutput
from shardmerge.plan import Plan, Task
from shardmerge.work import Done
from tests import support
from tests.support import HALVES, recipe_of, write_checkpoint, write_recipe

SAFE_S = 60.0
"""Until then everything that a test waits for has long happened."""


class ExecutorSuite:
    """What every executor promises; a subclass says how to start one."""

    def start(self, plan: Plan, writer: ShardWriter) -> Executor:
        raise NotImplementedError

    # --- what the tests stand on ---

    @pytest.fixture
    def models(self, tmp_path) -> list[Path]:
        return [
            write_checkpoint(tmp_path / f"m{i}", HALVES, seed=i, shards=shards)
            for i, shards in enumerate((1, 1, 2))
        ]

    def plan(self, folder: Path, models: list[Path], *, threads: int = 2) -> Plan:
        recipe = recipe_of("linear", None, {model: {"weight": 1.0} for model in models})
        path = write_recipe(folder / "r.yml", recipe)
        memory_bytes = support.least_memory(path, workers=2 * threads)
        return support.plan_of(path, folder / "out", memory_bytes=memory_bytes, threads=threads)

    @pytest.fixture
    def writer(self, tmp_path, models):
        with writing(tmp_path / "out", self.plan(tmp_path, models)) as writer:
            yield writer

    # --- the promises ---

    def test_every_task_ends_in_exactly_one_done(self, tmp_path, models, writer):
        plan = self.plan(tmp_path, models)
        with self.start(plan, writer) as executor:
            ended = finish(executor, plan.tasks)
            assert executor.next_done(0.05) is None
        assert sorted(done.task for done in ended) == [task.number for task in plan.tasks]
        check_written(tmp_path / "out", plan, ended)

    def test_it_keeps_what_a_task_promised(self, tmp_path, models, writer):
        plan = self.plan(tmp_path, models)
        with self.start(plan, writer) as executor:
            for done in finish(executor, plan.tasks):
                task = plan.tasks[done.task]
                assert done.read_bytes == task.read_bytes
                parts = [(receipt.shard, receipt.number) for receipt in done.receipts]
                assert parts == [(part.shard, part.number) for part in task.parts]
                assert sum(receipt.nbytes for receipt in done.receipts) == task.write_bytes

    def test_tasks_may_be_done_again(self, tmp_path, models, writer):
        plan = self.plan(tmp_path, models)
        with self.start(plan, writer) as executor:
            ended = finish(executor, [*plan.tasks, *plan.tasks])
        assert len(ended) == 2 * len(plan.tasks)
        check_written(tmp_path / "out", plan, ended)

    def test_the_error_of_a_task_is_raised_and_the_others_go_on(self, tmp_path):
        specs = {**HALVES, "ids": (DType.I64, (9,))}
        models = [write_checkpoint(tmp_path / f"m{i}", specs, seed=i, shards=1) for i in (0, 1)]
        data = (models[1] / support.SINGLE).read_bytes()
        at = data.index((8).to_bytes(8, "little"))
        (models[1] / support.SINGLE).write_bytes(data[:at] + b"\7" + data[at + 1 :])
        plan = self.plan(tmp_path, models)
        with writing(tmp_path / "out", plan) as writer, self.start(plan, writer) as executor:
            ended, errors = collect(executor, plan.tasks)
            assert executor.next_done(0.05) is None
        assert [type(error) for error in errors] == [CheckpointError]
        assert len(ended) == len(plan.tasks) - 1
        assert len({done.task for done in ended}) == len(ended)
        check_written(tmp_path / "out", plan, ended)

    def test_without_a_task_there_is_nothing_to_wait_for(self, tmp_path, models, writer):
        with self.start(self.plan(tmp_path, models), writer) as executor:
            assert executor.next_done(0) is None
            assert executor.next_done(0.01) is None
            assert executor.has_room()

    def test_after_stop_nothing_is_started(self, tmp_path, models, writer):
        plan = self.plan(tmp_path, models)
        with self.start(plan, writer) as executor:
            for task in plan.tasks:
                executor.submit(task, {})
            executor.stop()
            before = written_bytes(tmp_path / "out", plan)
            for task in plan.tasks:
                executor.submit(task, {})
            ended = []
            while (done := executor.next_done(0.05)) is not None:
                ended.append(done)
            assert written_bytes(tmp_path / "out", plan) == before
            executor.stop()
        assert len({done.task for done in ended}) == len(ended)
        check_written(tmp_path / "out", plan, ended)


@contextmanager
def writing(out: Path, plan: Plan) -> Iterator[ShardWriter]:
    """A writer of the shards of a plan."""
    output = LocalOutput(out)
    (out / STAGING).mkdir(parents=True)
    handles = dict(output.begin(plan.shards, range(len(plan.shards))))
    with closing(output.writer(plan.shards, handles)) as writer:
        yield writer


def collect(
    executor: Executor, tasks: list[Task] | tuple[Task, ...]
) -> tuple[list[Done], list[Exception]]:
    """Run tasks that need no decisions; gives what they ended in."""
    left, ended, errors = list(tasks), [], []
    flying, until = 0, time.monotonic() + SAFE_S
    while left or flying:
        assert time.monotonic() < until, "a task that was submitted never ended"
        while left and executor.has_room():
            executor.submit(left.pop(0), {})
            flying += 1
        try:
            done = executor.next_done(0.2)
        except ShardmergeError as error:
            errors.append(error)
            flying -= 1
            continue
        if done is not None:
            ended.append(done)
            flying -= 1
    return ended, errors


def finish(executor: Executor, tasks: list[Task] | tuple[Task, ...]) -> list[Done]:
    ended, errors = collect(executor, tasks)
    assert errors == []
    return ended


def written_bytes(out: Path, plan: Plan) -> list[bytes]:
    return [(out / STAGING / f"{shard.name}.part").read_bytes() for shard in plan.shards]


def check_written(out: Path, plan: Plan, ended: list[Done]) -> None:
    """Receipts tell the truth."""
    content = written_bytes(out, plan)
    for done in ended:
        for receipt in done.receipts:
            part = plan.shards[receipt.shard].parts[receipt.number]
            data = content[receipt.shard][part.start : part.stop]
            assert (receipt.nbytes, receipt.crc32) == (len(data), zlib.crc32(data))
