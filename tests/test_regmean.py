"""RegMean: what it solves, where its sums are singular, which tensors, and matrices as tasks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks import harness
from shardmerge.arrays import merge_arrays
from shardmerge.cli import main
from shardmerge.errors import CheckpointError, MemoryBudgetError, PlanError, RecipeError
from shardmerge.kernels import regression
from shardmerge.kernels.linalg import OnTorch, on_cpu
from shardmerge.kernels.regression import (
    FLOOR,
    NotPositive,
    gram_problem,
    solve,
    workspace_bytes,
)
from shardmerge.memory import alike, matrix_bytes
from shardmerge.merge import merge
from shardmerge.methods.regmean import RegMean, Side, formula
from shardmerge.numerics import DType, to_stored
from shardmerge.prepare import Where, prepare
from shardmerge.report import read_records
from shardmerge.stores import Stores
from tests import support
from tests.support import SINGLE, Specs, set_element, write_checkpoint, write_grams, write_recipe

Floats = npt.NDArray[np.float64]

SPECS: Specs = {
    "model.embed_tokens.weight": (DType.BF16, (40, 24)),
    "model.layers.0.self_attn.q_proj.weight": (DType.BF16, (24, 24)),
    "model.layers.0.mlp.up_proj.weight": (DType.BF16, (36, 24)),
    "model.layers.0.mlp.experts.down_proj": (DType.F16, (5, 24, 31)),
    "model.layers.0.norm.weight": (DType.F32, (24,)),
    "model.layers.1.attn.c_proj.weight": (DType.F32, (24, 24)),
    "model.layers.1.mlp.c_fc.weight": (DType.F32, (24, 36)),
    "model.layers.1.mlp.c_fc.bias": (DType.BF16, (36,)),
    "lm_head.weight": (DType.F64, (40, 24)),
}
ROWS = ("model.layers.1.attn.c_proj.weight", "model.layers.1.mlp.c_fc.weight")
UP, HEAD, NORM = "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.layers.0.norm.weight"


def write_family(folder: Path, specs: Specs = SPECS, *, count: int = 3) -> dict[str, Any]:
    """A recipe over models with Gram matrices, which are in the folder too."""
    rows = [name for name in ROWS if name in specs]
    models = []
    for seed in range(count):
        model = write_checkpoint(folder / f"m{seed}", specs, seed=seed)
        gram = write_grams(folder / f"g{seed}", specs, seed=seed, rows=rows)
        models.append({"model": str(model), "gram": str(gram)})
    return {"merge_method": "regmean", "models": models}


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    return write_family(tmp_path)


def merged(folder: Path, recipe: Mapping[str, Any], out: str = "out", **more: Any) -> dict:
    merge(write_recipe(folder / f"{out}.yml", recipe), str(folder / out), threads=2, **more)
    return support.read_tensors(folder / out)


def values(folder: str | Path) -> dict[str, Floats]:
    """Every tensor of a checkpoint, in float64."""
    return {
        name: support.loaded(raw, dtype).reshape(shape)
        for name, (dtype, shape, raw) in support.read_tensors(Path(folder)).items()
    }


def rewrite_gram(folder: str, change: Callable[[dict[str, npt.NDArray[Any]]], None]) -> None:
    """Change the Gram matrices of a folder; bfloat16 as uint16."""
    path = Path(folder)
    found = {
        name: np.frombuffer(raw, dtype=dtype.torch_name).reshape(shape).copy()
        for name, (dtype, shape, raw) in support.read_tensors(path).items()
    }
    change(found)
    kinds = {np.dtype(np.float32): DType.F32, np.dtype(np.float64): DType.F64}
    kinds |= {np.dtype(np.uint16): DType.BF16}
    specs = {name: (kinds[array.dtype], array.shape) for name, array in found.items()}
    support.write_shard(path / SINGLE, specs, found)


def gram_of(inputs: Floats) -> Floats:
    return inputs.T @ inputs / len(inputs)


def regmean(models: list[Floats], grams: list[Floats], r: float = 1.0, **more: Any) -> Floats:
    weight = more.pop("weight", (1.0,) * len(models))
    method = RegMean(reduce_non_diagonal=r, weight=weight, inputs=more.pop("inputs", Side.COLUMNS))
    return np.array(merge_arrays(method, models=models, gram=grams, **more))


# --- what it solves -------------------------------------------------------------------------------


def test_of_linear_regressions_it_is_the_regression_on_all_data():
    """Each model is the least squares fit of its data; so is the merged one, of all of it."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((50, 6)) * scale for scale in (1.0, 3.0, 0.3)]
    outputs = [x @ rng.standard_normal((6, 4)) + rng.standard_normal((50, 4)) for x in inputs]
    fits = [np.linalg.lstsq(x, y)[0].T for x, y in zip(inputs, outputs, strict=True)]
    best = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs))[0].T
    got = regmean(fits, list(map(gram_of, inputs)))
    assert np.abs(got - best).max() < 1e-6
    assert np.abs(np.mean(fits, axis=0) - best).max() > 0.01

    # With weights, that of data which counts as often.
    more = (2.0, 0.5, 1.0)
    roots = [math.sqrt(w) for w in more]
    best = np.linalg.lstsq(
        np.concatenate([r * x for r, x in zip(roots, inputs, strict=True)]),
        np.concatenate([r * y for r, y in zip(roots, outputs, strict=True)]),
    )[0].T
    assert np.abs(regmean(fits, list(map(gram_of, inputs)), weight=more) - best).max() < 1e-6


def test_without_the_rest_of_the_gram_matrices_each_input_is_averaged_by_itself():
    rng = np.random.default_rng(1)
    models = [rng.standard_normal((3, 5)) for _ in range(2)]
    grams = [gram_of(rng.standard_normal((20, 5))) for _ in range(2)]
    first, second = (gram.diagonal() for gram in grams)
    expected = (models[0] * first + models[1] * second) / (first + second)
    assert np.abs(regmean(models, grams, r=0.0) - expected).max() < 1e-6
    halves = [(gram + np.diag(gram.diagonal())) / 2 for gram in grams]
    assert np.abs(regmean(models, grams, r=0.5) - regmean(models, halves)).max() < 1e-6


def test_rows_are_columns_of_the_transpose():
    rng = np.random.default_rng(2)
    models = [rng.standard_normal((4, 4)) for _ in range(3)]
    grams = [gram_of(rng.standard_normal((9, 4))) for _ in range(3)]
    turned = regmean([model.T for model in models], grams, inputs=Side.ROWS).T
    assert np.abs(turned - regmean(models, grams)).max() < 1e-6
    assert np.abs(turned - regmean([model.T for model in models], grams).T).max() > 0.01


# --- where the sums are singular ------------------------------------------------------------------


def test_directions_that_nobody_has_seen_stay_the_mean():
    """Inputs of two models span four of six dimensions; scales differ by far."""
    rng = np.random.default_rng(3)
    scales = np.array([1e-3, 1.0, 50.0, 1.0, 0.1, 7.0])
    span = rng.standard_normal((4, 6)) * scales
    inputs = [rng.standard_normal((30, 4)) @ span for _ in range(2)]
    models = [rng.standard_normal((5, 6)) for _ in range(2)]
    grams = list(map(gram_of, inputs))
    got, mean = regmean(models, grams), (models[0] + models[1]) / 2
    unseen = np.linalg.svd(span)[2][4:]
    assert np.abs((got - mean) @ unseen.T).max() < 1e-5
    # On what was seen it is the regression on both models' outputs.
    best = np.linalg.lstsq(
        np.concatenate(inputs),
        np.concatenate([x @ m.T for x, m in zip(inputs, models, strict=True)]),
    )[0].T
    for x in inputs:
        assert np.abs(x @ (got - best).T).max() < 1e-4 * np.abs(x @ best.T).max()
    assert np.abs(inputs[0] @ (got - mean).T).max() > 1.0


@pytest.mark.parametrize("r", [0.0, 0.9, 1.0])
def test_an_input_that_was_always_zero_stays_the_mean(r):
    rng = np.random.default_rng(4)
    models = [rng.standard_normal((3, 5)).astype(np.float32) for _ in range(2)]
    inputs = [rng.standard_normal((20, 5)) * [1, 1, 0, 1, 1] for _ in range(2)]
    got = regmean(models, list(map(gram_of, inputs)), r, weight=(1.0, 3.0))
    mean = (models[0].astype(np.float64) + 3.0 * models[1]) / 4
    assert np.abs(got[:, 2] - mean[:, 2]).max() < 1e-7
    assert np.abs(got - mean).max() > 0.05


def test_no_inputs_at_all_are_the_mean():
    models = [np.array([[1.0, 2.0]]), np.array([[3.0, 6.0]])]
    zeros = np.zeros((2, 2))
    assert regmean(models, [zeros, zeros], r=0.9).tolist() == [[2.0, 4.0]]
    # A model without any does not count where the other has some.
    assert regmean(models, [np.eye(2), zeros]).tolist() == [[1.0, 2.0]]


def equilibrated(size: int, smallest: float) -> Floats:
    """A matrix with a diagonal of ones whose smallest eigenvalue is given: of two inputs' angle."""
    found = np.eye(size)
    found[0, 1] = found[1, 0] = 1 - smallest
    return found


@pytest.mark.parametrize("run", [on_cpu, OnTorch("cpu")], ids=["numpy", "torch"])
@pytest.mark.parametrize("share", [0.5, 0.99, 1.01, 2.0, 100.0])
def test_the_floor_is_where_it_is_said_to_be(run, share):
    """Below it a direction is left alone, above it both ways give the same."""
    size = 16
    floor = FLOOR * math.sqrt(size)
    scales = np.exp(np.random.default_rng(5).standard_normal(size))
    total = equilibrated(size, share * floor) * scales * scales[:, None]
    wanted = np.random.default_rng(6).standard_normal((3, size))
    got = run(solve, total.copy(), wanted @ total)
    weak = np.zeros(size)
    weak[:2] = np.array([1.0, -1.0]) / scales[:2]
    weak /= np.linalg.norm(weak)
    if share > 1:
        assert np.abs(got - wanted).max() < 1e-6
    else:
        assert np.abs(got @ weak).max() < 1e-9
        assert np.abs((got - wanted) - ((got - wanted) @ weak)[:, None] * weak).max() < 1e-6


@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("size", [1, 3, 300, 700])
def test_both_ways_give_the_same(xp, size, monkeypatch):
    rng = np.random.default_rng(size)
    inputs = rng.standard_normal((2 * size + 5, size)) * np.exp(rng.standard_normal(size))
    total, wanted = gram_of(inputs), rng.standard_normal((7, size))
    run = on_cpu if xp is np else OnTorch("cpu")
    ways = []
    for factor in (regression._safe_factor, lambda *_: None):
        monkeypatch.setattr(regression, "_safe_factor", factor)
        ways.append(run(solve, total.copy(), wanted @ total))
    for found in ways:
        assert np.abs(found - wanted).max() < 1e-10


def test_more_outputs_than_inputs_and_none():
    rng = np.random.default_rng(7)
    total = gram_of(rng.standard_normal((20, 4)))
    wanted = rng.standard_normal((400, 4))
    assert np.abs(solve(total.copy(), wanted @ total) - wanted).max() < 1e-10
    assert solve(np.zeros((0, 0)), np.zeros((3, 0))).shape == (3, 0)


def test_what_is_not_finite_makes_all_of_a_matrix_nan():
    for total, moments in ((np.diag([1.0, np.nan]), np.ones((1, 2))), (np.eye(1), [[np.inf]])):
        assert np.isnan(solve(np.array(total), np.array(moments))).all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda g: g.__setitem__((1, 1), -1.0), "diagonal holds -1 at 1"),
        (lambda g: g.__setitem__((0, 300), 0.5), "differs from its transpose by 0.5"),
        (lambda g: None, ""),
        (lambda g: g.__setitem__((0, 300), 0.0009), ""),
        (lambda g: g.__setitem__((5, 5), np.nan), ""),
        (lambda g: (g.__imul__(1000), g.__setitem__((0, 300), 0.5)), ""),
    ],
)
def test_what_can_be_no_gram_matrix_is_told(change, why):
    gram = np.eye(301)
    change(gram)
    found = gram_problem(gram)
    assert why in found and bool(found) == bool(why)


def test_a_negative_eigenvalue_is_no_rounding():
    total = np.eye(3)
    total[0, 1] = total[1, 0] = 1.1
    with pytest.raises(NotPositive, match=r"eigenvalue -0\.1;"):
        solve(total, np.ones((1, 3)))
    with pytest.raises(ValueError, match="eigenvalue"):
        regmean([np.ones((1, 2))] * 2, [np.array([[1, 1.2], [1.2, 1]])] * 2)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32", "float64"])
def test_every_tensor_by_the_formula(tmp_path, family, dtype):
    """Layers, Conv1D, experts, biases, embeddings; rounded once to whatever is written."""
    weight = (1.0, 0.25, 2.0)
    for model, own in zip(family["models"], weight, strict=True):
        model["parameters"] = {"weight": own}
    family["parameters"] = {"reduce_non_diagonal": 0.8}
    got = merged(tmp_path, family | ({"dtype": dtype} if dtype else {}))
    models = [values(model["model"]) for model in family["models"]]
    grams = [values(model["gram"]) for model in family["models"]]
    for name, (stored, shape) in SPECS.items():
        expected = formula(
            None,
            [model[name] for model in models],
            gram=[gram[name] for gram in grams if name in gram],
            reduce_non_diagonal=0.8,
            weight=weight,
            inputs=Side.ROWS if name in ROWS else Side.COLUMNS,
        )
        written = DType.F64 if dtype == "float64" else stored if dtype is None else got[name][0]
        assert got[name][:2] == (written, shape)
        if name in grams[0]:
            plain = np.average([model[name] for model in models], axis=0, weights=weight)
            assert np.abs(expected - plain).max() > 0.001
        if written is DType.F64:
            assert (
                np.abs(support.loaded(got[name][2], written) - expected.reshape(-1)).max() < 1e-14
            )
        elif name in grams[0]:
            rounded = to_stored(expected, written).tobytes()
            assert got[name][2] == rounded or _off_by_a_tie(got[name][2], expected, written)


def _off_by_a_tie(raw: bytes, expected: Floats, dtype: DType) -> bool:
    """Whether it is as rounded, but for values so near the middle that float64's errors decide."""
    ulp = {DType.F16: 2.0**-10, DType.BF16: 2.0**-7, DType.F32: 2.0**-23}[dtype]
    found = support.loaded(raw, dtype)
    apart = np.abs(found - expected.reshape(-1))
    return bool((apart <= ulp / 2 * np.abs(expected.reshape(-1)) * (1 + 1e-6) + 2e-8).all())


def test_experts_are_solved_one_by_one(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    recipe = write_family(tmp_path, {name: (DType.F32, (5, 24, 31))})
    together = values_of(merged(tmp_path, recipe))[name]
    models = [values(model["model"])[name] for model in recipe["models"]]
    grams = [values(model["gram"])[name] for model in recipe["models"]]
    for expert in range(5):
        alone = regmean([m[expert] for m in models], [g[expert] for g in grams], r=0.9)
        assert np.array_equal(together[expert], alone.astype(np.float64))


def values_of(tensors: dict) -> dict[str, Floats]:
    return {n: support.loaded(raw, d).reshape(s) for n, (d, s, raw) in tensors.items()}


def test_the_same_bytes_for_any_memory_threads_shards_and_slices(
    tmp_path, family, monkeypatch, capsys
):
    plain = merged(tmp_path, family)
    assert merged(tmp_path, family | {"shard_size": 4096}, "shards") == plain
    assert merged(tmp_path, family, "less", memory_bytes=300 * 2**20) == plain
    path = write_recipe(tmp_path / "sliced.yml", family)
    order = str(tmp_path / "order.json")
    assert main(["plan", path, str(tmp_path / "sliced"), "--save", order]) == 0
    for number in ("0/2", "1/2"):
        assert main(["worker", "--plan", order, "--slice", number]) == 0
    assert main(["publish", "--plan", order]) == 0
    assert support.read_tensors(tmp_path / "sliced") == plain
    support.shrink(monkeypatch.setattr)
    small = family | {"shard_size": 4096}
    assert merged(tmp_path, small, "small", memory_bytes=300 * 2**20) == plain


def test_linear_algebra_on_another_device_gives_the_same(tmp_path, family, monkeypatch):
    """Here by torch, as on CUDA, on the CPU."""
    plain = values_of(merged(tmp_path, family | {"dtype": "float64"}))
    monkeypatch.setattr("shardmerge.whole.linear_on", lambda _: OnTorch("cpu"))
    other = values_of(merged(tmp_path, family | {"dtype": "float64"}, "torch"))
    for name, expected in plain.items():
        assert np.abs(other[name] - expected).max() < 1e-12, name


def test_a_model_without_a_tensor_may_be_left_out_of_it(tmp_path, family):
    """And its Gram matrix with it: of the others, each goes with its own model."""
    lacking = {name: spec for name, spec in SPECS.items() if name != UP}
    write_checkpoint(tmp_path / "m1", lacking, seed=1)
    rules = [{"tensors": UP, "missing": "skip"}]
    got = values_of(merged(tmp_path, family | {"rules": rules, "dtype": "float32"}))[UP]
    first, _, last = family["models"]
    expected = regmean(
        [values(model["model"])[UP] for model in (first, last)],
        [values(model["gram"])[UP] for model in (first, last)],
        r=0.9,
    )
    assert np.array_equal(got, expected)


def test_layers_of_slices_go_with_the_gram_matrices_of_their_own_names(tmp_path):
    names = [f"model.layers.{number}.up.weight" for number in range(3)]
    specs: Specs = dict.fromkeys(names, (DType.F32, (6, 5)))
    recipe = write_family(tmp_path, specs, count=2)
    for model in recipe["models"]:
        (Path(model["model"]) / "config.json").write_text('{"num_hidden_layers": 3}')
    pairs = [(2, 0), (1, 1)]
    recipe["slices"] = [
        {
            "sources": [
                {**model, "layer_range": [at, at + 1]}
                for model, at in zip(recipe["models"], pair, strict=True)
            ]
        }
        for pair in pairs
    ]
    sources = recipe.pop("models")
    got = values_of(merged(tmp_path, recipe))
    for number, pair in enumerate(pairs):
        models, grams = (
            [values(s[kind])[names[at]] for s, at in zip(sources, pair, strict=True)]
            for kind in ("model", "gram")
        )
        assert np.array_equal(got[names[number]], regmean(models, grams, r=0.9))


# --- what is refused ------------------------------------------------------------------------------


def refused(tmp_path: Path, recipe: Mapping[str, Any], kind: type[Exception] = PlanError) -> str:
    with pytest.raises(kind) as found:
        merged(tmp_path, recipe)
    assert not list(tmp_path.glob("out/*.safetensors"))
    return str(found.value)


def test_a_tensor_that_only_some_gram_checkpoints_hold_is_refused_by_name(tmp_path, family):
    second = family["models"][1]
    rewrite_gram(second["gram"], lambda found: found.pop(UP))
    told = refused(tmp_path, family)
    assert f"{second['gram']}, the gram of {second['model']}, does not fit it in 1 tensor" in told
    assert f"{UP}: it is missing" in told
    rule = told.partition("rules: ")[2]
    assert rule.startswith(f'[{{tensors: "{UP}", merge_method: linear')
    parameters = {"weight": 1.0}
    rules = [{"tensors": UP, "merge_method": "linear", "parameters": parameters}]
    averaged = values_of(merged(tmp_path, family | {"rules": rules}))[UP]
    models = [values(model["model"])[UP] for model in family["models"]]
    assert np.abs(averaged - np.mean(models, axis=0)).max() < 0.001


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda found: found.update({UP: np.eye(23, dtype=np.float32)}),
            "its shape is [23, 23], which is not that of inputs in columns of a weight of",
        ),
        (
            lambda found: found.update({UP: np.zeros((24, 24), dtype=np.uint16)}),
            "its dtype is bfloat16; it must be float32 or float64",
        ),
        (
            lambda found: found.update({NORM: np.eye(24, dtype=np.float32)}),
            "the tensor's shape is [24], and only matrices have inputs",
        ),
    ],
)
def test_what_fits_no_weight_is_refused(tmp_path, family, change, why):
    for model in family["models"]:
        rewrite_gram(model["gram"], change)
    assert why in refused(tmp_path, family)


def test_a_square_weight_must_say_where_its_inputs_are(tmp_path, family):
    for model in family["models"]:
        (Path(model["gram"]) / "config.json").unlink()
    told = refused(tmp_path, family)
    assert "model.layers.0.self_attn.q_proj.weight: the weight is 24 x 24, and nothing says" in told
    assert "model.layers.1.attn.c_proj.weight" in told and UP not in told
    # By the recipe, the one and the other.
    rules = [{"tensors": list(ROWS), "parameters": {"inputs": "rows"}}]
    said = family | {"parameters": {"inputs": "columns"}, "rules": rules}
    by_recipe = merged(tmp_path, said)
    for model in family["models"]:
        facts = {"gram": {"rows": list(ROWS)}}
        (Path(model["gram"]) / "config.json").write_text(json.dumps(facts))
    assert merged(tmp_path, family, "said") == by_recipe
    wrong = merged(
        tmp_path,
        family | {"rules": [{"tensors": ROWS[0], "parameters": {"inputs": "columns"}}]},
        "wrong",
    )
    assert wrong[ROWS[0]] != by_recipe[ROWS[0]]


def test_models_must_agree_on_where_the_inputs_are(tmp_path, family):
    (Path(family["models"][2]["gram"]) / "config.json").write_text('{"gram": {"rows": []}}')
    told = refused(tmp_path, family)
    assert "the weight's rows, rows, columns, in this order" in told and ROWS[0] in told


def test_gram_matrices_of_other_names_are_no_plain_mean(tmp_path, family):
    for model in family["models"]:
        rewrite_gram(
            model["gram"],
            lambda found: [found.update({f"model.{n}": found.pop(n)}) for n in list(found)],
        )
    told = refused(tmp_path, family)
    assert "No gram checkpoint holds anything for any tensor that regmean merges" in told


def test_a_weight_has_one_gram_matrix_for_all_of_it(tmp_path, family):
    rules = [{"tensors": UP, "split": {"rows": 2}}]
    assert "gram is of the whole tensor" in refused(tmp_path, family | {"rules": rules})


def test_every_model_needs_one_and_weights_have_a_mean(tmp_path, family):
    lacking = {**family, "models": [{"model": m["model"]} for m in family["models"]]}
    assert "needs 'gram: <checkpoint>' for regmean" in refused(tmp_path, lacking, RecipeError)
    nothing = family | {"parameters": {"weight": 0.0}}
    assert "all weights are 0" in refused(tmp_path, nothing, RecipeError)


@pytest.mark.parametrize(
    ("value", "why"),
    [((3, 4, 500.0), "differs from its transpose by"), ((4, 4, -1.0), "diagonal holds -1")],
)
def test_values_that_are_no_gram_matrix_are_refused(tmp_path, family, value, why):
    row, column, number = value
    gram = family["models"][1]["gram"]
    rewrite_gram(gram, lambda found: found[UP].__setitem__((row, column), number))
    told = refused(tmp_path, family, CheckpointError)
    assert UP in told and why in told and f"{gram}/{SINGLE}" in told


@pytest.mark.parametrize(("kind", "element"), [("model", 5), ("gram", 7)])
def test_nan_is_found_wherever_it_is(tmp_path, family, capsys, kind, element):
    folder = family["models"][1][kind]
    set_element(Path(folder), UP, element, math.nan)
    path = write_recipe(tmp_path / "r.yml", family)
    assert main(["merge", path, str(tmp_path / "out"), "--quiet"]) == 1
    told = capsys.readouterr().err
    assert "NaN" in told and UP in told and folder in told
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_result_that_the_output_cannot_hold_is_found(tmp_path, capsys):
    specs = {UP: (DType.F32, (36, 24))}
    recipe = write_family(tmp_path, specs, count=2)
    for model in recipe["models"]:
        set_element(Path(model["model"]), UP, 3, 1e6)
    path = write_recipe(tmp_path / "r.yml", recipe | {"dtype": "float16"})
    assert main(["merge", path, str(tmp_path / "out"), "--quiet"]) == 1
    assert UP in capsys.readouterr().err


# --- plans and memory -----------------------------------------------------------------------------


def test_the_plan_tells_of_matrices_and_of_what_is_averaged(tmp_path, family, capsys):
    path = write_recipe(tmp_path / "r.yml", family)
    assert main(["plan", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["matrices"]["tensors"] == 6 and facts["projected"] is None
    assert facts["matrices"]["largest"] == HEAD  # the only one of float64
    assert any("embed_tokens" in note and "no gram checkpoint" in note for note in facts["notes"])
    assert main(["plan", path]) == 0
    assert "6 tensors seen as a whole" in capsys.readouterr().out


def test_a_matrix_that_does_not_fit_is_refused_with_a_budget_that_is_enough(tmp_path):
    recipe = write_family(tmp_path, {"model.layers.3.up.weight": (DType.BF16, (300, 700))}, count=2)
    path = write_recipe(tmp_path / "r.yml", recipe)
    with pytest.raises(MemoryBudgetError, match="300 x 700, with a gram of 700 x 700") as refusal:
        prepare(path, str(tmp_path / "out"), Where(memory_bytes=230 * 2**20))
    assert '"model.layers.*.up.weight", merge_method: linear' in str(refusal.value)
    enough = int(str(refusal.value).partition("--memory ")[2].partition("MiB")[0])
    plan = prepare(path, str(tmp_path / "out"), Where(memory_bytes=enough * 2**20)).plan
    assert plan.tasks[0].memory_bytes >= matrix_bytes(plan.tensors[0])
    with pytest.raises(MemoryBudgetError):
        prepare(path, str(tmp_path / "out"), Where(memory_bytes=(enough - 1) * 2**20))


def test_weights_of_one_shape_may_differ_in_their_inputs(tmp_path):
    """What is promised for one is not what the other takes."""
    names = ("model.layers.0.c_fc.weight", "model.layers.1.up.weight")
    specs: Specs = dict.fromkeys(names, (DType.F32, (50, 400)))
    recipe: dict[str, Any] = {"merge_method": "regmean", "models": []}
    for seed in range(2):
        model = write_checkpoint(tmp_path / f"m{seed}", specs, seed=seed)
        gram = write_grams(tmp_path / f"g{seed}", specs, rows=names[:1])
        recipe["models"].append({"model": str(model), "gram": str(gram)})
    plan = support.plan_of(write_recipe(tmp_path / "r.yml", recipe))
    small, large = map(matrix_bytes, plan.tensors)
    assert large > small + 6 * 8 * (400**2 - 50**2) - 2**20
    assert max(task.memory_bytes for task in plan.tasks) >= large
    first, second = plan.tensors
    assert alike([first, replace(first, extras=second.extras)]) == [0, 1]


PEAK = """
import sys
import numpy as np
from shardmerge.arrays import _Whole
from shardmerge.methods.regmean import RegMean, Side

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

rows, columns, tokens = map(int, sys.argv[1:])
random = np.random.default_rng(0)
models = [random.standard_normal((rows, columns), dtype=np.float32) for _ in range(2)]
inputs = random.standard_normal((tokens, columns), dtype=np.float32)
gram = inputs.T @ inputs / tokens
method = RegMean(reduce_non_diagonal=1.0, weight=(1.0, 1.0), inputs=Side.COLUMNS)
method.merge_matrices(_Whole(None, [m[:8, :8] for m in models], {"gram": [gram[:8, :8]] * 2}))
open("/proc/self/clear_refs", "w").write("5")  # the peak is from here on
before = anonymous()
method.merge_matrices(_Whole(None, models, {"gram": [gram, gram]}))
print(anonymous() - before)
"""


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((1000, 1500), 3000),
        ((1000, 1500), 30),
        ((100, 2000), 10),
        ((100, 2000), 1900),
        ((4000, 500), 10),
    ],
)
def test_what_it_takes_is_within_the_workspace(shape, tokens):
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, *map(str, (*shape, tokens))]
    folder = Path(__file__).parent.parent
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, cwd=folder
    )
    peak, promised = int(ran.stdout), workspace_bytes(*shape, shape[1])
    assert peak <= promised
    assert tokens > shape[1] or promised <= 1.6 * peak


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((2600, 1100), 4000), ((2600, 1100), 40), ((300, 1700), 40), ((300, 1700), 1000)],
    ids=["factor, tall", "eigenvectors, tall", "eigenvectors, wide", "many unseen, wide"],
)
def test_memory_stays_within_the_promise(tmp_path, shape, tokens):
    """Of a process of its own, with the smallest budget that is not refused."""
    specs = {f"model.layers.{i}.up_proj.weight": (DType.BF16, shape) for i in range(2)}
    models = []
    for seed in range(2):
        model = write_checkpoint(tmp_path / f"m{seed}", specs, seed=seed)
        gram = write_grams(tmp_path / f"g{seed}", specs, seed=seed, tokens=tokens)
        models.append({"model": str(model), "gram": str(gram)})
    recipe = {"merge_method": "regmean", "models": models}
    recipe["parameters"] = {"reduce_non_diagonal": 1.0}
    path = write_recipe(tmp_path / "r.yml", recipe)
    budget = support.least_memory(path)
    command = [sys.executable, "-m", "shardmerge", "merge", path, str(tmp_path / "out")]
    found = harness.run([*command, "--memory", f"{budget}B", "--device", "cpu", "--quiet"])
    assert found.peak_anon_bytes <= budget
    rows = read_records(str(tmp_path / "out"), Stores())
    assert max(row.peak_bytes for row in rows) <= rows[0].promised_bytes <= budget
