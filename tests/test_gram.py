"""``shardmerge gram``: matrices against an independent computation, passes, resuming, merging."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from shardmerge.cli import main
from shardmerge.errors import CheckpointError, MemoryBudgetError, Stopped, UsageError
from shardmerge.estimate import gram
from shardmerge.estimate.counting import Counter, Telling
from shardmerge.estimate.gram import Layer, Question, collect_gram, groups
from shardmerge.stores import Settings, Stores
from tests.support import SINGLE, write_recipe
from tests.test_end_to_end import SIZES, noisy, save, tokenizer

Floats = npt.NDArray[np.float64]
Grams = dict[str, npt.NDArray[np.float32]]

FORWARD = 1e-5
"""Of inputs of the same layer: attention in float32 is computed in another way with a mask."""
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
TEXTS = (
    "alpha beta gamma delta epsilon",
    "one two theta",
    "zeta eta theta alpha alpha beta one two gamma delta delta one",
    "beta two",
    "eta eta zeta gamma epsilon one one one",
)


def llama(*, tied: bool = False) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def bert() -> PreTrainedModel:
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return BertForSequenceClassification(BertConfig(**sizes, **more, num_labels=3))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


MAKERS = {"llama": llama, "gpt2": gpt2, "bert": bert}


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return str(path)


def written(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> str:
    save(model.to(dtype), folder)
    tokenizer(*WORDS).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


def collected(model: str, out: Path, data: str, *more: str) -> Grams:
    assert main(["gram", model, str(out), "--data", data, "--quiet", *more]) == 0
    return {n: v for path in sorted(out.glob("*.safetensors")) for n, v in load_file(path).items()}


def by_hand(model: PreTrainedModel) -> dict[str, Floats]:
    """The same from the definition: every input, kept and multiplied in float64."""
    seen: dict[str, list[Floats]] = {}
    with watched(model, seen):
        words = tokenizer(*WORDS)
        for text in TEXTS:
            with torch.no_grad():
                model(torch.tensor([words(text).input_ids]))
    found = {}
    for name, inputs in seen.items():
        every = np.concatenate(inputs)
        found[name] = sum(np.outer(x, x) for x in every) / len(every)
    return found


@contextmanager
def watched(model: PreTrainedModel, seen: dict[str, list[Floats]]) -> Iterator[None]:
    def keep(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
            seen.setdefault(f"{name}.weight", []).append(inputs[0].double().flatten(0, -2).numpy())

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.eval().named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    yield
    for hook in hooks:
        hook.remove()


def relative(got: Floats, expected: Floats) -> float:
    """Largest error beside the magnitudes of the two inputs."""
    size = np.sqrt(expected.diagonal())
    return float((np.abs(got - expected) / size / size[:, None]).max())


# --- what is collected ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_it_is_the_mean_of_outer_products_of_inputs(tmp_path, data, seeded, kind, capsys):
    model = MAKERS[kind]()
    folder = written(tmp_path / "m", model)
    got = collected(folder, tmp_path / "g", data)
    expected = by_hand(model)
    if kind == "gpt2":
        expected.pop("lm_head.weight")  # tied to wte
    assert got.keys() == expected.keys()
    for name, gram_ in expected.items():
        assert got[name].dtype == np.float32
        assert relative(got[name], gram_) < FORWARD, name
    facts = json.loads((tmp_path / "g" / "config.json").read_text())["gram"]
    assert facts["rows"] == (list(got) if kind == "gpt2" else [])
    assert any("embed" in name or "wte" in name for name in facts["without"])
    assert not set(facts["without"]) & got.keys()
    assert "collected" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "g")]) == 0


def test_tied_embeddings_and_experts_have_none_and_are_told(tmp_path, data, seeded, capsys):
    tied = collected(written(tmp_path / "m", llama(tied=True)), tmp_path / "g", data)
    assert "lm_head.weight" not in tied and "model.embed_tokens.weight" not in tied
    capsys.readouterr()
    moe = collected(written(tmp_path / "e", mixtral()), tmp_path / "ge", data)
    told = capsys.readouterr().err
    facts = json.loads((tmp_path / "ge" / "config.json").read_text())["gram"]
    experts = [name for name in facts["without"] if "expert" in name]
    assert experts and not [name for name in moe if "experts" in name]
    assert "which regmean averages" in told and f"{len(facts['without'])} tensors" in told
    assert "model.layers.0.self_attn.q_proj.weight" in moe


def test_a_tied_embedding_that_is_stored_twice_has_none_either(tmp_path, data, seeded):
    folder = written(tmp_path / "m", llama(tied=True))
    for path in Path(folder).glob("*.safetensors*"):
        if path.suffix == ".json":
            path.unlink()
    state = llama(tied=True).state_dict()
    for path in Path(folder).glob("*.safetensors"):
        path.unlink()
    everything = {name: value.numpy().copy() for name, value in state.items()}
    assert "lm_head.weight" in everything
    save_file(everything, Path(folder) / SINGLE)
    got = collected(folder, tmp_path / "g", data)
    assert len(got) == 28 and not {"lm_head.weight", "model.embed_tokens.weight"} & got.keys()


def test_long_inputs_are_multiplied_in_blocks(seeded):
    inputs = torch.randn(3, 2 * gram.BLOCK_TOKENS + 7, 5)
    rows = inputs.reshape(-1, 5).double()
    got = gram._product(inputs, 5)
    assert got.dtype == torch.float64
    assert relative(got.numpy(), (rows.T @ rows).numpy()) < 1e-6


def test_a_tensor_that_was_changed_in_place_is_another(tmp_path, data, seeded):
    loaded = gram.load_model(gram.describe_model(written(tmp_path / "m", llama()), None, Stores()))
    first, second = gram.linear_layers(loaded)[:2]
    sums, inputs = gram.Sums(loaded, [first, second]), torch.ones(1, SIZES["hidden_size"])
    sums.add(first, inputs)
    inputs *= 2
    sums.add(second, inputs)
    once, twice = sums.means()
    assert (once == 1).all() and (twice == 4).all()


def test_stored_halves_are_run_in_float32(tmp_path, data, seeded):
    model = llama()
    got = collected(written(tmp_path / "m", model, torch.bfloat16), tmp_path / "g", data)
    for name, expected in by_hand(model.float()).items():
        assert relative(got[name], expected) < FORWARD


def test_pairs_lengths_and_samples(tmp_path, data, seeded, capsys):
    folder = written(tmp_path / "m", bert())
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"a": text, "b": "one two"}) for text in TEXTS))
    both = ("--text-field", "a", "--text-field", "b")
    two = collected(folder, tmp_path / "two", str(pairs), *both)
    one = collected(folder, tmp_path / "one", str(pairs), "--text-field", "a")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not np.allclose(two[name], one[name])
    short = collected(folder, tmp_path / "s", str(pairs), "--text-field", "a", "--max-length", "2")
    assert not np.allclose(short[name], one[name])
    few = collected(folder, tmp_path / "f", str(pairs), "--text-field", "a", "--samples", "2")
    assert not np.allclose(few[name], one[name])
    assert "2 of 5 examples were used" in capsys.readouterr().err
    language = written(tmp_path / "l", llama())
    assert main(["gram", language, str(tmp_path / "x"), "--data", str(pairs), *both]) == 2
    assert "a pair, which only classifiers take" in capsys.readouterr().err


def test_a_layer_that_nothing_reaches_has_zeros(tmp_path, data, seeded, caplog):
    folder = written(tmp_path / "m", bert())
    real = gram.load_model

    def load(*given: Any) -> Any:
        loaded = real(*given)
        loaded.model.bert.pooler.forward = lambda hidden: hidden[:, 0]  # without its layer
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "load_model", load)
        got = collected(folder, tmp_path / "g", data)
    assert not got["bert.pooler.dense.weight"].any()
    assert "bert.pooler.dense.weight: no example reached this layer" in caplog.text


# --- passes, memory, resuming ---------------------------------------------------------------------


def collect(model: str, out: Path, data: str, *, memory: int = 2**30, **more: Any) -> Counted:
    counter = Counted(more.pop("stop_at", None))
    collect_gram(
        model,
        str(out),
        Question(data=[data]),
        device="cpu",
        memory_bytes=memory,
        counter=counter,
        stop=counter.stop,
        settings=Settings(),
        **more,
    )
    return counter


class Counted(Counter):
    """Counts, and stops a run after some examples."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(Telling.QUIET)
        self.stop, self.examples, self._stop_at = threading.Event(), 0, stop_at

    def done(self, done: int) -> None:
        super().done(done)
        self.examples = done
        if done == self._stop_at:
            self.stop.set()


def test_less_memory_takes_more_passes_and_gives_the_same_bytes(tmp_path, data, seeded):
    model = written(tmp_path / "m", llama())
    once = collect(model, tmp_path / "once", data)
    assert once.examples == len(TEXTS)
    least = (8 + 12) * SIZES["intermediate_size"] ** 2
    often = collect(model, tmp_path / "often", data, memory=least)
    assert often.examples > 4 * len(TEXTS)
    assert (tmp_path / "often" / SINGLE).read_bytes() == (tmp_path / "once" / SINGLE).read_bytes()
    with pytest.raises(MemoryBudgetError, match=r"down_proj\.weight needs"):
        collect(model, tmp_path / "never", data, memory=least - 1)
    assert not (tmp_path / "never").exists()


def test_a_stopped_run_goes_on_with_what_is_not_written(tmp_path, data, seeded, monkeypatch):
    monkeypatch.setattr("shardmerge.layout.PART_BYTES", 4096)
    monkeypatch.setattr("shardmerge.layout.LEAST_PART_BYTES", 512)
    model = written(tmp_path / "m", llama())
    collect(model, tmp_path / "quiet", data)
    memory = (8 + 12) * SIZES["intermediate_size"] ** 2
    whole = collect(model, tmp_path / "whole", data, memory=memory)
    assert whole.examples >= 8 * len(TEXTS)
    with pytest.raises(Stopped, match="the same command goes on"):
        collect(model, tmp_path / "out", data, memory=memory, stop_at=whole.examples // 2)
    assert not (tmp_path / "out" / SINGLE).exists()
    rest = collect(model, tmp_path / "out", data, memory=memory)
    assert 0 < rest.examples <= whole.examples // 2 + 2 * len(TEXTS)
    for name in ("quiet", "whole"):
        assert (tmp_path / name / SINGLE).read_bytes() == (tmp_path / "out" / SINGLE).read_bytes()
    assert collect(model, tmp_path / "out", data).examples == 0  # it is there


def test_layers_with_one_input_multiply_it_once(tmp_path, data, seeded, monkeypatch):
    calls = []
    real = gram._product
    monkeypatch.setattr(gram, "_product", lambda *a: calls.append(1) or real(*a))
    collect(written(tmp_path / "m", llama()), tmp_path / "g", data)
    layers = SIZES["num_hidden_layers"]
    # q, k, v; o; gate, up; down: 4 products of 7 layers; and the output embedding.
    assert len(calls) == (4 * layers + 1) * len(TEXTS)


def held_bytes(layers: list[Layer]) -> int:
    """Sums in float64, and of the largest a product in float64 and one in float32."""
    return sum(8 * layer.inputs**2 for layer in layers) + 12 * max(x.inputs**2 for x in layers)


@pytest.mark.parametrize("memory", [20, 28, 60, 80, 100, 10**6])
def test_groups_are_all_layers_in_order_and_fit(memory):
    layers = [Layer(f"l{i}", f"l{i}.weight", 1 + i % 2, rows=False) for i in range(9)]
    if memory < 80:
        with pytest.raises(MemoryBudgetError, match=r"l1\.weight needs 80 B"):
            groups(layers, memory)
        layers = layers[::2]
    found = groups(layers, memory)
    assert [layer for group in found for layer in group] == layers
    for group, after in zip(found, [*found[1:], None], strict=True):
        assert held_bytes(group) <= memory
        assert after is None or held_bytes([*group, after[0]]) > memory


def test_other_questions_are_not_gone_on_with(tmp_path, data, seeded, capsys):
    model = written(tmp_path / "m", llama())
    arguments = ["gram", model, str(tmp_path / "g"), "--data", data, "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert not first["already"] and first["tensors"] == 29
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["already"]
    assert main([*arguments, "--seed", "1", "--samples", "2"]) == 1
    error = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert error["event"] == "error" and "--overwrite" in error["message"]
    assert main([*arguments, "--seed", "1", "--samples", "2", "--overwrite"]) == 0
    inside = ["gram", model, model, "--data", data]
    assert main(inside) == 1
    assert "is where the source" in capsys.readouterr().err


def test_what_has_no_linear_layers_or_lies_elsewhere_is_refused(
    tmp_path, data, seeded, monkeypatch
):
    with pytest.raises(UsageError, match="local folder or by its name on the Hub"):
        collect("s3://bucket/model", tmp_path / "g", data)
    monkeypatch.setattr(gram, "linear_layers", lambda _: ())
    with pytest.raises(CheckpointError, match="no linear layer"):
        collect(written(tmp_path / "m", llama()), tmp_path / "g", data)
    assert not (tmp_path / "g").exists()


# --- merged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_two_fine_tunes_are_merged_by_what_they_were_given(tmp_path, data, seeded, kind):
    """Against numpy on inputs that hooks of this test have kept; every tensor."""
    base = MAKERS[kind]()
    models, out = [noisy(base, 1), noisy(base, 2)], tmp_path / "out"
    sources = []
    for number, model in enumerate(models):
        folder = written(tmp_path / f"m{number}", model)
        collected(folder, tmp_path / f"g{number}", data)
        sources.append({"model": folder, "gram": str(tmp_path / f"g{number}")})
    recipe = {"merge_method": "regmean", "models": sources}
    recipe["parameters"] = {"reduce_non_diagonal": 0.7}
    path = write_recipe(tmp_path / "r.yml", recipe)
    assert main(["merge", path, str(out), "--quiet"]) == 0
    merged = {n: v for p in sorted(out.glob("*.safetensors")) for n, v in load_file(p).items()}
    grams = list(map(by_hand, models))
    states = [{n: v.double().numpy() for n, v in m.state_dict().items()} for m in models]
    solved = 0
    for name, got in merged.items():
        first, second = (state[name] for state in states)
        expected = (first + second) / 2
        if name in grams[0] and (kind, name) != ("gpt2", "lm_head.weight"):
            solved += 1
            sides = [0.7 * g[name] + 0.3 * np.diag(g[name].diagonal()) for g in grams]
            turned = [m if kind == "gpt2" else m.T for m in (first, second)]
            moments = sides[0] @ turned[0] + sides[1] @ turned[1]
            best = np.linalg.solve(sides[0] + sides[1], moments)
            plain, expected = expected, best if kind == "gpt2" else best.T
            assert np.abs(expected - plain).max() > 1e-4
        assert np.abs(got - expected).max() < 2e-6, name
    assert solved == {"llama": 29, "gpt2": 8, "bert": 14}[kind]
