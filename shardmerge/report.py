"""Where the time of a merge went, from the rows that its tasks have left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardmerge.errors import CheckpointError
from shardmerge.progress import counted, size
from shardmerge.records import TASKS, TaskRecord, from_parquet
from shardmerge.stores import Stores

_SLOWEST = 5


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over some tasks.

    Args:
        tasks: how many.
        again: of these, begun more than once.
        wall_s: from the first begin to the last end.
        busy_s: seconds of all tasks together.
        peak_bytes: the most anonymous memory of a process; ``promised_bytes`` what was allowed.
    """

    tasks: int
    again: int
    read_bytes: int
    write_bytes: int
    wall_s: float
    busy_s: float
    read_s: float
    kernel_s: float
    write_s: float
    peak_bytes: int
    promised_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """What ``report_of`` found.

    Args:
        nodes: sums for each machine, by name.
        slowest: tasks, the slowest first.
    """

    totals: Totals
    nodes: dict[str, Totals]
    slowest: tuple[TaskRecord, ...]


def read_records(out: str, stores: Stores) -> list[TaskRecord]:
    """The rows of a published checkpoint.

    Raises:
        CheckpointError: where there are none.
    """
    store = stores.open(out)
    url = store.join(out, TASKS)
    if store.stat(url) is None:
        raise CheckpointError(
            f"{out} has no {TASKS}: it is not published yet, or was not made by shardmerge."
        )
    try:
        return from_parquet(store.read(url))
    except ValueError as problem:
        raise CheckpointError(f"{url} cannot be read as a table of tasks: {problem}") from problem


def report_of(records: Sequence[TaskRecord]) -> Report:
    """Totals, rates of nodes and the slowest tasks."""
    names = sorted({record.node for record in records})
    slowest = sorted(records, key=lambda record: -record.wall_s)[:_SLOWEST]
    return Report(
        totals=_totals(records),
        nodes={name: _totals([r for r in records if r.node == name]) for name in names},
        slowest=tuple(slowest),
    )


def _totals(records: Sequence[TaskRecord]) -> Totals:
    def total(name: str) -> float:
        return float(sum(getattr(record, name) for record in records))

    first = min((record.began for record in records), default=0.0)
    last = max((record.began + record.wall_s for record in records), default=0.0)
    return Totals(
        tasks=len(records),
        again=sum(record.attempt > 1 for record in records),
        read_bytes=int(total("read_bytes")),
        write_bytes=int(total("write_bytes")),
        wall_s=last - first,
        busy_s=total("wall_s"),
        read_s=total("read_s"),
        kernel_s=total("kernel_s"),
        write_s=total("write_s"),
        peak_bytes=max((record.peak_bytes for record in records), default=0),
        promised_bytes=max((record.promised_bytes for record in records), default=0),
    )


def report_text(report: Report) -> str:
    """For a terminal."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterable[str]:
    totals = report.totals
    again = f", {totals.again} of them begun again" if totals.again else ""
    yield f"{counted(totals.tasks, 'task')}{again}; {_rates(totals)}"
    yield (
        f"  tasks took {totals.busy_s:,.1f} s: read {totals.read_s:,.1f}, "
        f"kernels {totals.kernel_s:,.1f}, write {totals.write_s:,.1f}, "
        f"waited {max(0.0, _waited(totals)):,.1f}"
    )
    promised = f"of {size(totals.promised_bytes)} promised"
    yield f"  peak memory of a process {size(totals.peak_bytes)} {promised}"
    yield "nodes:"
    for name, node in report.nodes.items():
        yield f"  {name}: {counted(node.tasks, 'task')}, {_rates(node)}"
    yield "slowest tasks:"
    for record in report.slowest:
        others = f" and {record.tensors - 1} more" if record.tensors > 1 else ""
        yield (
            f"  {record.wall_s:,.2f} s (read {record.read_s:.2f}, kernels {record.kernel_s:.2f}, "
            f"write {record.write_s:.2f}): {record.step} of {record.tensor}{others} "
            f"on {record.node}, attempt {record.attempt}"
        )


def _waited(totals: Totals) -> float:
    return totals.busy_s - totals.read_s - totals.kernel_s - totals.write_s


def _rates(totals: Totals) -> str:
    wall_s = max(totals.wall_s, 1e-3)
    return (
        f"read {size(totals.read_bytes)}, wrote {size(totals.write_bytes)} in {totals.wall_s:,.1f} "
        f"s ({size(int(totals.read_bytes / wall_s))}/s, {size(int(totals.write_bytes / wall_s))}/s)"
    )
