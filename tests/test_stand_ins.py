"""Stand-ins for Fisher information, against numpy and against Adam as torch itself runs it."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.numpy import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict

from shardmerge.cli import main
from shardmerge.errors import CheckpointError
from shardmerge.numerics import DType
from shardmerge.sources.dcp import state_names
from shardmerge.sources.torch_file import Storage, StoredTensor
from shardmerge.sources.zero_states import flat_states
from tests.servers import deepspeed
from tests.support import (
    SEVERAL_DTYPES,
    loaded,
    read_tensors,
    set_element,
    shrink,
    tree,
    upload,
    write_checkpoint,
)

TRAINED = [case for case in deepspeed.CASES if not case.endswith("fp16")]


def values(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a float32 checkpoint."""
    found = {}
    for name, (dtype, shape, data) in read_tensors(folder).items():
        assert dtype is DType.F32
        found[name] = loaded(data, dtype).reshape(shape)
    return found


def fisher(model: object, out: Path, *options: str) -> int:
    return main(["fisher", str(model), str(out), "--quiet", *options])


# --- squared task vectors -------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = write_checkpoint(tmp_path / "base", SEVERAL_DTYPES, seed=1)
    return write_checkpoint(tmp_path / "model", SEVERAL_DTYPES, seed=2, shards=3), base


def test_squares_of_every_dtype_are_rounded_once(pair, tmp_path, monkeypatch):
    shrink(monkeypatch.setattr)  # several tiles
    model, base = pair
    assert fisher(model, tmp_path / "out", "--from", "task-vector", "--base", str(base)) == 0
    found = values(tmp_path / "out")
    ours, theirs = read_tensors(model), read_tensors(base)
    floats = {name for name, (dtype, _) in SEVERAL_DTYPES.items() if dtype.is_float}
    assert set(found) == floats
    for name, squares in found.items():
        dtype, shape, data = ours[name]
        delta = loaded(data, dtype) - loaded(theirs[name][2], dtype)
        wanted = np.square(delta).astype(np.float32).reshape(shape)
        np.testing.assert_array_equal(squares, wanted)
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "task_vector_squared" in (tmp_path / "out" / "README.md").read_text()


def test_a_small_difference_does_not_vanish_in_float32(tmp_path):
    specs = {"a": (DType.F64, (1,))}
    model, base = write_checkpoint(tmp_path / "m", specs), write_checkpoint(tmp_path / "b", specs)
    set_element(base, "a", 0, 1.0)
    set_element(model, "a", 0, 1.0 + 1e-9)
    assert fisher(model, tmp_path / "out", "--from", "task-vector", "--base", str(base)) == 0
    np.testing.assert_allclose(values(tmp_path / "out")["a"], [1e-18], rtol=1e-6)


def test_it_is_what_merge_method_fisher_reads(pair, tmp_path):
    model, base = pair
    other = write_checkpoint(tmp_path / "other", SEVERAL_DTYPES, seed=3)
    for name, each in (("f1", model), ("f2", other)):
        assert fisher(each, tmp_path / name, "--from", "task-vector", "--base", str(base)) == 0
    recipe = {
        "merge_method": "fisher",
        "models": [
            {"model": str(model), "fisher": str(tmp_path / "f1")},
            {"model": str(other), "fisher": str(tmp_path / "f2")},
        ],
        "parameters": {"normalize": False, "epsilon": 0.0},
        "out_dtype": "float32",
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--quiet"]) == 0
    name = "model.layers.0.mlp.up_proj.weight"
    masses = [values(tmp_path / each)[name] for each in ("f1", "f2")]
    models = [loaded(read_tensors(each)[name][2], DType.BF16) for each in (model, other)]
    top = sum(m * x.reshape(m.shape) for m, x in zip(masses, models, strict=True))
    with np.errstate(invalid="ignore"):
        wanted = (top / (masses[0] + masses[1])).astype(np.float32)
    dtype, shape, data = read_tensors(tmp_path / "out")[name]
    np.testing.assert_array_equal(loaded(data, dtype).reshape(shape), wanted)


def test_the_same_command_goes_on_and_repeats_nothing(pair, tmp_path, capsys):
    model, base = pair
    out, options = tmp_path / "out", ("--from", "task-vector", "--base", str(base))
    assert fisher(model, out, *options) == 0
    before = tree(out)
    capsys.readouterr()
    assert fisher(model, out, *options) == 0
    assert "was already computed" in capsys.readouterr().out
    assert tree(out) == before
    assert fisher(base, out, "--from", "task-vector", "--base", str(model)) == 1
    assert "holds another checkpoint" in capsys.readouterr().err


def test_from_and_to_a_bucket(bucket, pair, tmp_path):
    model, base = pair
    options = ("--from", "task-vector", "--base")
    assert fisher(model, tmp_path / "here", *options, str(base)) == 0
    there = f"{bucket}/there"
    urls = upload(bucket, model, "model"), upload(bucket, base, "base")
    assert main(["fisher", urls[0], there, "--quiet", *options, urls[1]]) == 0
    assert main(["verify", there]) == 0


def test_what_does_not_go_together(pair, tmp_path, capsys):
    model, base = pair
    assert fisher(model, tmp_path / "out", "--from", "task-vector") == 2
    assert "--from task-vector is the squared difference from --base" in capsys.readouterr().err
    assert fisher(model, tmp_path / "out", "--from", "adam", "--base", str(base)) == 2
    assert fisher(model, tmp_path / "out", "--from", "adam") == 1
    assert f"{model}: not the folder of a training" in capsys.readouterr().err
    less = {name: spec for name, spec in SEVERAL_DTYPES.items() if "norm" not in name}
    write_checkpoint(tmp_path / "less", less)
    assert fisher(tmp_path / "less", tmp_path / "out", "--from", "task-vector", "--base", str(base))
    assert "model.norm.weight" in capsys.readouterr().err
    set_element(base, "model.norm.weight", 3, float("nan"))
    assert fisher(model, tmp_path / "out", "--from", "task-vector", "--base", str(base)) == 1
    assert "NaN or infinity in 1 tensor" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_same_model_and_models_of_other_architectures(pair, tmp_path, capsys):
    model, base = pair
    out, options = tmp_path / "out", ("--from", "task-vector", "--base")
    for same in (model, tmp_path / "base" / ".." / "model"):
        assert fisher(model, out, *options, str(same)) == 2
        assert "they are the same model; F would be 0 everywhere" in capsys.readouterr().err
    name = "model.norm.weight"
    specs = SEVERAL_DTYPES | {name: (SEVERAL_DTYPES[name][0], (3,)), "more": (DType.F32, (2,))}
    other = write_checkpoint(tmp_path / "other", specs)
    for models in ((other, base), (base, other)):
        assert fisher(models[0], out, *options, str(models[1])) == 1
        told = capsys.readouterr().err
        assert f"differ in names or shapes of 2 tensors: {name}, more" in told
        assert "rules:" not in told


def test_the_task_vector_of_an_adapter(tmp_path, capsys):
    """A base model with it, and a path with a plus."""
    base = write_checkpoint(tmp_path / "a+b", {"a.q.weight": (DType.F32, (3, 4))})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(s).astype(np.float32) for s in ((3, 2), (2, 4)))
    begin = "base_model.model.a.q.lora"
    factors = {f"{begin}_A.weight": right, f"{begin}_B.weight": left}
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    options = ("--from", "task-vector", "--base", str(base))
    assert fisher(f"{plain}+{adapter}", tmp_path / "out", *options) == 0
    found = values(tmp_path / "out")["a.q.weight"]
    np.testing.assert_allclose(found, (left @ right) ** 2, rtol=1e-4, atol=1e-6)
    for wrong in (f"{tmp_path}/no+{adapter}", f"{plain}+{adapter}+x"):
        assert fisher(wrong, tmp_path / "other", *options) in (1, 2)
        assert "{path" not in capsys.readouterr().err


# --- Adam: DeepSpeed ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moments() -> dict[str, np.ndarray]:
    """Second moments of the training of ``deepspeed_train``, as plain torch on one process."""
    names = ("deepspeed", "deepspeed.accelerator", "deepspeed.utils.zero_to_fp32")
    with pytest.MonkeyPatch.context() as patch:
        for name in (*names, "deepspeed.utils"):
            patch.setitem(sys.modules, name, MagicMock())
        script = importlib.import_module("tests.deepspeed_train")
    torch.manual_seed(0)
    model = script.Tiny()
    optimizer = torch.optim.AdamW(script.groups(model), lr=1e-2)
    ids = [
        torch.randint(0, 101, (2, 8), generator=torch.Generator().manual_seed(rank))
        for rank in range(2)
    ]
    for _ in range(script.STEPS):
        optimizer.zero_grad()
        for batch in ids:
            loss = torch.nn.functional.cross_entropy(model(batch).view(-1, 101), batch.view(-1))
            (loss / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # DeepSpeed's default
        optimizer.step()
    return {
        name: optimizer.state[parameter]["exp_avg_sq"].numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("case", TRAINED)
def test_moments_are_those_of_plain_torch(zero_runs, moments, tmp_path, case, capsys):
    assert fisher(zero_runs / case, tmp_path / "out", "--from", "adam") == 0
    found = values(tmp_path / "out")
    exact = case.endswith("fp32")
    for name, wanted in moments.items():
        assert found[name].shape == wanted.shape
        far = np.abs(found[name] - wanted).max() / wanted.max()
        assert far < (1e-6 if exact else 0.05), name  # bfloat16 has 8 bits
    np.testing.assert_array_equal(found["head.weight"], found["emb.weight"])
    for name in ("frozen.weight", "frozen.bias", "scale"):
        assert not found[name].any()
    said = capsys.readouterr().err
    assert "not trained, so 0: 3 tensors (scale, frozen.weight, frozen.bias)" in said
    assert set(found) == {*moments, "head.weight", "frozen.weight", "frozen.bias", "scale"}


def test_a_universal_checkpoint_has_the_same(zero_runs, tmp_path):
    for case in ("3-bf16", "3-bf16-universal"):
        assert fisher(zero_runs / case, tmp_path / case, "--from", "adam") == 0
    whole, cut = values(tmp_path / "3-bf16-universal"), values(tmp_path / "3-bf16")
    assert set(whole) == set(cut)
    for name, wanted in whole.items():
        np.testing.assert_array_equal(cut[name], wanted)
        path = zero_runs / "3-bf16-universal" / "zero" / name / "exp_avg_sq.pt"
        if path.exists():  # as DeepSpeed's converter has put it together
            stored = torch.load(path, weights_only=True)
            stored = stored["param"] if isinstance(stored, dict) else stored
            np.testing.assert_array_equal(stored.numpy().reshape(wanted.shape), wanted)


def test_moments_weigh_a_merge(zero_runs, tmp_path):
    for case in ("2-fp32", "3-bf16"):
        assert fisher(zero_runs / case, tmp_path / case, "--from", "adam") == 0
    recipe = {
        "merge_method": "fisher",
        "models": [
            {"model": str(zero_runs / case), "fisher": str(tmp_path / case)}
            for case in ("2-fp32", "3-bf16")
        ],
        "out_dtype": "float32",
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--quiet"]) == 0
    assert set(values(tmp_path / "out")) == set(values(tmp_path / "2-fp32"))


def test_an_optimizer_that_made_no_step(zero_runs, tmp_path, capsys):
    assert fisher(zero_runs / "3-fp16", tmp_path / "out", "--from", "adam") == 1
    said = capsys.readouterr().err
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt: no states of an optimizer in it" in said
    assert "--from task-vector" in said


def flat(numel: int) -> StoredTensor:
    return StoredTensor(Storage(DType.F32, "0", numel), DType.F32, 0, (numel,), (1,))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({0: {"exp_avg_sq": flat(8)}, 1: {"step": 1}}, "no exp_avg_sq of group 1 of parameters"),
        ({0: {"exp_avg_sq": flat(8)}}, "no exp_avg_sq of group 1 of parameters"),
        ({}, "x.pt: no states of an optimizer in it (base_optimizer_state)"),
        ({0: {"exp_avg_sq": flat(7)}}, "exp_avg_sq of group 0 has 7 elements, its master weights"),
        ({0: {"exp_avg_sq": flat(10)}}, "exp_avg_sq of group 0 has 10 elements, its master"),
    ],
)
def test_states_that_are_not_adams(state, message):
    states = {"base_optimizer_state": {"state": state}, "group_paddings": [1, 0]}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        flat_states(states, 2, [flat(8), flat(5)], "exp_avg_sq", "x.pt")
    with pytest.raises(CheckpointError, match="no states of an optimizer"):  # 'elastic'
        flat_states({"base_optimizer_state": [state]}, 2, [flat(8)], "exp_avg_sq", "x.pt")


def test_what_fills_up_the_last_rank_is_left_out():
    for count, fill in ((9, 1), (8, 1), (8, 0)):
        state = {"base_optimizer_state": {"state": {0: {"exp_avg_sq": flat(count)}}}}
        states = {**state, "group_paddings": [fill]}
        (found,) = flat_states(states, 1, [flat(8)], "exp_avg_sq", "x.pt")
        assert found.shape == (8,)


def test_a_universal_parameter_without_moments(zero_runs, tmp_path, capsys):
    folder = Path(shutil.copytree(zero_runs / "3-bf16-universal", tmp_path / "run"))
    (folder / "zero" / "up.weight" / "exp_avg_sq.pt").unlink()
    assert fisher(folder, tmp_path / "out", "--from", "adam") == 1
    assert "zero/up.weight/exp_avg_sq.pt: no such file" in capsys.readouterr().err


# --- Adam: torch.distributed ----------------------------------------------------------------------


def train(*, named: bool = True) -> tuple[torch.nn.Module, dict[str, object], dict]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
    model[1].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()
    moments = {
        name: optimizer.state[parameter]["exp_avg_sq"].numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if named:
        weights, states = get_state_dict(model, optimizer)
        return model, {"model": weights, "optim": states}, moments
    return model, {"model": model.state_dict(), "optim": optimizer.state_dict()}, moments


def save(folder: Path, value: dict[str, object]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(value, checkpoint_id=str(folder), no_dist=True)
    return folder


def test_moments_of_torch_distributed(tmp_path, capsys):
    _, states, moments = train()
    save(tmp_path / "run", states)
    assert fisher(tmp_path / "run", tmp_path / "out", "--from", "adam") == 0
    found = values(tmp_path / "out")
    for name, wanted in moments.items():
        np.testing.assert_array_equal(found[name], wanted)
    assert not found["1.weight"].any()
    assert set(found) == {*moments, "1.weight", "1.bias"}
    assert "not trained, so 0: 2 tensors" in capsys.readouterr().err


def test_moments_beside_the_model_of_hugging_face(tmp_path):
    _, states, moments = train()
    save(tmp_path / "run" / "pytorch_model_fsdp_0", {"model": states["model"]})
    save(tmp_path / "run" / "optimizer_0", {"optimizer": states["optim"]})
    assert fisher(tmp_path / "run", tmp_path / "out", "--from", "adam") == 0
    found = values(tmp_path / "out")
    for name, wanted in moments.items():
        np.testing.assert_array_equal(found[name], wanted)


def test_moments_by_numbers_and_none_at_all(tmp_path, capsys):
    _, states, _ = train(named=False)
    save(tmp_path / "numbers", states)
    assert fisher(tmp_path / "numbers", tmp_path / "out", "--from", "adam") == 1
    assert "Its optimizer was saved with numbers in place of names" in capsys.readouterr().err
    save(tmp_path / "none", {"model": states["model"]})
    assert fisher(tmp_path / "none", tmp_path / "out", "--from", "adam") == 1
    assert "no exp_avg_sq of any parameter among its 6 tensors" in capsys.readouterr().err


def test_names_of_states():
    keys = {
        "optim.state.a.weight.exp_avg_sq": ("optim", "state", "a.weight", "exp_avg_sq"),
        "state.b.exp_avg_sq": ("state.b.exp_avg_sq",),
        "optim.state.a.weight.exp_avg": ("optim", "state", "a.weight", "exp_avg"),
        "model.state.weight": ("model", "state.weight"),
    }
    assert state_names(keys, "exp_avg_sq") == {
        "optim.state.a.weight.exp_avg_sq": "a.weight",
        "state.b.exp_avg_sq": "b",
    }


def test_what_is_published_says_what_it_is(tmp_path):
    _, states, _ = train()
    save(tmp_path / "run", states)
    assert fisher(tmp_path / "run", tmp_path / "out", "--from", "adam") == 0
    record = json.loads((tmp_path / "out" / "shardmerge.json").read_text())
    assert yaml.safe_load(record["recipe"]) == {"fisher": "adam", "model": str(tmp_path / "run")}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Stand-in for Fisher information" in card
    assert "Adam's second moment" in card
