"""The files beside the shards."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.assets import (
    files_to_copy,
    hub_name,
    model_card,
    patched_config,
    provenance,
    public_text,
    written_dtype,
)
from shardmerge.errors import PlanError
from shardmerge.match import Outputs, OutputTensor
from shardmerge.numerics import DType
from shardmerge.recipe import ModelName, Recipe
from shardmerge.sources.tensor import Checkpoint, TensorRef

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "vocab_size": 32,
}


# --- config.json ----------------------------------------------------------------------------------


def test_nothing_to_change() -> None:
    assert patched_config(LLAMA, dtype=None) == LLAMA


def test_the_given_config_is_not_changed() -> None:
    config = {"text_config": {"num_layers": 4, "layer_types": ["a", "b", "c", "d"]}}
    before = json.dumps(config)
    patched_config(config, dtype=DType.F32, layers=[0, 1, 1], layer_count=3, untied=True)
    assert json.dumps(config) == before


def test_keys_keep_their_order() -> None:
    patched = patched_config(
        LLAMA, dtype=DType.BF16, layer_count=2, layers=[0, 3], untied=True, vocab_size=33
    )
    assert list(patched) == list(LLAMA)
    assert patched == LLAMA | {
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 33,
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "x"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "x"}, {"dtype": "bfloat16"}),
        ({"dtype": "x", "torch_dtype": "x"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"a": 1}, {"a": 1, "dtype": "bfloat16"}),
        ({}, {}),
        (
            {"text_config": {"dtype": "x"}, "vision_config": {"torch_dtype": "x", "b": 2}},
            {
                "text_config": {"dtype": "bfloat16"},
                "vision_config": {"torch_dtype": "bfloat16", "b": 2},
                "dtype": "bfloat16",
            },
        ),
    ],
)
def test_dtype(config: Mapping[str, object], expected: Mapping[str, object]) -> None:
    assert patched_config(config, dtype=DType.BF16) == expected


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers"])
@pytest.mark.parametrize("nested", [False, True])
def test_layer_count(key: str, nested: bool) -> None:
    text: dict[str, object] = {key: 4, "layer_types": list("abcd"), "hidden_size": 4}
    config = {"text_config": text, "vision_config": {"num_hidden_layers": 4}} if nested else text
    patched = patched_config(config, dtype=None, layer_count=5, layers=[0, 1, 1, 2, 3])
    section = patched["text_config"] if nested else patched
    assert section == {key: 5, "layer_types": list("abbcd"), "hidden_size": 4}
    assert patched.get("vision_config") == ({"num_hidden_layers": 4} if nested else None)


def test_everything_per_layer_is_picked() -> None:
    config = {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "mlp_layer_types": list("dsss"),
        "hybrid_override_pattern": "M*M-",
        "mlp_only_layers": [0, 3],
        "cross_attention_layers": [1],
        "intermediate_size": [1, 2, 3, 4],
        "first_k_dense_replace": 1,
        "max_window_layers": 4,
        "eos_token_id": [1, 2, 3, 4],
        "quantization_config": {"quant_method": "fp8"},
    }
    patched = patched_config(config, dtype=None, layer_count=5, layers=[0, 1, 3, 2, 3])
    assert patched == {
        "num_hidden_layers": 5,
        "no_rope_layers": [1, 1, 0, 1, 0],
        "mlp_layer_types": list("dssss"),
        "hybrid_override_pattern": "M*-M-",
        "mlp_only_layers": [0, 2, 4],
        "cross_attention_layers": [1],
        "intermediate_size": [1, 2, 4, 3, 4],
        "first_k_dense_replace": 1,
        "max_window_layers": 5,
        "eos_token_id": [1, 2, 3, 4],
    }


def test_windows() -> None:
    config = {"num_hidden_layers": 4, "max_window_layers": 2, "use_sliding_window": True}
    patched = patched_config(config, dtype=None, layers=[0, 1, 1, 2, 3])
    assert patched["max_window_layers"] == 3
    with pytest.raises(PlanError, match="max_window_layers 2"):
        patched_config(config, dtype=None, layers=[0, 2, 1])
    unused = config | {"use_sliding_window": False, "max_window_layers": 3}
    assert patched_config(unused, dtype=None, layers=[0, 1])["max_window_layers"] == 2


def test_layers_whose_kind_follows_from_their_number() -> None:
    config = {"num_hidden_layers": 6, "sliding_window_pattern": 3}
    shifted = patched_config(config, dtype=None, layers=[0, 1, 2, 0, 1, 2, 3, 4, 5])
    assert shifted["num_hidden_layers"] == 9
    with pytest.raises(PlanError, match="output layer 2\n  is made from layer 1"):
        patched_config(config, dtype=None, layers=[0, 1, 1, 2])
    outright = config | {"layer_types": list("ssfssf")}
    patched = patched_config(outright, dtype=None, layers=[0, 1, 1, 2])
    assert patched["layer_types"] == list("sssf")
    with pytest.raises(PlanError, match="gemma2"):
        patched_config({"n_layer": 4, "model_type": "gemma2"}, dtype=None, layers=[0, 2])


def test_layers_that_the_donor_does_not_have() -> None:
    config = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    with pytest.raises(PlanError, match="entries for 2 layers"):
        patched_config(config, dtype=None, layers=[0, 1, 2])


def test_quantisation() -> None:
    config = {"a": 1, "text_config": {"quantization_config": {"dtype": "x"}}}
    assert patched_config(config, dtype=None) == {"a": 1, "text_config": {}}
    assert patched_config(config, dtype=None, dequantised=False) == config


def test_untied_is_said_everywhere() -> None:
    patched = patched_config({"text_config": {"vocab_size": 3}}, dtype=None, untied=True)
    assert patched == {
        "text_config": {"vocab_size": 3, "tie_word_embeddings": False},
        "tie_word_embeddings": False,
    }


def test_transformers_reads_it() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(num_hidden_layers=4, max_window_layers=2).to_dict()
    patched = patched_config(
        config, dtype=DType.BF16, layer_count=6, layers=[0, 1, 2, 1, 2, 3], untied=True
    )
    loaded = transformers.Qwen2Config.from_dict(patched)
    assert loaded.num_hidden_layers == len(loaded.layer_types) == 6
    assert not loaded.tie_word_embeddings
    assert str(loaded.dtype) == "torch.bfloat16"


def tensor(name: str, dtype: DType, shape: tuple[int, ...]) -> OutputTensor:
    ref = TensorRef(name, dtype, shape, ())
    return OutputTensor(
        name=name,
        shape=shape,
        dtype=dtype,
        method=None,
        base=None,
        models=(ref,),
        positions=(0,),
        extras=(),
        wide=False,
        group=0,
    )


def test_written_dtype() -> None:
    found = [
        tensor("a", DType.F32, (4,)),
        tensor("b", DType.BF16, (100,)),
        tensor("c", DType.I64, (999,)),
    ]
    assert written_dtype(found) is DType.BF16
    assert written_dtype(found[2:]) is None


# --- files ----------------------------------------------------------------------------------------


def small_files(url: str, *files: str) -> Checkpoint:
    return Checkpoint(url=url, tensors={}, shard_of={}, shards=(), files=files)


def test_files() -> None:
    tokenizer = (
        "added_tokens.json",
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "merges.txt",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "spiece.model",
        "tokenization_qwen.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    )
    other = (
        "1_Pooling/config.json",
        "config.json",
        "generation_config.json",
        "modeling_qwen.py",
        "modules.json",
        "preprocessor_config.json",
    )
    a, b = small_files("a", *tokenizer, *other), small_files("b", *tokenizer, *other)
    found = files_to_copy(a, b)
    assert [name for _, name in found] == sorted({*tokenizer, *other} - {"config.json"})
    assert {name for checkpoint, name in found if checkpoint is b} == set(tokenizer)
    assert all(checkpoint is a for checkpoint, _ in files_to_copy(a, a))


def test_files_that_only_one_has() -> None:
    a, b = small_files("a", "tokenizer.json", "x.json"), small_files("b", "vocab.txt", "y.json")
    assert [(c.url, name) for c, name in files_to_copy(a, b)] == [
        ("b", "vocab.txt"),
        ("a", "x.json"),
    ]


# --- model card -----------------------------------------------------------------------------------

RECIPE = """\
# kept in /home/me/recipes/x.yml
merge_method: ties
base_model: org/base-7B
models:
- model: /data/secret place/models--acme--math/snapshots/0123
  parameters: {weight: 0.5}
- {model: /home/me/models/code, parameters: {weight: 0.5}}
rules:
- {tensors: lm_head.weight, merge_method: linear}
"""


def card(text: str = RECIPE) -> str:
    notes = ("x.weight: only in /home/me/models/code; copied from it",)
    outputs = Outputs(
        tensors=(tensor("a", DType.BF16, (1000, 7)),),
        shard_of=(0,),
        notes=notes,
        donor=ModelName("org/base-7B"),
    )
    return model_card(Recipe.parse(text), outputs, version="1.2.3")


def test_card_front_matter() -> None:
    _, front, body = card().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["shardmerge", "merge"],
        "base_model": ["org/base-7B", "acme/math"],
    }
    assert "7,000 parameters in 1 tensor" in body


def test_card_names_methods_and_papers() -> None:
    text = card()
    assert "## Methods" in text
    assert (
        "- `ties`: Merge task vectors by trimming, sign election and disjoint mean. Yadav" in text
    )
    assert "arXiv:2306.01708" in text
    assert "- `linear`: Average models by weight. Wortsman" in text


def test_card_tells_no_paths() -> None:
    text = card()
    assert "/home" not in text
    assert "/data" not in text
    assert "secret place" not in text
    assert "- `code`: merged" in text
    assert "- `acme/math`: merged" in text
    assert "x.weight: only in code; copied from it" in text
    assert "shardmerge verify" in text


def test_the_cards_recipe_is_yaml() -> None:
    block = card(RECIPE.replace("# kept", "# ```` kept")).split("`````yaml\n")[1].split("`````")[0]
    assert yaml.safe_load(block)["models"][1]["model"] == "code"


def test_card_without_hub_names() -> None:
    text = "merge_method: passthrough\nmodels: [{model: /a/b/c}]\n"
    front = yaml.safe_load(card(text).split("---\n")[1])
    assert "base_model" not in front
    assert "## Method\n" in card(text)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("org/name-7B.v1", "org/name-7B.v1"),
        ("hf://org/name", "org/name"),
        ("/home/me/.cache/huggingface/hub/models--org--na-me/snapshots/a1b2", "org/na-me"),
        ("/abs/name", None),
        ("../name", None),
        ("./name", None),
        ("a/b/c", None),
        ("s3://bucket/name", None),
        ("name", None),
    ],
)
def test_hub_names(url: str, name: str | None) -> None:
    assert hub_name(ModelName(url)) == name


# --- provenance -----------------------------------------------------------------------------------


def test_provenance() -> None:
    url = "https://me:pa,ss@host/models/a?X-Amz-Signature=abc"
    text = f"merge_method: passthrough\nmodels: [{{model: {{path: '{url}'}}}}]\n"
    checkpoint = Checkpoint(url, {}, {}, (), versions={"model.safetensors": "v1"})
    content = provenance(
        version="1.0",
        fingerprint="f00",
        recipe=Recipe.parse(text),
        sources={ModelName(url): checkpoint},
        shards={"model.safetensors": {"bytes": 10, "crc32": "0000abcd"}},
        files={"config.json": b"{}", "README.md": b"# A model"},
        non_finite=0,
        notes=[f"x: only in {url}; copied from it"],
        sums=(0.1, 2.0),
    )
    found = json.loads(content)
    assert found["files"] == {"config.json": {"bytes": 2, "crc32": f"{zlib.crc32(b'{}'):08x}"}}
    assert list(found) == [
        "shardmerge",
        "fingerprint",
        "recipe",
        "sources",
        "shards",
        "files",
        "non_finite_tensors",
        "notes",
        "sums",
    ]
    assert found["sums"] == [0.1, 2.0]
    assert found["sources"] == {
        "https://host/models/a": {
            "url": "https://host/models/a",
            "versions": {"model.safetensors": "v1"},
        }
    }
    for secret in ("me:", "pa,ss", "Signature", "abc;"):
        assert secret not in json.dumps(found)


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("s3://bucket/key", "s3://bucket/key"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("{model: s3://k:s@b/x?v=1, a: c@d}", "{model: s3://b/x, a: c@d}"),
        ("['s3://b/x?v=1,2', 'y?z']", "['s3://b/x', 'y?z']"),
        ("s3://b/x#f [https://u@h]", "s3://b/x [https://h]"),
        ("/local/path?x", "/local/path?x"),
        ("http://[", "http://["),
    ],
)
def test_public_text(text: str, public: str) -> None:
    assert public_text(text) == public


SECRET = st.text(
    st.characters(categories=["L", "N"], include_characters=":,;!$&()*+=~.-_%"), min_size=4
)


@given(SECRET, SECRET)
def test_no_secret_is_told(password: str, query: str) -> None:
    told = public_text(f"model: https://user:{password}Q@host/a?sig={query}Q\n- next")
    assert told == "model: https://host/a\n- next"
