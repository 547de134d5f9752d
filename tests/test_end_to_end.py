"""Real architectures, tiny: written by transformers, merged, and loaded by transformers again."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shardmerge import methods
from shardmerge.cli import main
from shardmerge.numerics import DType
from tests.support import INDEX, SINGLE, digests, write_grams, write_recipe
from tests.test_cli import recipe_for

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

Capture = pytest.CaptureFixture[str]
Tensors = dict[str, Tensor]
BF16_ULP = 2.0**-8
SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


# --- checkpoints ----------------------------------------------------------------------------------


def noisy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A fine-tune of a model: every parameter changed a little."""
    torch.manual_seed(seed)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return changed


def save(model: PreTrainedModel, folder: Path, *, shard: str = "20KB") -> None:
    model.save_pretrained(folder, max_shard_size=shard)


def write_family(folder: Path, model: PreTrainedModel, *, shard: str = "20KB") -> None:
    """A base model, two fine-tunes and something that can be taken for Fisher information."""
    for name, member in (("base", model), ("a", noisy(model, 1)), ("b", noisy(model, 2))):
        save(member, folder / name, shard=shard)
    (folder / "f").mkdir()
    squares = {name: tensor.square() for name, tensor in tensors(folder / "a").items()}
    save_file(squares, folder / "f" / SINGLE)
    shapes = {name: (DType.BF16, tuple(t.shape)) for name, t in tensors(folder / "a").items()}
    write_grams(folder / "g", shapes)


def random(cls: type[PreTrainedModel], config: Any, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    return cls(config).to(dtype)


def tokenizer(*more: str) -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(("<unk>", "</s>", "one", "two", *more))}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharded bfloat16 Llamas with a tokenizer."""
    folder = tmp_path_factory.mktemp("llamas")
    write_family(folder, random(LlamaForCausalLM, LlamaConfig(**SIZES)))
    for name in ("base", "a", "b"):
        tokenizer(*(["more"] if name == "a" else [])).save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def family(llamas: Path, here: Path) -> Path:
    """The Llamas, in the current folder, to be changed."""
    shutil.copytree(llamas, here, dirs_exist_ok=True)
    return here


def tensors(folder: Path | str) -> Tensors:
    found: Tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(folder: Path | str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "config.json").read_text())
    return found


def write_config(folder: Path | str, **changes: Any) -> None:
    Path(folder, "config.json").write_text(json.dumps(config_of(folder) | changes))


# --- merging --------------------------------------------------------------------------------------


def merge(capsys: Capture, recipe: Mapping[str, Any], out: str = "out", status: int = 0) -> str:
    """What a merge says on stderr; a good one is verified."""
    path = write_recipe(Path("recipe.yml"), recipe)
    found = main(["merge", path, out, "--quiet"])
    err = capsys.readouterr().err
    assert found == status, err
    if status == 0:
        assert main(["verify", out]) == 0
        assert "every checksum" in capsys.readouterr().out
    return err


def of_two(method: str = "linear", weights: Any = 0.5, **top: Any) -> dict[str, Any]:
    """A recipe over a and b."""
    models = [{"model": "a"}, {"model": "b"}]
    return {"merge_method": method, "models": models, "parameters": {"weight": weights}} | top


def arithmetic(weight: Any, **top: Any) -> dict[str, Any]:
    """Task arithmetic of one model: the base model at weight 0, a at weight 1."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"weight": weight},
    } | top


def loaded(cls: Any, folder: Path | str = "out") -> Any:
    """The model; every parameter must be there and nothing else."""
    model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    wrong = {key: value for key, value in info.items() if value}
    assert not wrong, wrong
    return model.eval()


def speaks(model: Any) -> None:
    """Whether the model gives finite logits, and goes on with a text."""
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        longer = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.isfinite(logits).all()
    assert longer.shape == (1, 8)


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal up to one rounding to bfloat16."""
    torch.testing.assert_close(got.double(), wanted.double(), rtol=BF16_ULP, atol=1e-7)


def between(low: Tensor, high: Tensor, share: float) -> Tensor:
    return low.double() + share * (high.double() - low.double())


# --- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.names())
def test_a_llama_merged_by_every_method(capsys: Capture, family: Path, method: str) -> None:
    merge(capsys, recipe_for(method))
    model = loaded(AutoModelForCausalLM)
    assert model.dtype == torch.bfloat16
    speaks(model)
    words = AutoTokenizer.from_pretrained("out")
    assert words("one two").input_ids == [2, 3]
    out, base = tensors("out"), tensors("base")
    assert out.keys() == base.keys()
    assert {name: t.shape for name, t in out.items()} == {n: t.shape for n, t in base.items()}
    if method != "passthrough":  # a copy of a
        assert all(not torch.equal(out[name], tensors("a")[name]) for name in (EMBED, HEAD))


def test_shards_are_those_of_the_base_model(capsys: Capture, family: Path) -> None:
    merge(capsys, recipe_for("ties"))
    maps = [json.loads(Path(name, INDEX).read_text()) for name in ("base", "out")]
    assert maps[0]["weight_map"] == maps[1]["weight_map"]
    assert len(set(maps[0]["weight_map"].values())) > 3
    assert maps[1]["metadata"]["total_size"] == sum(t.nbytes for t in tensors("base").values())


def test_the_average_is_the_average(capsys: Capture, family: Path) -> None:
    merge(capsys, of_two())
    a, b, out = tensors("a"), tensors("b"), tensors("out")
    for name, tensor in out.items():
        assert torch.equal(tensor, between(a[name], b[name], 0.5).bfloat16())


def test_the_config_and_the_dtype(capsys: Capture, family: Path) -> None:
    before = config_of("base")
    merge(capsys, of_two(dtype="float32", base_model="base", merge_method="task_arithmetic"))
    assert config_of() == before | {"dtype": "float32"}
    assert {tensor.dtype for tensor in tensors("out").values()} == {torch.float32}
    model = loaded(AutoModelForCausalLM)
    assert model.dtype == torch.float32
    merge(capsys, of_two(dtype="float32", out_dtype="float16"), out="half")
    assert {tensor.dtype for tensor in tensors("half").values()} == {torch.float16}
    assert config_of("half")["dtype"] == "float16"


def test_one_shard_and_single_files(capsys: Capture, here: Path) -> None:
    """Models given as one ``.safetensors`` file each; the base model's folder has the config."""
    write_family(here, random(LlamaForCausalLM, LlamaConfig(**SIZES)), shard="1GB")
    for name in "ab":
        Path(name, SINGLE).rename(f"{name}.safetensors")
        shutil.rmtree(name)
    models = [{"model": "a.safetensors"}, {"model": "./b.safetensors"}]
    merge(capsys, recipe_for("ties") | {"models": models})
    speaks(loaded(AutoModelForCausalLM))
    assert not Path("out", INDEX).exists() and Path("out", SINGLE).exists()


def test_shard_size(capsys: Capture, family: Path) -> None:
    merge(capsys, of_two(shard_size="9 kB"))
    shards = list(Path("out").glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in shards]
    assert len(shards) > 6 and max(sizes) <= 9000
    speaks(loaded(AutoModelForCausalLM))


def test_seeds(capsys: Capture, family: Path) -> None:
    for out, seed in (("one", {"seed": 1}), ("two", {"seed": 2}), ("again", {"seed": 1})):
        merge(capsys, recipe_for("dare_ties", **seed), out=out)
    merge(capsys, recipe_for("dare_ties"), out="none")
    merge(capsys, recipe_for("dare_ties", seed=0), out="zero")
    assert digests(Path("one")) == digests(Path("again"))
    assert digests(Path("one")) != digests(Path("two"))
    assert digests(Path("none")) == digests(Path("zero")) != digests(Path("one"))


# --- gradients, filters, rules --------------------------------------------------------------------


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def check_weights(weight_of: Callable[[str], float]) -> None:
    """Every tensor of OUT is as far between the base model and a as its weight says."""
    base, a = tensors("base"), tensors("a")
    for name, tensor in tensors("out").items():
        close(tensor, between(base[name], a[name], weight_of(name)))


def test_a_gradient_over_the_layers(capsys: Capture, family: Path) -> None:
    """As in mergekit: linear between the entries, and the first entry outside of layers."""
    merge(capsys, arithmetic([0.1, 1.0, 0.4]))
    by_layer = [0.1, 0.1 + 0.9 * 2 / 3, 1.0 - 0.6 / 3, 0.4]
    check_weights(lambda name: 0.1 if layer_of(name) is None else by_layer[layer_of(name) or 0])


def test_filters(capsys: Capture, family: Path) -> None:
    """The first filter that is part of the name counts; one without filter is for the rest."""
    merge(
        capsys,
        arithmetic(
            [
                {"filter": "mlp.down", "value": [0.0, 0.9]},
                {"filter": "mlp", "value": 0.25},
                {"filter": "embed_tokens", "value": 1.0},
                {"value": 0.5},
            ]
        ),
    )

    def weight_of(name: str) -> float:
        layer = layer_of(name)
        if "mlp" in name and layer is not None:
            return 0.9 * layer / 3 if "down" in name else 0.25
        return 1.0 if name == EMBED else 0.5

    check_weights(weight_of)


def test_a_filter_that_does_not_match_falls_through(capsys: Capture, family: Path) -> None:
    """From the model's own parameters to those of the recipe."""
    recipe = arithmetic(0.75)
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "self_attn", "value": 0.25}]}
    merge(capsys, recipe)
    check_weights(lambda name: 0.25 if "self_attn" in name else 0.75)


def test_rules(capsys: Capture, family: Path) -> None:
    rules = [
        {"tensors": "*.mlp.*", "merge_method": "slerp", "parameters": {"t": 1.0}},
        {"tensors": ["*norm*", "*.up_proj.*"], "from": "base"},
        {"tensors": "model.layers.[12].self_attn.*", "parameters": {"weight": 0.25}},
        {"tensors": HEAD, "drop": True},
    ]
    merge(capsys, arithmetic(1.0) | {"rules": rules})
    assert HEAD not in tensors("out")

    def weight_of(name: str) -> float:
        if "norm" in name or "up_proj" in name:
            return 0.0
        return 0.25 if "self_attn" in name and layer_of(name) in (1, 2) else 1.0

    check_weights(weight_of)


def test_rules_for_tensors_that_a_model_lacks(capsys: Capture, family: Path) -> None:
    """Noise in a fine-tune: a buffer that only one has, a tensor that one does not."""
    index = json.loads(Path("a", INDEX).read_text())
    shard = Path("a", index["weight_map"].pop(NORM))
    own = load_file(shard)
    del own[NORM]
    own["model.extra"] = torch.ones(3)
    index["weight_map"]["model.extra"] = shard.name
    save_file(own, shard, metadata={"format": "pt"})
    Path("a", INDEX).write_text(json.dumps(index))
    recipe = arithmetic(0.5) | {"rules": [{"tensors": NORM, "missing": "base"}]}
    recipe["models"].append({"model": "b"})
    err = merge(capsys, recipe)
    assert "model.extra: only in a; copied from it" in err
    assert torch.equal(tensors("out")["model.extra"], torch.ones(3))
    close(tensors("out")[NORM], between(tensors("base")[NORM], tensors("b")[NORM], 0.5))


# --- tied embeddings ------------------------------------------------------------------------------


def tie(folder: str) -> None:
    """Make a checkpoint's output embedding its input embedding."""
    stored = tensors(folder)
    del stored[HEAD]
    for path in Path(folder).glob("*.safetensors*"):
        path.unlink()
    save_file(stored, Path(folder, SINGLE), metadata={"format": "pt"})
    write_config(folder, tie_word_embeddings=True)
    assert torch.equal(loaded(AutoModelForCausalLM, folder).lm_head.weight, stored[EMBED])


def test_one_model_tied_and_one_not(capsys: Capture, family: Path) -> None:
    """The output embedding is stored, and the config says so."""
    tie("base")
    err = merge(capsys, arithmetic(0.5))
    assert f"{HEAD}: tied to the token embedding in base; stored in the output" in err
    base, a, out = tensors("base"), tensors("a"), tensors("out")
    close(out[HEAD], between(base[EMBED], a[HEAD], 0.5))
    close(out[EMBED], between(base[EMBED], a[EMBED], 0.5))
    assert config_of()["tie_word_embeddings"] is False
    model = loaded(AutoModelForCausalLM)
    assert torch.equal(model.lm_head.weight, out[HEAD])
    speaks(model)


def test_dropping_the_output_embedding_keeps_it_tied(capsys: Capture, family: Path) -> None:
    tie("base")
    merge(capsys, arithmetic(0.5) | {"rules": [{"tensors": HEAD, "drop": True}]})
    assert HEAD not in tensors("out")
    assert config_of()["tie_word_embeddings"] is True
    model = loaded(AutoModelForCausalLM)
    assert torch.equal(model.lm_head.weight, tensors("out")[EMBED])


def test_all_tied(capsys: Capture, family: Path) -> None:
    for name in ("base", "a"):
        tie(name)
    assert "tied" not in merge(capsys, arithmetic(0.5))
    assert HEAD not in tensors("out") and config_of()["tie_word_embeddings"] is True
    speaks(loaded(AutoModelForCausalLM))


# --- slices ---------------------------------------------------------------------------------------


def stacked(*ranges: tuple[str, int, int], **top: Any) -> dict[str, Any]:
    slices = [
        {"sources": [{"model": model, "layer_range": [first, last]}]}
        for model, first, last in ranges
    ]
    return {"merge_method": "passthrough", "slices": slices} | top


def check_layers(picked: Sequence[tuple[str, int]], prefix: str = "model.layers.") -> None:
    """Every layer of OUT equals the layer of the model it was picked from."""
    out = tensors("out")
    seen = set()
    for number, (model, layer) in enumerate(picked):
        for name, tensor in tensors(model).items():
            if name.startswith(f"{prefix}{layer}."):
                new = name.replace(f"{prefix}{layer}.", f"{prefix}{number}.", 1)
                assert torch.equal(out[new], tensor), new
                seen.add(new)
    assert seen == {name for name in out if name.startswith(prefix)}


def test_stacked_layers(capsys: Capture, family: Path) -> None:
    merge(capsys, stacked(("a", 0, 3), ("b", 1, 4), ("a", 3, 4)))
    check_layers([("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("a", 3)])
    assert config_of()["num_hidden_layers"] == 7
    out = tensors("out")
    assert torch.equal(out[EMBED], tensors("a")[EMBED])  # of the first slice
    assert torch.equal(out[HEAD], tensors("a")[HEAD])  # of the last
    model = loaded(AutoModelForCausalLM)
    assert len(model.model.layers) == 7
    speaks(model)


def test_fewer_layers(capsys: Capture, family: Path) -> None:
    merge(capsys, stacked(("a", 0, 1), ("b", 3, 4), base_model="base"))
    check_layers([("a", 0), ("b", 3)])
    assert config_of()["num_hidden_layers"] == 2
    assert torch.equal(tensors("out")[HEAD], tensors("b")[HEAD])
    speaks(loaded(AutoModelForCausalLM))


def test_merged_layers(capsys: Capture, family: Path) -> None:
    """Two models in a slice, with a gradient inside the slice."""
    sources = [{"model": "base", "layer_range": [0, 3]}, {"model": "a", "layer_range": [0, 3]}]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [{"sources": sources, "parameters": {"weight": [0.0, 1.0]}}],
    }
    merge(capsys, recipe)
    check_weights(lambda name: (layer_of(name) or 0) / 2)
    assert config_of()["num_hidden_layers"] == 3
    speaks(loaded(AutoModelForCausalLM))


def test_layer_types_go_with_their_layers(capsys: Capture, here: Path) -> None:
    config = Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    full, sliding = "full_attention", "sliding_attention"
    config.layer_types = [full, sliding, sliding, full]
    write_family(here, random(Qwen3ForCausalLM, config))
    merge(capsys, stacked(("a", 0, 2), ("b", 1, 4)))
    check_layers([("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3)])
    assert config_of()["layer_types"] == [full, sliding, sliding, sliding, full]
    assert config_of()["num_hidden_layers"] == 5
    model = loaded(AutoModelForCausalLM)
    assert model.config.layer_types == [full, sliding, sliding, sliding, full]
    speaks(model)


def test_gemma3(capsys: Capture, here: Path) -> None:
    """Tied embeddings, layer types with a period, norms around everything."""
    sizes = {**SIZES, "num_hidden_layers": 6}
    config = Gemma3TextConfig(**sizes, head_dim=8, sliding_window=8)
    write_family(here, random(Gemma3ForCausalLM, config))
    merge(capsys, stacked(("a", 3, 6), ("b", 0, 3)))
    check_layers([("a", 3), ("a", 4), ("a", 5), ("b", 0), ("b", 1), ("b", 2)])
    sliding = "sliding_attention"
    assert config_of()["layer_types"] == [sliding, sliding, "full_attention"] + [sliding] * 3
    speaks(loaded(AutoModelForCausalLM))
    merge(capsys, recipe_for("slerp"), out="whole")
    speaks(loaded(AutoModelForCausalLM, "whole"))


# --- other architectures --------------------------------------------------------------------------


def test_an_image_model_with_a_nested_language_model(capsys: Capture, here: Path) -> None:
    """Layers of its language model are stacked; the tower for images is kept as it is."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(**SIZES)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    write_family(here, random(LlavaForConditionalGeneration, config))
    Path("a/preprocessor_config.json").write_text('{"size": 8}')
    Path("a/processor_config.json").write_text("{}")
    merge(capsys, of_two(), out="average")
    speaks(loaded(AutoModelForImageTextToText, "average"))
    merge(capsys, stacked(("a", 0, 2), ("b", 0, 4)))
    prefix = "language_model.model.layers."
    check_layers([("a", 0), ("a", 1), *(("b", layer) for layer in range(4))], prefix)
    assert config_of()["text_config"]["num_hidden_layers"] == 6
    assert config_of()["vision_config"] == config_of("a")["vision_config"]
    a = tensors("a")
    tower = [name for name in a if "vision" in name or "projector" in name]
    assert len(tower) > 20 and all(torch.equal(tensors("out")[name], a[name]) for name in tower)
    speaks(loaded(AutoModelForImageTextToText))
    assert Path("out/preprocessor_config.json").read_text() == '{"size": 8}'
    assert Path("out/processor_config.json").exists()


def test_a_mixture_of_experts(capsys: Capture, here: Path) -> None:
    write_family(here, random(MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4)))
    merge(capsys, recipe_for("ties"))
    experts = [name for name in tensors("out") if ".experts." in name]
    assert experts and tensors("out").keys() == tensors("base").keys()
    speaks(loaded(AutoModelForCausalLM))


def test_experts_in_one_tensor(capsys: Capture, here: Path) -> None:
    """Three dimensions, as newer checkpoints store experts."""
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        Path(name).mkdir()
        experts = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 32, 24).bfloat16()}
        save_file(experts, Path(name, SINGLE), metadata={"format": "pt"})
    merge(capsys, of_two(weights=[0.5, 0.5]))
    ((name, out),) = tensors("out").items()
    assert torch.equal(out, between(tensors("a")[name], tensors("b")[name], 0.5).bfloat16())


def test_an_encoder(capsys: Capture, here: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    write_family(here, random(BertModel, BertConfig(**sizes), dtype=torch.float32))
    merge(capsys, recipe_for("dare_linear"))
    model = loaded(AutoModel)
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([[3, 1, 4]])).last_hidden_state
    assert model.dtype == torch.float32 and torch.isfinite(hidden).all()
    merge(capsys, stacked(("a", 0, 2), ("b", 2, 3)), out="short")
    assert len(loaded(AutoModel, "short").encoder.layer) == 3


# --- fp8 ------------------------------------------------------------------------------------------

BLOCK = 128
FP8_SIZES = {**SIZES, "hidden_size": 136, "intermediate_size": 200, "num_hidden_layers": 2}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 codes and the scale of each block of 128 x 128, as DeepSeek's checkpoints have them."""
    rows, columns = weight.shape
    blocks = [math.ceil(size / BLOCK) for size in (rows, columns)]
    padded = torch.zeros(blocks[0] * BLOCK, blocks[1] * BLOCK)
    padded[:rows, :columns] = weight.float()
    tiles = padded.reshape(blocks[0], BLOCK, blocks[1], BLOCK)
    scales = tiles.abs().amax(dim=(1, 3)) / 448
    codes = (tiles / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scales


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return codes.float() * spread[: codes.shape[0], : codes.shape[1]]


def quantise(folder: str, **declared: Any) -> Tensors:
    """Store a checkpoint's projections as block-scaled fp8; gives the values they then have."""
    stored: Tensors = {}
    known: Tensors = {}
    for name, tensor in tensors(folder).items():
        known[name] = tensor
        if "_proj" not in name:
            stored[name] = tensor
            continue
        stored[name], stored[f"{name}_scale_inv"] = codes, scales = quantised(tensor)
        known[name] = dequantised(codes, scales)
    for path in Path(folder).glob("*.safetensors*"):
        path.unlink()
    save_file(stored, Path(folder, SINGLE), metadata={"format": "pt"})
    write_config(folder, quantization_config=FP8 | declared)
    return known


@pytest.fixture
def fp8_family(here: Path) -> Path:
    write_family(here, random(LlamaForCausalLM, LlamaConfig(**FP8_SIZES)), shard="1GB")
    return here


def test_fp8_merged_with_bfloat16(capsys: Capture, fp8_family: Path) -> None:
    """The values, not the codes, are merged; the base model is quantised as well."""
    base, a, b = quantise("base"), quantise("a"), tensors("b")
    recipe = of_two("task_arithmetic", base_model="base")
    err = merge(capsys, recipe, status=1)
    assert "stored as fp8" in err and "`dtype: bfloat16`" in err
    merge(capsys, recipe | {"dtype": "bfloat16"})  # as the message says
    out = tensors("out")
    assert out.keys() == b.keys()  # no scales are left
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}
    for name, tensor in out.items():
        values = [known[name].double() for known in (base, a, b)]
        wanted = values[0] + 0.5 * (values[1] - values[0]) + 0.5 * (values[2] - values[0])
        close(tensor, wanted)
    assert "quantization_config" not in config_of()
    assert config_of()["dtype"] == "bfloat16"
    speaks(loaded(AutoModelForCausalLM))


def test_fp8_in_small_tiles(
    capsys: Capture, fp8_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that begin and end inside rows and blocks give the same values; the plan knows all."""
    known, b = quantise("a", weight_block_size=[BLOCK, BLOCK]), tensors("b")
    path = write_recipe(Path("recipe.yml"), of_two(dtype="float32"))
    monkeypatch.setattr("shardmerge.memory.TILE_ELEMENTS", 65_536)
    assert main(["plan", path, "out", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(["merge", path, "out", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    read = sum(event.get("read_bytes", 0) for event in events)
    assert 1 <= read / planned["read_bytes"] < 1.001  # scales are read again for every tile
    for name, tensor in tensors("out").items():
        wanted = between(known[name], b[name], 0.5).float()
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-8)


# --- places and files -----------------------------------------------------------------------------


def cached(folder: str, revision: str) -> Path:
    """Move a checkpoint into a Hugging Face cache: a snapshot of links to blobs."""
    cache = Path(f"hub/models--org--{folder}")
    snapshot = cache / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    for number, path in enumerate(sorted(Path(folder).iterdir())):
        blob = cache / "blobs" / f"{number:064x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    Path(folder).rmdir()
    return snapshot


def test_a_hugging_face_cache(capsys: Capture, family: Path) -> None:
    before = {name: tensors(name) for name in ("base", "a", "b")}
    snapshots = {name: cached(name, "0123abcd") for name in ("base", "a", "b")}
    recipe = of_two("task_arithmetic", base_model=str(snapshots["base"]))
    recipe["models"] = [{"model": str(snapshots["a"])}, {"model": "hub/models--org--b@main"}]
    merge(capsys, recipe)
    for name, tensor in tensors("out").items():
        base, a, b = (before[model][name].double() for model in ("base", "a", "b"))
        close(tensor, base + 0.5 * (a - base) + 0.5 * (b - base))
    speaks(loaded(AutoModelForCausalLM))
    assert all(not path.is_symlink() for path in Path("out").iterdir())
    assert "org/base" in Path("out/README.md").read_text()


def test_custom_code_is_copied_and_never_run(capsys: Capture, family: Path) -> None:
    code = "from pathlib import Path\nPath('marker').write_text('was run')\n"
    for name in ("modeling_own.py", "tokenization_own.py", "setup.py", "__init__.py"):
        Path("base", name).write_text(code)
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    write_config("base", auto_map=auto_map)
    merge(capsys, recipe_for("ties"))
    for name in ("modeling_own.py", "tokenization_own.py"):
        assert Path("out", name).read_text() == code
    assert config_of()["auto_map"] == auto_map
    assert list(Path().rglob("marker")) == []


def test_files_beside_the_weights(capsys: Capture, family: Path) -> None:
    """Those of the base model; the tokenizer's and its template are those of tokenizer_source."""
    generation = json.loads(Path("base/generation_config.json").read_text()) | {"top_k": 7}
    Path("base/generation_config.json").write_text(json.dumps(generation))
    for name in ("preprocessor_config.json", "LICENSE", "merges.txt", "tokenizer.model"):
        Path("base", name).write_text(f"{name} of base")
    Path("base/optimizer.pt").write_bytes(b"training state")
    Path("base/trainer_state.json").write_text("{}")
    Path("a/LICENSE").write_text("of a")
    merge(capsys, recipe_for("ties"))
    for name in ("preprocessor_config.json", "LICENSE", "merges.txt", "tokenizer.model"):
        assert Path("out", name).read_text() == f"{name} of base"
    assert json.loads(Path("out/generation_config.json").read_text())["top_k"] == 7
    assert not Path("out/optimizer.pt").exists() and not Path("out/trainer_state.json").exists()
    template = Path("base/chat_template.jinja").read_text()
    assert Path("out/chat_template.jinja").read_text() == template

    Path("a/chat_template.jinja").write_text("of a")
    merge(capsys, recipe_for("ties", tokenizer_source="a"), out="other")
    assert AutoTokenizer.from_pretrained("other")("more").input_ids == [4]
    assert AutoTokenizer.from_pretrained("out")("more").input_ids == [0]
    assert Path("other/chat_template.jinja").read_text() == "of a"
    assert not Path("other/tokenizer.model").exists()  # a has none
    assert Path("other/LICENSE").read_text() == "LICENSE of base"


def test_the_record_and_the_card(capsys: Capture, family: Path) -> None:
    merge(capsys, recipe_for("dare_ties", str(family), seed=5))
    record = json.loads(Path("out/shardmerge.json").read_text())
    assert set(record["shards"]) == {path.name for path in Path("out").glob("*.safetensors")}
    assert set(record["sources"]) == {f"{family}/{name}" for name in ("base", "a", "b")}
    assert "dare_ties" in record["recipe"] and "seed: 5" in record["recipe"]
    card = Path("out/README.md").read_text()
    assert card.startswith("---\n") and "dare_ties" in card and "arXiv:2311.03099" in card
    assert "`base`" in card and str(family) not in card  # it is made to be published


def test_a_merge_can_be_merged_again(capsys: Capture, family: Path) -> None:
    merge(capsys, of_two(), out="first")
    merge(capsys, {**of_two(), "models": [{"model": "first"}, {"model": "a"}]})
    speaks(loaded(AutoModelForCausalLM))
    assert set(json.loads(Path("out/shardmerge.json").read_text())["sources"]) == {"first", "a"}
