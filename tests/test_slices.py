"""A merge in slices: each a process that knows of no other."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmerge import slices
from shardmerge.cli import main
from shardmerge.errors import (
    LedgerMismatchError,
    LockedError,
    OutputError,
    PartsMissingError,
    Stopped,
    UsageError,
)
from shardmerge.layout import Spec, lay_out
from shardmerge.merge import merge
from shardmerge.numerics import DType
from shardmerge.outputs.local import LocalOutput
from shardmerge.prepare import Where, prepare
from shardmerge.report import read_records
from shardmerge.slices import load_order, publish_slices, save_order, share, work_slice
from shardmerge.stores import Stores
from shardmerge.summaries import Summing
from tests import support
from tests.support import (
    SEVERAL_DTYPES,
    digests,
    recipe_of,
    tree,
    visible,
    write_checkpoint,
    write_recipe,
)

MEMORY_BYTES = 2**30
TIES = {"weight": 1.0, "density": 0.5}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    support.shrink(monkeypatch.setattr)
    monkeypatch.setattr(slices, "_POLL_S", 0.01)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def models(tmp_path) -> list[Path]:
    return [
        write_checkpoint(tmp_path / f"m{i}", SEVERAL_DTYPES, seed=i, shards=3) for i in (0, 1, 2)
    ]


def recipe(models: Sequence[Path], **settings: Any) -> str:
    base, *others = models
    values = {**recipe_of("ties", base, dict.fromkeys(others, TIES)), **settings}
    return write_recipe(base.parent / "r.yml", values)


def order_of(path: str, out: Path | str) -> slices.Order:
    ready = prepare(path, str(out), Where(memory_bytes=MEMORY_BYTES, threads=2))
    save_order("plan.json", ready, path, 2)
    return load_order("plan.json")


def in_turns(order: slices.Order, count: int) -> list[int]:
    """One slice after the other, again and again, until all are done; gives how often each ran."""
    left = dict.fromkeys(range(count), 0)
    runs = []
    while left:
        for index in list(left):
            left[index] += 1
            assert left[index] < 10
            try:
                work_slice(order, index, count)
            except Stopped:
                continue
            runs.append(left.pop(index))
    return runs


# --- which parts ----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(1, 9),
    st.booleans(),
)
def test_slices_share_every_part_once(tensors, count, whole_shards):
    specs = [Spec(f"t{i}", DType.BF16, (n,)) for i, (n, _) in enumerate(tensors)]
    shards = lay_out(specs, sorted(shard for _, shard in tensors), None)
    found = share(shards, count, whole_shards=whole_shards)
    assert len(found) == count
    every = sorted((p.shard, p.number) for s in shards for p in s.parts)
    assert sorted(part for parts in found for part in parts) == every
    groups = (
        [s.parts for s in shards] if whole_shards else [u.parts for s in shards for u in s.units]
    )
    for group in groups:
        keys = {(p.shard, p.number) for p in group}
        assert sum(bool(keys & parts) for parts in found) == 1
    size = {(p.shard, p.number): p.nbytes for s in shards for p in s.parts}
    loads = [sum(size[part] for part in parts) for parts in found]
    largest = max(sum(p.nbytes for p in group) for group in groups)
    assert max(loads) <= sum(loads) / count + largest


def test_sums_go_from_process_to_process():
    rng = np.random.default_rng(0)
    for terms in (rng.standard_normal((9, 3)) * 10.0 ** rng.integers(-300, 300, (9, 3)),):
        whole, shared = Summing(), Summing()
        whole.add(terms)
        for rows in (terms[:4], terms[4:]):
            one = Summing()
            one.add(rows)
            shared.take(one.dumped())
        shared.take(Summing().dumped())  # of a slice that had nothing to measure
        assert shared.summary() == whole.summary()
    special = Summing()
    special.add(np.array([[np.nan, np.inf, 1.0]]))
    again = Summing()
    again.take(special.dumped())
    assert list(map(str, again.summary())) == ["nan", "inf", "1.0"]
    counts = rng.integers(0, 5, (2, 65536))
    summing = Summing()
    for _ in range(2):
        one = Summing()
        one.add(counts.copy())
        summing.take(one.dumped())
    assert np.array_equal(summing.summary(), 2 * counts)


# --- merges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_slices_give_the_bytes_of_one_run(models, count):
    path = recipe(models)
    merge(path, "local")
    order = order_of(path, "out")
    assert in_turns(order, count) == [1] * count
    published = publish_slices(order)
    assert not published.already
    assert tree(Path("out")) == tree(Path("local"))
    assert len(read_records("out", Stores())) >= len(read_records("local", Stores()))
    assert publish_slices(order).already
    assert work_slice(order, 0, count).already


@pytest.mark.parametrize("count", [2, 3])
def test_what_is_measured_over_the_model_is_shared(models, count, monkeypatch):
    monkeypatch.setattr(slices, "OTHERS_S", 0.0)
    path = recipe(models, parameters={"trim": "model"})
    merge(path, "local")
    order = order_of(path, "out")
    runs = in_turns(order, count)
    assert max(runs) > 1  # the first could not know what the last would measure
    publish_slices(order)
    assert digests(Path("out")) == digests(Path("local"))
    plan = support.plan_of(path, "out", memory_bytes=MEMORY_BYTES, threads=2)
    rows = read_records("out", Stores())
    assert {row.task for row in rows} == {task.number for task in plan.tasks}


def side_by_side(order: slices.Order, count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda index: work_slice(order, index, count), range(count)))


def test_slices_side_by_side_wait_for_each_other(models):
    path = recipe(models, parameters={"trim": "model"})
    merge(path, "local")
    order = order_of(path, "out")
    side_by_side(order, 3)
    publish_slices(order)
    assert digests(Path("out")) == digests(Path("local"))


def matrices(models: Sequence[Path]) -> str:
    """A method whose sum is made and published before anything else."""
    base, *others = models
    values = {
        "merge_method": "opcm",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in others],
    }
    return write_recipe(base.parent / "opcm.yml", values)


def test_a_sum_is_made_by_all_slices_first(models):
    path = matrices(models)
    merge(path, "local", memory_bytes=MEMORY_BYTES, threads=2)
    order = order_of(path, "out")
    side_by_side(order, 3)
    publish_slices(order)
    assert tree(Path("out")) == tree(Path("local"))


def test_slices_of_a_sum_in_turns(models, monkeypatch):
    monkeypatch.setattr(slices, "OTHERS_S", 0.0)
    path = matrices(models)
    merge(path, "local", memory_bytes=MEMORY_BYTES, threads=2)
    order = order_of(path, "out")
    with pytest.raises(PartsMissingError):
        publish_slices(order)
    assert max(in_turns(order, 2)) > 1
    publish_slices(order)
    assert digests(Path("out")) == digests(Path("local"))


def test_sums_over_the_model(tmp_path, models):
    """Fisher's normalisation adds floats up, in blocks and exactly."""
    weights = [
        write_checkpoint(tmp_path / f"f{i}", SEVERAL_DTYPES, seed=9 + i, shards=2, positive=True)
        for i in range(3)
    ]
    inputs = [
        {"model": str(model), "fisher": str(fisher)}
        for model, fisher in zip(models, weights, strict=True)
    ]
    path = write_recipe(tmp_path / "r.yml", {"merge_method": "fisher", "models": inputs})
    merge(path, "local")
    order = order_of(path, "out")
    side_by_side(order, 2)
    publish_slices(order)
    assert digests(Path("out")) == digests(Path("local"))


class Stops(support.Quiet):
    """Stops the run after some tasks."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def task(self, done: Any, task: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1])
def test_a_slice_that_was_stopped_goes_on(models, after):
    path = recipe(models)
    merge(path, "local")
    order = order_of(path, "out")
    with pytest.raises(KeyboardInterrupt):
        work_slice(order, 0, 2, progress=Stops(after))
    with pytest.raises(OutputError, match=r"parts are not written.*nothing was published"):
        publish_slices(order)
    in_turns(order, 2)
    publish_slices(order)
    assert tree(Path("out")) == tree(Path("local"))


def test_what_somebody_removed_is_written_again(models):
    path = recipe(models)
    merge(path, "local")
    order = order_of(path, "out")
    in_turns(order, 2)
    next(Path("out/.shardmerge").glob("*.part")).unlink()
    with pytest.raises(OutputError, match="parts are not written"):
        publish_slices(order)
    in_turns(order, 2)
    publish_slices(order)
    assert tree(Path("out")) == tree(Path("local"))


def test_another_run_goes_on_from_what_slices_have_written(models):
    path = recipe(models)
    merge(path, "local")
    order = order_of(path, "out")
    done = work_slice(order, 1, 2)
    written = []

    class Counts(support.Quiet):
        def task(self, done: Any, task: Any) -> None:
            written.extend(receipt.key for receipt in done.receipts)

    merge(path, "out", memory_bytes=MEMORY_BYTES, threads=2, progress=Counts())
    assert tree(Path("out")) == tree(Path("local"))
    plan = support.plan_of(path, "out", memory_bytes=MEMORY_BYTES, threads=2)
    parts = [part for shard in plan.shards for part in shard.parts]
    assert len(parts) - done.parts <= len(written) < len(parts)


# --- what is refused ------------------------------------------------------------------------------


def test_nobody_publishes_while_a_slice_is_at_work(models):
    path = recipe(models)
    order = order_of(path, "out")
    work_slice(order, 0, 2)
    before = tree(Path("out"))
    with LocalOutput(Path("out")).locked("0-of-2"):
        with pytest.raises(LockedError):
            publish_slices(order)
        with pytest.raises(LockedError):
            merge(path, "out")
        with pytest.raises(LockedError):
            merge(path, "out", fresh=True)
        with pytest.raises(LockedError):
            work_slice(order, 0, 2)
        work_slice(order, 1, 2)
    assert before.keys() <= tree(Path("out")).keys()
    assert not visible(Path("out"))
    publish_slices(order)


@pytest.mark.parametrize("change", ["recipe", "model"])
def test_a_plan_of_something_else(models, change):
    path = recipe(models)
    order = order_of(path, "out")
    if change == "recipe":
        recipe(models, seed=7)
    else:
        write_checkpoint(models[1], SEVERAL_DTYPES, seed=99, shards=3)
    with pytest.raises(LedgerMismatchError, match="not what it was when the plan was made"):
        work_slice(order, 0, 2)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"shardmerge order": 2}', "a: b"])
def test_a_file_that_is_no_plan(text, tmp_path):
    Path("p").write_text(text)
    with pytest.raises(UsageError, match="cannot be used as a plan"):
        load_order("p")
    with pytest.raises(UsageError, match="cannot be used as a plan"):
        load_order("missing")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(slices.Order)])
def test_a_value_of_a_plan_that_was_changed(models, field):
    order_of(recipe(models), "out")
    values = json.loads(Path("plan.json").read_text())
    Path("plan.json").write_text(json.dumps({**values, field: {"x": 1}}))
    with pytest.raises(UsageError, match="cannot be used as a plan"):
        load_order("plan.json")


def test_on_the_command_line(models, capsys, monkeypatch):
    path = recipe(models)
    merge(path, "local")
    assert main(["plan", path, "--save", "p"]) == 2
    assert main(["plan", path, "out", "--save", "p", "--threads", "2"]) == 0
    assert "secret" not in Path("p").read_text()
    for text in ("2/2", "0", "x/2", "1/0"):
        with pytest.raises(SystemExit):
            main(["worker", "--plan", "p", "--slice", text])
    assert main(["worker", "--plan", "p", "--slice", "0/2"]) == 0
    assert main(["publish", "--plan", "p"]) == 1
    assert "not written" in capsys.readouterr().err
    assert main(["worker", "--plan", "p", "--slice", "1/2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["index"] == 1 and told["nbytes"] > 0
    assert main(["publish", "--plan", "p"]) == 0
    assert tree(Path("out")) == tree(Path("local"))


def test_from_and_to_s3(models, bucket, capsys):
    """Processes of their own, side by side, as an array runs them."""
    path = recipe(models)
    merge(path, "local")
    assert main(["plan", path, f"{bucket}/out", "--save", "p", "--threads", "1"]) == 0
    code = "import sys; from shardmerge.cli import main; sys.exit(main(sys.argv[1:]))"
    elements = [
        subprocess.Popen([sys.executable, "-c", code, "worker", "--plan", "p", "--slice", f"{i}/2"])
        for i in range(2)
    ]
    assert [element.wait(120) for element in elements] == [0, 0]
    assert main(["publish", "--plan", "p"]) == 0
    assert main(["verify", f"{bucket}/out"]) == 0
