"""Which tasks go together, where, and which of them are late. Pure: no Ray, no clock.

Tasks wait in line until a place has room. A place takes the tasks of one unit together: some 64 MiB
of reading and writing, so that what a task costs to send is small beside it. Places get work by the
bytes that they were given for each slot, so nodes of different sizes stay balanced, and a slow one,
which has room less often, gets less.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count

from shardmerge.errors import ClusterError
from shardmerge.plan import Task
from shardmerge.runs import Decided

UNIT_BYTES = 64 * 2**20
"""Bytes that a unit reads and writes, at least, where so many wait."""
UNIT_TASKS = 256
"""Tasks of a unit, at most."""
WINDOW_BYTES = 2**30
"""Bytes for each slot of a place up to which units wait there beside those that run."""
SMALL_UNITS = 8
"""Units for each slot of a place, and in line for it, while all of them together are less than one
should be. With two, Ray takes half as long again for each, as it keeps giving workers back."""


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere that runs units: a node, or a process that holds a GPU.

    Args:
        slots: units that it runs at a time.
    """

    key: str
    node: str
    slots: int


@dataclass(frozen=True)  # without slots: pickled three times as fast
class Unit:
    """Tasks that are run one after another by one worker.

    Args:
        tasks: numbers, and the decisions that each needs.
        nbytes: that they read and write.
        shards: that they belong to; none where any node will do.
    """

    number: int
    tasks: tuple[tuple[int, Decided], ...]
    nbytes: int
    shards: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Waiting:
    number: int
    decided: Decided
    nbytes: int


@dataclass(slots=True)
class _Load:
    """What a place was given.

    Args:
        units: that run or wait there.
        nbytes: of them.
        given: bytes of all units that it ever got.
    """

    place: Place
    units: int = 0
    nbytes: int = 0
    given: int = 0

    @property
    def has_room(self) -> bool:
        slots = self.place.slots
        if self.units < 2 * slots:
            return self.units < slots or self.nbytes < slots * WINDOW_BYTES
        return self.units < SMALL_UNITS * slots and self.nbytes < slots * UNIT_BYTES


def _given_per_slot(load: _Load) -> float:
    return load.given / load.place.slots


class Placement:
    """Tasks in line, and the places that they go to.

    Args:
        whole_shards: whether all tasks of a shard go to one node: where nodes write whole pages of
            a shared file system, two of them must not write to one file.
    """

    def __init__(self, *, whole_shards: bool) -> None:
        self._whole_shards = whole_shards
        self._loads: dict[str, _Load] = {}
        self._node_of: dict[int, str] = {}
        self._free: deque[_Waiting] = deque()
        self._of_shard: dict[int, deque[_Waiting]] = {}
        self._waiting = self._waiting_bytes = 0
        self._numbers = count()

    @property
    def slots(self) -> int:
        """Of all places."""
        return sum(load.place.slots for load in self._loads.values())

    @property
    def waiting(self) -> int:
        """Tasks in line."""
        return self._waiting

    def set_places(self, places: Iterable[Place]) -> None:
        """The places there are now. Shards of nodes that are gone go to others."""
        self._loads = {place.key: self._loads.get(place.key, _Load(place)) for place in places}
        nodes = {load.place.node for load in self._loads.values()}
        self._node_of = {shard: node for shard, node in self._node_of.items() if node in nodes}

    def has_room(self) -> bool:
        """Whether the line is short, a unit or two for each slot, or holds nothing for some place.

        Tasks come shard by shard, so that a long line may be all of one node's.
        """
        slots = max(1, self.slots)
        few = self._waiting < SMALL_UNITS * slots * UNIT_TASKS
        return (few and self._waiting_bytes < 2 * slots * UNIT_BYTES) or self._is_starving()

    def add(self, task: Task, decided: Decided, shard: int | None) -> None:
        """Put a task in line.

        Args:
            shard: that it writes to, or works for; None where any node will do.
        """
        waiting = _Waiting(task.number, decided, task.read_bytes + task.write_bytes)
        if self._whole_shards and shard is not None:
            self._of_shard.setdefault(shard, deque()).append(waiting)
        else:
            self._free.append(waiting)
        self._waiting += 1
        self._waiting_bytes += waiting.nbytes

    def take(self) -> tuple[Place, Unit] | None:
        """The next unit and its place; None where none waits, or no place has room."""
        for load in sorted(self._loads.values(), key=_given_per_slot):
            if load.has_room and (unit := self._unit_for(load.place.node)):
                self._give(load, unit)
                return load.place, unit
        return None

    def again(self, unit: Unit, *, avoid: str) -> Place | None:
        """Where a unit is tried once more: on another node than ``avoid`` if there is one."""
        nodes = {self._node_of.get(shard) for shard in unit.shards} - {None}
        able = [load for load in self._loads.values() if not nodes or load.place.node in nodes]
        others = [load for load in able if load.place.node != avoid]
        if not (others or able):
            return None
        load = min(others or able, key=lambda load: load.units / load.place.slots)
        for shard in unit.shards:
            self._node_of.setdefault(shard, load.place.node)
        self._give(load, unit)
        return load.place

    def is_idle(self, *, but: str, unit: Unit) -> bool:
        """Whether a slot is free where ``again`` would put a second attempt of a unit."""
        loads = list(self._loads.values())
        there = [load for load in loads if load.place.node == but]
        others = [load for load in loads if load.place.node != but]
        able = there if unit.shards else others or there
        return any(load.units < load.place.slots for load in able)

    def ended(self, place: Place, unit: Unit) -> None:
        """A unit ended there, however it did."""
        load = self._loads.get(place.key)
        if load is not None:
            load.units -= 1
            load.nbytes -= unit.nbytes

    def clear(self) -> None:
        """Nothing is in line any more."""
        self._free.clear()
        self._of_shard.clear()
        self._waiting = self._waiting_bytes = 0

    def _give(self, load: _Load, unit: Unit) -> None:
        load.units += 1
        load.nbytes += unit.nbytes
        load.given += unit.nbytes

    def _is_starving(self) -> bool:
        """Whether more nodes have room and no shard than there are shards in line for them."""
        if self._free:
            return False
        owners = {self._node_of.get(shard) for shard in self._of_shard}
        hungry = {load.place.node for load in self._loads.values() if load.has_room} - owners
        return len(hungry) > sum(shard not in self._node_of for shard in self._of_shard)

    def _unit_for(self, node: str) -> Unit | None:
        """The tasks of a unit for this node, first of shards that it has, then of a new one."""
        shard = next((s for s in self._of_shard if self._node_of.get(s) == node), None)
        if shard is None:
            shard = next((s for s in self._of_shard if s not in self._node_of), None)
        if shard is None:
            return self._unit(self._free, frozenset()) if self._free else None
        self._node_of[shard] = node
        unit = self._unit(self._of_shard[shard], frozenset([shard]))
        if not self._of_shard[shard]:
            del self._of_shard[shard]
        return unit

    def _unit(self, line: deque[_Waiting], shards: frozenset[int]) -> Unit:
        taken: list[_Waiting] = []
        nbytes = 0
        while line and nbytes < UNIT_BYTES and len(taken) < UNIT_TASKS:
            taken.append(line.popleft())
            nbytes += taken[-1].nbytes
        self._waiting -= len(taken)
        self._waiting_bytes -= nbytes
        tasks = tuple((item.number, item.decided) for item in taken)
        return Unit(next(self._numbers), tasks, nbytes, shards)


@dataclass(slots=True)
class Pace:
    """How fast units are, to know which is late (Dean and Ghemawat, MapReduce, OSDI 2004, 3.6).

    Args:
        all_bytes: of the run; second attempts take at most a fiftieth of them.
    """

    all_bytes: int
    seconds: list[float] = field(default_factory=list)
    seconds_per_byte: list[float] = field(default_factory=list)
    spent_bytes: int = 0

    def ended(self, nbytes: int, seconds: float) -> None:
        """A unit took so long."""
        self.seconds.append(seconds)
        self.seconds_per_byte.append(seconds / max(1, nbytes))

    def is_late(self, nbytes: int, age_s: float) -> bool:
        """Whether a unit that runs for ``age_s`` is far behind others of its size."""
        if len(self.seconds) < MEASURED_UNITS or age_s < LATE_S:
            return False
        usual = max(
            statistics.median(self.seconds), statistics.median(self.seconds_per_byte) * nbytes
        )
        return age_s > LATE_TIMES * usual

    def allows(self, nbytes: int) -> bool:
        """Whether a second attempt of so many bytes is within what they may take."""
        return self.spent_bytes == 0 or self.spent_bytes + nbytes <= self.all_bytes // 50


MEASURED_UNITS = 10
"""Units that must have ended before one can be called late."""
LATE_TIMES = 3.0
"""Times the median."""
LATE_S = 5.0
"""Seconds below which nothing is late."""


# --- what a cluster can do ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of a cluster, with all its resources, whoever uses them now."""

    key: str
    name: str
    cpus: float
    memory_bytes: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Need:
    """What one worker takes."""

    cpus: float
    memory_bytes: int
    gpus: float = 0.0

    def slots(self, node: Node) -> int:
        """Workers that fit on a node."""
        fits = [node.cpus / self.cpus, node.memory_bytes / self.memory_bytes]
        if self.gpus:
            fits.append(node.gpus / self.gpus)
        return int(min(fits) + 1e-6)

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus:g} CPU, {self.memory_bytes / 2**30:.2f} GiB of memory{gpus}"


def refuse_impossible(nodes: Iterable[Node], need: Need) -> None:
    """Refuse a cluster none of whose nodes can ever run a worker.

    Raises:
        ClusterError: with what each of them has.
    """
    nodes = list(nodes)
    if any(need.slots(node) for node in nodes):
        return
    listing = "\n".join(
        f"  {node.name}: {node.cpus:g} CPU, {node.memory_bytes / 2**30:.2f} GiB of memory, "
        f"{node.gpus:g} GPU"
        for node in nodes
    )
    raise ClusterError(
        f"no node of the cluster can ever run a worker, which takes {need}:\n{listing}\n"
        "  Give a smaller --memory, or add nodes that have so much "
        "(ray start --num-cpus=... --memory=BYTES)."
    )


def different_versions(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """What is not the same on another node, in words."""
    return [
        f"{name} {there.get(name, 'is missing')}, the driver has {version}"
        for name, version in here.items()
        if there.get(name) != version
    ]
