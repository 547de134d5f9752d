"""A merge in slices that never talk to each other: for arrays of batch systems, without Ray.

An order names what is to be merged; every process makes the same plan from it. A slice is some of
the output's parts. It is done by a process with a ledger of its own, so that any number of them run
at a time, in any order, and are run again when they were killed. Where a method is measured over
the whole model, each slice measures a share and leaves its sum beside the ledgers; whoever comes
when all are there goes on. The last step takes over what all slices have written, and publishes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardmerge import executors
from shardmerge.errors import (
    LedgerMismatchError,
    LockedError,
    PartsMissingError,
    Stopped,
    UsageError,
)
from shardmerge.execute import Progress, execute, measure
from shardmerge.executors.api import Executor
from shardmerge.layout import Shard
from shardmerge.ledger import Ledger, fingerprint
from shardmerge.merge import decisions_after, finish, give
from shardmerge.methods.api import Decision, Kind, Over, Pass, info_of, levels_of
from shardmerge.outputs.api import STAGING, PartKey
from shardmerge.plan import MeasureTask
from shardmerge.prepare import Prepared, Where, prepare
from shardmerge.progress import Quiet, counted
from shardmerge.publish import CLEARED, Published
from shardmerge.records import record_of
from shardmerge.staging import refuse_sources, staging, sweep
from shardmerge.stores import Settings, is_remote
from shardmerge.summaries import Summary, Summing, settle

_KINDS: dict[str, type | tuple[type, ...]] = {
    "recipe": str,
    "out": str,
    "folder": str,
    "memory_bytes": int,
    "threads": (int, type(None)),
    "device": str,
    "patience_minutes": (int, float),
    "fingerprint": str,
}
"""Types of an order's values."""
OTHERS_S = 60.0
"""Seconds that a slice waits for what others measure, before it gives its place to them."""
PATIENCE = 10
"""Times as long it waits since the last sign of life of others: a large matrix takes minutes."""
_LOCK_S = 600.0
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be merged, as a small file that any process can go by.

    Args:
        recipe: path of the recipe.
        folder: that relative paths start from.
        fingerprint: of the plan that was made; another one is refused.
    """

    recipe: str
    out: str
    folder: str
    memory_bytes: int
    threads: int | None
    device: str
    patience_minutes: float
    s3: tuple[tuple[str, str, str], ...]
    fingerprint: str

    @property
    def settings(self) -> Settings:
        """Of stores."""
        return Settings(self.patience_minutes, self.s3)


def save_order(path: str, ready: Prepared, recipe: str, threads: int | None) -> None:
    """Write the order for a plan.

    Raises:
        UsageError: for a place that cannot be written.
    """
    out = ready.plan.out
    order = Order(
        recipe=str(Path(recipe).absolute()),
        out=out if is_remote(out) else str(Path(out).expanduser().absolute()),
        folder=str(Path.cwd()),
        memory_bytes=ready.plan.memory_bytes,
        threads=threads,
        device=ready.plan.device,
        patience_minutes=ready.stores.settings.patience_minutes,
        s3=ready.stores.settings.s3,
        fingerprint=fingerprint(ready.plan.identity),
    )
    text = json.dumps({"shardmerge order": 1, **dataclasses.asdict(order)}, indent=1)
    try:
        Path(path).write_text(text + "\n")
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror}") from problem


def load_order(path: str) -> Order:
    """The order in a file that ``shardmerge plan --save`` has written.

    Raises:
        UsageError: for any other file.
    """
    try:
        values = json.loads(Path(path).read_text())
        if values.pop("shardmerge order") != 1:
            raise ValueError("another version's")
        values["s3"] = tuple((str(a), str(b), str(c)) for a, b, c in values["s3"])
        order = Order(**values)
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(order, name), kinds):
                raise ValueError(f"{name} is {getattr(order, name)!r}")
        return order
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise UsageError(
            f"{path} cannot be used as a plan ({reason}).\n"
            "  Make one with 'shardmerge plan RECIPE OUT --save FILE'."
        ) from problem


def _prepared(order: Order, stop: threading.Event) -> Prepared:
    """The plan of an order, made again.

    Raises:
        LedgerMismatchError: the recipe or a source is not what it was.
    """
    where = Where(
        executor="slurm-array",
        device=order.device,
        memory_bytes=order.memory_bytes,
        threads=order.threads,
    )
    ready = prepare(order.recipe, order.out, where, settings=order.settings, stop=stop)
    if fingerprint(ready.plan.identity) != order.fingerprint:
        raise LedgerMismatchError(
            f"{order.recipe} or a checkpoint that it names is not what it was when the plan was "
            "made, or this is another version of shardmerge.\n"
            "  Put it back, or make the plan again."
        )
    refuse_sources(ready.output, ready.sources)
    return ready


# --- which parts ----------------------------------------------------------------------------------


def share(shards: Sequence[Shard], count: int, *, whole_shards: bool) -> list[frozenset[PartKey]]:
    """The parts of each slice: about as many bytes for each, the largest given away first.

    Args:
        whole_shards: whether one slice writes all of a shard. Else units are given away, whose
            tensors are read once.
    Reference: Graham. Bounds on multiprocessing timing anomalies. 1969 (longest time first).
    """
    groups = [
        [part for unit in units for part in unit.parts]
        for shard in shards
        for units in ([shard.units] if whole_shards else [[unit] for unit in shard.units])
    ]
    sizes = sorted(((-sum(p.nbytes for p in group), n) for n, group in enumerate(groups)))
    slices: list[set[PartKey]] = [set() for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for size, group in sizes:
        load, number = heapq.heappop(loads)
        slices[number].update((part.shard, part.number) for part in groups[group])
        heapq.heappush(loads, (load - size, number))
    return [frozenset(parts) for parts in slices]


# --- one slice ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sliced:
    """What a slice has done.

    Args:
        parts: that are its own.
        nbytes: of them.
        already: whether the whole checkpoint was published before.
    """

    index: int
    count: int
    parts: int
    nbytes: int
    already: bool = False


def work_slice(
    order: Order,
    index: int,
    count: int,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Sliced:
    """Do slice ``index`` of ``count``, from where an earlier process of it stopped.

    Raises:
        Stopped: the run was stopped, or others have not measured their share yet; the same call
            goes on from there.
        ShardmergeError: as ``merge``.
    """
    stop = stop or threading.Event()
    ready = _prepared(order, stop)
    return _work(ready, index, count, progress or Quiet(), stop)


def _work(
    ready: Prepared, index: int, count: int, progress: Progress, stop: threading.Event
) -> Sliced:
    """Do a slice of a plan, and before of the one that has to be published first."""
    plan, output = ready.plan, ready.output
    name = f"{index}-of-{count}"
    own = share(plan.shards, count, whole_shards=output.whole_shards)[index]
    with ExitStack() as stack:
        with _turn(ready, stop):
            if ready.is_published():
                output.tidy()
                return Sliced(index, count, 0, 0, already=True)
            with staging(output, plan, ready.files, alone=False) as (main, _):
                # Before OUT's lock is given back, so that nobody publishes in between.
                stack.enter_context(output.locked(name))
        ledger = stack.enter_context(closing(Ledger(output.journal(name), plan.identity)))
        cleared = CLEARED in main.events
        found = output.survey(plan.shards, ledger.receipts, main.handles, cleared=cleared)
        ledger.forget(found.lost)
        ledger.decisions = {**main.decisions, **ledger.decisions}
        if ready.first is not None:
            _work(ready.first, index, count, progress, stop)
            _publish_first(ready.first, index, count, stop)
            give(ledger, decisions_after(ready))
        writer = stack.enter_context(closing(output.writer(plan.shards, main.handles)))
        workers = stack.enter_context(executors.start("local", plan, writer, ready.stores, output))
        _Agreement(ready, ledger, workers, index, count, stop).reach()
        execute(
            plan,
            workers,
            ledger,
            writer,
            progress=progress,
            stop=stop,
            parts=own - main.receipts.keys(),
        )
    nbytes = sum(p.nbytes for s in plan.shards for p in s.parts if (p.shard, p.number) in own)
    return Sliced(index, count, len(own), nbytes)


def _publish_first(first: Prepared, index: int, count: int, stop: threading.Event) -> None:
    """Publish what all slices have written of a first plan; whoever comes when all have does it.

    Raises:
        Stopped: another slice has not written its share, and nothing was written for long.
    """
    output = first.output
    output.write(_written(index, count), b"")
    until, before = 0.0, None
    while not first.is_published():
        missing = [n for n in range(count) if output.size(_written(n, count)) is None]
        if not missing:
            with contextlib.suppress(LockedError):  # another slice does it
                _publish(first)
                return
        journals = output.names(f"{STAGING}/")
        alive = [(name, output.size(f"{STAGING}/{name}")) for name in journals]
        if alive != before:
            until, before = time.monotonic() + PATIENCE * OTHERS_S, alive
        if time.monotonic() > until:
            told = ", ".join(f"{number}/{count}" for number in missing[:5])
            raise Stopped(
                f"all slices sum up first, and slices {told} have not.\n"
                "  Run all slices side by side, or this one again when they have."
            )
        if stop.wait(_POLL_S):
            raise Stopped("stopped while other slices summed up; run this one again.")


def _written(index: int, count: int) -> str:
    """Name of the file that says that a slice has written its share of a first plan."""
    return f"{STAGING}/written-{index}-of-{count}"


@contextmanager
def _turn(ready: Prepared, stop: threading.Event) -> Iterator[None]:
    """The lock of OUT, which every slice takes for a moment; one after the other."""
    with ExitStack() as stack:
        until = time.monotonic() + _LOCK_S
        while True:
            try:
                stack.enter_context(ready.output.locked())
                break
            except LockedError:
                if time.monotonic() > until:
                    raise
            if stop.wait(_POLL_S):
                raise Stopped("stopped while another slice began")
        yield


class _Agreement:
    """Decisions over the whole model, which every slice takes alike from the sums of all."""

    def __init__(
        self,
        ready: Prepared,
        ledger: Ledger,
        workers: Executor,
        index: int,
        count: int,
        stop: threading.Event,
    ) -> None:
        self._plan = ready.plan
        self._output = ready.output
        self._ledger = ledger
        self._workers = workers
        self._index, self._count = index, count
        self._stop = stop

    def reach(self) -> None:
        """Take every decision over the model.

        Raises:
            Stopped: a share of another slice is not there yet.
        """
        for scope in range(len(self._plan.tensors), len(self._plan.scopes)):
            self._decide(scope)

    def _decide(self, scope: int) -> None:
        method = self._plan.scopes[scope].method
        levels = levels_of(method)
        known: dict[str, Decision | None] = {
            step: None for step, over in levels.items() if over is None
        }
        measures = {
            step.name: step
            for step in info_of(method).passes[:-1]
            if step.kind is Kind.MEASURE and levels[step.name] is Over.MODEL
        }
        for step in info_of(method).passes[:-1]:
            if step.kind is not Kind.SETTLE or levels[step.name] is not Over.MODEL:
                continue
            key = self._plan.scopes[scope].decision(step.name)
            if key not in self._ledger.decisions:
                wanted = [measures[need] for need in step.needs if need in measures]
                summaries = {need.name: self._summary(scope, need) for need in wanted}
                self._ledger.record(decisions={key: settle(method, step, summaries, known)})
            known[step.name] = self._ledger.decisions[key]

    def _summary(self, scope: int, step: Pass) -> Summary:
        """What a pass has measured over the model: the sum of all slices' shares."""
        if self._output.size(self._file(scope, step, self._index)) is None:
            tasks = [
                task
                for task in self._plan.tasks
                if isinstance(task, MeasureTask) and (task.scope, task.step) == (scope, step.name)
            ][self._index :: self._count]
            own = measure(
                tasks,
                self._workers,
                self._ledger.decisions,
                ended=lambda done: self._ledger.record(tasks=[record_of(self._plan, done)]),
                stop=self._stop,
            )
            self._output.write(self._file(scope, step, self._index), own.dumped())
        self._wait(scope, step)
        total = Summing()
        for number in range(self._count):
            total.take(self._output.read(self._file(scope, step, number)))
        return total.summary()

    def _wait(self, scope: int, step: Pass) -> None:
        """Wait until every slice has left what it measured."""
        until = time.monotonic() + OTHERS_S
        while missing := [
            number
            for number in range(self._count)
            if self._output.size(self._file(scope, step, number)) is None
        ]:
            if self._stop.wait(_POLL_S) or time.monotonic() > until:
                told = ", ".join(f"{number}/{self._count}" for number in missing[:5])
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                raise Stopped(
                    f"the whole model is measured first ('{step.name}'), and slices {told}{more} "
                    "have not measured their share yet.\n"
                    "  Run all slices side by side, or this one again when they have."
                )

    def _file(self, scope: int, step: Pass, number: int) -> str:
        model_scope = scope - len(self._plan.tensors)
        return f"{STAGING}/sum-{model_scope}-{step.name}-{number}-of-{self._count}.npz"


# --- the last step --------------------------------------------------------------------------------


def publish_slices(order: Order, *, stop: threading.Event | None = None) -> Published:
    """Check that every part is there, and publish.

    Raises:
        PartsMissingError: parts are missing.
        LockedError: a slice is at work.
    """
    return _publish(_prepared(order, stop or threading.Event()))


def _publish(ready: Prepared) -> Published:
    plan, output = ready.plan, ready.output
    if ready.is_published():
        sweep(output)
        return ready.published(already=True)
    with output.locked(), staging(output, plan, ready.files) as (ledger, _):
        parts = [part for shard in plan.shards for part in shard.parts]
        missing = [p for p in parts if (p.shard, p.number) not in ledger.receipts]
        if missing:
            first = plan.shards[missing[0].shard].name
            raise PartsMissingError(
                f"{output.url}: {len(missing)} of {counted(len(parts), 'part')} are not written, "
                f"the first is part {missing[0].number} of {first}; nothing was published.\n"
                "  Run the slices that have not ended again, then this command."
            )
        finish(ready, ledger)
    return ready.published(already=False)
