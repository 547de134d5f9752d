"""The ledger: what survives a torn line, and what it is bound to."""

from __future__ import annotations

import json
import math
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.errors import LedgerMismatchError, Stopped
from shardmerge.ledger import Ledger, fingerprint
from shardmerge.merge import merge
from shardmerge.outputs.api import STAGING, Receipt
from shardmerge.outputs.local import LEDGER_FILE as LEDGER
from shardmerge.outputs.local import LocalJournal
from shardmerge.progress import Quiet
from tests import support
from tests.support import HALVES, recipe_of, write_checkpoint, write_recipe

IDENTITY = {"recipe": "merge_method: linear\n", "source a": "model.safetensors 1-2-3"}


@pytest.fixture(autouse=True)
def small_engine(monkeypatch):
    support.shrink(monkeypatch.setattr)


def contents(ledger: Ledger) -> tuple[object, ...]:
    """Everything that a ledger knows, with every bit of the floats."""
    bits = {key: list(map(bits_of, values)) for key, values in ledger.decisions.items()}
    return dict(ledger.receipts), bits, dict(ledger.handles), dict(ledger.events)


def bits_of(value: float) -> bytes:
    return struct.pack("<d", math.nan if math.isnan(value) else value)


def reopened(path: Path) -> tuple[object, ...]:
    ledger = Ledger(LocalJournal(path), IDENTITY)
    ledger.close()
    return contents(ledger)


# --- records ------------------------------------------------------------------------------------

sizes = st.integers(0, 2**63 - 1)
receipts = st.builds(
    Receipt,
    shard=st.integers(0, 3),
    number=st.integers(0, 9),
    nbytes=sizes,
    crc32=st.integers(0, 2**32 - 1),
    non_finite=st.lists(st.tuples(sizes, st.integers(-1, 62)), max_size=3).map(tuple),
)
decisions = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1),
    st.lists(st.floats(), max_size=4).map(tuple),
    max_size=3,
)
names = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=3)
steps = st.one_of(
    st.tuples(st.just("record"), st.lists(receipts, max_size=4), decisions),
    st.tuples(st.just("mark"), st.sampled_from(["clearing", "cleared"]), names),
    st.tuples(st.just("forget"), st.sets(st.tuples(st.integers(0, 3), st.integers(0, 9)))),
    st.tuples(
        st.just("begin"), st.dictionaries(st.integers(0, 3), st.text(min_size=1)).map(dict.items)
    ),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=6), st.integers(0, 6))
def test_everything_survives_being_opened_again(tmp_path_factory, done, reopen):
    path = tmp_path_factory.mktemp("ledger") / LEDGER
    ledger = Ledger(LocalJournal(path), IDENTITY)
    for number, (name, *arguments) in enumerate(done):
        if number == reopen:
            ledger.close()
            ledger = Ledger(LocalJournal(path), IDENTITY)
        getattr(ledger, name)(*arguments)
    ledger.close()
    assert reopened(path) == contents(ledger)


def test_forgotten_shards_stay_forgotten_and_can_be_written_again(tmp_path):
    ledger = Ledger(LocalJournal(tmp_path / LEDGER), IDENTITY)
    ledger.record([Receipt(shard, 0, 10, 1) for shard in range(3)])
    ledger.forget({(0, 0), (2, 0), (3, 0)})
    ledger.record([Receipt(2, 0, 10, 7)])
    ledger.close()
    again = Ledger(LocalJournal(tmp_path / LEDGER), IDENTITY)
    again.close()
    assert again.receipts == {(1, 0): Receipt(1, 0, 10, 1), (2, 0): Receipt(2, 0, 10, 7)}


def test_a_ledger_is_new_until_something_was_done(tmp_path):
    for number, act in enumerate(
        (
            lambda ledger: ledger.record([Receipt(0, 0, 1, 1)]),
            lambda ledger: ledger.record((), {"key": (1.0,)}),
            lambda ledger: ledger.mark("cleared"),
        )
    ):
        path = tmp_path / str(number)
        ledger = Ledger(LocalJournal(path), IDENTITY)
        ledger.record()
        ledger.forget({(1, 0)})
        assert ledger.is_new
        ledger.close()
        assert len(path.read_text().splitlines()) == 1
        ledger = Ledger(LocalJournal(path), IDENTITY)
        assert ledger.is_new
        act(ledger)
        assert not ledger.is_new
        ledger.close()


# --- damage -------------------------------------------------------------------------------------


def written(path: Path) -> list[tuple[object, ...]]:
    """Make a ledger; gives what it knew after each of its lines."""
    ledger = Ledger(LocalJournal(path), IDENTITY)
    known = [contents(ledger)]
    for act in (
        lambda: ledger.record([Receipt(0, 0, 10, 77, ((3, 1), (4, -1)))]),
        lambda: ledger.record((), {"é": (math.pi, -0.0, math.inf)}),
        lambda: ledger.mark("clearing", ["tokenizer.json"]),
        lambda: ledger.record([Receipt(1, 0, 10, 2**32 - 1)]),
    ):
        act()
        known.append(reopened(path))
    ledger.close()
    return known


def test_a_line_that_was_torn_anywhere_is_cut_off(tmp_path):
    known = written(tmp_path / LEDGER)
    text = (tmp_path / LEDGER).read_bytes()
    for position in range(len(text) + 1):
        path = tmp_path / "torn"
        path.write_bytes(text[:position])
        whole = text[:position].count(b"\n")
        assert reopened(path) == known[max(0, whole - 1)], position
        # What is recorded next begins a line of its own.
        ledger = Ledger(LocalJournal(path), IDENTITY)
        ledger.record([Receipt(9, 9, 9, 9)])
        ledger.close()
        assert (9, 9) in Ledger(LocalJournal(path), IDENTITY).receipts, position
        assert path.read_bytes().startswith(text[: text[:position].rfind(b"\n") + 1])


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b'{"other": 1}', b'{"identity": 5}'],
)
def test_a_damaged_line_is_told(tmp_path, line, damage):
    path = tmp_path / LEDGER
    written(path)
    lines = path.read_bytes().splitlines()
    lines[line] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(LedgerMismatchError, match="damaged") as caught:
        Ledger(LocalJournal(path), IDENTITY)
    assert str(path) in str(caught.value) and "--fresh" in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        {"part": [0, 0], "bytes": 1, "crc32": 1, "non_finite": [3]},
        {"part": [0], "bytes": 1, "crc32": 1},
        {"part": [0, 0], "bytes": 1},
        {"decision": "a", "values": ["x"]},
        {"decision": 1, "values": []},
        {"event": "cleared", "names": 3},
        {"gone": ["a"]},
    ],
)
def test_a_record_with_other_values_is_told(tmp_path, record):
    path = tmp_path / LEDGER
    Ledger(LocalJournal(path), IDENTITY).close()
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(LedgerMismatchError, match="damaged"):
        Ledger(LocalJournal(path), IDENTITY)


def test_fingerprints_differ_with_everything_but_order():
    assert fingerprint(IDENTITY) == fingerprint(dict(reversed(IDENTITY.items())))
    changed = [IDENTITY | {"recipe": "x"}, IDENTITY | {"more": ""}, {"recipe": IDENTITY["recipe"]}]
    assert len({fingerprint(identity) for identity in (IDENTITY, *changed)}) == 4


# --- what an unfinished run is bound to -----------------------------------------------------------


class StopAfter(Quiet):
    """Stops a run when so many tasks have ended."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.left = tasks
        self.event = threading.Event()
        self.ended: list[int] = []

    def task(self, done, task):
        super().task(done, task)
        self.ended.append(done.task)
        if len(self.ended) == self.left:
            self.event.set()


@pytest.fixture
def unfinished(tmp_path):
    """A recipe of which some parts are merged."""
    base = write_checkpoint(tmp_path / "base", HALVES, shards=3)
    models = {
        write_checkpoint(tmp_path / name, HALVES, seed=seed): {"weight": 1.0, "density": 0.5}
        for seed, name in enumerate(("a", "b"), 1)
    }
    recipe = recipe_of("dare_ties", base, models, seed=1, parameters={"rescale": "inv_keep"})
    path = write_recipe(tmp_path / "r.yml", recipe)
    stop = StopAfter(3)
    with pytest.raises(Stopped):
        merge(path, str(tmp_path / "out"), threads=1, progress=stop, stop=stop.event)
    assert (tmp_path / "out" / STAGING / LEDGER).read_text().count("part") >= 3
    return recipe


def refusal(folder: Path) -> str:
    before = support.tree(folder / "out")
    with pytest.raises(LedgerMismatchError) as caught:
        merge(str(folder / "r.yml"), str(folder / "out"), threads=1)
    after = support.tree(folder / "out")
    lock = f"{STAGING}/lock"
    assert {**after, lock: b""} == {**before, lock: b""}
    message = str(caught.value)
    assert "--fresh" in message and str(folder / "out") in message
    return message


def quiet_bytes(folder: Path) -> dict[str, bytes]:
    merge(str(folder / "r.yml"), str(folder / "quiet"), threads=1)
    return support.tree(folder / "quiet")


def test_another_seed_is_refused_with_its_line(tmp_path, unfinished):
    write_recipe(tmp_path / "r.yml", unfinished | {"seed": 2})
    message = refusal(tmp_path)
    assert "- seed: 1" in message and "+ seed: 2" in message and f"source {tmp_path}" not in message


def test_another_weight_is_refused_with_its_line(tmp_path, unfinished):
    unfinished["models"][1]["parameters"]["weight"] = 0.25
    write_recipe(tmp_path / "r.yml", unfinished)
    assert "+     weight: 0.25" in refusal(tmp_path)


def test_a_changed_source_is_refused_by_name(tmp_path, unfinished):
    write_checkpoint(tmp_path / "b", HALVES, seed=7)
    message = refusal(tmp_path)
    assert f"source {tmp_path / 'b'} changed" in message
    assert "model.safetensors" in message and f"source {tmp_path / 'a'}" not in message


def test_another_model_is_refused_by_name(tmp_path, unfinished):
    other = write_checkpoint(tmp_path / "c", HALVES, seed=3)
    unfinished["models"][1]["model"] = str(other)
    write_recipe(tmp_path / "r.yml", unfinished)
    message = refusal(tmp_path)
    assert f"source {tmp_path / 'b'} changed:\n    it is not there any more" in message
    assert f"source {other} changed:\n    it was not there before" in message


def test_fresh_starts_over(tmp_path, unfinished):
    write_recipe(tmp_path / "r.yml", unfinished | {"seed": 2})
    refusal(tmp_path)
    merge(str(tmp_path / "r.yml"), str(tmp_path / "out"), threads=1, fresh=True)
    assert support.tree(tmp_path / "out") == quiet_bytes(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: recipe | {"allow_non_finite": True},
        lambda recipe: dict(reversed(recipe.items())),
        lambda recipe: recipe | {"models": [dict(reversed(m.items())) for m in recipe["models"]]},
    ],
)
def test_what_does_not_change_the_bytes_may_change(tmp_path, unfinished, change):
    path = write_recipe(tmp_path / "r.yml", change(unfinished))
    Path(path).write_text("# a comment\n" + Path(path).read_text() + "\n\n")
    goes_on(tmp_path)


def test_memory_and_threads_may_change(tmp_path, unfinished):
    goes_on(tmp_path, memory_bytes=support.least_memory(str(tmp_path / "r.yml")))


def goes_on(folder: Path, **resources: int) -> None:
    """The run goes on from where it stopped, and ends in the same bytes."""
    count = StopAfter(0)
    tasks = len(support.plan_of(str(folder / "r.yml")).tasks)
    merge(str(folder / "r.yml"), str(folder / "out"), progress=count, **resources)
    assert 0 < len(count.ended) <= tasks - 3
    assert support.tree(folder / "out") == quiet_bytes(folder)
