"""Extracting LoRA adapters: PEFT itself trains and merges them, loads ours, and gives models back.

Errors of approximations are compared with numpy's float64 singular value decomposition.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import threadpoolctl
import torch
import torch.distributed.checkpoint as dcp
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from shardmerge.architectures import added_prefix, task_type
from shardmerge.cli import main
from shardmerge.errors import Stopped
from shardmerge.extract import Wanted, decompose, extract_lora, lora
from shardmerge.extract.finished import Finished, Matrix
from shardmerge.extract.names import adapter_config, base_name
from shardmerge.kernels.factors import factorise, residual
from shardmerge.numerics import DType
from shardmerge.outputs import open_output
from shardmerge.stores import Stores
from tests.support import tree, upload

ADAPTER = "adapter_model.safetensors"
LAYERS = 12
"""Of the llama: more than ten, so that a layer's name is the beginning of another's."""


def make_llama(**more: Any) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **more,
    )
    return transformers.LlamaForCausalLM(config)


def make_gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=16, n_layer=2, n_head=4, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def merged_lora(model: transformers.PreTrainedModel, rank: int, **more: Any) -> None:
    """Add random LoRA layers of PEFT's to a model, and merge them."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, **more)
    peft.get_peft_model(model, config).merge_and_unload()


LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base model, and the model that a LoRA of rank 3 has made of it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = make_llama()
    model.save_pretrained(folder / "base")
    merged_lora(model, 3, target_modules=[*LLAMA_TARGETS, "lm_head"])
    model.save_pretrained(folder / "model", max_shard_size="40kB")
    return str(folder / "base"), str(folder / "model")


@pytest.fixture(scope="module")
def gpts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(1)
    model = make_gpt2()
    model.save_pretrained(folder / "base")
    merged_lora(model, 2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model.save_pretrained(folder / "model")
    return str(folder / "base"), str(folder / "model")


def extract(base: object, model: object, out: object, *options: str) -> int:
    return main(["extract-lora", str(model), str(out), "--base", str(base), "--quiet", *options])


def report(out: Path) -> Any:
    return json.loads((out / "extract_lora.json").read_text())


def weights(folder: object) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(Path(str(folder)).glob("*.safetensors")):
        found |= load_file(path)
    return found


def given_back(base: str, out: Path, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    """The parameters that PEFT makes of the base model and an adapter."""
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(base), str(out))
    merged = model.merge_and_unload()
    return {name: value.detach().numpy() for name, value in merged.named_parameters()}


# --- PEFT gives the model back --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rank", "layers"), [("llamas", 3, 7 * LAYERS + 1), ("gpts", 2, 8)]
)
def test_peft_gives_the_model_back(request, tmp_path, kind, rank, layers):
    base, model = request.getfixturevalue(kind)
    assert extract(base, model, tmp_path / "out", "--rank", str(rank)) == 0
    found = report(tmp_path / "out")
    assert len(found["matrices"]) == layers
    assert found["left_out"] == []
    assert all(matrix["relative_error"] < 2e-7 for matrix in found["matrices"])
    wanted = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, value in given_back(base, tmp_path / "out").items():
        np.testing.assert_allclose(value, wanted[name].numpy(), atol=2e-6, err_msg=name)
    assert main(["verify", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (kind == "gpts")
    assert (config["task_type"], config["r"], config["lora_alpha"]) == ("CAUSAL_LM", rank, rank)
    assert config["base_model_name_or_path"] == base


@pytest.mark.parametrize("kind", ["llamas", "gpts"])
def test_our_own_merge_gives_the_model_back(request, tmp_path, kind):
    base, model = request.getfixturevalue(kind)
    out = tmp_path / "adapter"
    assert extract(base, model, out, "--energy", "0.99999999999", "--max-rank", "3") == 0
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{out}"}]}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--quiet"]) == 0
    found, wanted = weights(tmp_path / "out"), weights(model)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=2e-6, err_msg=name)


def test_only_the_layers_that_were_extracted_are_targets(llamas, tmp_path):
    base, model = llamas
    options = ("--rank", "3", "--include", "*.layers.1.*", "--exclude", "*.mlp.*")
    assert extract(base, model, tmp_path / "out", *options) == 0
    loaded = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")
    )
    found = {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    begin = "base_model.model.model.layers.1.self_attn"
    assert found == {f"{begin}.{letter}_proj" for letter in "qkvo"}
    assert len(report(tmp_path / "out")["left_out"]) == 7 * LAYERS + 1 - 4


def test_ranks_by_energy_reach_their_own_layer(llamas, tmp_path):
    base, _ = llamas
    own = weights(base)
    rng = np.random.default_rng(0)
    ranks = {1: 5, 2: 1, 11: 2}
    for layer, rank in ranks.items():
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        delta = rng.standard_normal((24, rank)) @ rng.standard_normal((rank, 16))
        own[name] = (own[name] + delta).astype(np.float32)
    model = tmp_path / "model"
    transformers.AutoConfig.from_pretrained(base).save_pretrained(model)
    save_file(own, model / "model.safetensors", metadata={"format": "pt"})
    assert extract(base, model, tmp_path / "out", "--energy", "0.999999999") == 0
    found = report(tmp_path / "out")
    assert {matrix["tensor"]: matrix["rank"] for matrix in found["matrices"]} == {
        f"model.layers.{layer}.mlp.up_proj.weight": rank for layer, rank in ranks.items()
    }
    assert found["equal"] == 7 * LAYERS + 1 - 3
    for name, value in given_back(base, tmp_path / "out").items():
        np.testing.assert_allclose(value, own[name], atol=1e-5, err_msg=name)


def test_names_of_a_base_model_without_a_head(gpts, tmp_path):
    """The published gpt2: a config with a head, and names without ``transformer``."""
    for name, folder in zip(("base", "model"), gpts, strict=True):
        held = {key.removeprefix("transformer."): value for key, value in weights(folder).items()}
        (tmp_path / name).mkdir()
        save_file(held, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        config = (Path(folder) / "config.json").read_text()
        (tmp_path / name / "config.json").write_text(config)
    out = tmp_path / "out"
    assert extract(tmp_path / "base", tmp_path / "model", out, "--rank", "2") == 0
    wanted = transformers.AutoModelForCausalLM.from_pretrained(gpts[1]).state_dict()
    for name, value in given_back(str(tmp_path / "base"), out).items():
        np.testing.assert_allclose(value, wanted[name].numpy(), atol=2e-6, err_msg=name)


@pytest.mark.parametrize("bare", ["base", "model"])
def test_a_base_model_without_a_head_and_a_fine_tune_with_one(gpts, tmp_path, bare):
    """One as the published gpt2, the other as transformers saves it."""
    folders = dict(zip(("base", "model"), gpts, strict=True))

    def renamed(held: dict[str, np.ndarray]) -> None:
        for name in list(held):
            held[name.removeprefix("transformer.")] = held.pop(name)

    folders[bare] = str(changed(folders[bare], tmp_path / "bare", renamed))
    out, options = tmp_path / "out", ("--rank", "2", "--save-modules", "*ln_f")
    assert extract(folders["base"], folders["model"], out, *options) == 0
    assert report(out)["left_out"] == []
    wanted = transformers.AutoModelForCausalLM.from_pretrained(gpts[1]).state_dict()
    for name, value in given_back(folders["base"], out).items():
        np.testing.assert_allclose(value, wanted[name].numpy(), atol=2e-6, err_msg=name)


def changed(folder: str, out: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of a checkpoint, in one file, with other values."""
    held = weights(folder)
    change(held)
    out.mkdir()
    (out / "config.json").write_text((Path(folder) / "config.json").read_text())
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    return out


def norms_and_embedding(held: dict[str, np.ndarray]) -> None:
    for name, value in held.items():
        if "norm" in name:
            value *= 1.5
    held["model.embed_tokens.weight"][3] += 1


def test_what_no_layer_gives_back_is_told_and_can_be_stored(llamas, tmp_path, capsys):
    base, model = llamas
    other = changed(model, tmp_path / "model", norms_and_embedding)
    assert extract(base, other, tmp_path / "some", "--rank", "3") == 0
    told = capsys.readouterr()
    norms = 2 * LAYERS + 1
    assert f"NOT in the adapter: {norms + 1} tensors" in told.out
    assert told.err.count("left out: ") == norms + 1
    assert "left out: model.norm.weight (no linear layer that was asked for, relative" in told.err
    left = {
        each["tensor"]: each["relative_difference"]
        for each in report(tmp_path / "some")["left_out"]
    }
    np.testing.assert_allclose(left["model.norm.weight"], 0.5, rtol=1e-6)

    saved = ("--save-modules", "*norm*", "--save-modules", "*embed_tokens")
    assert extract(base, other, tmp_path / "all", "--rank", "3", *saved) == 0
    assert "NOT in the adapter" not in capsys.readouterr().out
    wanted = weights(other)
    for name, value in given_back(base, tmp_path / "all").items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-6, err_msg=name)


def test_the_head_of_a_classifier_is_stored_whole(tmp_path):
    """PEFT loads it from every adapter for that task, and fails where it is not there."""
    torch.manual_seed(2)
    config = make_llama().config
    config.num_labels, config.pad_token_id = 3, 0
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    merged_lora(model, 2, target_modules=["q_proj"])
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "model")
    assert extract(tmp_path / "base", tmp_path / "model", tmp_path / "out", "--rank", "2") == 0
    assert report(tmp_path / "out")["saved"] == ["score"]
    kind = transformers.AutoModelForSequenceClassification
    found = given_back(str(tmp_path / "base"), tmp_path / "out", kind)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=2e-6, err_msg=name)


@pytest.mark.parametrize("options", [(), ("--exclude", "*classifier*")])
def test_modules_whose_name_ends_with_the_heads_are_stored_whole(tmp_path, options):
    """PEFT takes ``pre_classifier`` for a ``classifier``."""
    torch.manual_seed(5)
    config = transformers.DistilBertConfig(
        vocab_size=48, dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=8
    )
    model = transformers.DistilBertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    merged_lora(model, 2, target_modules=["q_lin"])
    for head in (model.classifier, model.pre_classifier):
        torch.nn.init.normal_(head.weight)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert extract(tmp_path / "base", tmp_path / "model", out, "--rank", "2", *options) == 0
    assert sorted(report(out)["saved"]) == ["classifier", "pre_classifier"]
    kind = transformers.AutoModelForSequenceClassification
    found = given_back(str(tmp_path / "base"), out, kind)
    for name, value in model.named_parameters():
        np.testing.assert_allclose(found[name], value.detach(), atol=2e-6, err_msg=name)


def test_a_table_of_vectors_is_no_layer(tmp_path):
    """An embedding under another name than most: PEFT's layer of one has other factors."""
    torch.manual_seed(6)
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers",)}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    wide = {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
    config = transformers.BartConfig(
        vocab_size=48, d_model=16, max_position_embeddings=8, **sizes, **heads, **wide
    )
    model = transformers.BartForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert extract(tmp_path / "base", tmp_path / "model", out, "--rank", "24") == 0
    left = [each["tensor"] for each in report(out)["left_out"]]
    assert "model.shared.weight" in left
    assert not any("shared" in each["module"] for each in report(out)["matrices"])
    found = given_back(str(tmp_path / "base"), out, transformers.AutoModelForSeq2SeqLM)
    for name, value in model.named_parameters():
        if name not in left:
            np.testing.assert_allclose(found[name], value.detach(), atol=2e-6, err_msg=name)


def test_a_module_of_several_layers_is_stored_whole(llamas, tmp_path):
    base, model = llamas
    options = ("--rank", "3", "--save-modules", "*mlp")
    assert extract(base, model, tmp_path / "out", *options) == 0
    assert report(tmp_path / "out")["saved"] == [f"model.layers.{i}.mlp" for i in range(LAYERS)]
    assert report(tmp_path / "out")["left_out"] == []
    wanted = weights(model)
    for name, value in given_back(base, tmp_path / "out").items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-6, err_msg=name)


def test_of_a_base_model_with_an_adapter(llamas, tmp_path, capsys):
    """What the adapter does is extracted again, or subtracted; what is excluded is compared."""
    base, model = llamas
    first, out = tmp_path / "first", tmp_path / "out"
    assert extract(base, model, first, "--rank", "3") == 0
    capsys.readouterr()
    adapted = f"{base}+{first}"
    assert extract(base, adapted, out, "--rank", "3", "--exclude", "lm_head*") == 0
    assert "NOT in the adapter: 1 tensor " in capsys.readouterr().out
    ours, theirs = weights(out), weights(first)
    for name in ours:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            products = [held[other] @ held[name] for held in (ours, theirs)]
            np.testing.assert_allclose(*products, atol=1e-6, err_msg=name)
    assert report(out)["model"] == adapted
    assert main(["verify", str(out)]) == 0
    (share,) = (each["relative_difference"] for each in report(out)["left_out"])
    delta = weights(model)["lm_head.weight"] - weights(base)["lm_head.weight"]
    wanted = np.linalg.norm(delta) / np.linalg.norm(weights(base)["lm_head.weight"])
    np.testing.assert_allclose(share, wanted, rtol=1e-5)
    other = changed(model, tmp_path / "other", more_in_one_matrix)
    assert extract(adapted, other, tmp_path / "rest", "--rank", "1") == 0
    matrices = {each["tensor"]: each["norm"] for each in report(tmp_path / "rest")["matrices"]}
    assert max(matrices, key=lambda name: matrices[name]) == "model.layers.3.mlp.up_proj.weight"
    assert sorted(matrices.values())[-2] < 1e-4


def more_in_one_matrix(held: dict[str, np.ndarray]) -> None:
    held["model.layers.3.mlp.up_proj.weight"] += 1


def test_a_path_with_a_plus_is_a_path(llamas, tmp_path, capsys):
    base, model = llamas
    there = changed(model, tmp_path / "a+b@c", lambda held: None)
    assert extract(base, there, tmp_path / "out", "--rank", "3") == 0
    for wrong in (f"{there}+x", f"{base}+{model}", f"{base}+", f"{tmp_path}/no+{model}"):
        assert extract(base, wrong, tmp_path / "other", "--rank", "3") in (1, 2)
        assert "{path" not in capsys.readouterr().err


def test_a_tied_embedding_is_stored_with_its_twin(tmp_path, capsys):
    """PEFT replaces a module that it saves; the output embedding would stay as it was."""
    torch.manual_seed(3)
    config = make_llama().config
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    for name, value in model.named_parameters():
        if "layers.0.mlp" in name or "embed" in name:
            torch.nn.init.normal_(value)
    model.save_pretrained(tmp_path / "model")
    models, options = (tmp_path / "base", tmp_path / "model"), ("--rank", "16")
    saved = ("--save-modules", "*embed_tokens")
    assert extract(*models, tmp_path / "out", *options, *saved) == 0
    assert "NOT in the adapter" not in capsys.readouterr().out
    assert report(tmp_path / "out")["saved"] == ["model.embed_tokens", "lm_head"]
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    ids = torch.arange(8)[None]
    np.testing.assert_allclose(
        found(ids).logits.detach(), model(ids).logits.detach(), rtol=1e-4, atol=1e-4
    )
    for name in ("base", "model"):
        path = tmp_path / name / "config.json"
        other = {**json.loads(path.read_text()), "architectures": ["LlamaForMaskedLM"]}
        path.write_text(json.dumps(other))
    assert extract(*models, tmp_path / "other", *options, *saved) == 1
    assert "may be tied to an output embedding" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "far"), [("bfloat16", 6e-3), ("float16", 8e-4)])
def test_a_smaller_dtype_costs_what_the_report_says(llamas, tmp_path, dtype, far):
    base, model = llamas
    out = tmp_path / "out"
    assert extract(base, model, out, "--rank", "3", "--dtype", dtype) == 0
    kind = {str(value.dtype) for value in peft.utils.load_peft_weights(str(out), "cpu").values()}
    assert kind == {f"torch.{dtype}"}
    found = peft.utils.load_peft_weights(str(out), "cpu")
    ours, theirs = weights(model), weights(base)
    for matrix in report(out)["matrices"]:
        name = f"base_model.model.{matrix['module']}.lora"
        left, right = (found[f"{name}_{letter}.weight"].double().numpy() for letter in "BA")
        delta = (ours[matrix["tensor"]] - theirs[matrix["tensor"]]).astype(np.float64)
        error = np.linalg.norm(delta - left @ right) / np.linalg.norm(delta)
        np.testing.assert_allclose(matrix["relative_error"], error, rtol=1e-9)
        assert far / 10 < error < far


# --- the best approximation -----------------------------------------------------------------------


def with_spectrum(m: int, n: int, values: np.ndarray, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((m, len(values))))
    right, _ = np.linalg.qr(rng.standard_normal((n, len(values))))
    return (left * values) @ right.T


SPECTRA = {
    "flat": np.linspace(2, 1, 40),
    "power": 1 / np.arange(1, 41),
    "steep": np.geomspace(1, 1e-6, 40),
    "steeper": np.geomspace(1, 1e-12, 40),
    "half": np.r_[np.ones(20), np.full(20, 1e-9)],
    "low": np.r_[np.geomspace(1, 1e-8, 12), np.zeros(28)],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (40, 40)])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_no_approximation_of_the_rank_is_nearer(spectrum, shape, scale):
    """Eckart and Young: the error is that of the singular values left out."""
    matrix = with_spectrum(*shape, SPECTRA[spectrum]) * scale
    singular = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 7, 12, 25):
        found = factorise(matrix, lambda squares, rank=rank: rank)
        lost, norm = residual(matrix, found.left, found.right)
        best = np.linalg.norm(singular[rank:] / scale) * scale
        assert lost <= best * (1 + 1e-12) + 3e-8 * norm
        np.testing.assert_allclose(norm, np.linalg.norm(singular / scale) * scale, rtol=1e-12)
        # Both factors have the same share: the roots of the singular values.
        first = np.sqrt(singular[0])
        np.testing.assert_allclose(np.linalg.norm(found.left[:, 0]), first, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(found.right[0]), first, rtol=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_any_small_matrix(m, n, rank, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.integers(-3, 4, (m, n)).astype(np.float32)
    matrix[0, 0] = 1.0
    rank = min(rank, m, n)
    found = factorise(matrix, lambda squares: rank)
    assert found.left.shape == (m, rank)
    assert found.right.shape == (rank, n)
    peaks = np.abs(found.left).argmax(axis=0)
    assert (found.left[peaks, range(rank)] >= 0).all()
    singular = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    lost, norm = residual(matrix, found.left, found.right)
    assert abs(lost - np.linalg.norm(singular[rank:])) < 1e-7 * norm


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 1), st.integers(1, 9))
def test_the_least_rank_that_holds_the_energy(values, energy, most):
    squares = np.array(sorted([*values, 1.0], reverse=True)) ** 2
    rank = decompose.rank_for(squares, Wanted(energy=energy))
    share = squares.cumsum() / squares.sum()
    assert share[rank - 1] >= energy - 1e-12
    assert rank == 1 or share[rank - 2] < energy + 1e-12
    assert decompose.rank_for(squares, Wanted(energy=energy, most=most)) == min(rank, most)


def test_float64_models_are_subtracted_in_float64(tmp_path):
    delta = with_spectrum(20, 30, np.array([3e-9, 2e-9]))
    base = np.random.default_rng(0).standard_normal((20, 30))
    for name, value in (("base", base), ("model", base + delta)):
        (tmp_path / name).mkdir()
        save_file({"a.weight": value}, tmp_path / name / "model.safetensors")
    out = tmp_path / "out"
    assert extract(tmp_path / "base", tmp_path / "model", out, "--rank", "2") == 0
    found = weights(out)
    product = found["base_model.model.a.lora_B.weight"] @ found["base_model.model.a.lora_A.weight"]
    assert np.linalg.norm(product - delta) < 1e-6 * np.linalg.norm(delta)


def test_of_checkpoints_of_other_kinds(tmp_path):
    """A training of torch.distributed against a base model in bfloat16, by torch.save."""
    torch.manual_seed(4)
    base = {"a.b.weight": torch.randn(20, 30).bfloat16(), "a.b.bias": torch.randn(20).bfloat16()}
    delta = torch.from_numpy(with_spectrum(20, 30, np.array([3.0, 2.0, 1.0, 0.5]))).float()
    model = {name: value.float() for name, value in base.items()}
    model["a.b.weight"] += delta
    (tmp_path / "base").mkdir()
    torch.save(base, tmp_path / "base" / "pytorch_model.bin")
    with pytest.warns(UserWarning):
        dcp.save({"model": model}, checkpoint_id=str(tmp_path / "model"), no_dist=True)
    assert extract(tmp_path / "base", tmp_path / "model", tmp_path / "out", "--rank", "2") == 0
    (matrix,) = report(tmp_path / "out")["matrices"]
    wanted = np.hypot(1.0, 0.5) / np.linalg.norm([3.0, 2.0, 1.0, 0.5])
    np.testing.assert_allclose(matrix["relative_error"], wanted, rtol=1e-5)
    found = weights(tmp_path / "out")
    left, right = (found[f"base_model.model.a.b.lora_{letter}.weight"] for letter in "BA")
    singular = np.linalg.svd((left @ right).astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(singular[:2], [3.0, 2.0], rtol=1e-5)


# --- the same bytes, and going on -----------------------------------------------------------------


def run(base: str, model: str, out: Path, **more: Any) -> Any:
    wanted = more.pop("wanted", Wanted(rank=3))
    return extract_lora(model, str(out), base=base, wanted=wanted, **more)


def test_bytes_do_not_depend_on_threads(llamas, tmp_path):
    for threads in (1, 4):
        run(*llamas, tmp_path / str(threads), threads=threads)
    assert tree(tmp_path / "1") == tree(tmp_path / "4")


def test_each_matrix_has_one_thread_of_linear_algebra(llamas, tmp_path, monkeypatch):
    real, seen = decompose.factorise, []

    def looked_at(*arguments: Any) -> Any:
        seen.extend(
            each["num_threads"]
            for each in threadpoolctl.threadpool_info()
            if each["user_api"] == "blas" and "numpy" in each["filepath"]
        )
        return real(*arguments)

    monkeypatch.setattr(decompose, "factorise", looked_at)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        run(*llamas, tmp_path / "out", threads=2)
    assert set(seen) == {1}


def test_matrices_of_another_run_are_made_again(tmp_path):
    """They may be left by a run that was killed while it was forgotten."""
    output = open_output(str(tmp_path), Stores())
    matrix = Matrix("a.weight", "a", (2, 3), 1, 1.0, 0.5)
    stored = np.arange(5, dtype=np.float32)
    with output.locked():
        Finished(output, "one", DType.F32).save(7, matrix, stored.tobytes())
        assert Finished(output, "other", DType.F32).load() == {}
        again = Finished(output, "one", DType.F32)
        assert again.load() == {"a.weight": matrix}
        left, right = again.factors("a.weight")
        output.write(".shardmerge/factors/000008", b"no record")
        assert Finished(output, "one", DType.F32).load() == {"a.weight": matrix}
    np.testing.assert_array_equal(left, [[0], [1]])
    np.testing.assert_array_equal(right, [[2, 3, 4]])


def test_a_run_that_is_stopped_goes_on(llamas, tmp_path, monkeypatch):
    stop, real, calls = threading.Event(), decompose.read_delta, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[0].name)
        if len(calls) == 30:
            stop.set()
        return real(*arguments)

    monkeypatch.setattr(decompose, "read_delta", counted)
    with pytest.raises(Stopped):
        run(*llamas, tmp_path / "out", threads=1, stop=stop)
    assert not (tmp_path / "out" / ADAPTER).exists()
    stop.clear()
    run(*llamas, tmp_path / "out", threads=2)
    assert len(calls) == len(set(calls)) == 7 * LAYERS + 1
    run(*llamas, tmp_path / "quiet", threads=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "quiet")
    before = len(calls)
    found = run(*llamas, tmp_path / "out")
    assert found.published.already
    assert found.matrices == run(*llamas, tmp_path / "quiet").matrices
    assert len(calls) == before


def test_other_options_do_not_go_on_with_it(llamas, tmp_path, monkeypatch, capsys):
    base, model = llamas
    monkeypatch.setattr(
        lora, "write_computed", lambda *_, **__: (_ for _ in ()).throw(Stopped("x"))
    )
    assert extract(base, model, tmp_path / "out", "--rank", "3") == 3
    monkeypatch.undo()
    assert extract(base, model, tmp_path / "out", "--rank", "2") == 1
    assert "--fresh" in capsys.readouterr().err
    assert extract(base, model, tmp_path / "out", "--rank", "2", "--fresh") == 0
    assert extract(base, model, tmp_path / "plain", "--rank", "2") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")


def test_interrupted_by_ctrl_c(llamas, tmp_path):
    base, model = llamas
    slow = (
        "import sys, time\nfrom shardmerge.extract import decompose\n"
        "real = decompose.read_delta\n"
        "def read(*a):\n    time.sleep(0.2)\n    return real(*a)\n"
        "decompose.read_delta = read\n"
        "from shardmerge.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", slow, "extract-lora", model, str(out), "--base", base]
    process = subprocess.Popen([*command, "--rank", "3", "--quiet"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(out.glob(".shardmerge/factors/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3, said.decode()
    assert "run the same command again" in said.decode()
    assert extract(base, model, out, "--rank", "3") == 0


def test_a_place_that_is_taken(llamas, tmp_path, capsys):
    base, model = llamas
    out = tmp_path / "out"
    out.mkdir()
    (out / ADAPTER).write_text("another")
    (out / "notes.txt").write_text("mine")
    assert extract(base, model, out, "--rank", "3") == 1
    assert f"{out} holds something else: {ADAPTER}" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {ADAPTER, "notes.txt"}
    assert extract(base, model, out, "--rank", "3", "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert extract(base, model, out, "--rank", "2", "--overwrite") == 0
    assert report(out)["rank"] == 2
    assert extract(base, model, model, "--rank", "2", "--overwrite") == 1
    assert "is where the source" in capsys.readouterr().err


def test_a_merge_over_an_adapter_leaves_nothing_of_it(llamas, tmp_path):
    """transformers would take the new checkpoint for an adapter."""
    base, model = llamas
    out = tmp_path / "out"
    assert extract(base, model, out, "--rank", "3") == 0
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    assert main(["merge", str(tmp_path / "recipe.yml"), str(out), "--overwrite", "--quiet"]) == 0
    assert not (out / "adapter_config.json").exists()
    assert not (out / ADAPTER).exists()


def test_from_and_to_a_bucket(bucket, llamas, tmp_path, monkeypatch, capsys):
    base, model = llamas
    urls = upload(bucket, Path(base), "base"), upload(bucket, Path(model), "model")
    there = f"{bucket}/adapter"
    command = ["extract-lora", urls[1], there, "--base", urls[0], "--rank", "3", "--quiet"]

    def stopped(*_: Any) -> None:
        raise Stopped("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Finished, "factors", stopped)
        assert main(command) == 3
    assert main(["clean", there, "--dry-run"]) == 0
    assert f"upload of {there}/{ADAPTER}" in capsys.readouterr().out
    assert main(command) == 0
    assert main(["verify", there]) == 0
    run(*llamas, tmp_path / "here")
    stores = Stores()
    store = stores.open(there)
    assert store.read(f"{there}/{ADAPTER}") == (tmp_path / "here" / ADAPTER).read_bytes()
    assert [name for name in store.names(there) if name.startswith(".")] == []


# --- memory ---------------------------------------------------------------------------------------


def test_a_matrix_that_does_not_fit_is_refused(llamas, tmp_path, capsys):
    base, model = llamas
    assert extract(base, model, tmp_path / "out", "--rank", "3", "--memory", "230MiB") == 1
    said = capsys.readouterr().err
    assert "MemoryBudgetError: lm_head.weight (48 x 16) needs" in said
    needed = int(said.rpartition("--memory ")[2].partition("MiB")[0])
    assert extract(base, model, tmp_path / "out", "--rank", "3", "--memory", f"{needed}MiB") == 0
    assert not (tmp_path / "no").exists()


def test_memory_stays_within_the_promise(tmp_path):
    """Peak of anonymous memory of a process, for matrices of several kinds."""
    child = (
        "import sys, resource, numpy as np\n"
        "from shardmerge.extract import decompose\n"
        "from shardmerge.extract.choice import Layer, Wanted\n"
        "from shardmerge.sources import open_checkpoint\n"
        "from shardmerge.stores import Stores\n"
        "a, b = (open_checkpoint(f'{sys.argv[1]}/{n}').tensors['a.weight'] for n in 'ab')\n"
        "wanted, layer = Wanted(rank=int(sys.argv[2])), Layer(a, b, 'a', False)\n"
        "small = np.linalg.eigh(np.eye(8)); small = np.ones((8, 8)) @ np.ones((8, 8))\n"
        "def anonymous():\n"
        "    text = open('/proc/self/status').read()\n"
        "    return int(text.partition('VmHWM:')[2].split()[0]) * 1024\n"
        "before = anonymous()\n"
        "decompose._decomposed(layer, wanted, Stores())\n"
        "print(anonymous() - before, decompose.needed_bytes(layer, wanted))\n"
    )
    for (rows, columns), rank in (((600, 4000), 16), ((4000, 600), 600), ((1500, 1500), 64)):
        rng = np.random.default_rng(0)
        for name in "ab":
            (tmp_path / name).mkdir(exist_ok=True)
            value = rng.standard_normal((rows, columns)).astype(np.float32)
            save_file({"a.weight": value}, tmp_path / name / "model.safetensors")
        done = subprocess.run(
            [sys.executable, "-c", child, str(tmp_path), str(rank)],
            capture_output=True,
            text=True,
            check=True,
            env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
        )
        taken, promised = map(int, done.stdout.split())
        assert taken <= promised, (rows, columns)
        assert promised < 4 * taken, (rows, columns)  # and it is no empty promise


# --- what is refused ------------------------------------------------------------------------------


def test_the_same_model(llamas, tmp_path, capsys):
    base, _ = llamas
    again = changed(base, tmp_path / "again", lambda held: None)
    assert extract(base, again, tmp_path / "out", "--rank", "3") == 1
    assert "there is nothing to extract" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("**/*"))
    other = changed(base, tmp_path / "other", norms_and_embedding)
    assert extract(base, other, tmp_path / "out", "--rank", "3") == 1
    assert "What differs: model.embed_tokens.weight" in capsys.readouterr().err


def test_models_that_do_not_fit(llamas, tmp_path, capsys):
    base, model = llamas

    def other(held: dict[str, np.ndarray]) -> None:
        del held["model.norm.weight"]
        held["model.layers.0.mlp.up_proj.weight"] = np.zeros((25, 16), np.float32)
        held["more.weight"] = np.zeros((2, 2), np.float32)

    wrong = changed(model, tmp_path / "wrong", other)
    assert extract(base, wrong, tmp_path / "out", "--rank", "3") == 1
    said = capsys.readouterr().err
    assert "differ in 3 of their tensors' names or shapes" in said
    assert "model.norm.weight (only in the base model)" in said
    assert "more.weight (only in the model)" in said
    assert "up_proj.weight ([25, 16] in the model, [24, 16] in the base model)" in said
    exclude = ("model.norm.weight", "more.weight", "*.0.mlp.up_proj.weight")
    options = [item for glob in exclude for item in ("--exclude", glob)]
    assert extract(base, wrong, tmp_path / "out", "--rank", "3", *options) == 0
    assert "NOT in the adapter: 3 tensors" in capsys.readouterr().out


def test_nan_is_refused_by_name(llamas, tmp_path, capsys):
    base, model = llamas

    def broken(held: dict[str, np.ndarray]) -> None:
        held["model.layers.11.mlp.up_proj.weight"][3, 4] = np.nan

    wrong = changed(model, tmp_path / "wrong", broken)
    assert extract(base, wrong, tmp_path / "out", "--rank", "3") == 1
    said = capsys.readouterr().err
    assert "NaN or infinity in model.layers.11.mlp.up_proj.weight of" in said
    assert str(wrong) in said
    assert not (tmp_path / "out" / ".shardmerge").exists()
    options = ("--rank", "3", "--exclude", "*.11.mlp.up_proj.weight")
    assert extract(base, wrong, tmp_path / "out", *options) == 0


def test_factors_that_float16_does_not_hold(tmp_path, capsys):
    for name, value in (("base", 0.0), ("model", 1e12)):
        (tmp_path / name).mkdir()
        save_file({"a.weight": np.full((4, 4), value)}, tmp_path / name / "model.safetensors")
    out = tmp_path / "out"
    options = ("--rank", "1", "--dtype", "float16")
    assert extract(tmp_path / "base", tmp_path / "model", out, *options) == 1
    assert "a.weight: its factors do not fit float16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of the arguments --rank --energy is required"),
        (("--rank", "3", "--energy", "0.9"), "not allowed with argument"),
        (("--rank", "0"), "'0' is no count"),
        (("--energy", "1.5"), "'1.5' is no share"),
        (("--energy", "0"), "'0' is no share"),
        (("--rank", "3", "--max-rank", "2"), "--max-rank limits ranks that --energy chooses"),
        (("--rank", "3", "--include", "*.q_prj.*"), "no tensor has a name like '*.q_prj.*'"),
        (("--rank", "3", "--save-modules", "lm_heat"), "no module has a name like 'lm_heat'"),
    ],
)
def test_options_that_make_no_sense(llamas, tmp_path, capsys, options, message):
    try:
        status = extract(*llamas, tmp_path / "out", *options)
    except SystemExit as left:
        status = left.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def pairs(tmp_path: Path, config: dict[str, object], *names: str) -> tuple[Path, Path]:
    """A base model and a model with matrices of these names."""
    for folder, value in (("base", 0.0), ("model", 1.0)):
        (tmp_path / folder).mkdir()
        held = {name: np.full((3, 4), value, np.float32) for name in names}
        save_file(held, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    return tmp_path / "base", tmp_path / "model"


@pytest.mark.parametrize("key", ["vision_config", "image_size", "patch_size"])
def test_models_that_peft_finds_under_other_names(tmp_path, capsys, key):
    models = pairs(tmp_path, {key: {}}, "a.weight")
    assert extract(*models, tmp_path / "out", "--rank", "1") == 1
    assert "a model for images or sound, or with parts for them" in capsys.readouterr().err


def test_experts_are_refused_by_name(tmp_path, capsys):
    names = ("a.mlp.experts.0.w1.weight", "a.q.weight")
    models = pairs(tmp_path, {}, *names)
    assert extract(*models, tmp_path / "out", "--rank", "1") == 1
    assert "1 matrix is of experts (a.mlp.experts.0.w1.weight)" in capsys.readouterr().err
    assert extract(*models, tmp_path / "out", "--rank", "1", "--exclude", "*expert*") == 0


def test_a_saved_module_that_peft_would_take_others_for(tmp_path, capsys):
    models = pairs(tmp_path, {}, "norm.weight", "a.input_norm.weight", "a.q.weight")
    options = ("--rank", "1", "--save-modules")
    assert extract(*models, tmp_path / "out", *options, "norm") == 1
    told = capsys.readouterr().err
    assert "'norm' would also be a.input_norm" in told
    assert "Give --save-modules '*norm', which is all of them" in told
    assert extract(*models, tmp_path / "out", *options, "*norm") == 0


def test_all_matrices_are_stored_whole(tmp_path, capsys):
    models = pairs(tmp_path, {}, "a.q.weight")
    options = ("--rank", "1", "--save-modules", "a.q")
    assert extract(*models, tmp_path / "out", *options) == 1
    assert "no matrix of a linear layer is left" in capsys.readouterr().err


def test_integers_are_compared_and_never_stored_as_floats(tmp_path, capsys):
    models = pairs(tmp_path, {}, "a.q.weight")
    for folder, value in zip(models, (1, 2), strict=True):
        held = weights(folder) | {
            "a.n.count": np.array([value]),
            "a.k.weight": np.eye(2, dtype=int),
        }
        save_file(held, folder / "model.safetensors")
    assert extract(*models, tmp_path / "out", "--rank", "1") == 0
    assert [each["tensor"] for each in report(tmp_path / "out")["left_out"]] == ["a.n.count"]
    options = ("--rank", "1", "--save-modules", "a.n")
    assert extract(*models, tmp_path / "other", *options) == 1
    assert "a.n.count: integers" in capsys.readouterr().err


def test_a_tied_output_embedding_is_no_layer(tmp_path):
    models = pairs(tmp_path, {"tie_word_embeddings": True}, "lm_head.weight", "a.q.weight")
    assert extract(*models, tmp_path / "out", "--rank", "1") == 0
    found = report(tmp_path / "out")
    assert [matrix["module"] for matrix in found["matrices"]] == ["a.q"]
    assert [each["tensor"] for each in found["left_out"]] == ["lm_head.weight"]


# --- what an adapter says -------------------------------------------------------------------------


def test_a_name_that_is_the_end_of_anothers():
    modules = ["layers.0.q", "decoder.layers.0.q"]
    said = adapter_config({"layers.0.q": 2}, modules, [], {}, "x")
    assert said["target_modules"] == r"layers\.0\.q"
    assert adapter_config(dict.fromkeys(modules, 2), modules, [], {}, "x")["target_modules"] == [
        "decoder.layers.0.q",
        "layers.0.q",
    ]


def test_patterns_match_one_module_only():
    ranks = {f"layers.{i}.q": 1 + (i in (1, 11)) for i in range(12)}
    ranks |= {"xlayers.1.q": 1, "y.layers.1.q": 1}
    said = adapter_config(ranks, list(ranks), [], {}, "x")
    for module, rank in ranks.items():
        key = peft.utils.other.get_pattern_key(said["rank_pattern"], module)
        assert said["rank_pattern"].get(key, said["r"]) == rank
        assert said["alpha_pattern"].get(key, said["lora_alpha"]) == rank


def test_the_name_of_the_base_model():
    assert base_name("hf://org/name@main") == ("org/name", "main")
    assert base_name("hf://org/name") == ("org/name", None)
    assert base_name("https://user:secret@host/x?token=1") == ("https://host/x", None)
    assert base_name("models/base") == ("models/base", None)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("BertForTokenClassification", "TOKEN_CLS"),
        ("BertForQuestionAnswering", "QUESTION_ANS"),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("BertModel", "FEATURE_EXTRACTION"),
        ("GPT2DoubleHeadsModel", None),
        ("BertForMaskedLM", None),
    ],
)
def test_tasks(architecture, task):
    config = {"architectures": [architecture], "is_encoder_decoder": architecture.startswith("T5")}
    assert task_type(config) == task


def test_prefixes_of_transformers():
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    assert added_prefix(gpt2, ["h.0.attn.c_attn.weight"]) == "transformer."
    assert added_prefix(gpt2, ["transformer.h.0.attn.c_attn.weight"]) == ""
    assert added_prefix(gpt2 | {"architectures": ["GPT2Model"]}, ["h.0.ln_1.weight"]) == ""
    assert added_prefix({}, ["h.0.ln_1.weight"]) == ""
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    assert added_prefix(bert, ["encoder.layer.0.output.dense.weight"]) == "bert."
