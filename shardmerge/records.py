"""What became of each task, one row each: kept in the ledger, published as a Parquet file."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from shardmerge.plan import MeasureTask, Plan, pieces_of
from shardmerge.work import Done

if TYPE_CHECKING:
    import pyarrow as pa

TASKS = "shardmerge_tasks.parquet"
"""Name of the file in the published checkpoint."""


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One task that ended.

    Args:
        task: its number in the plan.
        step: name of the measuring pass, or ``merge``; ``sum``: of a sum that was made first.
        tensor: the first that it works on.
        tensors: how many there are.
        shard: that it writes to; empty for a measure.
        read_bytes: that it read.
        write_bytes: that it wrote.
        read_s: seconds of reading; ``kernel_s`` of computing, ``write_s`` of writing.
        wall_s: seconds from begin to end; what the others leave is waiting for its turn.
        began: seconds since 1970.
        peak_bytes: anonymous memory of its process while it had all its buffers.
        promised_bytes: the most that the plan allows that process.
        node: name of the machine.
        process: its number there.
        attempt: 1, or more where it was begun before and did not end.
    """

    task: int
    step: str
    tensor: str
    tensors: int
    shard: str
    read_bytes: int
    write_bytes: int
    read_s: float
    kernel_s: float
    write_s: float
    wall_s: float
    began: float
    peak_bytes: int
    promised_bytes: int
    node: str
    process: int
    attempt: int


_COLUMNS = tuple(item.name for item in dataclasses.fields(TaskRecord))
_values = attrgetter(*_COLUMNS)


def record_of(plan: Plan, done: Done) -> TaskRecord:
    """The row of a task that ended."""
    task = plan.tasks[done.task]
    if isinstance(task, MeasureTask):
        step, shard = task.step, ""
    else:
        step, shard = "merge", plan.shards[task.parts[0].shard].name
    tensors = [piece.tensor for piece in pieces_of(task)]
    return TaskRecord(
        task=done.task,
        step=step,
        tensor=plan.tensors[tensors[0]].name if tensors else "",
        tensors=len(set(tensors)),
        shard=shard,
        read_bytes=done.read_bytes,
        write_bytes=sum(receipt.nbytes for receipt in done.receipts),
        read_s=done.seconds.read,
        kernel_s=done.seconds.kernel,
        write_s=done.seconds.write,
        wall_s=done.ran.ended - done.ran.began,
        began=done.ran.began,
        peak_bytes=done.ran.peak_bytes,
        promised_bytes=plan.peak_bytes,
        node=done.ran.node,
        process=done.ran.process,
        attempt=done.ran.attempt,
    )


def row_of(record: TaskRecord) -> dict[str, int | float | str]:
    """A row by the names of its columns; ``dataclasses.asdict`` takes nine times as long."""
    return dict(zip(_COLUMNS, _values(record), strict=True))


def to_parquet(records: Sequence[TaskRecord]) -> bytes:
    """A Parquet file of all rows, in the order of the tasks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = sorted(map(row_of, records), key=lambda row: (row["task"], row["began"]))
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), file, compression="zstd")
    return file.getvalue()


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds = {"int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    return pa.schema(
        [
            pa.field(item.name, kinds[str(item.type)], nullable=False)
            for item in dataclasses.fields(TaskRecord)
        ]
    )


def from_parquet(content: bytes) -> list[TaskRecord]:
    """The rows of such a file.

    Raises:
        ValueError: for one that is no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError) as problem:
        raise ValueError(str(problem)) from problem
    if not table.schema.equals(_schema()) or any(column.null_count for column in table.columns):
        raise ValueError("its columns are not those of tasks")
    return [TaskRecord(**row) for row in table.to_pylist()]
