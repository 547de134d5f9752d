"""OPCM: per-step goldens, its corners, which tensors are projected, and matrices as tasks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from benchmarks import harness
from shardmerge import layout
from shardmerge.cli import main
from shardmerge.errors import MemoryBudgetError, PlanError, RecipeError
from shardmerge.kept import adding
from shardmerge.layout import Spec, lay_out
from shardmerge.matrices import matrices_in, matrix_shapes, split_problem
from shardmerge.memory import matrix_bytes
from shardmerge.merge import merge
from shardmerge.methods.opcm import Opcm, Projected, cleaned
from shardmerge.numerics import DType
from shardmerge.plan import MergeTask
from shardmerge.prepare import Where, prepare
from shardmerge.recipe import Recipe, Split
from shardmerge.report import read_records
from shardmerge.stores import Stores
from tests import support
from tests.support import write_checkpoint, write_recipe

PAPERS = Path(__file__).parent / "golden" / "papers"
CASES = {
    item["file"].removesuffix(".safetensors"): item
    for item in json.loads((PAPERS / "index.json").read_text())["cases"]
    if item["file"].startswith("opcm")
}
AUTO = Opcm(alpha=0.5, project=Projected.AUTO, shuffle=False)

SHAPES = {
    "model.embed_tokens.weight": (DType.BF16, (40, 24)),
    "model.layers.0.self_attn.qkv_proj.weight": (DType.BF16, (36, 24)),
    "model.layers.0.mlp.experts.gate_up_proj": (DType.BF16, (5, 24, 31)),
    "model.layers.0.norm.weight": (DType.F32, (24,)),
    "model.layers.1.self_attn.qkv_proj.weight": (DType.F16, (24, 36)),
    "model.layers.1.conv.weight": (DType.BF16, (8, 3, 3)),
    "lm_head.weight": (DType.BF16, (40, 24)),
}


def recipe_of(base: object, models: list, **more: object) -> dict[str, object]:
    return {
        "merge_method": "opcm",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        **more,
    }


@pytest.fixture
def family(tmp_path):
    """A base model and four models of every kind of tensor."""
    return [write_checkpoint(tmp_path / f"m{seed}", SHAPES, seed=seed) for seed in range(5)]


def merged(tmp_path: Path, recipe: dict[str, object], out: str = "out", **more) -> dict:
    path = write_recipe(tmp_path / f"{out}.yml", recipe)
    merge(path, str(tmp_path / out), threads=2, **more)
    return support.read_tensors(tmp_path / out)


# --- against the reference ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_goldens(case, tmp_path):
    golden = CASES[case]
    models = [PAPERS / f"{name}.safetensors" for name in golden["models"][: golden["step"] + 1]]
    recipe = recipe_of(PAPERS / "base.safetensors", models, dtype="float32")
    recipe["parameters"] = {"alpha": golden["params"]["alpha"]}
    merge(write_recipe(tmp_path / "r.yml", recipe), str(tmp_path / "out"), threads=2)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(PAPERS / golden["file"])
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert np.abs(ours[name].astype(np.float64) - expected).max() <= 1e-6, name


def test_every_tensor_by_the_formula(tmp_path, family):
    """Experts, splits in rows and columns, embeddings, convolutions: all as the definition says."""
    rules = [
        {"tensors": "*.0.self_attn.qkv_proj.weight", "split": {"rows": [24, 6, 6]}},
        {"tensors": "*.1.self_attn.qkv_proj.weight", "split": {"columns": 3}},
    ]
    got = merged(tmp_path, recipe_of(family[0], family[1:], dtype="float32", rules=rules))
    base, *models = (
        {n: support.loaded(t[2], t[0]) for n, t in read.items()}
        for read in map(support.read_tensors, family)
    )
    sums, deltas = {}, [{n: m[n] - base[n] for n in base} for m in models]
    for name, (_, shape) in SHAPES.items():
        total, *others = (delta[name].reshape(shape).copy() for delta in deltas)
        for other in others:
            total = total + np.array(_cleaned(name, total, other.copy()))
        sums[name] = total
    norm = math.sqrt(sum(float((total**2).sum()) for total in sums.values()))
    each = [math.sqrt(sum(float((d**2).sum()) for d in delta.values())) for delta in deltas]
    for name, total in sums.items():
        expected = base[name] + total.reshape(-1) * np.mean(each) / norm
        found = support.loaded(got[name][2], got[name][0])
        assert np.abs(found - expected).max() < 2e-5, name


def _cleaned(name: str, total: np.ndarray, delta: np.ndarray) -> np.ndarray:
    if name.endswith("0.self_attn.qkv_proj.weight"):
        for rows in (slice(0, 24), slice(24, 30), slice(30, 36)):
            delta[rows] = cleaned(total[rows], delta[rows], 0.5)
    elif name.endswith("1.self_attn.qkv_proj.weight"):
        for first in (0, 12, 24):
            here = (slice(None), slice(first, first + 12))
            delta[here] = cleaned(total[here], delta[here], 0.5)
    elif "expert" in name:
        for number in range(len(delta)):
            delta[number] = cleaned(total[number], delta[number], 0.5)
    elif name == "lm_head.weight":
        delta = cleaned(total, delta, 0.5)
    return delta


# --- which tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "projected"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 4), True),
        ("lm_head.weight", (8, 4), True),
        ("h.0.attn.c_attn.weight", (4, 12), True),
        ("model.layers.0.mlp.experts.down_proj", (3, 8, 4), True),
        ("model.embed_tokens.weight", (8, 4), False),
        ("bert.embeddings.position_embeddings.weight", (8, 4), False),
        ("transformer.wte.weight", (8, 4), False),
        ("wpe.weight", (8, 4), False),
        ("shared.weight", (8, 4), False),
        ("model.shared.weight", (8, 4), False),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (8, 4), True),
        ("conv1.weight", (8, 4, 3), False),
        ("patch.weight", (8, 4, 3, 3), False),
        ("model.norm.weight", (8,), False),
        ("model.layers.0.mlp.gate", (0, 8), False),
    ],
)
def test_matrices_but_not_embeddings_are_projected(name, shape, projected):
    assert AUTO.whole(name, shape) is projected


def test_a_rule_says_otherwise(tmp_path, family, capsys):
    rules = [
        {"tensors": "*embed_tokens*", "parameters": {"project": "always"}},
        {"tensors": "lm_head.*", "parameters": {"project": "never"}},
    ]
    path = write_recipe(tmp_path / "r.yml", recipe_of(family[0], family[1:], rules=rules))
    first = prepare(path, str(tmp_path / "out"), Where()).first
    whole = {tensor.name for tensor in first.plan.tensors if tensor.whole}
    assert "model.embed_tokens.weight" in whole and "lm_head.weight" not in whole
    assert main(["plan", path]) == 0
    told = capsys.readouterr().out
    assert "projected" in told and "model.embed_tokens.weight" not in told.split("projected")[0]


def test_other_methods_beside_it(tmp_path, family):
    rules = [
        {
            "tensors": "lm_head.weight",
            "merge_method": "task_arithmetic",
            "parameters": {"weight": 0.5},
        },
        {"tensors": "*norm*", "from": "base"},
    ]
    both = merged(tmp_path, recipe_of(family[0], family[1:3], rules=rules))
    alone = recipe_of(family[0], family[1:3], parameters={"weight": 0.5})
    other = merged(tmp_path, {**alone, "merge_method": "task_arithmetic"}, "other")
    base = support.read_tensors(family[0])
    assert both["lm_head.weight"] == other["lm_head.weight"]
    assert both["model.layers.0.norm.weight"] == base["model.layers.0.norm.weight"]
    assert both["model.embed_tokens.weight"] != other["model.embed_tokens.weight"]


@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=3).map(tuple),
    axis=st.sampled_from(["rows", "columns"]),
    data=st.data(),
)
def test_matrices_of_a_split_are_a_partition(shape, axis, data):
    length = shape[-2:][axis == "columns"]
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=4)) | {length})
    sizes = tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False))
    split = Split(axis, sizes)
    assert not split_problem(shape, split)
    counts = np.zeros(shape[-2:], dtype=int)
    for rows, columns in matrices_in(shape, split):
        counts[rows, columns] += 1
    assert (counts == 1).all()
    assert sum(r * c for r, c in matrix_shapes(shape, split)) == counts.size
    assert split_problem(shape, Split(axis, (*sizes, 1)))


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"rows": 5}, "its 36 rows are not 5 times as many"),
        ({"rows": [30, 5]}, "it has 36 rows, not 35"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(tmp_path, family, split, words):
    rules = [{"tensors": "*.0.self_attn.qkv_proj.weight", "split": split}]
    path = write_recipe(tmp_path / "r.yml", recipe_of(family[0], family[1:], rules=rules))
    with pytest.raises(PlanError, match=words):
        prepare(path, str(tmp_path / "out"), Where())


def test_a_split_where_nothing_is_seen_as_a_whole_is_refused(tmp_path, family):
    rules = [{"tensors": "*embed*", "split": {"rows": 2}}]
    path = write_recipe(tmp_path / "r.yml", recipe_of(family[0], family[1:], rules=rules))
    with pytest.raises(PlanError, match="element by element"):
        prepare(path, str(tmp_path / "out"), Where())


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({}, "needs one of 'rows' and 'columns'"),
        ({"rows": 1}, "rules\\[0\\].split.rows"),
        ({"rows": [3]}, "at least two"),
        ({"depth": 2}, "depth"),
        ({"rows": 2, "columns": 2}, "needs one of"),
    ],
)
def test_a_split_that_says_nothing_is_refused(split, words):
    recipe = recipe_of("b", ["m"], rules=[{"tensors": "*", "split": split}])
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(json.dumps(recipe))


def test_models_that_lack_tensors_are_refused_unless_they_count_as_equal(tmp_path, family):
    """One number scales all tensors: they must be of the same models."""
    fewer = {name: spec for name, spec in SHAPES.items() if "norm" not in name}
    lacking = write_checkpoint(tmp_path / "lacking", fewer, seed=7)
    recipe = recipe_of(family[0], [family[1], lacking])
    recipe["rules"] = [{"tensors": "*norm*", "missing": "skip"}]
    with pytest.raises(RecipeError, match="missing: base"):
        merged(tmp_path, recipe)
    recipe["rules"] = [{"tensors": "*norm*", "missing": "base"}]
    merged(tmp_path, recipe)


# --- order ----------------------------------------------------------------------------------------


def test_the_order_is_the_recipes_or_drawn_from_its_seed(tmp_path, family):
    recipe = recipe_of(family[0], family[1:])
    drawn = Opcm(alpha=0.5, project=Projected.AUTO, shuffle=True).order(4, 3)
    assert list(drawn) != [0, 1, 2, 3] and sorted(drawn) == [0, 1, 2, 3]
    by_hand = recipe_of(family[0], [family[1 + place] for place in drawn])
    shuffled = merged(tmp_path, {**recipe, "parameters": {"shuffle": True}, "seed": 3}, "a")
    assert shuffled == merged(tmp_path, by_hand, "b")
    assert shuffled != merged(tmp_path, recipe, "c")


# --- tasks, memory, bytes -------------------------------------------------------------------------


def test_the_same_bytes_for_any_memory_threads_and_shards(tmp_path, family, monkeypatch):
    recipe = recipe_of(family[0], family[1:])
    plain = merged(tmp_path, recipe)
    assert merged(tmp_path, {**recipe, "shard_size": 4096}, "shards") == plain
    assert merged(tmp_path, recipe, "less", memory_bytes=300 * 2**20) == plain
    support.shrink(monkeypatch.setattr)
    small = merged(tmp_path, {**recipe, "shard_size": 4096}, "small", memory_bytes=300 * 2**20)
    # Blocks of the sums are smaller there, so norms may be rounded another way.
    for name, (dtype, _, raw) in small.items():
        got, expected = support.loaded(raw, dtype), support.loaded(plain[name][2], dtype)
        assert np.allclose(got, expected, rtol=2.0**-7, atol=1e-6), name


@given(
    experts=st.integers(1, 12),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    part=st.integers(200, 4000),
)
def test_units_hold_whole_matrices(experts, rows, columns, part):
    spec = Spec("w", DType.F32, (experts, rows, columns), grain=rows * columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CANONICAL_BLOCK", 64)
        patch.setattr(layout, "LEAST_PART_BYTES", 16)
        (shard,) = lay_out([spec], [0], None, part_bytes=part)
    position = 0
    for unit in shard.units:
        pieces = [piece for piece_of in unit.parts for piece in piece_of.pieces]
        assert pieces[0].start % spec.grain == 0 and pieces[-1].stop % spec.grain == 0
        for piece in pieces:
            assert piece.start == position
            position = piece.stop
    assert position == spec.numel
    assert shard.units[-1].parts[-1].stop == shard.nbytes


def test_a_matrix_that_does_not_fit_is_refused_with_a_budget_that_is_enough(tmp_path):
    shapes = {"model.layers.3.mlp.down_proj.weight": (DType.BF16, (900, 2100))}
    family = [write_checkpoint(tmp_path / f"m{seed}", shapes, seed=seed) for seed in range(3)]
    path = write_recipe(tmp_path / "r.yml", recipe_of(family[0], family[1:]))
    with pytest.raises(MemoryBudgetError, match="900 x 2100") as refused:
        prepare(path, str(tmp_path / "out"), Where(memory_bytes=230 * 2**20))
    assert '"model.layers.*.mlp.down_proj.weight"' in str(refused.value)
    enough = int(str(refused.value).partition("--memory ")[2].partition("MiB")[0])
    plan = prepare(path, str(tmp_path / "out"), Where(memory_bytes=enough * 2**20)).first.plan
    (task,) = plan.tasks
    assert isinstance(task, MergeTask) and task.memory_bytes >= matrix_bytes(plan.tensors[0])
    assert plan.peak_bytes <= enough * 2**20
    with pytest.raises(MemoryBudgetError):
        prepare(path, str(tmp_path / "out"), Where(memory_bytes=(enough - 1) * 2**20))


def test_nan_is_found_in_matrices_too(tmp_path, family, capsys):
    support.set_element(family[2], "lm_head.weight", 5, math.nan)
    path = write_recipe(tmp_path / "r.yml", recipe_of(family[0], family[1:]))
    assert main(["merge", path, str(tmp_path / "out"), "--quiet"]) == 1
    told = capsys.readouterr().err
    assert "NaN" in told and "lm_head.weight" in told and str(family[2]) in told
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_the_plan_tells_what_is_kept_and_projected(tmp_path, family, capsys):
    path = write_recipe(tmp_path / "r.yml", recipe_of(family[0], family[1:]))
    assert main(["plan", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    elements = sum(math.prod(shape) for _, shape in SHAPES.values())
    assert elements * 4 <= facts["scratch_bytes"] <= elements * 4 + 8192
    assert facts["disk_bytes"] == facts["write_bytes"] + facts["scratch_bytes"]
    assert facts["projected"]["tensors"] == 4
    assert "*embed*" in facts["projected"]["not"]
    ready = prepare(path, "OUT", Where())
    assert adding(ready.first.plan.outputs) == AUTO


def test_memory_stays_within_the_promise(tmp_path):
    """Of a process of its own, with the smallest budget that is not refused."""
    shapes = {f"model.layers.{i}.up_proj.weight": (DType.BF16, (1100, 2600)) for i in range(3)}
    family = [write_checkpoint(tmp_path / f"m{seed}", shapes, seed=seed) for seed in range(3)]
    path = write_recipe(tmp_path / "r.yml", recipe_of(family[0], family[1:]))
    budget = support.least_memory(path)
    command = [sys.executable, "-m", "shardmerge", "merge", path, str(tmp_path / "out")]
    found = harness.run([*command, "--memory", f"{budget}B", "--device", "cpu", "--quiet"])
    assert found.peak_anon_bytes <= budget
    rows = read_records(str(tmp_path / "out"), Stores())
    assert {row.step for row in rows} == {"sum", "merge"}
    assert max(row.peak_bytes for row in rows) <= rows[0].promised_bytes <= budget
