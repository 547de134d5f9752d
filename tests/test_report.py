"""What a merge leaves of its tasks, and what is told of it."""

from __future__ import annotations

import dataclasses
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardmerge.cli import main
from shardmerge.errors import CheckpointError
from shardmerge.merge import merge
from shardmerge.plan import MergeTask
from shardmerge.records import TASKS, TaskRecord, from_parquet, to_parquet
from shardmerge.report import read_records, report_of, report_text
from shardmerge.stores import Stores
from tests import support
from tests.support import RECORD, recipe_of, write_checkpoint, write_recipe


@pytest.fixture
def recipe(tmp_path):
    models = [write_checkpoint(tmp_path / f"m{i}", seed=i) for i in range(3)]
    base, *others = models
    given = {model: {"weight": 1.0, "density": 0.5} for model in others}
    return write_recipe(tmp_path / "r.yml", recipe_of("ties", base, given))


def test_every_task_leaves_a_row(tmp_path, recipe, monkeypatch):
    support.shrink(monkeypatch.setattr)
    plan = support.plan_of(recipe, tmp_path / "out", memory_bytes=2**30, threads=2)
    merge(recipe, str(tmp_path / "out"), memory_bytes=2**30, threads=2)
    rows = read_records(str(tmp_path / "out"), Stores())
    assert [row.task for row in rows] == [task.number for task in plan.tasks]
    for row, task in zip(rows, plan.tasks, strict=True):
        assert (row.read_bytes, row.write_bytes) == (task.read_bytes, task.write_bytes)
        assert (row.step == "merge") == isinstance(task, MergeTask)
        assert row.attempt == 1
        assert row.read_s + row.kernel_s + row.write_s <= row.wall_s + 0.01
        assert row.peak_bytes > 0
        assert row.promised_bytes == plan.peak_bytes


def test_rows_of_a_run_that_was_stopped_stay(tmp_path, recipe, monkeypatch):
    support.shrink(monkeypatch.setattr)

    class Stops(support.Quiet):
        def task(self, done, task):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, str(tmp_path / "out"), memory_bytes=2**30, threads=2, progress=Stops())
    merge(recipe, str(tmp_path / "out"), memory_bytes=2**30, threads=2)
    rows = read_records(str(tmp_path / "out"), Stores())
    plan = support.plan_of(recipe, tmp_path / "out", memory_bytes=2**30, threads=2)
    merges = [row.task for row in rows if row.step == "merge"]
    assert sorted(merges) == [task.number for task in plan.tasks if isinstance(task, MergeTask)]


def test_a_table_holds_what_was_put_in():
    rows = [RECORD, dataclasses.replace(RECORD, task=1, attempt=2, node="there")]
    assert from_parquet(to_parquet(rows)) == rows
    assert from_parquet(to_parquet([])) == []
    with pytest.raises(ValueError, match="magic"):
        from_parquet(b"not a table at all")


def rows_of_two_nodes() -> list[TaskRecord]:
    return [
        dataclasses.replace(
            RECORD,
            task=number,
            node=f"node{number % 2}",
            began=100.0 + number,
            wall_s=7.0 + number,
            attempt=1 + (number == 3),
        )
        for number in range(4)
    ]


def test_a_report_adds_up():
    report = report_of(rows_of_two_nodes())
    assert report.totals.tasks == 4
    assert report.totals.again == 1
    assert report.totals.read_bytes == 12
    assert report.totals.wall_s == 13.0  # from 100 to 103 + 10
    assert report.totals.busy_s == 7 + 8 + 9 + 10
    assert [row.task for row in report.slowest] == [3, 2, 1, 0]
    assert {name: node.tasks for name, node in report.nodes.items()} == {"node0": 2, "node1": 2}
    assert sum(node.write_bytes for node in report.nodes.values()) == 4


def test_a_report_is_told(tmp_path, recipe, capsys):
    merge(recipe, str(tmp_path / "out"))
    assert main(["report", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "slowest tasks:" in told
    assert "promised" in told
    assert main(["report", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["totals"]["write_bytes"] > 0
    assert report_text(report_of([]))  # of a merge that had nothing to do


def test_without_a_table_there_is_no_report(tmp_path):
    write_checkpoint(tmp_path / "other")
    with pytest.raises(CheckpointError, match="not published yet"):
        read_records(str(tmp_path / "other"), Stores())
    (tmp_path / "other" / TASKS).write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot be read as a table"):
        read_records(str(tmp_path / "other"), Stores())


def test_a_table_of_other_types_is_none():
    table = pq.read_table(io.BytesIO(to_parquet([RECORD])))
    texts = table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))
    nothing = pa.table(
        {name: pa.nulls(1, table.schema.field(name).type) for name in texts.schema.names}
    )
    for wrong in (texts, nothing, table.drop_columns("task")):
        file = io.BytesIO()
        pq.write_table(wrong, file)
        with pytest.raises(ValueError, match="columns"):
            from_parquet(file.getvalue())
