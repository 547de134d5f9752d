"""Which tasks go together, where, and which are late: decided on paper, without a cluster."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.errors import ClusterError
from shardmerge.executors.placement import (
    LATE_S,
    LATE_TIMES,
    MEASURED_UNITS,
    SMALL_UNITS,
    UNIT_BYTES,
    UNIT_TASKS,
    WINDOW_BYTES,
    Need,
    Node,
    Pace,
    Place,
    Placement,
    Unit,
    different_versions,
    refuse_impossible,
)
from shardmerge.plan import MergeTask

MIB = 2**20
TASKS = st.lists(st.tuples(st.integers(0, 300 * MIB), st.integers(0, 5)), min_size=1, max_size=60)
"""Bytes and shard of each task."""
SLOTS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def task(number: int, nbytes: int) -> MergeTask:
    return MergeTask(number, (), False, (), nbytes, 0, 0)


def placement_of(slots: list[int], *, whole_shards: bool) -> Placement:
    made = Placement(whole_shards=whole_shards)
    made.set_places([Place(f"n{i}", f"n{i}", count) for i, count in enumerate(slots)])
    return made


def drain(made: Placement, rng) -> list[tuple[Place, Unit]]:
    """Take and end units in any order until nothing waits."""
    running: list[tuple[Place, Unit]] = []
    every: list[tuple[Place, Unit]] = []
    while True:
        while (found := made.take()) is not None:
            running.append(found)
            every.append(found)
        if not running:
            return every
        place, unit = running.pop(rng.randrange(len(running)))
        made.ended(place, unit)


@given(TASKS, SLOTS, st.booleans(), st.randoms())
def test_every_task_is_placed_once(tasks, slots, whole_shards, rng):
    made = placement_of(slots, whole_shards=whole_shards)
    for number, (nbytes, shard) in enumerate(tasks):
        made.add(task(number, nbytes), {}, shard)
    assert made.waiting == len(tasks)
    every = drain(made, rng)
    placed = [number for _, unit in every for number, _ in unit.tasks]
    assert sorted(placed) == list(range(len(tasks)))
    assert made.waiting == 0
    for _, unit in every:
        assert unit.nbytes == sum(tasks[number][0] for number, _ in unit.tasks)
        assert len(unit.tasks) <= UNIT_TASKS
        # All but its last task were not enough by themselves.
        assert sum(tasks[number][0] for number, _ in unit.tasks[:-1]) < UNIT_BYTES


@given(TASKS, SLOTS, st.randoms())
def test_a_shard_belongs_to_one_node(tasks, slots, rng):
    made = placement_of(slots, whole_shards=True)
    for number, (nbytes, shard) in enumerate(tasks):
        made.add(task(number, nbytes), {}, shard)
    nodes: dict[int, set[str]] = {}
    for place, unit in drain(made, rng):
        for number, _ in unit.tasks:
            nodes.setdefault(tasks[number][1], set()).add(place.node)
    assert all(len(found) == 1 for found in nodes.values())


@given(TASKS, SLOTS, st.booleans())
def test_no_place_is_flooded(tasks, slots, whole_shards):
    made = placement_of(slots, whole_shards=whole_shards)
    for number, (nbytes, shard) in enumerate(tasks):
        made.add(task(number, nbytes), {}, shard)
    units: Counter[str] = Counter()
    nbytes_at: Counter[str] = Counter()
    while (found := made.take()) is not None:
        place, unit = found
        if units[place.key] >= 2 * place.slots:
            assert units[place.key] < SMALL_UNITS * place.slots
            assert nbytes_at[place.key] < place.slots * UNIT_BYTES
        elif units[place.key] >= place.slots:
            assert nbytes_at[place.key] < place.slots * WINDOW_BYTES
        units[place.key] += 1
        nbytes_at[place.key] += unit.nbytes


def test_bytes_are_balanced_by_slots():
    made = placement_of([2, 6], whole_shards=False)
    given_bytes: Counter[str] = Counter()
    running: deque[tuple[Place, Unit]] = deque()
    number = 0
    for _ in range(400):
        while made.has_room():
            made.add(task(number, 64 * MIB), {}, None)
            number += 1
        while (found := made.take()) is not None:
            running.append(found)
            given_bytes[found[0].node] += found[1].nbytes
        made.ended(*running.popleft())
    assert given_bytes["n1"] / given_bytes["n0"] == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("nodes", [2, 16])
def test_whole_shards_keep_every_node_busy(nodes):
    """Tasks come shard by shard, and a shard is one node's: the line must reach beyond it."""
    made = placement_of([16] * nodes, whole_shards=True)
    tasks = deque((shard, 320 * MIB) for shard in range(4 * nodes) for _ in range(80))
    running: deque[tuple[Place, Unit]] = deque()
    least = nodes
    while tasks or made.waiting:
        while tasks and made.has_room():
            shard, nbytes = tasks.popleft()
            made.add(task(len(tasks), nbytes), {}, shard)
        while (found := made.take()) is not None:
            running.append(found)
        if len(tasks) > nodes * 80:  # else there are fewer shards than nodes left
            least = min(least, len({place.node for place, _ in running}))
        made.ended(*running.popleft())
    assert least == nodes


def test_the_line_is_bounded_by_count_and_by_bytes():
    for nbytes in (0, 100 * MIB):
        made = placement_of([1, 1], whole_shards=False)
        count = 0
        while made.has_room():
            made.add(task(count, nbytes), {}, None)
            count += 1
        assert count == (2 * SMALL_UNITS * UNIT_TASKS if nbytes == 0 else 3)


def test_shards_of_a_node_that_is_gone_go_to_another():
    made = placement_of([1, 1], whole_shards=True)
    for number in range(8):
        made.add(task(number, UNIT_BYTES), {}, number % 2)
    first = made.take()
    second = made.take()
    assert first is not None and second is not None
    assert {first[0].node, second[0].node} == {"n0", "n1"}
    lost, unit = first
    made.set_places([second[0]])
    place = made.again(unit, avoid=lost.node)
    assert place == second[0]
    made.ended(lost, unit)  # the place is not there any more
    made.ended(second[0], unit)
    made.ended(*second)
    nodes = set()
    while (found := made.take()) is not None:
        nodes.add(found[0].node)
        made.ended(*found)
    assert nodes == {second[0].node}


def test_a_second_attempt_avoids_the_first_ones_node():
    made = placement_of([1, 1], whole_shards=False)
    made.add(task(0, MIB), {}, None)
    found = made.take()
    assert found is not None
    place, unit = found
    assert made.is_idle(but=place.node, unit=unit)
    other = made.again(unit, avoid=place.node)
    assert other is not None and other.node != place.node
    assert not made.is_idle(but=place.node, unit=unit)
    made.set_places([place])
    assert made.again(unit, avoid=place.node) == place
    made.set_places([])
    assert made.again(unit, avoid=place.node) is None


def test_late_is_far_behind_others_of_its_size():
    pace = Pace(all_bytes=10_000 * MIB)
    for _ in range(MEASURED_UNITS - 1):
        pace.ended(100 * MIB, 10.0)
    assert not pace.is_late(100 * MIB, 1e6)  # too few are known
    pace.ended(100 * MIB, 10.0)
    assert not pace.is_late(100 * MIB, LATE_TIMES * 10.0)
    assert pace.is_late(100 * MIB, LATE_TIMES * 10.0 + 0.1)
    assert not pace.is_late(200 * MIB, LATE_TIMES * 20.0)  # twice the bytes, twice the time
    assert not pace.is_late(1, LATE_TIMES * 10.0)  # small ones take as long as any to begin
    fast = Pace(all_bytes=1)
    for _ in range(MEASURED_UNITS):
        fast.ended(MIB, 0.001)
    assert not fast.is_late(MIB, LATE_S - 0.1)


def test_second_attempts_are_few():
    pace = Pace(all_bytes=100 * MIB)
    assert pace.allows(64 * MIB)  # the first
    pace.spent_bytes += 64 * MIB
    assert not pace.allows(1)
    large = Pace(all_bytes=10_000 * MIB, spent_bytes=100 * MIB)
    assert large.allows(100 * MIB)
    assert not large.allows(101 * MIB)


def test_a_cluster_is_refused_with_its_numbers():
    need = Need(cpus=0.5, memory_bytes=2**30)
    small = Node("a", "small", cpus=4, memory_bytes=2**29, gpus=0)
    head = Node("b", "head", cpus=0, memory_bytes=2**34, gpus=0)
    fits = Node("c", "fits", cpus=2, memory_bytes=2**34, gpus=0)
    assert [need.slots(node) for node in (small, head, fits)] == [0, 0, 4]
    assert Need(0.25, 2**30, gpus=0.5).slots(Node("d", "gpu", 8, 2**34, 1)) == 2
    refuse_impossible([small, fits], need)
    with pytest.raises(ClusterError) as told:
        refuse_impossible([small, head], need)
    for text in ("0.5 CPU, 1.00 GiB", "small: 4 CPU, 0.50 GiB", "head: 0 CPU", "--memory"):
        assert text in str(told.value)


def test_versions_are_compared_by_name():
    here = {"python": "3.11.7", "numpy": "2.4"}
    assert different_versions(here, {**here, "more": "1"}) == []
    assert different_versions(here, {"python": "3.11.8"}) == [
        "python 3.11.8, the driver has 3.11.7",
        "numpy is missing, the driver has 2.4",
    ]
