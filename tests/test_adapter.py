"""LoRA adapters over a base checkpoint: real ones of PEFT, against what PEFT makes of them."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shardmerge.cli import main
from shardmerge.continual import State
from shardmerge.errors import (
    CheckpointError,
    NonFiniteError,
    OutputError,
    SourceChangedError,
    StateError,
)
from shardmerge.match import match
from shardmerge.memory import inputs_of
from shardmerge.merge import merge
from shardmerge.prepare import Where
from shardmerge.recipe import ModelName, Recipe
from shardmerge.sources import open_adapted, open_checkpoint
from shardmerge.sources.tensor import LowRank
from tests.support import BLOCK, digests, least_memory, plan_of, shrink, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LLAMA = LlamaConfig(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=90, n_positions=16, n_embd=24, n_layer=2, n_head=2)

LLAMA_ADAPTERS: dict[str, dict[str, object]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "rank-stabilised": {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": ["k_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"1.mlp.up_proj": 7, "^model.layers.0.self_attn.v_proj": 1},
    },
    "embeddings": {"r": 3, "lora_alpha": 3, "target_modules": ["embed_tokens", "down_proj"]},
    "whole modules": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj"],
        "modules_to_save": ["lm_head", "norm"],
    },
    "biases": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "bias": "all"},
}


def trained(model: torch.nn.Module, folder: Path, **options: object) -> Path:
    """A PEFT adapter of a model whose every trained value is random."""
    torch.manual_seed(len(folder.name))
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return folder


def merged_by_peft(kind: type, base: Path, adapter: Path, **options: object) -> Mapping:
    """The state dict of PEFT's own merge."""
    model = PeftModel.from_pretrained(kind.from_pretrained(base, **options), str(adapter))
    return model.merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A base model in float32."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama") / "base"
    LlamaForCausalLM(LLAMA).save_pretrained(folder)
    return folder


def fresh(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def copy_of(model: str, tmp_path: Path, name: str = "out") -> dict[str, torch.Tensor]:
    """What a merge of this one model publishes."""
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    merge(write_recipe(tmp_path / f"{name}.yml", recipe), str(tmp_path / name))
    return load_file(tmp_path / name / "model.safetensors")


def in_float64(base: Path, adapter: Path) -> Callable[[str], np.ndarray]:
    """``W + scale * B @ A`` of a module, from the files, with nothing of ours."""
    weights = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def value(module: str) -> np.ndarray:
        a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        alpha, rank = config["lora_alpha"], a.shape[0]
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        return (weights[f"{module}.weight"].double() + scale * (b @ a)).numpy()

    return value


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LLAMA_ADAPTERS)
def test_it_is_what_peft_makes_of_it(llama, tmp_path, case):
    adapter = trained(fresh(llama), tmp_path / "adapter", **LLAMA_ADAPTERS[case])
    want = merged_by_peft(LlamaForCausalLM, llama, adapter)
    base = load_file(llama / "model.safetensors")
    found = copy_of(f"{llama}+{adapter}", tmp_path)
    assert set(found) == set(base)
    changed = [name for name in base if not torch.equal(base[name], want[name])]
    assert changed
    for name, tensor in found.items():
        if torch.equal(base[name], want[name]):
            assert torch.equal(tensor, want[name]), name
        else:
            # PEFT rounds the product, its scale and the sum; each to a bit in 2**24.
            bound = 4 * 2**-24 * (base[name].abs() + (want[name] - base[name]).abs()).max()
            assert (tensor - want[name]).abs().max() <= bound, name


def test_modules_that_were_trained_whole_are_bit_for_bit(llama, tmp_path):
    adapter = trained(fresh(llama), tmp_path / "adapter", **LLAMA_ADAPTERS["whole modules"])
    want = merged_by_peft(LlamaForCausalLM, llama, adapter)
    found = copy_of(f"{llama}+{adapter}", tmp_path)
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], want[name])
        assert not torch.equal(found[name], load_file(llama / "model.safetensors")[name])


def test_a_float32_is_rounded_once(llama, tmp_path):
    options = {"r": 7, "lora_alpha": 5, "use_rslora": True, "target_modules": ["gate_proj"]}
    adapter = trained(fresh(llama), tmp_path / "adapter", **options)
    found = copy_of(f"{llama}+{adapter}", tmp_path)
    value = in_float64(llama, adapter)
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.gate_proj"
        want = value(module).astype(np.float32)
        assert np.array_equal(found[f"{module}.weight"].numpy(), want)


def test_bit_for_bit_where_nothing_is_rounded(llama, tmp_path):
    """Small whole numbers and a scale of 2: PEFT's sums are exact as well."""
    model = fresh(llama)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape).float())
    adapted.save_pretrained(str(tmp_path / "adapter"))
    plain = adapted.unload()
    plain.save_pretrained(tmp_path / "base")
    want = merged_by_peft(LlamaForCausalLM, tmp_path / "base", tmp_path / "adapter")
    found = copy_of(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", tmp_path)
    assert all(torch.equal(found[name], want[name]) for name in found)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_halves_are_added_in_float32(llama, tmp_path, dtype):
    """PEFT rounds the product to the base's dtype and the sum again; here the sum is, once."""
    fresh(llama).to(dtype).save_pretrained(tmp_path / "base")
    adapter = trained(fresh(tmp_path / "base", dtype), tmp_path / "adapter", r=4, lora_alpha=8)
    found = copy_of(f"{tmp_path / 'base'}+{adapter}", tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    want = torch.from_numpy(in_float64(tmp_path / "base", adapter)(name)).to(dtype)
    assert found[f"{name}.weight"].dtype == dtype
    assert torch.equal(found[f"{name}.weight"], want)


def test_layers_that_store_their_weights_transposed(tmp_path):
    """GPT-2: [in, out], one of them square; and names without the prefix of the model's head."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2).transformer.save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "wte"]}
    adapter = trained(model, tmp_path / "adapter", fan_in_fan_out=True, **options)
    assert "h.0.attn.c_proj.weight" in load_file(tmp_path / "base" / "model.safetensors")
    want = merged_by_peft(GPT2LMHeadModel, tmp_path / "base", adapter)
    for name, tensor in copy_of(f"{tmp_path / 'base'}+{adapter}", tmp_path).items():
        assert torch.allclose(tensor, want[f"transformer.{name}"], atol=1e-6), name


def test_task_vectors_of_adapters(llama, tmp_path):
    """In a method that takes differences, an adapter's is its product."""
    first = trained(fresh(llama), tmp_path / "first", r=2, lora_alpha=4)
    second = trained(fresh(llama), tmp_path / "second", r=5, lora_alpha=5)
    models = [
        {"model": f"{llama}+{first}", "parameters": {"weight": 0.5}},
        {"model": {"model": str(llama), "lora": str(second)}, "parameters": {"weight": 2.0}},
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(llama), "models": models}
    merge(write_recipe(tmp_path / "r.yml", recipe), str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    base = load_file(llama / "model.safetensors")[f"{name}.weight"].double().numpy()
    deltas = [in_float64(llama, adapter)(name) - base for adapter in (first, second)]
    want = base + 0.5 * deltas[0] + 2 * deltas[1]
    assert np.allclose(found[f"{name}.weight"].numpy(), want, atol=1e-6)


# --- how it is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ("linear", "ties", "opcm"))
def test_bytes_do_not_depend_on_memory_or_threads(llama, tmp_path, monkeypatch, method):
    shrink(monkeypatch.setattr, part_bytes=2048)
    adapters = [
        trained(fresh(llama), tmp_path / name, target_modules="all-linear", r=rank, lora_alpha=4)
        for name, rank in (("first", 3), ("second", 6))
    ]
    parameters = {} if method == "opcm" else {"parameters": {"weight": 0.5}}
    models = [{"model": f"{llama}+{adapter}", **parameters} for adapter in adapters]
    base = {} if method == "linear" else {"base_model": str(llama)}
    recipe = {"merge_method": method, "models": models, **base}
    path = write_recipe(tmp_path / "r.yml", recipe)
    found = set()
    for memory, threads in ((2**30, 1), (2**30, 4), (least_memory(path), 1)):
        out = tmp_path / f"{memory}-{threads}"
        merge(path, str(out), memory_bytes=memory, threads=threads)
        found.add(tuple(digests(out).items()))
    assert len(found) == 1


def test_the_plan_counts_the_factors(llama, tmp_path, monkeypatch):
    """Their bytes are read, and their memory is promised."""
    shrink(monkeypatch.setattr)
    adapter = trained(fresh(llama), tmp_path / "adapter", r=16, target_modules=["up_proj"])
    models = [{"model": f"{llama}+{adapter}"}]
    plain = [{"model": str(llama)}]
    sizes = []
    for number, listed in enumerate((plain, models)):
        recipe = {"merge_method": "passthrough", "models": listed}
        plan = plan_of(write_recipe(tmp_path / f"{number}.yml", recipe))
        sizes.append(sum(task.read_bytes for task in plan.tasks))
    up = 4 * 16 * (LLAMA.hidden_size + LLAMA.intermediate_size)
    parts = math.ceil(4 * LLAMA.hidden_size * LLAMA.intermediate_size / 1024)
    assert sizes[0] + 2 * up <= sizes[1] <= sizes[0] + 2 * up * (parts + 1)
    assert BLOCK == 64  # tiles are smaller than a row is wide: factors outlast them


def test_the_base_lies_where_it_lay(llama, tmp_path):
    """No merged copy: an adapted matrix is the base's bytes and two factors."""
    adapter = trained(fresh(llama), tmp_path / "adapter", **LLAMA_ADAPTERS["plain"])
    base = open_checkpoint(str(llama))
    found = open_adapted(base, str(adapter))
    for name, ref in found.tensors.items():
        if isinstance(ref.decode, LowRank):
            assert ref.segments == base.tensors[name].segments
            assert ref.decode.rank == 4 and ref.decode.scale == 3.0
        else:
            assert ref == base.tensors[name]
    decoded = {name for name, ref in found.tensors.items() if ref.decode}
    assert len(decoded) == 6 and found.shards == base.shards
    assert found.files == base.files and found.config == base.config


def test_an_adapter_that_changes_while_it_is_merged(llama, tmp_path):
    adapter = trained(fresh(llama), tmp_path / "adapter", **LLAMA_ADAPTERS["plain"])
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{llama}+{adapter}"}]}
    path = write_recipe(tmp_path / "r.yml", recipe)

    class Changes:
        def start(self, **_):
            config = adapter / "adapter_config.json"
            config.write_text(config.read_text() + " ")

        def task(self, *_):
            return

    with pytest.raises(SourceChangedError, match="adapter_config"):
        merge(path, str(tmp_path / "out"), progress=Changes())


def test_nan_in_a_factor_is_told_with_both_files(llama, tmp_path):
    adapter = trained(fresh(llama), tmp_path / "adapter", **LLAMA_ADAPTERS["plain"])
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    with_tensors(adapter, lambda tensors: tensors[name].view(-1)[5].fill_(math.nan))
    with pytest.raises(NonFiniteError) as caught:
        copy_of(f"{llama}+{adapter}", tmp_path)
    told = str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight" in told
    assert f"{llama}/model.safetensors with {adapter}/adapter_model.safetensors" in told


def test_it_is_not_published_over_its_adapter(llama, tmp_path):
    adapter = trained(fresh(llama), tmp_path / "adapter", **LLAMA_ADAPTERS["plain"])
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{llama}+{adapter}"}]}
    with pytest.raises(OutputError, match="where the source"):
        merge(write_recipe(tmp_path / "r.yml", recipe), str(adapter))


def test_on_a_cluster(llama, tmp_path):
    pytest.importorskip("ray")
    adapter = trained(fresh(llama), tmp_path / "adapter", **LLAMA_ADAPTERS["plain"])
    want = copy_of(f"{llama}+{adapter}", tmp_path, "want")
    merge(str(tmp_path / "want.yml"), str(tmp_path / "ray"), executor="ray")
    found = load_file(tmp_path / "ray" / "model.safetensors")
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_provenance_names_the_adapter(llama, tmp_path):
    adapter = trained(fresh(llama), tmp_path / "adapter", **LLAMA_ADAPTERS["plain"])
    copy_of(f"{llama}+{adapter}", tmp_path)
    record = json.loads((tmp_path / "out" / "shardmerge.json").read_text())
    (source,) = record["sources"].values()
    assert source["adapter"]["url"] == str(adapter)
    assert set(source["adapter"]["versions"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "base+adapter" in (tmp_path / "out" / "README.md").read_text()


def test_adapters_that_arrive_one_at_a_time(llama, tmp_path):
    adapters = [trained(fresh(llama), tmp_path / name, r=2) for name in ("first", "second")]
    state = State(str(tmp_path / "state"))
    state.init(str(llama), method="task_arithmetic", settings=["lambda=0.5"], rules="", keep=2)
    for adapter in adapters:
        state.add(f"{llama}+{adapter}", Where())
    with pytest.raises(StateError, match="already"):
        State(str(tmp_path / "state")).add(f"{llama}+{adapters[0]}", Where())
    State(str(tmp_path / "state")).publish(str(tmp_path / "out"), Where())
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    base = load_file(llama / "model.safetensors")[f"{name}.weight"].double().numpy()
    deltas = [in_float64(llama, adapter)(name) - base for adapter in adapters]
    assert np.allclose(found[f"{name}.weight"].numpy(), base + 0.5 * sum(deltas), atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def adapter(llama, tmp_path) -> Path:
    return trained(fresh(llama), tmp_path / "adapter", **LLAMA_ADAPTERS["plain"])


def refusal(base: Path, adapter: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_adapted(open_checkpoint(str(base)), str(adapter))
    return str(caught.value)


def configured(adapter: Path, **changes: object) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return adapter


def with_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return adapter


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, ("use_dora", "DoRA")),
        ({"lora_bias": True}, ("lora_bias", "biases")),
        ({"trainable_token_indices": [3, 4]}, ("trainable_token_indices", "single rows")),
    ],
)
def test_real_adapters_of_other_kinds_are_refused_by_name(tmp_path, options, words):
    torch.manual_seed(0)
    base = tmp_path / "base"
    config = LlamaConfig(**{**LLAMA.to_diff_dict(), "attention_bias": True})
    LlamaForCausalLM(config).save_pretrained(base)
    found = trained(fresh(base), tmp_path / "adapter", r=2, target_modules=["q_proj"], **options)
    told = refusal(base, found)
    assert all(word in told for word in (*words, str(found))), told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is read"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's own weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set: it repeats layers"),
        ({"a_new_setting": 3}, "a_new_setting is set"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "says rank 3"),
        ({"r": 5}, "says rank 5"),
    ],
)
def test_settings_that_cannot_be_followed(llama, adapter, changes, words):
    assert words in refusal(llama, configured(adapter, **changes))


def test_an_adapter_of_a_larger_model(adapter, tmp_path):
    torch.manual_seed(0)
    other = LlamaConfig(**{**LLAMA.to_diff_dict(), "hidden_size": 48, "num_attention_heads": 6})
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    told = refusal(tmp_path / "other", adapter)
    assert "[56, 32]" in told and "[56, 48]" in told and "trained on another model" in told


def test_an_adapter_of_a_model_with_more_layers(adapter, tmp_path):
    torch.manual_seed(0)
    other = LlamaConfig(**{**LLAMA.to_diff_dict(), "num_hidden_layers": 1})
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    told = refusal(tmp_path / "other", adapter)
    assert "3 of 6 tensors" in told and "model.layers.1." in told


def test_an_adapter_of_another_model_of_the_hub(llama, adapter, tmp_path):
    cached = tmp_path / "models--org--base" / "snapshots" / "1234"
    shutil.copytree(llama, cached)
    told = refusal(cached, configured(adapter, base_model_name_or_path="org/other-base"))
    assert "trained on org/other-base, which is another model than org/base" in told
    assert "any_base" in told
    base = open_checkpoint(str(cached))
    assert not open_adapted(base, str(adapter), any_base=True).notes
    assert not open_adapted(base, str(configured(adapter, base_model_name_or_path="x/Base"))).notes


def test_a_base_that_may_be_another_is_told(llama, adapter, tmp_path, capsys):
    configured(adapter, base_model_name_or_path="org/some-model")
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{llama}+{adapter}"}]}
    assert main(["merge", write_recipe(tmp_path / "r.yml", recipe), str(tmp_path / "out")]) == 0
    told = "".join(capsys.readouterr())
    assert "says that it was trained on org/some-model" in told
    assert "some-model" in (tmp_path / "out" / "README.md").read_text()


def test_a_factor_that_is_lost(llama, adapter):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    with_tensors(adapter, lambda tensors: tensors.pop(name))
    assert "only one of the two factors of model.layers.0.mlp.up_proj" in refusal(llama, adapter)


def test_tensors_that_mean_something_else(llama, adapter):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    with_tensors(adapter, lambda tensors: tensors.update({name: torch.zeros(3)}))
    told = refusal(llama, adapter)
    assert name in told and "whose meaning is not known" in told


def test_a_vocabulary_that_was_resized(llama, adapter):
    name = "base_model.model.lm_head.weight"
    with_tensors(adapter, lambda tensors: tensors.update({name: torch.zeros(125, 32)}))
    told = refusal(llama, adapter)
    assert "[125, 32]" in told and "[120, 32]" in told and "vocabulary was resized" in told


def test_a_convolution(llama, adapter):
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_{x}.weight": torch.zeros(4, 4, 1, 1) for x in "AB"}
    with_tensors(adapter, lambda tensors: tensors.update(factors))
    assert "no convolutions" in refusal(llama, adapter)


def test_a_truncated_adapter(llama, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(llama, adapter)


def test_a_folder_that_is_no_adapter(llama, tmp_path):
    assert "no LoRA adapter" in refusal(llama, llama)
    assert "no such folder" in refusal(llama, f"{tmp_path}/missing/adapter")


def test_an_adapter_without_its_model(adapter):
    with pytest.raises(CheckpointError, match=r"MODEL\+ADAPTER"):
        open_checkpoint(str(adapter))


def test_a_plus_sign_in_a_path(tmp_path, llama):
    shutil.copytree(llama, tmp_path / "a+b")
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/a+b"}]}
    with pytest.raises(CheckpointError, match=r"write \{path"):
        merge(write_recipe(tmp_path / "r.yml", recipe), str(tmp_path / "out"))
    recipe["models"] = [{"model": {"path": f"{tmp_path}/a+b"}}]
    merge(write_recipe(tmp_path / "r.yml", recipe), str(tmp_path / "out"))


def test_a_quantised_base(llama, adapter, tmp_path):
    fp8 = tmp_path / "fp8"
    shutil.copytree(llama, fp8)
    tensors = load_file(fp8 / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, fp8 / "model.safetensors")
    told = refusal(fp8, adapter)
    assert "adapters of quantised tensors" in told and name in told


def test_an_adapter_as_a_pickle(llama, adapter, tmp_path):
    want = copy_of(f"{llama}+{adapter}", tmp_path, "want")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    found = copy_of(f"{llama}+{adapter}", tmp_path, "found")
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_pickle_that_would_run_something(llama, adapter, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Trap()}, adapter / "adapter_model.bin", pickle_module=pickle)
    assert "mkdir" in refusal(llama, adapter)
    assert not (tmp_path / "executed").exists()


def test_only_the_matched_models_have_adapters(llama, adapter):
    """The same base, with and without: two models of one recipe."""
    name = ModelName(str(llama), None, ModelName(str(adapter)))
    text = f"merge_method: linear\nmodels: [{{model: {llama}}}, {{model: {name}}}]\n"
    text += "parameters: {weight: 0.5}\n"
    recipe = Recipe.parse(text)
    base = open_checkpoint(str(llama))
    sources = {ModelName(str(llama)): base, name: open_adapted(base, str(adapter))}
    outputs = match(recipe, sources)
    coded = [sum(ref.decode is not None for ref in inputs_of(t)) for t in outputs.tensors]
    assert set(coded) == {0, 1} and sum(coded) == 6


# --- what ties, heads and layers of two kinds mean ------------------------------------------------


def agrees_with_peft(kind: type, base: Path, adapter: Path, tmp_path: Path) -> None:
    """The published model, loaded by transformers, is PEFT's merged one."""
    copy_of(f"{base}+{adapter}", tmp_path)
    found = kind.from_pretrained(tmp_path / "out").state_dict()
    want = merged_by_peft(kind, base, adapter)
    for name, value in want.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


@pytest.mark.parametrize("target", ("lm_head", "c_fc"))
def test_square_layers_are_as_their_type_stores_them(tmp_path, target):
    """PEFT writes down what it did with the last layer, which may be of the other kind."""
    torch.manual_seed(0)
    config = GPT2Config(**{**GPT2.to_diff_dict(), "tie_word_embeddings": False})
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    options = {"r": 3, "target_modules": ["c_attn", "c_proj", target], "fan_in_fan_out": True}
    adapter = trained(model, tmp_path / "adapter", **options)
    for said in (True, False):
        configured(adapter, fan_in_fan_out=said)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        agrees_with_peft(GPT2LMHeadModel, tmp_path / "base", adapter, tmp_path)


def tied(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA.to_diff_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    return tmp_path / "tied"


@pytest.mark.parametrize("saved", (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]))
def test_tied_embeddings_of_which_one_was_trained_whole(tmp_path, saved):
    base = tied(tmp_path)
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": saved}
    adapter = trained(fresh(base), tmp_path / "adapter", **options)
    agrees_with_peft(LlamaForCausalLM, base, adapter, tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_only_an_output_embedding(tmp_path):
    """Nothing else is in the adapter's file."""
    base = tied(tmp_path)
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapter = trained(fresh(base), tmp_path / "adapter", **options)
    with_tensors(adapter, lambda t: [t.pop(name) for name in list(t) if "lora_" in name])
    found = open_adapted(open_checkpoint(str(base)), str(adapter), any_base=True)
    assert found.tensors["lm_head.weight"].segments[0].url.startswith(str(adapter))


def test_modules_that_are_no_embeddings_leave_tied_ones_tied(tmp_path):
    """Also where names have no prefix, as in the published GPT-2."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2).transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}
    adapter = trained(model, tmp_path / "adapter", fan_in_fan_out=True, **options)
    found = open_adapted(open_checkpoint(str(tmp_path / "base")), str(adapter))
    assert "lm_head.weight" not in found.tensors and found.config == config


def test_tied_embeddings_that_are_adapted_together(tmp_path):
    base = tied(tmp_path)
    adapter = trained(fresh(base), tmp_path / "adapter", r=2, target_modules=["embed_tokens"])
    agrees_with_peft(LlamaForCausalLM, base, adapter, tmp_path)


def test_copies_of_tied_embeddings_are_no_others(tmp_path):
    base = tied(tmp_path)
    model = get_peft_model(fresh(base), LoraConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    agrees_with_peft(LlamaForCausalLM, base, tmp_path / "adapter", tmp_path)


def test_a_tied_output_embedding_that_is_adapted(tmp_path):
    base = tied(tmp_path)
    adapter = trained(fresh(base), tmp_path / "adapter", r=2, target_modules=["lm_head"])
    assert "tied to the input embedding" in refusal(base, adapter)


def test_biases_beside_modules_that_were_trained_whole(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA.to_diff_dict(), "attention_bias": True, "mlp_bias": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["o_proj"], "bias": "all"}
    adapter = trained(fresh(tmp_path / "base"), tmp_path / "adapter", **options)
    names = load_file(adapter / "adapter_model.safetensors")
    assert any("original_module" in name for name in names)
    agrees_with_peft(LlamaForCausalLM, tmp_path / "base", adapter, tmp_path)


def test_an_adapter_that_does_not_reach_every_layer(llama, adapter):
    """As one of a model with fewer layers, or one of which a part was lost."""
    module = "base_model.model.model.layers.1.mlp.up_proj"
    gone = [f"{module}.lora_{x}.weight" for x in "AB"]
    with_tensors(adapter, lambda tensors: [tensors.pop(name) for name in gone])
    told = refusal(llama, adapter)
    assert "no factors of 1 matrices" in told and "model.layers.1.mlp.up_proj.weight" in told
    base = open_checkpoint(str(llama))
    assert open_adapted(base, str(adapter), any_base=True)
    assert open_adapted(base, str(configured(adapter, layers_to_transform=[0])))


def test_an_adapter_that_reaches_further_than_it_says(llama, adapter):
    told = refusal(llama, configured(adapter, target_modules=["q_proj", "up_proj"]))
    assert "that its target_modules do not name" in told and "o_proj" in told


def test_names_that_peft_would_not_read(llama, adapter):
    def shortened(tensors):
        for name in list(tensors):
            tensors[name.removesuffix(".weight")] = tensors.pop(name)

    assert "whose meaning is not known" in refusal(llama, with_tensors(adapter, shortened))
