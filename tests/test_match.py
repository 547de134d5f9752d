"""Which input tensors make each output tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.errors import PlanError
from shardmerge.layers import is_before_layers, layout_of, place_of
from shardmerge.match import Outputs, OutputTensor, match
from shardmerge.methods.api import describe
from shardmerge.numerics import DType
from shardmerge.recipe import ModelName, Recipe
from shardmerge.sources.tensor import BlockScale, Checkpoint, Segment, TensorRef

Shapes = Mapping[str, tuple[int, ...]]

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
UNTIED = {"num_hidden_layers": 2, "tie_word_embeddings": False}
TIED = {"num_hidden_layers": 2, "tie_word_embeddings": True}


def llama(layers: int = 2, *, vocab: int = 16, head: bool = True) -> dict[str, tuple[int, ...]]:
    names = {EMBED: (vocab, 4)}
    for layer in range(layers):
        names[f"model.layers.{layer}.mlp.up_proj.weight"] = (8, 4)
        names[f"model.layers.{layer}.self_attn.q_proj.weight"] = (4, 4)
    return {**names, NORM: (4,)} | ({HEAD: (vocab, 4)} if head else {})


def checkpoint(
    url: str,
    shapes: Shapes,
    config: Mapping[str, object] | None = None,
    *,
    dtype: DType = DType.BF16,
    dtypes: Mapping[str, DType] | None = None,
    shards: int = 1,
) -> Checkpoint:
    refs = {}
    for name, shape in shapes.items():
        ref = TensorRef(name, (dtypes or {}).get(name, dtype), shape, ())
        refs[name] = replace(ref, segments=(Segment(f"{url}/m.safetensors", 0, ref.nbytes),))
    per_shard = -(-len(refs) // shards)
    return Checkpoint(
        url=url,
        tensors=refs,
        shard_of={name: number // per_shard for number, name in enumerate(refs)},
        shards=tuple(f"model-{number}.safetensors" for number in range(shards)),
        config=UNTIED if config is None else config,
    )


def outputs(text: str, *checkpoints: Checkpoint) -> Outputs:
    return match(Recipe.parse(text), {ModelName(item.url): item for item in checkpoints})


def problem(text: str, *checkpoints: Checkpoint) -> str:
    with pytest.raises(PlanError) as caught:
        outputs(text, *checkpoints)
    return str(caught.value)


def by_name(found: Outputs) -> dict[str, OutputTensor]:
    return {tensor.name: tensor for tensor in found.tensors}


def urls(tensor: OutputTensor) -> list[str]:
    return [ref.segments[0].url.split("/")[0] for ref in tensor.models]


def settings(tensor: OutputTensor) -> dict[str, object]:
    found = describe(tensor.method)["parameters"]
    assert isinstance(found, dict)
    return found


def weighted(*models: str, extra: str = "") -> str:
    lines = [f"- {{model: {model}, parameters: {{weight: 1}}{extra}}}" for model in models]
    return "models:\n" + "\n".join(lines) + "\n"


LINEAR = "merge_method: linear\n" + weighted("a", "b")
TASK = "merge_method: task_arithmetic\nbase_model: base\n" + weighted("a", "b")
STACK = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b, layer_range: [1, 4]}]
"""


def rules(*texts: str) -> str:
    return "rules:\n" + "".join(f"- {{{text}}}\n" for text in texts)


# --- names and layers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.", 12),
        ("transformer.h.3.attn.c_attn.weight", "transformer.h.", 3),
        ("bert.encoder.layer.0.output.dense.bias", "bert.encoder.layer.", 0),
        ("language_model.model.layers.4.norm.weight", "language_model.model.layers.", 4),
        ("model.decoder.layers.7.fc1.weight", "model.decoder.layers.", 7),
        ("gpt_neox.layers.5.mlp.weight", "gpt_neox.layers.", 5),
        ("blocks.1.w", "blocks.", 1),
        ("model.layers.1.mlp.experts.63.up_proj.weight", "model.layers.", 1),
        ("0.weight", "", 0),
        ("h.10", "h.", 10),
    ],
)
def test_place(name: str, prefix: str, layer: int) -> None:
    place = place_of(name)
    assert place is not None
    assert (place.prefix, place.layer) == (prefix, layer)
    assert f"{place.prefix}{place.layer}{place.suffix}" == name


def test_no_place() -> None:
    assert place_of("model.embed_tokens.weight") is None
    assert place_of("v2.proj1.weight") is None
    assert place_of("h.01.weight") is None
    assert place_of("h.\u0663.weight") is None


def test_main_stack_is_the_configs_not_the_longest() -> None:
    names = [f"vision_tower.layers.{i}.w" for i in range(6)]
    names += [f"model.layers.{i}.mlp.experts.{k}.w" for i in range(3) for k in range(9)]
    assert layout_of(names, {"text_config": {"num_hidden_layers": 3}}).main == "model.layers."
    assert layout_of(names, {}).main == "vision_tower.layers."
    same = [*names, *(f"model.layers.{i}.w" for i in range(3, 6))]
    assert layout_of(same, {"n_layer": 6}).main == "model.layers."


def test_layers_beyond_the_configs_are_no_layers_of_the_model() -> None:
    """Multi-token prediction: DeepSeek-V3 stores layer 61 of a model with 61 layers."""
    layout = layout_of([f"model.layers.{i}.w" for i in range(62)], {"num_hidden_layers": 61})
    assert layout.layer_count == 61
    assert layout.depth("model.layers.60.w") == layout.depth("model.layers.61.w") == 1.0


def test_gaps_are_no_stack() -> None:
    layout = layout_of(["projector.0.w", "projector.2.w", "h.0.w", "h.1.w"], {})
    assert set(layout.lengths) == {"h."}
    assert layout.depth("projector.2.w") == 0.0


@pytest.mark.parametrize(
    ("name", "before"),
    [
        (EMBED, True),
        ("transformer.wpe.weight", True),
        ("transformer.word_embeddings_layernorm.bias", True),
        ("shared.weight", True),
        ("multi_modal_projector.linear_1.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("embed_out.weight", False),
        (HEAD, False),
        (NORM, False),
        ("score.weight", False),
    ],
)
def test_before_layers(name: str, before: bool) -> None:
    assert is_before_layers(name) is before


# --- all tensors everywhere -----------------------------------------------------------------------


def test_plain_merge() -> None:
    found = outputs(TASK, *(checkpoint(url, llama(), shards=2) for url in ("base", "a", "b")))
    assert [tensor.name for tensor in found.tensors] == list(llama())
    assert found.shard_of == (0, 0, 0, 0, 1, 1, 1)
    assert (found.notes, found.untied, found.layers, found.layer_count) == ((), False, None, None)
    assert found.donor == ModelName("base")
    for tensor in found.tensors:
        assert tensor.base is not None
        assert tensor.base.segments[0].url.startswith("base")
        assert urls(tensor) == ["a", "b"]
        assert tensor.positions == (0, 1)
        assert tensor.dtype is DType.BF16
        assert not tensor.wide
        assert tensor.group == 0


def test_equal_settings_share_one_method() -> None:
    found = outputs(LINEAR, checkpoint("a", llama()), checkpoint("b", llama()))
    assert len({id(tensor.method) for tensor in found.tensors}) <= 3  # t = 0, 1, and outside


def test_order_is_the_bases() -> None:
    backwards = dict(reversed(list(llama().items())))
    found = outputs(
        TASK, checkpoint("base", backwards), checkpoint("a", llama()), checkpoint("b", llama())
    )
    assert [tensor.name for tensor in found.tensors] == list(backwards)


def test_unused_base_gives_the_order_but_no_input() -> None:
    text = "merge_method: fisher\nbase_model: base\n" + weighted("a", extra=", fisher: f")
    found = outputs(
        text,
        checkpoint("base", dict(reversed(list(llama().items())))),
        checkpoint("a", llama()),
        checkpoint("f", llama(), dtype=DType.F32),
    )
    assert [tensor.name for tensor in found.tensors] == list(reversed(llama()))
    assert all(tensor.base is None for tensor in found.tensors)
    ((kind, refs),) = found.tensors[0].extras
    assert kind == "fisher"
    assert refs[0].segments[0].url.startswith("f/")


def test_nothing_in_common() -> None:
    other = {f"transformer.{name}": shape for name, shape in llama().items()}
    text = problem(LINEAR, checkpoint("a", llama()), checkpoint("b", other))
    assert "b and a have no tensor name in common" in text


# --- gradients ------------------------------------------------------------------------------------


def test_gradient_over_layers() -> None:
    shapes = llama(5) | {f"visual.blocks.{i}.w": (2,) for i in range(3)}
    text = "merge_method: linear\nparameters: {weight: [0, 1]}\nmodels: [{model: a}]\n"
    found = outputs(
        text.replace("[0, 1]", "[1, 3]"), checkpoint("a", shapes, {"num_hidden_layers": 5})
    )
    values = {tensor.name: settings(tensor)["weight"] for tensor in found.tensors}
    layers = [values[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(5)]
    assert layers == [[1.0], [1.5], [2.0], [2.5], [3.0]]
    assert [values[f"visual.blocks.{i}.w"] for i in range(3)] == [[1.0], [2.0], [3.0]]
    assert values[EMBED] == values[HEAD] == values[NORM] == [1.0]


def test_a_single_layer_has_the_last_value() -> None:
    text = "merge_method: linear\nparameters: {weight: [1, 3]}\nmodels: [{model: a}]\n"
    found = by_name(outputs(text, checkpoint("a", llama(1), {"num_hidden_layers": 1})))
    assert settings(found["model.layers.0.mlp.up_proj.weight"])["weight"] == [3.0]


def test_filters_and_rules_give_other_methods() -> None:
    text = """
merge_method: task_arithmetic
base_model: base
parameters: {weight: [{filter: mlp, value: 2}, {value: 1}]}
models: [{model: a}, {model: b}]
"""
    text += rules(
        "tensors: '*.q_proj.weight', merge_method: ties, parameters: {density: 0.5}",
        "tensors: 'model.layers.1.*', parameters: {lambda: 3}",
    )
    found = by_name(outputs(text, *(checkpoint(url, llama()) for url in ("base", "a", "b"))))
    assert settings(found["model.layers.0.mlp.up_proj.weight"])["weight"] == [2.0, 2.0]
    assert settings(found["model.layers.1.mlp.up_proj.weight"])["lambda"] == 3.0
    assert settings(found[NORM])["weight"] == [1.0, 1.0]
    assert describe(found["model.layers.1.self_attn.q_proj.weight"].method) == {
        "merge_method": "ties",
        "parameters": settings(found["model.layers.0.self_attn.q_proj.weight"]) | {"lambda": 3.0},
    }


# --- slices ---------------------------------------------------------------------------------------


def test_stacked_layers() -> None:
    config = {"num_hidden_layers": 4, "tie_word_embeddings": False}
    found = outputs(STACK, checkpoint("a", llama(4), config), checkpoint("b", llama(4), config))
    origin = {tensor.name: (urls(tensor)[0], tensor.models[0].name) for tensor in found.tensors}
    ups = [origin[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(5)]
    assert ups == [
        (url, f"model.layers.{i}.mlp.up_proj.weight")
        for url, i in [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3)]
    ]
    assert origin[EMBED] == ("a", EMBED)
    assert origin[NORM] == ("b", NORM)
    assert origin[HEAD] == ("b", HEAD)
    assert len(found.tensors) == 13
    assert (found.layer_count, found.layers) == (5, (0, 1, 1, 2, 3))
    assert [tensor.name for tensor in found.tensors][:2] == [
        EMBED,
        "model.layers.0.mlp.up_proj.weight",
    ]


def test_gradient_within_a_slice() -> None:
    text = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [1, 4]}]
  parameters: {scale: [1, 3]}
- sources: [{model: a, layer_range: [0, 1]}]
  parameters: {scale: [5, 9]}
"""
    found = by_name(outputs(text, checkpoint("a", llama(4), {"num_hidden_layers": 4})))
    values = [settings(found[f"model.layers.{i}.mlp.up_proj.weight"])["scale"] for i in range(4)]
    assert values == [[1.0], [2.0], [3.0], [9.0]]
    assert settings(found[EMBED])["scale"] == [1.0]
    assert settings(found[NORM])["scale"] == [5.0]


def test_base_layers_of_a_slice() -> None:
    text = """
merge_method: task_arithmetic
base_model: base
parameters: {weight: 1}
slices:
- sources:
  - {model: a, layer_range: [0, 2]}
  - {model: b, layer_range: [2, 4]}
- sources:
  - {model: base, layer_range: [1, 2]}
  - {model: a, layer_range: [3, 4]}
"""
    config = {"num_hidden_layers": 4}
    found = outputs(text, *(checkpoint(url, llama(4), config) for url in ("base", "a", "b")))
    tensors = by_name(found)
    first, last = (tensors[f"model.layers.{i}.mlp.up_proj.weight"] for i in (1, 2))
    assert first.base is not None
    assert last.base is not None
    assert first.base.name == "model.layers.1.mlp.up_proj.weight"
    assert [ref.name for ref in first.models] == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
    ]
    assert last.base.name == "model.layers.1.mlp.up_proj.weight"
    assert last.models[0].name == "model.layers.3.mlp.up_proj.weight"
    assert tensors[EMBED].positions == (0, 1)
    assert urls(tensors[HEAD]) == ["a"]
    assert found.layers == (0, 1, 1)
    assert {tensors[name].group for name in (EMBED, first.name)} == {first.group}
    assert last.group != first.group


def test_layer_range_beyond_the_model() -> None:
    text = problem(STACK, checkpoint("a", llama(4), {}), checkpoint("b", llama(3), {}))
    assert "slices[1].sources[0]: layer_range [1, 4] goes beyond the 3 layers of b" in text


def test_slices_of_an_encoder_decoder() -> None:
    shapes = {f"{side}.block.{i}.w": (2,) for side in ("encoder", "decoder") for i in range(4)}
    both = (checkpoint(url, shapes, {"num_layers": 4}) for url in "ab")
    assert "a has an encoder and a decoder" in problem(STACK, *both)


def test_slices_of_differently_named_layers() -> None:
    other = {name.replace("model.layers", "h"): shape for name, shape in llama(4).items()}
    text = problem(STACK, checkpoint("a", llama(4), {}), checkpoint("b", other, {}))
    assert "'model.layers.0.' in a, 'h.0.' in b" in text


def test_slices_of_models_without_layers() -> None:
    flat = {NORM: (4,)}
    assert "a has no numbered layers" in problem(STACK, *(checkpoint(u, flat, {}) for u in "ab"))


def test_tensors_of_inner_slices_are_noted() -> None:
    shapes = llama(4) | {"visual.patch_embed.weight": (3,)}
    found = outputs(STACK, checkpoint("a", llama(4), {}), checkpoint("b", shapes, {}))
    assert found.notes == ("visual.patch_embed.weight: only in b, which gives layers; left out",)


def test_shards_of_stacked_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmerge.match.SHARD_BYTES", 100)
    found = outputs(STACK, *(checkpoint(url, llama(4), {}, shards=4) for url in "ab"))
    sizes: dict[int, int] = {}
    for tensor, shard in zip(found.tensors, found.shard_of, strict=True):
        sizes[shard] = sizes.get(shard, 0) + tensor.models[0].nbytes
    assert list(found.shard_of) == sorted(found.shard_of)
    assert len(sizes) > 2
    assert max(sizes.values()) <= 224  # the donor's largest shard: embeddings and two projections


# --- missing tensors ------------------------------------------------------------------------------

PLUS = llama() | {"extra.weight": (2, 2)}


def test_only_in_the_base() -> None:
    found = outputs(
        TASK, checkpoint("base", PLUS), checkpoint("a", llama()), checkpoint("b", llama())
    )
    tensor = by_name(found)["extra.weight"]
    assert (urls(tensor), tensor.base, settings(tensor)) == (["base"], None, {"scale": [1.0]})
    assert found.notes == ("extra.weight: only in base; copied from it",)


def test_only_in_one_model() -> None:
    text = LINEAR.replace("models:", "models:\n- {model: base, parameters: {weight: 1}}")
    for recipe in (TASK, text, f"base_model: base\n{text}"):
        found = outputs(
            recipe, checkpoint("base", llama()), checkpoint("a", llama()), checkpoint("b", PLUS)
        )
        assert urls(by_name(found)["extra.weight"]) == ["b"]
        assert found.notes == ("extra.weight: only in b; copied from it",)
        assert found.shard_of[-1] == 0


def test_many_notes_are_one() -> None:
    shapes = llama() | {f"more.x{i}.weight": (2,) for i in range(1234)}
    found = outputs(LINEAR, checkpoint("a", shapes), checkpoint("b", llama()))
    (note,) = found.notes
    assert note.startswith("more.x0.weight, more.x1.weight, more.x2.weight and 1,231 more: only in")


def test_in_some_models() -> None:
    text = problem(TASK, checkpoint("base", PLUS), checkpoint("a", llama()), checkpoint("b", PLUS))
    assert text == (
        "1 tensor is not in every input: extra.weight.\n"
        "  b and base have it, a does not.\n"
        '  Say what to do: rules: [{tensors: "extra.weight", missing: base}]'
        "  (a as if equal to base)\n"
        "    or, in place of 'missing: base': missing: skip  (merged without a)\n"
        "    or, in place of 'missing: base': from: b  (copied from there)\n"
        "    or, in place of 'missing: base': drop: true  (left out of the output)"
    )


def test_in_models_but_not_in_the_base() -> None:
    both = (checkpoint("base", llama()), checkpoint("a", PLUS), checkpoint("b", PLUS))
    text = problem(TASK, *both)
    assert "a and b have it, base does not" in text
    assert "missing" not in text.split("Say what to do")[1]
    assert 'rules: [{tensors: "extra.weight", from: a}]' in text
    for asked in ("skip", "base"):
        text = problem(TASK + rules(f"tensors: extra.weight, missing: {asked}"), *both)
        assert f"'missing: {asked}' needs the tensor in the base model" in text


@pytest.mark.parametrize("action", ["missing: base", "missing: skip", "from: b", "drop: true"])
def test_rules_for_missing_tensors(action: str) -> None:
    found = by_name(
        outputs(
            TASK + rules(f"tensors: extra.*, {action}"),
            checkpoint("base", PLUS),
            checkpoint("a", llama()),
            checkpoint("b", PLUS),
        )
    )
    tensor = found.get("extra.weight")
    if action == "drop: true":
        assert tensor is None
        assert len(found) == len(llama())
        return
    assert tensor is not None
    expected = {
        "missing: base": (["base", "b"], (0, 1)),
        "missing: skip": (["b"], (1,)),
        "from: b": (["b"], (0,)),
    }
    assert (urls(tensor), tensor.positions) == expected[action]
    assert (tensor.base is None) is (action == "from: b")
    assert tensor.group == (0 if action == "missing: base" else 1)


def test_the_rule_printed_is_for_these_tensors_only() -> None:
    text = problem(
        TASK,
        checkpoint("base", llama(40), {}),
        checkpoint("a", llama(38), {}),
        checkpoint("b", {name: s for name, s in llama(40).items() if "q_proj" not in name}, {}),
    )
    globs = [re.findall('"(.*?)"', line) for line in text.splitlines() if "rules: " in line]
    assert globs == [
        [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(10)],
        ["model.layers.38.mlp.up_proj.weight", "model.layers.39.mlp.up_proj.weight"],
    ]
    text = problem(
        TASK,
        checkpoint("base", llama(40), {}),
        checkpoint("a", llama(38), {}),
        checkpoint("b", llama(40), {}),
    )
    assert '{tensors: ["model.layers.38.*", "model.layers.39.*"], missing: base}' in text


def test_skipping_leaves_too_few_models() -> None:
    text = "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nmodels: [{model: a}]\n"
    text += rules("tensors: extra.weight, missing: skip")
    found = outputs(text, checkpoint("base", PLUS), checkpoint("a", llama()))
    assert found.notes == ("extra.weight: only in base; copied from it",)


def test_layers_the_config_does_not_know() -> None:
    text = problem(
        LINEAR, checkpoint("a", llama(2)), checkpoint("b", llama(3), {"num_hidden_layers": 3})
    )
    assert "2 tensors are of layers that a does not have" in text
    assert 'rules: [{tensors: "model.layers.2.*", drop: true}]' in text
    dropped = LINEAR + rules("tensors: 'model.layers.2.*', drop: true")
    found = outputs(dropped, checkpoint("a", llama(2)), checkpoint("b", llama(3)))
    assert len(found.tensors) == len(llama(2))


# --- tied embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TIED, {"num_hidden_layers": 2}])
def test_tied_in_one_model(config: Mapping[str, object]) -> None:
    found = outputs(
        TASK,
        checkpoint("base", llama(head=False), config),
        checkpoint("a", llama(head=False), config),
        checkpoint("b", llama()),
    )
    head = by_name(found)[HEAD]
    assert head.base is not None
    assert [head.base.name, *(ref.name for ref in head.models)] == [EMBED, EMBED, HEAD]
    assert found.untied
    assert found.notes == (
        "lm_head.weight: tied to the token embedding in a and base; stored in the output",
    )
    assert head.shape == (16, 4)


def test_tied_in_all_stays_absent() -> None:
    found = outputs(LINEAR, *(checkpoint(url, llama(head=False), TIED) for url in "ab"))
    assert HEAD not in by_name(found)
    assert not found.untied


def test_a_rule_keeps_it_tied() -> None:
    found = outputs(
        LINEAR + rules("tensors: lm_head.weight, drop: true"),
        checkpoint("a", llama(head=False), TIED),
        checkpoint("b", llama()),
    )
    assert HEAD not in by_name(found)
    assert not found.untied
    assert not found.notes


def test_not_tied_and_missing() -> None:
    config = {"tie_word_embeddings": False}
    text = problem(
        TASK,
        checkpoint("base", llama()),
        checkpoint("a", llama(head=False), config),
        checkpoint("b", llama()),
    )
    assert "b and base have it, a does not" in text


def test_the_nested_configs_word_counts() -> None:
    config = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    found = outputs(LINEAR, checkpoint("a", llama(head=False), config), checkpoint("b", llama()))
    assert found.untied


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("transformer.wte.weight", "lm_head.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("shared.weight", "lm_head.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("tok_embeddings.weight", "output.weight"),
    ],
)
def test_names_of_tied_embeddings(embedding: str, head: str) -> None:
    shapes = {embedding: (8, 2), "visual.embed_tokens.weight": (3, 3), "norm.weight": (2,)}
    found = outputs(
        LINEAR, checkpoint("a", shapes, {}), checkpoint("b", shapes | {head: (8, 2)}, {})
    )
    assert [ref.name for ref in by_name(found)[head].models] == [embedding, head]


def test_tied_output_embedding_of_stacked_layers() -> None:
    """The head is the last slice's, even where that model has it tied."""
    found = outputs(STACK, checkpoint("a", llama(4), {}), checkpoint("b", llama(4, head=False), {}))
    head = by_name(found)[HEAD]
    assert (urls(head), head.models[0].name) == (["b"], EMBED)
    assert not found.untied


def test_tied_embeddings_of_stacked_layers_are_noted() -> None:
    found = outputs(STACK, *(checkpoint(url, llama(4, head=False), {}) for url in "ab"))
    assert HEAD not in by_name(found)
    assert found.notes == (f"{EMBED}: also the output embedding, after layers of b",)


# --- shapes and dtypes ----------------------------------------------------------------------------


def test_vocabulary_sizes() -> None:
    text = problem(
        TASK, *(checkpoint(u, llama(vocab=v)) for u, v in [("base", 16), ("a", 18), ("b", 16)])
    )
    assert text == (
        "The vocabulary sizes differ, so 2 tensors cannot be merged:\n"
        "  model.embed_tokens.weight: [16, 4] in base and b; [18, 4] in a\n"
        "  lm_head.weight: [16, 4] in base and b; [18, 4] in a\n"
        "  Keep one model's vocabulary: "
        'rules: [{tensors: ["model.embed_tokens.weight", "lm_head.weight"], from: base}]\n'
        "  and its tokenizer: tokenizer_source: base"
    )


def test_vocabulary_of_another_model() -> None:
    both = f'tensors: ["{EMBED}", "{HEAD}"], from: b'
    found = outputs(
        LINEAR + rules(both), checkpoint("a", llama(vocab=16)), checkpoint("b", llama(vocab=18))
    )
    assert found.vocab_size == 18
    assert urls(by_name(found)[EMBED]) == ["b"]
    same = outputs(
        LINEAR + rules(both.replace("from: b", "from: a")),
        checkpoint("a", llama(vocab=16)),
        checkpoint("b", llama(vocab=18)),
    )
    assert same.vocab_size is None


def test_other_shapes_come_all_at_once() -> None:
    wide = {name: (5, *shape[1:]) for name, shape in llama(6).items()}
    text = problem(LINEAR, checkpoint("a", llama(6)), checkpoint("b", wide))
    assert "13 tensors are of different shapes in the models" in text
    assert "  model.layers.0.mlp.up_proj.weight: [8, 4] in a; [5, 4] in b" in text
    assert "and 3 more" in text
    assert "The vocabulary sizes differ" in text


@pytest.mark.parametrize(
    ("options", "stored", "written", "wide"),
    [
        ("", (DType.BF16, DType.BF16), DType.BF16, False),
        ("", (DType.BF16, DType.F16), DType.F32, False),
        ("", (DType.F32, DType.F64), DType.F64, True),
        ("dtype: float32", (DType.BF16, DType.BF16), DType.F32, False),
        ("dtype: float32", (DType.F64, DType.F64), DType.F32, False),
        ("dtype: float64\nout_dtype: float16", (DType.BF16, DType.BF16), DType.F16, True),
        ("out_dtype: float64", (DType.BF16, DType.BF16), DType.F64, False),
        ("out_dtype: bfloat16", (DType.F64, DType.BF16), DType.BF16, True),
        ("dtype: bfloat16", (DType.F8_E4M3, DType.BF16), DType.BF16, False),
    ],
)
def test_written_dtypes(
    options: str, stored: tuple[DType, DType], written: DType, wide: bool
) -> None:
    a, b = (checkpoint(url, llama(), dtype=dtype) for url, dtype in zip("ab", stored, strict=True))
    found = outputs(f"{LINEAR}{options}\n", a, b)
    assert {(tensor.dtype, tensor.wide) for tensor in found.tensors} == {(written, wide)}


def test_copies_are_converted_too() -> None:
    found = outputs(
        TASK + "dtype: float16\n",
        checkpoint("base", PLUS),
        checkpoint("a", llama()),
        checkpoint("b", llama()),
    )
    assert by_name(found)["extra.weight"].dtype is DType.F16


def test_fp8_needs_a_dtype() -> None:
    model = checkpoint("a", llama())
    scale = TensorRef("s", DType.F32, (1, 1), ())
    ref = replace(model.tensors[HEAD], dtype=DType.F8_E4M3, decode=BlockScale(scale, 128, 128))
    model = replace(model, tensors={**model.tensors, HEAD: ref})
    text = problem(LINEAR, model, checkpoint("b", llama()))
    assert "1 tensor of a is stored as fp8: lm_head.weight" in text
    assert "add `dtype: bfloat16`" in text


def test_integers_must_be_equal() -> None:
    shapes = {"position_ids": (1, 4), **llama()}
    ints = {"position_ids": DType.I64}
    found = outputs(
        TASK + "dtype: float32\n", *(checkpoint(u, shapes, dtypes=ints) for u in ("base", "a", "b"))
    )
    tensor = by_name(found)["position_ids"]
    assert (tensor.method, tensor.base, tensor.dtype) == (None, None, DType.I64)
    assert urls(tensor) == ["base", "a", "b"]
    assert len(tensor.positions) == 3


def test_kinds_of_numbers() -> None:
    shapes = llama() | {"n": (1,), "m": (1,)}
    text = problem(
        LINEAR,
        checkpoint("a", shapes, dtypes={"n": DType.I64, "m": DType.I64}),
        checkpoint("b", shapes, dtypes={"n": DType.I32}),
    )
    assert "2 tensors are stored as different kinds of numbers" in text
    assert "n: int64 in a; int32 in b" in text
    assert "m: int64 in a; bfloat16 in b" in text


# --- rules ----------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing() -> None:
    text = problem(
        LINEAR + rules('tensors: ["model.layer.0.*", lm_head.weight], from: a'),
        checkpoint("a", llama()),
        checkpoint("b", llama()),
    )
    assert text.startswith("rules[0]: 'model.layer.0.*' matches no tensor of the output.")
    assert "lm_head" not in text
    text = problem(
        LINEAR + rules("tensors: model.embed_token.weight, from: a"),
        checkpoint("a", llama()),
        checkpoint("b", llama()),
    )
    assert "Did you mean 'model.embed_tokens.weight'?" in text


def test_nothing_left() -> None:
    text = problem(
        LINEAR + rules("tensors: '*', drop: true"), checkpoint("a", llama()), checkpoint("b", PLUS)
    )
    assert text.startswith("The rules drop every tensor")


def test_taken_from_a_model_without_it() -> None:
    text = problem(
        LINEAR + rules("tensors: extra.weight, from: a"),
        checkpoint("a", llama()),
        checkpoint("b", PLUS),
    )
    assert "A rule takes 1 tensor from a, which does not have it: extra.weight" in text


def test_taken_from_another_slice() -> None:
    text = problem(
        STACK + rules("tensors: 'model.layers.4.mlp.*', from: a"),
        *(checkpoint(url, llama(4), {}) for url in "ab"),
    )
    assert "which is not a source of slices[1]" in text
    found = outputs(
        STACK + rules("tensors: lm_head.weight, from: a"),
        *(checkpoint(url, llama(4), {}) for url in "ab"),
    )
    assert urls(by_name(found)[HEAD]) == ["a"]


def test_parameters_that_cannot_work() -> None:
    text = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
    text += "- {model: b, parameters: {weight: -1}}\n- {model: c, parameters: {weight: 1}}\n"
    text += rules("tensors: extra.weight, missing: skip")
    found = problem(text, checkpoint("a", PLUS), checkpoint("b", PLUS), checkpoint("c", llama()))
    assert "sum to 0" in found
    assert "extra.weight" in found


def test_parameters_that_nothing_gives() -> None:
    text = "merge_method: linear\nparameters: {weight: [{filter: mlp, value: [1, 2]}]}\n"
    text += "models: [{model: a}, {model: b}]\n"
    found = problem(text, checkpoint("a", llama()), checkpoint("b", llama()))
    assert "no 'weight'" in found
    assert found.count("\n") == 0
    assert found.endswith(
        f"(for {EMBED}, model.layers.0.self_attn.q_proj.weight, "
        "model.layers.1.self_attn.q_proj.weight and 2 more)"
    )


# --- extras ---------------------------------------------------------------------------------------

FISHER = "merge_method: fisher\nmodels:\n- {model: a, fisher: fa}\n- {model: b, fisher: fb}\n"


def test_extras_go_with_their_models() -> None:
    found = outputs(
        FISHER + rules("tensors: extra.weight, from: a"),
        checkpoint("a", PLUS),
        checkpoint("b", llama()),
        checkpoint("fa", llama(), dtype=DType.F32),
        checkpoint("fb", llama(), dtype=DType.F32),
    )
    for tensor in found.tensors:
        refs = [ref.segments[0].url for _, refs in tensor.extras for ref in refs]
        copied = tensor.name == "extra.weight"
        assert refs == ([] if copied else ["fa/m.safetensors", "fb/m.safetensors"])


def test_extras_that_do_not_fit() -> None:
    shapes = dict(llama())
    shapes.pop(NORM)
    shapes[HEAD] = (2, 4)
    text = problem(
        FISHER,
        checkpoint("a", llama()),
        checkpoint("b", llama()),
        checkpoint("fa", shapes),
        checkpoint("fb", llama(), dtypes={EMBED: DType.I32}),
    )
    assert "fa, the fisher of a, does not fit it in 2 tensors" in text
    assert "model.norm.weight: it is missing" in text
    assert "lm_head.weight: its shape is [2, 4], the model's [16, 4]" in text
    assert "fb, the fisher of b, does not fit it in 1 tensor" in text
    assert "its dtype is int32" in text


# --- laws -----------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [EMBED, HEAD, NORM, *(f"model.layers.{i}.{n}.weight" for i in range(3) for n in "xy")]
)
CHECKPOINTS = st.dictionaries(NAMES, st.sampled_from([(4, 2), (5, 2), (3,)]), min_size=1)
RECIPES = st.sampled_from(
    [
        LINEAR,
        TASK,
        LINEAR + rules("tensors: '*', missing: skip"),
        TASK + rules("tensors: '*', missing: base"),
        TASK + rules("tensors: 'model.*', missing: skip"),
    ]
)


@given(RECIPES, CHECKPOINTS, CHECKPOINTS, CHECKPOINTS)
def test_no_tensor_is_lost(recipe: str, base: Shapes, a: Shapes, b: Shapes) -> None:
    """Every tensor of an input is in the output, or in the error."""
    used = {"base": base, "a": a, "b": b} if recipe.startswith(TASK) else {"a": a, "b": b}
    names = {name for shapes in used.values() for name in shapes}
    sources = [checkpoint(url, shapes) for url, shapes in used.items()]
    try:
        found = outputs(recipe, *sources)
    except PlanError as error:
        assert re.search(r"matches no tensor|in common|more|and \d", str(error)) or any(
            name in str(error) for name in names
        )
        return
    assert {tensor.name for tensor in found.tensors} == names
    for tensor in found.tensors:
        held = [ref.segments[0].url.split("/")[0] for ref in (tensor.base, *tensor.models) if ref]
        noted = any(tensor.name in note or " more" in note for note in found.notes)
        everyone = [url for url, shapes in used.items() if tensor.name in shapes]
        assert set(held) <= set(everyone)
        assert set(held) == set(everyone) or noted
        assert len(tensor.models) == len(tensor.positions)


@given(CHECKPOINTS, st.integers(1, 4))
def test_shards_are_numbered_without_gaps(shapes: Shapes, shards: int) -> None:
    model = checkpoint("a", shapes, {}, shards=shards)
    text = "merge_method: passthrough\nmodels: [{model: a}]\n"
    found = outputs(text, model)
    assert sorted(set(found.shard_of)) == list(range(max(found.shard_of) + 1))
    assert [tensor.name for tensor in found.tensors] == list(shapes)


NAME = st.lists(
    st.one_of(st.integers(0, 12).map(str), st.text("abc[]*?\"'\\ é", min_size=1)), min_size=1
).map(".".join)


@given(st.lists(NAME, min_size=1, unique=True), st.lists(NAME, unique=True))
def test_any_name_will_do(names: list[str], others: list[str]) -> None:
    text = "merge_method: passthrough\nmodels: [{model: a}]\n"
    found = outputs(text, checkpoint("a", dict.fromkeys(names, (2,)), {}))
    assert [tensor.name for tensor in found.tensors] == names
    a = checkpoint("a", dict.fromkeys(names, (2,)), {})
    b = checkpoint("b", dict.fromkeys([names[0], *others], (3,)), {})
    rule = problem(LINEAR, a, b).split("rules: ")[1]
    rule = rule.partition("\n")[0]
    if "..." not in rule:  # the rule that a message prints is one, and does what it says
        found = outputs(f"{LINEAR}rules: {rule}\n", a, b)
        assert {tensor.name for tensor in found.tensors} == {*names, *others}


RANGES = st.tuples(st.integers(0, 3), st.integers(1, 4)).map(lambda r: (r[0], min(4, r[0] + r[1])))


@given(st.lists(st.tuples(st.sampled_from("ab"), RANGES), min_size=1, max_size=5))
def test_stacks_are_the_layers_asked_for(stack: list[tuple[str, tuple[int, int]]]) -> None:
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"- sources: [{{model: {url}, layer_range: {list(layers)}}}]\n" for url, layers in stack
    )
    used = sorted({url for url, _ in stack})
    found = outputs(text, *(checkpoint(url, llama(4), {}) for url in used))
    expected = [(url, layer) for url, layers in stack for layer in range(*layers)]
    for suffix in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
        tensors = [t for t in found.tensors if t.name.endswith(suffix)]
        assert [t.name for t in tensors] == [
            f"model.layers.{i}.{suffix}" for i in range(len(expected))
        ]
        assert [(urls(t)[0], t.models[0].name) for t in tensors] == [
            (url, f"model.layers.{layer}.{suffix}") for url, layer in expected
        ]
    assert found.layer_count == len(expected)
    assert urls(by_name(found)[EMBED]) == [stack[0][0]]
    assert urls(by_name(found)[HEAD]) == [stack[-1][0]]
