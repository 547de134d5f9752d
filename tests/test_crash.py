"""Runs that are killed at any moment: the same command goes on, and the bytes are the same."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from shardmerge.layout import Shard
from shardmerge.merge import merge
from shardmerge.outputs.api import STAGING
from tests import support
from tests.crash_child import SYNCS, Merges
from tests.support import HALVES, INDEX, SINGLE, Pwrites, all_parts, receipts, tree, visible

KILLED = -9
OLD_FILES = {
    "tokenizer.json": "old",
    "added_tokens.json": "old",
    "generation_config.json": "{}",
    "README.md": "old",
}
NEW_FILES = {"tokenizer.json": "new", "tokenizer_config.json": "{}"}


@dataclass(frozen=True)
class Scenario:
    """A merge, and what it makes when nobody disturbs it.

    Args:
        old: a checkpoint that lies at OUT before and is replaced.
        shards: of the plan.
        quiet: every file of the output.
        calls: every call to the system of the quiet run, in order.
    """

    recipe: str
    memory_bytes: int
    old: Path | None
    shards: tuple[Shard, ...]
    quiet: Mapping[str, bytes]
    calls: tuple[str, ...] = ()

    def arguments(self, out: Path) -> list[str]:
        found = ["merge", self.recipe, str(out), "--quiet", "--threads", "1"]
        return [*found, "--memory", str(self.memory_bytes), *(["--overwrite"] * bool(self.old))]

    def before(self, out: Path) -> Path:
        """OUT as it is before the run."""
        if self.old is not None:
            shutil.copytree(self.old, out)
        return out


@pytest.fixture(scope="module")
def merges() -> Iterator[Merges]:
    with Merges() as process:
        yield process


@pytest.fixture(autouse=True)
def small_engine(monkeypatch):
    support.shrink(monkeypatch.setattr)
    for name in SYNCS:
        monkeypatch.setattr(os, name, lambda _: None)


def scenario(
    folder: Path, merges: Merges, *, shards: int, old_shards: int = 0, method: str = "ties"
) -> Scenario:
    base = support.write_checkpoint(folder / "base", HALVES, shards=shards, files=NEW_FILES)
    models = {
        support.write_checkpoint(folder / f"model{seed}", HALVES, seed=seed): (
            {"weight": 1.0 / seed, "density": 0.5} if method == "ties" else {}
        )
        for seed in (1, 2)
    }
    recipe = support.write_recipe(folder / "r.yml", support.recipe_of(method, base, models))
    old = None
    if old_shards:
        larger = {f"model.layers.{i}.weight": HALVES["model.layers.0.weight"] for i in range(10)}
        old = support.write_checkpoint(
            folder / "old", larger, seed=9, shards=old_shards, files=OLD_FILES
        )
    memory_bytes = support.least_memory(recipe)
    merges.warm(recipe, folder / "quiet", memory_bytes)
    shards_of_plan = support.plan_of(recipe).shards
    made = Scenario(recipe, memory_bytes, old, shards_of_plan, tree(folder / "quiet"))
    log = folder / "log"
    assert merges.run(made.arguments(made.before(folder / "again")), log) == 0
    assert tree(folder / "again") == made.quiet
    calls = tuple(log.read_text().replace(str(folder / "again"), "OUT").splitlines())
    return replace(made, calls=calls)


# --- what must hold after a kill, and after the same command again --------------------------------


def check_what_readers_see(case: Scenario, out: Path, point: object) -> None:
    """No checkpoint, or all of the old one, or all of the new one."""
    found = visible(out) if out.exists() else {}
    if INDEX not in found and SINGLE not in found:
        return
    if found == case.quiet:
        return
    assert case.old is not None and found == tree(case.old), f"{point}: {sorted(found)}"


def check_resume(case: Scenario, out: Path, point: object, monkeypatch) -> None:
    """The same command again gives the same files, and writes no part that has a receipt."""
    kept = receipts(out)
    every = all_parts(case.shards)
    published = visible(out) == case.quiet if out.exists() else False
    with monkeypatch.context() as patch:
        pwrites = Pwrites(patch)
        merge(
            case.recipe,
            str(out),
            memory_bytes=case.memory_bytes,
            threads=1,
            overwrite=case.old is not None,
        )
    assert tree(out) == case.quiet, point
    assert [path for path in out.rglob("*") if path.is_dir()] == [], point
    if not published:
        assert pwrites.parts(case.shards) == every - kept, point


def check(case: Scenario, merges: Merges, folder: Path, point: dict[str, object], monkeypatch):
    """Kill at one point and go on. Gives whether the run came to that point."""
    out = case.before(folder / "out")
    status = merges.run(case.arguments(out), folder / "log", do="kill", **point)
    assert status in (0, KILLED), (point, (folder / "log.err").read_text())
    check_what_readers_see(case, out, point)
    check_resume(case, out, point, monkeypatch)
    shutil.rmtree(folder)
    return status == KILLED


# --- kills --------------------------------------------------------------------------------------

SHAPES = {
    "three shards": {"shards": 3},
    "one shard": {"shards": 1},
    "three shards over five": {"shards": 3, "old_shards": 5},
    "one shard over five": {"shards": 1, "old_shards": 5},
    "one shard over one": {"shards": 1, "old_shards": 1},
    "a sum that is made first": {"shards": 2, "method": "opcm"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_at_any_call(shape, tmp_path, merges, monkeypatch):
    case = scenario(tmp_path / "case", merges, **SHAPES[shape])
    points = chosen_points(case, random.Random(shape))
    reached = 0
    for number, point in enumerate(points):
        folder = tmp_path / str(number)
        folder.mkdir()
        hit = check(case, merges, folder, point, monkeypatch)
        assert hit or "call" in point, f"the run never came to {point}"
        reached += hit
    assert reached >= 0.9 * len(points)


def chosen_points(case: Scenario, rng: random.Random) -> list[dict[str, object]]:
    """Random calls, and before and after each step of publishing: records, names, removals."""
    publishing = first_of_publishing(case)
    points: list[dict[str, object]] = [
        {"call": call, "when": when}
        for call, when in zip(
            sorted(rng.sample(range(publishing), min(publishing, 12))),
            rng.choices(("before", "after"), k=12),
            strict=False,
        )
    ]
    seen: dict[str, int] = {}
    for call in case.calls:
        op, _, path = call.partition(" ")
        nth = seen[call] = seen.get(call, -1) + 1
        if case.calls.index(call) >= publishing and op not in (*SYNCS, "mkdir"):
            tail = path.removeprefix("OUT")
            points += [
                {"op": op, "path": f"out{tail}", "nth": nth, "when": when}
                for when in ("before", "after")
            ]
    return points


def first_of_publishing(case: Scenario) -> int:
    """Number of the first call after the last part was written."""
    return max(n for n, call in enumerate(case.calls) if call.startswith("pwrite")) + 1


def test_killed_while_an_unfinished_run_is_forgotten(tmp_path, merges, monkeypatch):
    """Receipts must not outlive what they prove: their files are made again, full of zeros."""
    case = scenario(tmp_path / "case", merges, shards=3)
    names = [f"{shard.name}.part" for shard in case.shards]
    points = [
        {"op": "unlink", "path": f"{STAGING}/{name}", "when": when}
        for name in ("ledger.jsonl", *names)
        for when in ("before", "after")
    ]
    for number, point in enumerate(points):
        out, log = tmp_path / str(number), tmp_path / f"log{number}"
        arguments = case.arguments(out)
        late = {"op": "pwrite", "path": names[2], "nth": 5, "when": "after"}
        early = {"op": "pwrite", "path": ".part", "when": "before"}
        for options, more in ((late, []), (point, ["--fresh"]), (early, [])):
            status = merges.run([*arguments, *more], log, do="kill", **options)
            assert status == KILLED, (point, options)
            assert receipts(out) or options is not late
        check_resume(case, out, point, monkeypatch)
