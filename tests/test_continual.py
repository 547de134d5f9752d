"""Continual merging: states, steps that are killed, what is refused, and what a step costs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from shardmerge import continual
from shardmerge.cli import main
from shardmerge.continual import State
from shardmerge.errors import (
    CheckpointError,
    LockedError,
    OutputError,
    PlanError,
    StateError,
    Stopped,
    UsageError,
)
from shardmerge.merge import merge
from shardmerge.numerics import DType
from shardmerge.prepare import Where
from shardmerge.state import RECORD
from tests import support
from tests.crash_child import SYNCS, Merges
from tests.support import HALVES, tree, write_checkpoint, write_recipe

KILLED = -9
TENSORS = {
    "model.embed_tokens.weight": (DType.BF16, (40, 24)),
    "model.layers.0.mlp.experts.down_proj": (DType.BF16, (3, 24, 16)),
    "model.layers.0.up_proj.weight": (DType.BF16, (30, 24)),
    "model.layers.0.norm.weight": (DType.F32, (24,)),
    "model.position_ids": (DType.I64, (1, 17)),
}
WHERE = Where(threads=2, device="cpu")


@pytest.fixture
def family(tmp_path):
    """A base model and eight fine-tunes."""
    folder = tmp_path / "family"
    return [write_checkpoint(folder / f"m{seed}", TENSORS, seed=seed) for seed in range(9)]


def begun(place: Path | str, family: list[Path], models: int, **more) -> State:
    state = State(str(place))
    state.init(str(family[0]), **more)
    for model in family[1 : 1 + models]:
        state.add(str(model), WHERE)
    return state


def published(state: State, out: Path, **more) -> dict:
    state.publish(str(out), WHERE, **more)
    return support.read_tensors(out)


# --- what a state gives ---------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [(DType.F64, DType.BF16), (DType.F32, DType.F64)])
def test_float64_among_others_changes_nothing(tmp_path, kinds):
    """What is added is float32 whatever the others of a recipe are: one by one is the same."""
    family = []
    for seed in range(4):
        specs = {"a.up.weight": (kinds[seed % 2], (24, 16)), "a.norm": (kinds[seed % 2], (24,))}
        family.append(write_checkpoint(tmp_path / f"m{seed}", specs, seed=seed))
    state = begun(tmp_path / "state", family, 3)
    one_by_one = published(state, tmp_path / "one", dtype="float32")
    recipe = {
        "merge_method": "opcm",
        "base_model": str(family[0]),
        "models": [{"model": str(model)} for model in family[1:]],
        "dtype": "float32",
    }
    merge(write_recipe(tmp_path / "r.yml", recipe), str(tmp_path / "all"), threads=1)
    assert one_by_one == support.read_tensors(tmp_path / "all")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_by_one_is_the_same_bytes_as_all_at_once(tmp_path, family, dtype):
    state = begun(tmp_path / "state", family, 4, settings=["alpha=0.6"])
    one_by_one = published(state, tmp_path / "one", dtype=dtype)
    recipe = {
        "merge_method": "opcm",
        "base_model": str(family[0]),
        "models": [{"model": str(model)} for model in family[1:5]],
        "parameters": {"alpha": 0.6},
        "dtype": dtype,
    }
    merge(write_recipe(tmp_path / "r.yml", recipe), str(tmp_path / "all"), threads=1)
    assert one_by_one == support.read_tensors(tmp_path / "all")


def test_without_a_dtype_every_tensor_has_the_base_models(tmp_path, family):
    got = published(begun(tmp_path / "state", family, 2), tmp_path / "out")
    assert {name: (dtype, shape) for name, (dtype, shape, _) in got.items()} == TENSORS


def _values(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: support.loaded(raw, dtype)
        for name, (dtype, _, raw) in support.read_tensors(folder).items()
        if dtype.is_float
    }


def test_the_baselines_by_their_formulas(tmp_path, family):
    base, *models = map(_values, family[:4])
    deltas = [{name: model[name] - base[name] for name in base} for model in models]
    got = {}
    for method, settings in {"linear": [], "task_arithmetic": ["lambda=0.4"]}.items():
        state = begun(tmp_path / method, family, 3, method=method, settings=settings)
        state.publish(str(tmp_path / f"{method}-out"), WHERE, dtype="float32")
        got[method] = _values(tmp_path / f"{method}-out")
    for name in base:
        total = sum(delta[name] for delta in deltas)
        assert np.allclose(got["linear"][name], base[name] + total / 3, atol=1e-6)
        assert np.allclose(got["task_arithmetic"][name], base[name] + 0.4 * total, atol=1e-6)


def test_continual_ties_by_its_formula(tmp_path, family):
    settings = ["density=0.3", "lambda=0.5"]
    state = begun(tmp_path / "state", family, 2, method="ties", settings=settings)
    state.publish(str(tmp_path / "out"), WHERE, dtype="float32")
    got = _values(tmp_path / "out")
    base, *models = map(_values, family[:3])
    for name in base:
        total, delta = ((model[name] - base[name]).astype(np.float32) for model in models)
        kept = []
        for values in (total, delta):
            rank = max(1, int(0.3 * values.size))
            threshold = np.sort(np.abs(values))[::-1][rank - 1]
            kept.append(np.where(np.abs(values) >= threshold, values, 0))
        sign = np.where(sum(kept) >= 0, 1, -1)
        elected = sum(np.where(values * sign > 0, values, 0) for values in kept)
        assert np.allclose(got[name], base[name] + total + 0.5 * elected, atol=1e-6), name


def test_the_record_says_what_is_in_it(tmp_path, family, capsys):
    begun(tmp_path / "state", family, 3, settings=["alpha=0.25"])
    assert main(["continual", "status", str(tmp_path / "state"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [step["model"] for step in facts["steps"]] == list(map(str, family[1:4]))
    assert facts["method"] == "opcm"
    assert facts["parameters"] == {"alpha": 0.25, "project": "auto"}
    base, *models = map(_values, family[:4])
    for step, model in zip(facts["steps"], models, strict=True):
        squares = sum(float(((model[n] - base[n]) ** 2).sum()) for n in base)
        assert math.isclose(step["norm"], math.sqrt(squares), rel_tol=1e-6)
    assert [bool(step["sum"]) for step in facts["steps"]] == [False, True, True]
    assert facts["disk_bytes"] == sum(step["sum_bytes"] for step in facts["steps"]) > 0
    assert main(["continual", "status", str(tmp_path / "state")]) == 0
    told = capsys.readouterr().out
    assert "alpha 0.25" in told and "models    3" in told


def test_old_models_are_no_longer_needed(tmp_path, family):
    state = begun(tmp_path / "state", family, 3)
    for model in family[1:4]:
        shutil.rmtree(model)
    state.add(str(family[4]), WHERE)
    shutil.rmtree(family[4])
    assert published(state, tmp_path / "out")


def test_a_sum_is_an_ordinary_checkpoint(tmp_path, family, capsys):
    state = begun(tmp_path / "state", family, 2)
    folder = tmp_path / "state" / (state.record().steps[-1].folder or "")
    assert main(["verify", str(folder)]) == 0
    assert main(["inspect", str(folder)]) == 0
    assert "float32" in capsys.readouterr().out


def test_rules_of_a_state(tmp_path, family):
    rules = '- {tensors: "*embed*", parameters: {project: always}}\n'
    state = begun(tmp_path / "state", family, 1, rules=rules)
    plan = state.plan_add(str(family[2]), WHERE).plan
    assert [t.name for t in plan.tensors if t.whole] == [n for n in TENSORS if "model." in n][:3]
    with pytest.raises(Exception, match="tensros"):
        State(str(tmp_path / "other")).init(str(family[0]), rules="- {tensros: a}")


# --- what a step costs ----------------------------------------------------------------------------


def test_the_eighth_model_costs_what_the_second_did(tmp_path, family):
    """Tasks, bytes read and written, memory: of the base model, the sum and one model."""
    state = begun(tmp_path / "state", family, 1)
    costs = []
    for model in family[2:]:
        plan = state.plan_add(str(model), WHERE).plan
        costs.append((len(plan.tasks), plan.read_bytes, plan.output_bytes, plan.peak_bytes))
        state.add(str(model), WHERE)
    assert len(costs) == 7 and len(set(costs)) == 1
    elements = sum(math.prod(s) for d, s in TENSORS.values() if d.is_float)
    stored = sum(math.prod(s) * d.itemsize for d, s in TENSORS.values())
    assert costs[0][1] == 2 * stored + 4 * elements


def test_a_step_opens_no_earlier_model(tmp_path, family, monkeypatch):
    state = begun(tmp_path / "state", family, 3)
    sums = f"{tmp_path}/state/{state.record().steps[-1].folder}"
    opened = []
    real = continual.open_checkpoint
    monkeypatch.setattr(
        continual, "open_checkpoint", lambda url, *a: opened.append(url) or real(url, *a)
    )
    from shardmerge import prepare as preparing

    monkeypatch.setattr(
        preparing, "open_checkpoint", lambda url, *a: opened.append(url) or real(url, *a)
    )
    state.add(str(family[4]), WHERE)
    written = f"{tmp_path}/state/{state.record().steps[-1].folder}"
    assert {str(family[0]), str(family[4]), sums, written} == set(opened)


def test_the_plan_of_a_step_tells_the_disk(tmp_path, family, capsys):
    begun(tmp_path / "state", family, 2)
    before = tree(tmp_path / "state")
    arguments = ["continual", "add", str(tmp_path / "state"), str(family[3]), "--plan", "--json"]
    assert main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["disk_bytes"] == 3 * facts["write_bytes"]
    assert tree(tmp_path / "state") == before


# --- what is refused ------------------------------------------------------------------------------


def test_the_same_model_twice(tmp_path, family):
    state = begun(tmp_path / "state", family, 2)
    before = tree(tmp_path / "state")
    with pytest.raises(StateError, match=re.escape(f"{family[1]} is in")):
        state.add(str(family[1]), WHERE)
    with pytest.raises(StateError, match="is the base model"):
        state.add(str(family[0]), WHERE)
    assert tree(tmp_path / "state") == before


def test_the_same_model_from_another_place(tmp_path, family):
    state = begun(tmp_path / "state", family, 2)
    before = tree(tmp_path / "state")
    shutil.copytree(family[1], tmp_path / "copy")
    with pytest.raises(StateError, match="holds the same elements as step 1"):
        state.add(str(tmp_path / "copy"), WHERE)
    assert tree(tmp_path / "state") == before
    assert state.add(str(family[3]), WHERE).number == 3


def test_a_model_of_the_same_norm_is_another(tmp_path, family):
    """Mirrored at the base model, of zeros."""
    for name, factor in {"zero": 0.0, "one": 1.0, "other": -1.0}.items():
        values = torch.randn(24, 16, generator=torch.Generator().manual_seed(1)) * factor
        save_file({"model.up_proj.weight": values}, tmp_path / f"{name}.safetensors")
    state = State(str(tmp_path / "state"))
    state.init(str(tmp_path / "zero.safetensors"))
    state.add(str(tmp_path / "one.safetensors"), WHERE)
    assert state.add(str(tmp_path / "other.safetensors"), WHERE).number == 2


def test_a_sum_that_somebody_changed(tmp_path, family):
    state = begun(tmp_path / "state", family, 2)
    sums = [tmp_path / "state" / (step.folder or "") for step in state.record().steps]
    shutil.copytree(tmp_path / "state", tmp_path / "copied")
    assert State(str(tmp_path / "copied")).add(str(family[3]), WHERE).number == 3
    support.set_element(sums[1], "model.layers.0.norm.weight", 3, 7.0)
    for act in (
        lambda: state.add(str(family[3]), WHERE),
        lambda: state.publish(str(tmp_path / "out"), WHERE),
    ):
        with pytest.raises(StateError, match="is not what was written"):
            act()
    shutil.rmtree(sums[0])
    with pytest.raises(StateError, match="cannot be read"):
        state.undo()
    assert len(state.record().steps) == 2 and sums[1].exists()


def test_nothing_is_published_into_a_state(tmp_path, family, monkeypatch):
    state = begun(tmp_path / "state", family, 1)
    monkeypatch.chdir(tmp_path)
    for place in ("state", "state/out", "state/steps/000002", f"{tmp_path}/state/"):
        with pytest.raises(OutputError, match="lies in the state"):
            state.publish(place, WHERE)


def test_another_base_model(tmp_path, family):
    state = begun(tmp_path / "state", family, 1)
    write_checkpoint(family[0], TENSORS, seed=77)
    for act in (
        lambda: state.add(str(family[2]), WHERE),
        lambda: state.publish(str(tmp_path / "out"), WHERE),
    ):
        with pytest.raises(StateError, match="is not the base model that"):
            act()


def test_a_base_model_that_was_copied_back_is_the_same(tmp_path, family):
    state = begun(tmp_path / "state", family, 1)
    shutil.move(family[0], tmp_path / "away")
    shutil.copytree(tmp_path / "away", family[0])
    assert state.add(str(family[2]), WHERE).number == 2
    shutil.rmtree(family[0])
    with pytest.raises(CheckpointError):
        state.publish(str(tmp_path / "out"), WHERE)
    state.publish(str(tmp_path / "out"), WHERE, base=str(tmp_path / "away"))
    assert state.add(str(family[3]), WHERE, base=str(tmp_path / "away")).number == 3
    assert state.add(str(family[4]), WHERE).number == 4
    with pytest.raises(StateError, match="--base"):
        state.add(str(family[5]), WHERE, base=str(family[6]))


def test_a_missing_and_an_extra_tensor(tmp_path, family):
    state = begun(tmp_path / "state", family, 1)
    fewer = {name: spec for name, spec in TENSORS.items() if "norm" not in name}
    more = {**TENSORS, "extra.weight": (DType.BF16, (4, 4))}
    other = {**TENSORS, "model.layers.0.up_proj.weight": (DType.BF16, (30, 25))}
    head = {**TENSORS, "lm_head.weight": (DType.BF16, (40, 24))}
    for specs, words in (
        (fewer, "lacks 1 tensor of the base model: model.layers.0.norm.weight"),
        (more, "has 1 tensor that the base model lacks: extra.weight"),
        (head, "has 1 tensor that the base model lacks: lm_head.weight"),
        (other, r"up_proj.weight: \[30, 24\]"),
    ):
        model = write_checkpoint(tmp_path / "odd", specs, seed=50)
        with pytest.raises((StateError, PlanError), match=words):
            state.add(str(model), WHERE)
        shutil.rmtree(model)
    assert state.record().pending is None and len(state.record().steps) == 1


def test_integers_that_differ(tmp_path, family):
    state = begun(tmp_path / "state", family, 1)
    specs = {**TENSORS, "model.position_ids": (DType.I64, (1, 17))}
    model = write_checkpoint(tmp_path / "odd", specs, seed=50)
    support.set_element(model, "model.position_ids", 3, 99)
    with pytest.raises(CheckpointError, match=r"model\.position_ids"):
        state.add(str(model), WHERE)
    state.undo()
    assert state.add(str(family[2]), WHERE).number == 2


def test_nan_is_refused_with_what_helps_in_a_state(tmp_path, family):
    state = begun(tmp_path / "state", family, 1)
    support.set_element(family[2], "model.layers.0.up_proj.weight", 3, math.nan)
    with pytest.raises(StateError, match="continual undo") as refused:
        state.add(str(family[2]), WHERE)
    assert "allow_non_finite" not in str(refused.value)
    state.undo()
    assert state.add(str(family[3]), WHERE).number == 2


@pytest.mark.parametrize(
    "rule",
    [
        '{tensors: "*up_proj*", merge_method: task_arithmetic, parameters: {weight: 0.3}}',
        '{tensors: "*", from: base}',
    ],
)
def test_rules_that_leave_tensors_to_other_methods(tmp_path, family, rule):
    """What is not added would be the base model's in what is published."""
    state = begun(tmp_path / "state", family, 0, rules=f"- {rule}")
    with pytest.raises(StateError, match="a state adds"):
        state.add(str(family[1]), WHERE)


def test_rules_are_the_same_in_what_is_published(tmp_path, family):
    rules = """
    - {tensors: "*up_proj*", parameters: {project: never}}
    - {tensors: "*norm*", from: base}
    - {tensors: "*embed*", drop: true}
    """
    state = begun(tmp_path / "state", family, 2, rules=rules)
    got = published(state, tmp_path / "out", dtype="float32")
    recipe = {
        "merge_method": "opcm",
        "base_model": str(family[0]),
        "models": [{"model": str(model)} for model in family[1:3]],
        "rules": yaml.safe_load(rules),
        "dtype": "float32",
    }
    merge(write_recipe(tmp_path / "r.yml", recipe), str(tmp_path / "all"), threads=1)
    assert got == support.read_tensors(tmp_path / "all")
    assert "model.embed_tokens.weight" not in got


def test_what_is_published_tells_its_models(tmp_path, family):
    """The recipe beside it, of opcm, gives the same bytes again."""
    state = begun(tmp_path / "state", family, 3)
    state.publish(str(tmp_path / "out"), WHERE, dtype="float32")
    recipe = tmp_path / "out" / "shardmerge_recipe.yml"
    merge(str(recipe), str(tmp_path / "again"), threads=1)
    assert support.digests(tmp_path / "again") == support.digests(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(model.name in card for model in family[:4])
    other = begun(tmp_path / "other", family, 2, method="ties")
    other.publish(str(tmp_path / "ties"), WHERE)
    assert "merge_method: ties" in (tmp_path / "ties" / "shardmerge_recipe.yml").read_text()


def test_fp8_models(tmp_path):
    places = {"bf16": tmp_path / "bf16.safetensors", "e4m3": tmp_path / "e4m3.safetensors"}
    for seed, (name, path) in enumerate(places.items()):
        values = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
        kind = torch.bfloat16 if name == "bf16" else torch.float8_e4m3fn
        norm = torch.full((16,), seed + 0.5, dtype=torch.bfloat16)
        save_file({"model.up_proj.weight": values.to(kind), "model.norm.weight": norm}, path)
    state = State(str(tmp_path / "state"))
    state.init(str(places["bf16"]))
    state.add(str(places["e4m3"]), WHERE)
    state.publish(str(tmp_path / "out"), WHERE)
    found = support.read_tensors(tmp_path / "out")
    assert {dtype for dtype, _, _ in found.values()} == {DType.BF16}
    eighth = State(str(tmp_path / "eighth"))
    eighth.init(str(places["e4m3"]))
    eighth.add(str(places["bf16"]), WHERE)
    with pytest.raises(UsageError, match="--dtype bfloat16"):
        eighth.publish(str(tmp_path / "out8"), WHERE)
    eighth.publish(str(tmp_path / "out8"), WHERE, dtype="bfloat16")


def test_two_at_a_time(tmp_path, family):
    state = begun(tmp_path / "state", family, 1)
    with state._locked():
        other = State(str(tmp_path / "state"))
        for act in (lambda: other.add(str(family[2]), WHERE), other.undo):
            with pytest.raises(LockedError):
                act()
    assert state.add(str(family[2]), WHERE).number == 2


def test_another_model_while_one_is_not_complete(tmp_path, family, monkeypatch):
    state = begun(tmp_path / "state", family, 1)
    state._stop.set()
    with pytest.raises(Stopped):
        state.add(str(family[2]), WHERE)
    state = State(str(tmp_path / "state"))
    assert len(state.record().steps) == 1
    with pytest.raises(StateError, match="was begun and is not complete"):
        state.add(str(family[3]), WHERE)
    assert state.add(str(family[2]), WHERE).number == 2
    quiet = published(begun(tmp_path / "quiet", family, 2), tmp_path / "a")
    assert published(state, tmp_path / "b") == quiet


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"method": "opmc"}, UsageError, "Did you mean 'opcm'"),
        ({"method": "dare_ties"}, UsageError, "does not add one model at a time"),
        ({"settings": ["alhpa=0.5"]}, UsageError, "Did you mean 'alpha'"),
        ({"settings": ["alpha"]}, UsageError, "KEY=VALUE"),
        ({"settings": ["alpha=-1"]}, UsageError, "at least 0"),
        ({"settings": ["shuffle=true"]}, UsageError, "shuffle"),
    ],
)
def test_a_state_that_cannot_begin(tmp_path, family, more, error, words):
    with pytest.raises(error, match=words):
        State(str(tmp_path / "state")).init(str(family[0]), **more)
    assert not (tmp_path / "state").exists()


def test_places_that_are_no_states(tmp_path, family):
    with pytest.raises(StateError, match="continual init"):
        State(str(tmp_path / "nothing")).record()
    with pytest.raises(OutputError, match="not empty"):
        State(str(family[1])).init(str(family[0]))
    state = begun(tmp_path / "state", family, 0)
    with pytest.raises(StateError, match="no model yet"):
        state.publish(str(tmp_path / "out"), WHERE)
    with pytest.raises(StateError, match="no step"):
        state.undo()
    state.add(str(family[1]), WHERE)
    record = json.loads((tmp_path / "state" / RECORD).read_text())
    record["steps"][0]["norm"] = "x"
    for text in ('{"shardmerge state": 1}', "[", json.dumps(record)):
        (tmp_path / "state" / RECORD).write_text(text)
        with pytest.raises(StateError, match="damaged"):
            state.record()


# --- undo, keep -----------------------------------------------------------------------------------


def test_undo_goes_back_one_step(tmp_path, family):
    state = begun(tmp_path / "state", family, 2, keep=9)
    one = published(state, tmp_path / "one")
    state.add(str(family[3]), WHERE)
    assert state.undo().url == str(family[3])
    assert published(state, tmp_path / "two") == one
    state.undo()
    state.undo()
    assert not list((tmp_path / "state" / "steps").iterdir())
    for model in family[1:3]:
        state.add(str(model), WHERE)
    assert published(state, tmp_path / "three") == one


def test_so_many_sums_stay(tmp_path, family):
    state = begun(tmp_path / "state", family, 5, keep=3)
    assert _numbers(tmp_path / "state") == [3, 4, 5]
    state.add(str(family[6]), WHERE, keep=1)
    assert _numbers(tmp_path / "state") == [6]
    with pytest.raises(StateError, match="is not kept"):
        state.undo()


def _numbers(state: Path) -> list[int]:
    """Of the steps whose sums are there."""
    return sorted(int(path.name.partition("-")[0]) for path in (state / "steps").iterdir())


# --- kills ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merges():
    with Merges() as process:
        yield process


def test_a_step_killed_at_any_call_leaves_the_last_one_whole(tmp_path, merges, monkeypatch):
    """Until a step is complete the one before can be published; the same command completes it."""
    support.shrink(monkeypatch.setattr)
    for name in SYNCS:
        monkeypatch.setattr(os, name, lambda _: None)
    family = [write_checkpoint(tmp_path / f"m{seed}", HALVES, seed=seed) for seed in range(4)]
    state = begun(tmp_path / "begun", family, 2)
    before = _sums(state)
    recipe = support.write_recipe(
        tmp_path / "r.yml",
        support.recipe_of("task_arithmetic", family[0], {family[1]: {"weight": 1.0}}),
    )
    merges.warm(recipe, tmp_path / "warm", support.least_memory(recipe))

    def arguments(folder: Path) -> list[str]:
        add = ["continual", "add", str(folder), str(family[3]), "--quiet", "--threads", "1"]
        return [*add, "--device", "cpu"]

    shutil.copytree(tmp_path / "begun", tmp_path / "quiet")
    log = tmp_path / "log"
    assert merges.run(arguments(tmp_path / "quiet"), log) == 0
    quiet = _sums(State(str(tmp_path / "quiet")))
    calls = log.read_text().splitlines()
    killed = 0
    for number in [
        *range(0, len(calls), max(1, len(calls) // 25)),
        *range(len(calls) - 12, len(calls)),
    ]:
        for when in ("before", "after"):
            folder = tmp_path / "state"
            shutil.copytree(tmp_path / "begun", folder)
            status = merges.run(
                arguments(folder), tmp_path / "l", do="kill", call=number, when=when
            )
            assert status in (0, KILLED), (tmp_path / "l.err").read_text()
            killed += status == KILLED
            found = State(str(folder))
            steps = len(found.record().steps)
            assert _sums(found) == (before if steps == 2 else quiet), (calls[number], when)
            if steps == 2:
                found.add(str(family[3]), Where(threads=1, device="cpu"))
            assert _sums(State(str(folder))) == quiet, (calls[number], when)
            assert not (folder / ".shardmerge").exists() or steps == 3
            shutil.rmtree(folder)
    assert killed > 40


def _sums(state: State) -> tuple[list[float], bytes]:
    """Norms of all steps, and the bytes of the last sum, checked."""
    record = state.record()
    folder = Path(state.url) / (record.steps[-1].folder or "")
    assert main(["verify", str(folder)]) == 0
    return [step.total for step in record.steps], (folder / "model.safetensors").read_bytes()


def test_a_state_cannot_be_everywhere():
    with pytest.raises(UsageError, match="local folder"):
        State("hf://org/name")


def test_a_scale_of_zero_is_told(tmp_path, family, capsys):
    state = str(tmp_path / "state")
    init = ["continual", "init", state, "--base", str(family[0]), "--method", "task_arithmetic"]
    assert main([*init, "--set", "lambda=0"]) == 0
    assert main(["continual", "add", state, str(family[1]), "--quiet"]) == 0
    assert main(["continual", "status", state]) == 0
    assert "lambda inf" in capsys.readouterr().out


def test_rules_that_are_no_yaml(tmp_path, family, capsys):
    (tmp_path / "rules.yml").write_text("- {tensors: [}")
    init = ["continual", "init", str(tmp_path / "state"), "--base", str(family[0])]
    assert main([*init, "--rules", str(tmp_path / "rules.yml")]) == 2
    assert "RecipeError: rules" in capsys.readouterr().err


def test_a_sum_of_another_model_is_never_taken_for_ones_own(tmp_path, family):
    """Sums lie in folders of their own, whatever was undone."""
    state = begun(tmp_path / "state", family, 2)
    first = state.record().steps[-1].folder
    state.undo()
    assert state.add(str(family[3]), WHERE).folder != first
    state.undo()
    assert state.add(str(family[2]), WHERE).folder == first


def test_what_a_killed_clean_up_left_is_removed(tmp_path, family, monkeypatch):
    state = begun(tmp_path / "state", family, 2)
    with monkeypatch.context() as patch:
        patch.setattr(State, "_sweep", lambda *_: False)
        state.add(str(family[3]), WHERE)
    assert _numbers(tmp_path / "state") == [1, 2, 3]
    assert state.add(str(family[3]), WHERE).number == 3  # the same command ends what was begun
    assert _numbers(tmp_path / "state") == [2, 3]
    with pytest.raises(StateError, match="is in"):
        state.add(str(family[3]), WHERE)
