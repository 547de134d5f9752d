"""What every executor promises; for pytest."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from shardmerge.errors import CheckpointError, ShardmergeError
from shardmerge.executors.api import Executor
from shardmerge.header import write_header
from shardmerge.layout import SINGLE_SHARD
from shardmerge.numerics import DType
from shardmerge.outputs.api import STAGING, Output, ShardWriter
from shardmerge.outputs.local import LocalOutput
from shardmerge.plan import Plan, Task
from shardmerge.prepare import Where, prepare
from shardmerge.work import Done

SAFE_S = 60.0
"""Until then everything that a test waits for has long happened."""
_SHAPE = (48, 43)
_TENSORS = 9


class ExecutorSuite:
    """The promises of ``executors.api``.

    A subclass ``TestMine`` says how one is started.
    """

    def start(self, plan: Plan, writer: ShardWriter, output: Output) -> Executor:
        """An executor for the tasks of ``plan``."""
        raise NotImplementedError

    # --- what the tests stand on ---

    @pytest.fixture
    def models(self, tmp_path: Path) -> list[Path]:
        return [write_model(tmp_path / f"m{seed}", seed=seed) for seed in range(3)]

    def plan(self, folder: Path, models: Sequence[Path], *, threads: int = 2) -> Plan:
        """A linear merge of a task for each tensor or so."""
        recipe = {
            "merge_method": "linear",
            "shard_size": 4096,
            "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in models],
        }
        path = folder / "recipe.yml"
        path.write_text(json.dumps(recipe))
        where = Where(device="cpu", memory_bytes=2**30, threads=threads)
        return prepare(str(path), str(folder / "out"), where).plan

    @pytest.fixture
    def writer(self, tmp_path: Path, models: Sequence[Path]) -> Iterator[ShardWriter]:
        with writing(tmp_path / "out", self.plan(tmp_path, models)) as writer:
            yield writer

    def started(self, plan: Plan, writer: ShardWriter) -> Executor:
        return self.start(plan, writer, LocalOutput(Path(plan.out)))

    # --- the promises ---

    def test_every_task_ends_in_exactly_one_done(
        self, tmp_path: Path, models: Sequence[Path], writer: ShardWriter
    ) -> None:
        plan = self.plan(tmp_path, models)
        with self.started(plan, writer) as executor:
            ended = finish(executor, plan.tasks)
            assert executor.next_done(0.05) is None
        assert sorted(done.task for done in ended) == [task.number for task in plan.tasks]
        check_written(tmp_path / "out", plan, ended)

    def test_it_keeps_what_a_task_promised(
        self, tmp_path: Path, models: Sequence[Path], writer: ShardWriter
    ) -> None:
        plan = self.plan(tmp_path, models)
        with self.started(plan, writer) as executor:
            for done in finish(executor, plan.tasks):
                task = plan.tasks[done.task]
                assert done.read_bytes == task.read_bytes
                assert sum(receipt.nbytes for receipt in done.receipts) == task.write_bytes
                assert done.ran.attempt == 1
                assert 0 < done.ran.began <= done.ran.ended

    def test_tasks_may_be_done_again(
        self, tmp_path: Path, models: Sequence[Path], writer: ShardWriter
    ) -> None:
        plan = self.plan(tmp_path, models)
        with self.started(plan, writer) as executor:
            ended = finish(executor, [*plan.tasks, *plan.tasks])
        assert len(ended) == 2 * len(plan.tasks)
        check_written(tmp_path / "out", plan, ended)

    def test_the_error_of_a_task_is_raised_and_the_others_go_on(self, tmp_path: Path) -> None:
        models = [write_model(tmp_path / f"m{seed}", seed=seed, ids=seed) for seed in (0, 1)]
        plan = self.plan(tmp_path, models)
        with writing(tmp_path / "out", plan) as writer, self.started(plan, writer) as executor:
            ended, errors = collect(executor, plan.tasks)
            assert executor.next_done(0.05) is None
        assert [type(error) for error in errors] == [CheckpointError]
        assert len(ended) == len(plan.tasks) - 1
        assert len({done.task for done in ended}) == len(ended)
        check_written(tmp_path / "out", plan, ended)

    def test_without_a_task_there_is_nothing_to_wait_for(
        self, tmp_path: Path, models: Sequence[Path], writer: ShardWriter
    ) -> None:
        with self.started(self.plan(tmp_path, models), writer) as executor:
            assert executor.next_done(0) is None
            assert executor.next_done(0.01) is None
            assert executor.has_room()

    def test_after_stop_nothing_is_started(
        self, tmp_path: Path, models: Sequence[Path], writer: ShardWriter
    ) -> None:
        plan = self.plan(tmp_path, models)
        with self.started(plan, writer) as executor:
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


def write_model(folder: Path, *, seed: int, ids: int = 0) -> Path:
    """A checkpoint of small bfloat16 matrices, and one of integers that all begin with ``ids``."""
    rng = np.random.default_rng(seed)
    specs = [(f"layers.{n}.weight", DType.BF16, _SHAPE) for n in range(_TENSORS)]
    header = write_header([*specs, ("ids", DType.I64, (9,))])
    floats = rng.standard_normal((_TENSORS, *_SHAPE)).astype(np.float32)
    halves = (floats.view(np.uint32) >> 16).astype(np.uint16)
    folder.mkdir()
    integers = np.arange(ids, ids + 9, dtype=np.int64)
    (folder / SINGLE_SHARD).write_bytes(header + halves.tobytes() + integers.tobytes())
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


@contextmanager
def writing(out: Path, plan: Plan) -> Iterator[ShardWriter]:
    """A writer of the shards of a plan."""
    output = LocalOutput(out)
    (out / STAGING).mkdir(parents=True)
    handles = dict(output.begin(plan.shards, range(len(plan.shards))))
    with closing(output.writer(plan.shards, handles)) as writer:
        yield writer


def collect(executor: Executor, tasks: Sequence[Task]) -> tuple[list[Done], list[Exception]]:
    """Run tasks that need no decisions; gives what they ended in."""
    left, flying = list(tasks), 0
    ended: list[Done] = []
    errors: list[Exception] = []
    until = time.monotonic() + SAFE_S
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


def finish(executor: Executor, tasks: Sequence[Task]) -> list[Done]:
    """The same for tasks of which none fails."""
    ended, errors = collect(executor, tasks)
    assert errors == []
    return ended


def written_bytes(out: Path, plan: Plan) -> list[bytes]:
    """The content of every shard, as far as it is written."""
    return [(out / STAGING / f"{shard.name}.part").read_bytes() for shard in plan.shards]


def check_written(out: Path, plan: Plan, ended: Sequence[Done]) -> None:
    """Receipts tell the truth."""
    content = written_bytes(out, plan)
    for done in ended:
        for receipt in done.receipts:
            part = plan.shards[receipt.shard].parts[receipt.number]
            data = content[receipt.shard][part.start : part.stop]
            assert (receipt.nbytes, receipt.crc32) == (len(data), zlib.crc32(data))
