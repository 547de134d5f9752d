"""Tasks on a Ray cluster.

Workers get tasks, and of the plan what these need; they read sources and write parts themselves,
and give back receipts. No tensor passes through Ray. CPU workers are Ray tasks; a GPU belongs to
one actor, because a context and pinned buffers take seconds to make.

Ray itself repeats nothing (``max_retries=0``): which attempt runs where is decided here, so that a
unit that kills its workers is told by name after a few, and a second attempt avoids the node of the
first.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
)

from shardmerge.errors import ClusterError, UsageError
from shardmerge.excerpt import excerpt
from shardmerge.executors.node import Failed, Job
from shardmerge.executors.placement import Need, Pace, Place, Placement, Unit
from shardmerge.executors.ray_cluster import EXAMINE_S, Nodes, connect, pinned
from shardmerge.executors.ray_worker import TELL_S, Call, HolderActor, WatchActor, run_unit
from shardmerge.kernels.device import CUDA
from shardmerge.memory import LOCAL_WORKERS, REMOTE_WORKERS, inputs_of
from shardmerge.outputs.api import Output, ShardWriter
from shardmerge.plan import MeasureTask, Plan, Task, pieces_of
from shardmerge.progress import counted
from shardmerge.runs import Decided
from shardmerge.stores import Stores
from shardmerge.stores.api import scheme_of
from shardmerge.work import Done

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Times that a unit is begun before it is held to be what kills its workers."""
DRAIN_S = 60.0
"""Seconds that units which run are given to end when the run is stopped."""
LEARN_S = 10.0
"""Seconds that workers are given, then, to tell what they run."""
QUIET_S = 60.0
"""Seconds without a unit that ends after which the user is told what is going on."""
_CARE_S = 1.0
_ADVICE = "Run the same command again to go on from there."


@dataclass(frozen=True, slots=True)
class _Attempt:
    unit: Unit
    number: int
    place: Place


@dataclass(slots=True)
class _Flight:
    """A unit that has not ended.

    Args:
        tried: attempts that were begun.
        lost: of these, ended with their workers.
        running: references of those that have neither ended nor been lost, by number.
    """

    unit: Unit
    tried: int = 0
    lost: int = 0
    running: dict[int, Any] = field(default_factory=dict)


class RayExecutor:
    """Workers of a cluster.

    Args:
        address: of a cluster that runs; None for one that ends with the run.
        gpus: of each worker on CUDA; less than 1 for a part of one.
    Raises:
        UsageError: there is no cluster at ``address``, or a source is only in this process.
        ClusterError: its nodes cannot work for this plan.
    """

    def __init__(
        self,
        plan: Plan,
        writer: ShardWriter,
        stores: Stores,
        output: Output,
        *,
        address: str | None = None,
        gpus: float = 1.0,
    ) -> None:
        _refuse_memory(plan)
        self._plan = plan
        self._need = need_of(plan, gpus)
        self._leaves = connect(address)
        self._run = uuid.uuid4().hex
        self._placement = Placement(whole_shards=output.whole_shards)
        self._pace = Pace(plan.read_bytes + plan.output_bytes)
        self._flights: dict[int, _Flight] = {}
        self._attempts: dict[Any, _Attempt] = {}
        self._ended: deque[Done | BaseException] = deque()
        self._holders: dict[str, Any] = {}
        self._runners: dict[str, Any] = {}
        self._ages: dict[tuple[int, int], float] = {}
        self._asked: Any = None
        self._over: list[tuple[int, int]] = []
        self._stopped = False
        self._cared = self._moved = time.monotonic()
        try:
            self._job = [ray.put(Job.of(plan, stores, writer))]
            self._watch = WatchActor.options(name=self._run).remote()
            self._asked = self._watch.ages.remote(self._over)
            self._nodes = Nodes(self._need, self._job, output)
            self._nodes.examine_all()
            ray.wait([self._asked], timeout=EXAMINE_S)  # it has started: from now on it hears all
            self._set_places()
        except BaseException:
            self._leave()
            raise

    # --- what the engine calls ------------------------------------------------------------------

    def has_room(self) -> bool:
        """Whether the line of tasks is short."""
        return self._placement.has_room()

    def submit(self, task: Task, decided: Decided) -> None:
        """Put a task in line; it is sent with others when a node has room."""
        if not self._stopped:
            self._placement.add(task, decided, self._shard_of(task))

    def next_done(self, timeout_s: float) -> Done | None:
        """The next task that ended; None after ``timeout_s`` without one. Raises a task's error."""
        if not self._ended:
            try:
                self._launch()
                self._wait(timeout_s)
                self._care()
            except (RayError, ConnectionError) as problem:
                raise ClusterError(f"the Ray cluster is gone: {problem}\n  {_ADVICE}") from problem
        if not self._ended:
            return None
        done = self._ended.popleft()
        if isinstance(done, BaseException):
            raise done
        return done

    def stop(self) -> None:
        """Forget what waits, let what runs end, and wait for it."""
        if self._stopped:
            return
        self._stopped = True
        self._placement.clear()
        with contextlib.suppress(RayError, ConnectionError):
            self._drain()
        self._attempts.clear()
        self._flights.clear()

    def _drain(self) -> None:
        """Let units that have begun end, for a while; the others are not begun."""
        self._nodes.forget()
        with contextlib.suppress(RayError):
            self._learn()
        for ref, attempt in list(self._attempts.items()):
            if not self._has_begun(attempt):
                self._cancel(ref, attempt, force=False)
        until = time.monotonic() + DRAIN_S
        while self._attempts and time.monotonic() < until:
            self._wait(1.0)
        for ref, attempt in list(self._attempts.items()):
            self._cancel(ref, attempt, force=True)
        if self._attempts:
            ray.wait(list(self._attempts), num_returns=len(self._attempts), timeout=10)

    def _learn(self) -> None:
        """Wait until workers have told what they run, for a while: some may not have started."""
        until = time.monotonic() + LEARN_S
        while self._attempts and time.monotonic() < until:
            self._wait(TELL_S)
            self._ages = ray.get(self._watch.ages.remote(self._over), timeout=LEARN_S)
            given = Counter(attempt.place for attempt in self._attempts.values())
            running = sum(min(count, place.slots) for place, count in given.items())
            if sum(map(self._has_begun, self._attempts.values())) >= running:
                return

    def _has_begun(self, attempt: _Attempt) -> bool:
        return (attempt.unit.number, attempt.number) in self._ages

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            self._leave()

    def _leave(self) -> None:
        for holder in self._holders.values():
            with contextlib.suppress(RayError, ConnectionError):
                ray.kill(holder)
        if self._leaves:
            ray.shutdown()

    # --- sending units --------------------------------------------------------------------------

    def _shard_of(self, task: Task) -> int | None:
        """The shard that a task writes, or that its one tensor is in: their bytes are cached."""
        if not isinstance(task, MeasureTask):
            return task.parts[0].shard
        tensors = {piece.tensor for piece in task.pieces}
        return self._plan.outputs.shard_of[tensors.pop()] if len(tensors) == 1 else None

    def _set_places(self) -> None:
        places = []
        for node in self._nodes.working:
            slots = self._need.slots(node)
            if not self._need.gpus:
                places.append(Place(node.key, node.key, slots))
                continue
            for number in range(slots):
                key = f"{node.key}/{number}"
                if key not in self._holders:
                    self._holders[key] = self._hold(node.key)
                places.append(Place(key, node.key, self._plan.workers))
        self._placement.set_places(places)

    def _hold(self, node: str) -> Any:
        """Take a GPU of a node for as long as the run lasts."""
        return HolderActor.options(
            num_cpus=self._need.cpus,
            num_gpus=self._need.gpus,
            memory=self._need.memory_bytes,
            max_concurrency=self._plan.workers,
            scheduling_strategy=pinned(node),
        ).remote()

    def _launch(self) -> None:
        while (found := self._placement.take()) is not None:
            place, unit = found
            self._flights[unit.number] = _Flight(unit)
            self._send(place, unit)

    def _send(self, place: Place, unit: Unit) -> None:
        flight = self._flights[unit.number]
        flight.tried += 1
        part = excerpt(self._plan, [number for number, _ in unit.tasks])
        ref = self._runner(place).remote(Call(self._run, self._job, unit, part, flight.tried))
        flight.running[flight.tried] = ref
        self._attempts[ref] = _Attempt(unit, flight.tried, place)

    def _runner(self, place: Place) -> Any:
        """What runs a unit there."""
        if place.key in self._holders:
            return self._holders[place.key].run
        if place.node not in self._runners:  # a tenth of a millisecond to make
            self._runners[place.node] = run_unit.options(
                name="shardmerge unit",
                num_cpus=self._need.cpus,
                memory=self._need.memory_bytes,
                scheduling_strategy=pinned(place.node),
            )
        return self._runners[place.node]

    # --- what comes back ------------------------------------------------------------------------

    def _wait(self, timeout_s: float) -> None:
        """Take what ended."""
        if not self._attempts:
            time.sleep(min(timeout_s, 0.05))
            return
        waiting = list(self._attempts)
        ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if ready:  # all of them, since each call looks at the whole window
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for ref in ready:
            attempt = self._attempts.pop(ref)
            self._placement.ended(attempt.place, attempt.unit)
            self._take(ref, attempt)

    def _take(self, ref: Any, attempt: _Attempt) -> None:
        flight = self._flights.get(attempt.unit.number)
        if flight is None:
            return  # another attempt was first
        flight.running.pop(attempt.number, None)
        try:
            ended: list[Done | Failed] = ray.get(ref)
        except RayTaskError as problem:
            self._fail(flight, problem.cause or problem)
        except RayError as problem:
            if not self._stopped:  # else it was cancelled
                self._lose(flight, attempt, problem)
        else:
            # Where one failed and another runs, its node may be at fault: the other decides.
            if not (flight.running and any(isinstance(done, Failed) for done in ended)):
                self._win(flight, attempt, ended)

    def _win(self, flight: _Flight, attempt: _Attempt, ended: Sequence[Done | Failed]) -> None:
        """The first attempt of a unit to end; others are not needed any more."""
        self._end(flight)
        times = [done.ran for done in ended if isinstance(done, Done)]
        if len(times) == len(ended):
            self._pace.ended(attempt.unit.nbytes, times[-1].ended - times[0].began)
        self._ended.extend(done.error if isinstance(done, Failed) else done for done in ended)

    def _fail(self, flight: _Flight, error: BaseException) -> None:
        """Every task of a unit ends, in the same error."""
        self._end(flight)
        self._ended.extend([error] * len(flight.unit.tasks))

    def _end(self, flight: _Flight) -> None:
        self._moved = time.monotonic()
        del self._flights[flight.unit.number]
        for ref in flight.running.values():
            self._cancel(ref, self._attempts[ref], force=True)
        self._over += [(flight.unit.number, number + 1) for number in range(flight.tried)]

    def _cancel(self, ref: Any, attempt: _Attempt, *, force: bool) -> None:
        # An actor's call that runs cannot be ended without its process; it writes the same bytes.
        with contextlib.suppress(RayError, ValueError):
            ray.cancel(ref, force=force and attempt.place.key not in self._holders)

    def _lose(self, flight: _Flight, attempt: _Attempt, problem: RayError) -> None:
        """A worker died, or its node: begin the unit again, a few times."""
        if isinstance(problem, NodeDiedError | TaskUnschedulableError):
            self._nodes.lost(attempt.place.node)
            self._set_places()
        if flight.running:
            return
        where = self._nodes.name(attempt.place.node)
        if not isinstance(problem, TaskUnschedulableError):  # else it has not begun at all
            flight.lost += 1
        if flight.lost >= ATTEMPTS:
            self._fail(flight, self._given_up(flight, where, problem))
            return
        place = self._placement.again(attempt.unit, avoid=attempt.place.node)
        if place is None:
            self._fail(flight, ClusterError(f"every node of the cluster is gone. {_ADVICE}"))
            return
        log.warning(
            "%s on %s was lost (%s); attempt %d on %s",
            self._name(flight.unit),
            where,
            type(problem).__name__,
            flight.tried + 1,
            self._nodes.name(place.node),
        )
        self._send(place, attempt.unit)

    def _given_up(self, flight: _Flight, where: str, problem: RayError) -> ClusterError:
        needed = f"{self._need.memory_bytes / 2**30:.2f} GiB"
        reason = (str(problem).strip() or "no reason given").splitlines()[0]
        if isinstance(problem, OutOfMemoryError):
            advice = (
                f"Its node had no memory left; a worker may take {needed}. Give a smaller "
                "--memory, or nodes that nothing else uses."
            )
        else:
            advice = f"Look for what kills processes there; a worker may take {needed}. {_ADVICE}"
        return ClusterError(
            f"{self._name(flight.unit)} has lost its worker {counted(flight.lost, 'time')}, "
            f"at last on {where}: {type(problem).__name__}: {reason}\n  {advice}"
        )

    def _name(self, unit: Unit) -> str:
        pieces = pieces_of(self._plan.tasks[unit.tasks[0][0]])
        what = self._plan.tensors[pieces[0].tensor].name if pieces else "a header"
        others = f" and {counted(len(unit.tasks) - 1, 'other task')}" if unit.tasks[1:] else ""
        return f"the unit of {what}{others}"

    # --- looking after it -----------------------------------------------------------------------

    def _care(self) -> None:
        """From time to time: who is there, who is late, does anything move at all."""
        now = time.monotonic()
        if now - self._cared < _CARE_S:
            return
        self._cared = now
        self._hear()
        if self._nodes.look():
            self._set_places()
        self._help_late()
        if now - self._moved >= QUIET_S and (self._attempts or self._placement.waiting):
            self._moved = now
            log.warning("%s", self._standstill())

    def _hear(self) -> None:
        """When units began, as far as it is known by now."""
        if self._asked is not None:
            if not ray.wait([self._asked], timeout=0)[0]:
                return
            with contextlib.suppress(RayError):
                self._ages = ray.get(self._asked)
        self._asked = self._watch.ages.remote(self._over)
        self._over = []

    def _help_late(self) -> None:
        """A second attempt for a unit that is far behind, where a slot is free."""
        if self._placement.waiting:
            return
        for flight in list(self._flights.values()):
            unit = flight.unit
            if flight.tried != 1 or not flight.running:
                continue
            attempt = self._attempts[flight.running[1]]
            age_s = self._ages.get((unit.number, 1), 0.0)
            if (
                not self._placement.is_idle(but=attempt.place.node, unit=unit)
                or not self._pace.is_late(unit.nbytes, age_s)
                or not self._pace.allows(unit.nbytes)
            ):
                continue
            place = self._placement.again(unit, avoid=attempt.place.node)
            if place is not None:
                self._pace.spent_bytes += unit.nbytes
                log.warning(
                    "%s runs for %.0f s on %s; a second attempt is begun on %s",
                    self._name(unit),
                    age_s,
                    self._nodes.name(attempt.place.node),
                    self._nodes.name(place.node),
                )
                self._send(place, unit)

    def _standstill(self) -> str:
        """What to tell when nothing has ended for long."""
        begun = [
            f"  {self._name(attempt.unit)} on {self._nodes.name(attempt.place.node)}"
            for attempt in self._attempts.values()
            if self._has_begun(attempt)
        ]
        lines = [f"no task has ended for {QUIET_S:.0f} s; {counted(len(begun), 'unit')} running"]
        lines += begun[:5]
        if len(begun) < len(self._attempts):
            free = ray.available_resources()
            lines.append(
                f"  {counted(len(self._attempts) - len(begun), 'unit')} not begun: a worker takes "
                f"{self._need}; free in the cluster are {free.get('CPU', 0):g} CPU, "
                f"{free.get('memory', 0) / 2**30:.2f} GiB. Do other jobs hold the rest?"
            )
        return "\n".join(lines)


def need_of(plan: Plan, gpus: float) -> Need:
    """What one worker of a plan takes."""
    if plan.device == CUDA:
        return Need(cpus=float(plan.kernels), memory_bytes=plan.peak_bytes, gpus=gpus)
    # Several to a CPU, so that some read and write while others compute.
    each = REMOTE_WORKERS if plan.networked else LOCAL_WORKERS
    return Need(cpus=1.0 / each, memory_bytes=plan.peak_bytes)


def _refuse_memory(plan: Plan) -> None:
    for tensor in plan.tensors:
        for ref in inputs_of(tensor):
            for segment in ref.all_segments:
                if scheme_of(segment.url) == "memory":
                    raise UsageError(
                        f"{segment.url} is in the memory of one process, which the workers of a "
                        "cluster cannot read. Use --executor local."
                    )
