"""Fisher information of tiny models, against loops that share no code with it."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from shardmerge.cli import main
from shardmerge.errors import CheckpointError
from shardmerge.estimate import fisher, sums
from shardmerge.estimate.counting import Counter, Telling
from shardmerge.estimate.examples import (
    IGNORED,
    MASKED_SHARE,
    Task,
    Text,
    read_sample,
    tokenised,
)
from shardmerge.estimate.models import describe_model, load_model
from shardmerge.estimate.tensors import Group, stored
from shardmerge.methods.fisher import SMALL
from shardmerge.sources import open_checkpoint
from shardmerge.stores import Stores
from tests.servers.hub import Hub
from tests.support import INDEX, SINGLE, recipe_of, tree, write_recipe
from tests.tiny_models import (
    KINDS,
    LABELS,
    POSITIONS,
    SPECIAL,
    texts,
    write_data,
    write_jsonl,
    write_model,
    write_tokenizer,
)

Tensors = dict[str, torch.Tensor]
MASK = SPECIAL.index("[MASK]")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models that tests only read, each written once."""
    folder = tmp_path_factory.mktemp("models")

    def of(kind: str) -> Path:
        if not (folder / kind).exists():
            write_model(folder / kind, kind)
        return folder / kind

    return of


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Twelve texts with labels."""
    return write_data(tmp_path / "data.jsonl", 12)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A model in a folder needs none; the tests of S3 have a server here."""
    if "bucket" in request.fixturenames or "hub" in request.node.name:
        return

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def run(model: Path | str, out: Path | str, *options: object) -> int:
    """The exit status of a command."""
    return main(["fisher", str(model), str(out), "--quiet", *map(str, options)])


def estimated(model: Path, out: Path, *options: object) -> Tensors:
    """What a command publishes."""
    assert run(model, out, *options) == 0
    assert not (out / ".shardmerge").exists()
    return load_file(out / SINGLE)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    """What a command says that fails; it leaves nothing."""
    assert run(*arguments) == status
    assert not Path(str(arguments[1])).exists()
    return capsys.readouterr().err


# --- oracles --------------------------------------------------------------------------------------


def wide_model(folder: Path) -> Any:
    """The model in float64, by the class that wrote it."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    config = transformers.AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"  # the default has no float64
    model = getattr(transformers, name).from_pretrained(folder, config=config, dtype=torch.float64)
    return model.eval()


def squares(model: Any, log_p: torch.Tensor) -> Tensors:
    """Squared gradients, by parameter."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(log_p, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g**2
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def total(parts: Iterator[tuple[float, Tensors]]) -> Tensors:
    """A weighted sum."""
    found: Tensors = {}
    for weight, part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0) + weight * value
    return found


def language_oracle(folder: Path, rows: list[tuple[list[int], list[int]]]) -> Tensors:
    """Of inputs and, for each position of the logits, the token there or -1."""
    model = wide_model(folder)

    def parts() -> Iterator[tuple[float, Tensors]]:
        for ids, targets in rows:
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            asked = [log_p[i, t] for i, t in enumerate(targets) if t >= 0]
            yield 1 / len(rows), squares(model, torch.stack(asked).sum())

    return total(parts())


def ids_of(folder: Path, text: str) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def causal_oracle(folder: Path, lines: list[str]) -> Tensors:
    rows = [ids_of(folder, line) for line in lines]
    return language_oracle(folder, [(ids, [*ids[1:], -1]) for ids in rows])


def label_oracle(folder: Path, records: list[tuple[str, int]]) -> Tensors:
    model = wide_model(folder)

    def parts() -> Iterator[tuple[float, Tensors]]:
        for text, label in records:
            logits = model(input_ids=torch.tensor([ids_of(folder, text)])).logits[0]
            yield 1 / len(records), squares(model, logits.log_softmax(-1)[label])

    return total(parts())


def exact_oracle(folder: Path, lines: list[str]) -> Tensors:
    model = wide_model(folder)

    def parts() -> Iterator[tuple[float, Tensors]]:
        for text in lines:
            logits = model(input_ids=torch.tensor([ids_of(folder, text)])).logits[0]
            for p, log_p in zip(logits.softmax(-1).tolist(), logits.log_softmax(-1), strict=True):
                yield p / len(lines), squares(model, log_p)

    return total(parts())


def agree(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """To the accuracy of float32, of the largest element of each tensor.

    What is 0 but for rounding (no softmax knows of its keys' bias) is compared to all tensors.
    """
    assert set(found) == set(wanted)
    largest = max(float(value.max()) for value in wanted.values())
    assert largest > 0
    for name, value in wanted.items():
        assert found[name].dtype is torch.float32
        scale = max(float(value.max()), 1e-8 * largest)
        torch.testing.assert_close(
            found[name].double() / scale, value / scale, rtol=0, atol=2e-5, msg=name
        )


def records(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- what is estimated ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_causal_language_models(models, data, tmp_path, kind):
    found = estimated(models(kind), tmp_path / "out", "--data", data)
    agree(found, causal_oracle(models(kind), [record["text"] for record in records(data)]))


def test_masked_language_models(models, data, tmp_path):
    folder = models("bert-mlm")
    found = estimated(folder, tmp_path / "out", "--data", data, "--seed", 3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chosen = read_sample([data], samples=100, seed=3).chosen
    rows = []
    for text, example in zip(
        chosen,
        tokenised(chosen, tokenizer, Task.MASKED_LM, max_length=POSITIONS, seed=3),
        strict=True,
    ):
        ids = ids_of(folder, text.texts[0])
        hidden = [i for i, token in enumerate(example.inputs["input_ids"]) if token == MASK]
        assert len(hidden) == int(np.ceil(MASKED_SHARE * len(ids)))
        masked = [MASK if i in hidden else token for i, token in enumerate(ids)]
        rows.append((masked, [token if i in hidden else -1 for i, token in enumerate(ids)]))
    agree(found, language_oracle(folder, rows))


@pytest.mark.parametrize("kind", ["bert", "llama-cls"])
def test_classifiers(models, data, tmp_path, kind):
    found = estimated(models(kind), tmp_path / "out", "--data", data)
    wanted = label_oracle(models(kind), [(r["text"], r["label"]) for r in records(data)])
    agree(found, wanted)


def test_exact_information_is_the_mean_over_predictions(models, data, tmp_path):
    folder = models("bert")
    found = estimated(folder, tmp_path / "out", "--data", data, "--exact")
    lines = [record["text"] for record in records(data)]
    agree(found, exact_oracle(folder, lines))
    # In closed form, of the last bias: the mean of p (1 - p).
    model = wide_model(folder)
    p = torch.stack(
        [model(torch.tensor([ids_of(folder, line)])).logits[0].softmax(-1) for line in lines]
    )
    torch.testing.assert_close(found["classifier.bias"].double(), (p * (1 - p)).mean(0).detach())


def test_exact_information_needs_no_labels(models, tmp_path):
    lines = texts(5)
    (tmp_path / "data.txt").write_text("\n".join(lines))
    found = estimated(models("bert"), tmp_path / "a", "--data", tmp_path / "data.txt", "--exact")
    agree(found, exact_oracle(models("bert"), lines))


def test_pairs_and_names_of_labels(models, tmp_path):
    pairs = list(zip(texts(6), texts(6, seed=1), strict=True))
    by_name = [{"a": a, "b": b, "answer": LABELS[i % 3]} for i, (a, b) in enumerate(pairs)]
    by_number = [{**record, "answer": i % 3} for i, record in enumerate(by_name)]
    options = ("--text-field", "a", "--text-field", "b", "--label-field", "answer")
    found = [
        estimated(
            models("bert"),
            tmp_path / str(i),
            "--data",
            write_jsonl(tmp_path / f"{i}.jsonl", lines),
            *options,
        )
        for i, lines in enumerate((by_name, by_number))
    ]
    agree(found[0], {name: value.double() for name, value in found[1].items()})
    joined = [(f"{a} {b}", i % 3) for i, (a, b) in enumerate(pairs)]
    agree(found[0], label_oracle(models("bert"), joined))


def test_arithmetic_is_float32_whatever_is_stored(tmp_path, data):
    folder = write_model(tmp_path / "model", "llama", dtype="bfloat16")
    found = estimated(folder, tmp_path / "out", "--data", data)
    agree(found, causal_oracle(folder, [record["text"] for record in records(data)]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_one_gradient_is_alive_at_a_time(models, data, tmp_path, monkeypatch):
    alive = []
    real = sums.Sums._take

    def take(self: Any, name: str, parameter: torch.Tensor) -> None:
        alive.append(sum(p.grad is not None for p in self.parameters.values()))
        real(self, name, parameter)

    made = sums.Sums.__init__

    def make(self: Any, parameters: Any) -> None:
        made(self, parameters)
        self.parameters = parameters

    monkeypatch.setattr(sums.Sums, "_take", take)
    monkeypatch.setattr(sums.Sums, "__init__", make)
    estimated(models("llama"), tmp_path / "out", "--data", data)
    assert alive and set(alive) == {1}


def test_a_text_is_cut_off_at_max_length(models, tmp_path):
    long, short = "w1 w2 w3 w4 w5 w6", "w1 w2 w3 w4"
    for name, line in (("long", long), ("short", short)):
        (tmp_path / f"{name}.txt").write_text(line)
    data = tmp_path / "long.txt"
    found = estimated(models("gpt2"), tmp_path / "a", "--data", data, "--max-length", 4)
    agree(found, causal_oracle(models("gpt2"), [short]))
    # Without it, what the model takes.
    (tmp_path / "longest.txt").write_text(" ".join(["w3", "w7"] * POSITIONS))
    found = estimated(models("gpt2"), tmp_path / "b", "--data", tmp_path / "longest.txt")
    agree(found, causal_oracle(models("gpt2"), [" ".join(["w3", "w7"] * (POSITIONS // 2))]))


# --- names of tensors -----------------------------------------------------------------------------


def test_every_element_of_a_parameter_is_found_in_its_checkpoint(tmp_path):
    """Parameters themselves, stored back, are the bytes of the checkpoint."""
    for kind in KINDS:
        folder = write_model(tmp_path / kind, kind)
        loaded = load_model(describe_model(str(folder), None, Stores()), torch.device("cpu"))
        state = loaded.model.state_dict()
        found = dict(
            item
            for group in loaded.groups
            for item in stored(loaded.described.checkpoint, group, state.get)
        )
        wanted = load_file(folder / SINGLE)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_experts_that_transformers_stacks_have_tensors_of_their_own(models, data, tmp_path):
    found = estimated(models("mixtral"), tmp_path / "out", "--data", data)
    wanted = causal_oracle(models("mixtral"), [record["text"] for record in records(data)])
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        into = f"model.layers.{layer}.block_sparse_moe"
        both, down = wanted.pop(f"{experts}.gate_up_proj"), wanted.pop(f"{experts}.down_proj")
        for expert in range(3):
            gate, up = both[expert].chunk(2)
            names = {"w1": gate, "w2": down[expert], "w3": up}
            wanted |= {f"{into}.experts.{expert}.{k}.weight": v for k, v in names.items()}
        wanted[f"{into}.gate.weight"] = wanted.pop(f"model.layers.{layer}.mlp.gate.weight")
    agree(found, wanted)


def rewritten(source: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a model whose tensors are changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE)
    save_file(change(tensors), folder / SINGLE, {"format": "pt"})
    return folder


def test_names_are_those_of_the_checkpoint(models, data, tmp_path):
    """Without the base model's prefix, with buffers of old versions, as OpenAI's GPT-2 is."""

    def older(tensors: Tensors) -> Tensors:
        plain = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        return plain | {
            "h.0.attn.bias": torch.ones(1, 1, 4, 4),
            "h.0.attn.steps": torch.arange(3),
        }

    folder = rewritten(models("gpt2"), tmp_path / "model", older)
    found = estimated(folder, tmp_path / "out", "--data", data)
    plain = estimated(models("gpt2"), tmp_path / "plain", "--data", data)
    assert not found.pop("h.0.attn.bias").any()
    assert {f"transformer.{name}": value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in plain.items()
    }
    notes = json.loads((tmp_path / "out" / "shardmerge.json").read_text())["notes"]
    assert notes == [
        "12 of 12 examples were used",
        SMALL,
        "2 tensors of the checkpoint took no part in causal-lm, so F is 0 there: "
        "h.0.attn.steps, h.0.attn.bias",
    ]


def test_names_of_old_layer_norms(models, data, tmp_path):
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    folder = rewritten(
        models("bert"), tmp_path / "model", lambda t: {old(name): v for name, v in t.items()}
    )
    found = estimated(folder, tmp_path / "out", "--data", data)
    plain = estimated(models("bert"), tmp_path / "plain", "--data", data)
    assert any(name.endswith("gamma") for name in found)
    agree(found, {old(name): value.double() for name, value in plain.items()})


def test_a_tied_tensor_that_is_stored_twice_has_the_whole_gradient_twice(models, data, tmp_path):
    folder = rewritten(
        models("gpt2"),
        tmp_path / "model",
        lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()},
    )
    found = estimated(folder, tmp_path / "out", "--data", data)
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    found.pop("lm_head.weight")
    agree(found, causal_oracle(models("gpt2"), [record["text"] for record in records(data)]))


@settings(deadline=None)
@given(st.permutations(range(18)), st.integers(0, 18))
def test_any_rearrangement_is_undone(tmp_path_factory, order, cut):
    """Of two tensors into two parameters, which may be cut anywhere."""
    folder = tmp_path_factory.mktemp("rearranged")
    held = {"a": torch.randn(3, 4), "b": torch.randn(2, 3)}
    save_file(held, folder / SINGLE)

    def convert(values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        flat = torch.cat([values["a"].flatten(), values["b"].flatten()])[list(order)]
        return {"x": flat[:cut], "y": flat[cut:]}

    group = Group(("a", "b"), ("x", "y"), convert)
    found = dict(stored(open_checkpoint(str(folder)), group, convert(held).get))
    assert set(found) == set(held)
    assert all(torch.equal(found[name], value) for name, value in held.items())


def test_elements_that_are_made_of_several_are_refused(models):
    loaded = load_model(describe_model(str(models("mixtral")), None, Stores()))
    group = next(group for group in loaded.groups if group.convert)
    blurred = Group(
        group.sources,
        group.targets,
        lambda values: {k: v // 2 for k, v in group.convert(values).items()},
    )
    with pytest.raises(CheckpointError, match="one by one"):
        list(stored(loaded.described.checkpoint, blurred, loaded.model.state_dict().get))


# --- which examples -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_the_sample_is_random_and_always_the_same(tmp_path_factory, count, few, more, seed):
    folder = tmp_path_factory.mktemp("data")
    lines = [f"text {i}" for i in range(count)]
    (folder / "a.txt").write_text("\n".join(lines[: count // 2]) + "\n\n")
    (folder / "b.txt").write_text("\n".join(lines[count // 2 :]))
    files = [str(folder / "a.txt"), str(folder / "b.txt")]
    few, more = sorted((few, more))
    small, large = (read_sample(files, samples=n, seed=seed) for n in (few, more))
    assert small == read_sample(files, samples=few, seed=seed)
    assert small.total == count
    assert len(small.chosen) == min(few, count)
    assert set(small.chosen) <= set(large.chosen)
    chosen = [lines.index(text.texts[0]) for text in large.chosen]
    assert chosen == sorted(set(chosen))


def test_another_seed_is_another_sample(tmp_path):
    path = write_data(tmp_path / "data.jsonl", 200)
    chosen = [
        [text.where for text in read_sample([path], samples=20, seed=seed).chosen]
        for seed in range(3)
    ]
    assert chosen[0] != chosen[1] != chosen[2] != chosen[0]
    assert all(where != [f"{path}:{i + 1}" for i in range(20)] for where in chosen)


def test_the_seed_decides_what_is_published(models, data, tmp_path):
    found = [
        (tmp_path / out / SINGLE).read_bytes()
        for out, seed in (("a", 0), ("b", 1), ("c", 0))
        if run(models("llama"), tmp_path / out, "--data", data, "--samples", 4, "--seed", seed) == 0
    ]
    assert found[0] == found[2] != found[1]


def test_the_order_of_examples_does_not_matter(models, data, tmp_path):
    lines = records(data)
    random.Random(0).shuffle(lines)
    other = write_jsonl(tmp_path / "shuffled.jsonl", lines)
    for kind in ("llama", "bert-mlm"):
        found = [
            estimated(models(kind), tmp_path / f"{kind}{i}", "--data", path)
            for i, path in enumerate((data, other))
        ]
        agree(found[0], {name: value.double() for name, value in found[1].items()})


def test_kinds_of_files(models, data, tmp_path):
    lines = [record["text"] for record in records(data)]
    (tmp_path / "data.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    table = pyarrow.table({"text": [*lines, " "], "more": list(range(13))})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=5)
    found = [
        read_sample([str(path)], samples=100, seed=0)
        for path in (data, tmp_path / "data.txt", tmp_path / "data.parquet")
    ]
    assert [sample.digest for sample in found] == [found[0].digest] * 3
    assert found[1].chosen[1].where.endswith("data.txt:3")
    assert found[2].chosen[1].where.endswith("data.parquet:2")


@settings(deadline=None)
@given(st.lists(st.sampled_from(texts(5)), min_size=1, max_size=4), st.integers(0, 5))
def test_masks_depend_on_the_text_and_the_seed_alone(models, lines, seed):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models("bert-mlm"))
    chosen = [Text(str(i), (line,), None) for i, line in enumerate(lines)]
    made = tokenised(chosen, tokenizer, Task.MASKED_LM, max_length=9, seed=seed)
    for text, example in zip(chosen, made, strict=True):
        (alone,) = tokenised([text], tokenizer, Task.MASKED_LM, max_length=9, seed=seed)
        assert alone == example
        ids = tokenizer(text.texts[0])["input_ids"][:9]
        for given_, target, token in zip(
            example.inputs["input_ids"], example.targets, ids, strict=True
        ):
            assert (given_, target) in ((token, IGNORED), (MASK, token))


def test_every_token_may_be_masked(models):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models("bert-mlm"))
    chosen = [Text(line, (line,), None) for line in texts(200, longest=9)]
    made = [
        tokenised(chosen, tokenizer, Task.MASKED_LM, max_length=9, seed=seed) for seed in (0, 1)
    ]
    hidden = [[example.inputs["input_ids"].index(MASK) for example in found] for found in made]
    assert hidden[0] != hidden[1]
    for length in range(2, 10):
        found = {
            i
            for text, i in zip(chosen, hidden[0], strict=True)
            if len(text.texts[0].split()) == length
        }
        assert len(found) > length / 2


# --- runs that end early --------------------------------------------------------------------------


class Child:
    """Runs that end at a chosen point."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fisher_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, *arguments: object, **order: object) -> int:
        assert self._process.stdin and self._process.stdout
        line = json.dumps({"arguments": ["fisher", *map(str, arguments)], **order})
        self._log.seek(0)
        self._log.truncate()
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def said(self) -> str:
        """On stderr, by the last run."""
        return Path(self._log.name).read_text()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    made = Child(tmp_path_factory.mktemp("child") / "log")
    yield made
    made.close()


POINTS = [
    {"replace": number, "when": when} for number in (0, 3, 4, 7, 11) for when in ("before", "torn")
] + [{"replace": 11, "when": "after"}, {"publish": True}]
"""Two files are replaced for each example, of six."""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(models, data, tmp_path, child):
    arguments = ("--data", data, "--samples", 6, "--quiet")
    assert child.run(models("llama"), tmp_path / "whole", *arguments) == 0
    wanted = tree(tmp_path / "whole")
    for number, point in enumerate(POINTS):
        out = tmp_path / str(number)
        assert child.run(models("llama"), out, *arguments, **point) == -9, point
        assert not (out / SINGLE).exists()
        assert child.run(models("llama"), out, *arguments) == 0
        assert tree(out) == wanted, point


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_was_stopped_goes_on(models, data, tmp_path, child, name):
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = (models("bert"), out, "--data", data, "--work", work)
    assert child.run(*arguments, signal=name, example=5) == 3
    said = child.said()
    assert "Stopped: stopped after 6 of 12 examples; the same command goes on from there" in said
    assert child.run(*arguments) == 0
    assert "6 examples of 12 are done already" in child.said()
    assert child.run(models("bert"), tmp_path / "whole", "--data", data) == 0
    assert tree(out) == tree(tmp_path / "whole")
    assert not list(work.iterdir())


def test_what_is_done_is_not_done_again(models, data, tmp_path, child):
    out = tmp_path / "out"
    arguments = (models("llama"), out, "--data", data, "--json")
    assert child.run(*arguments, signal="SIGINT", example=7) == 3
    assert child.run(*arguments) == 0
    events = [json.loads(line) for line in child.said().splitlines()]
    assert events[0] == {"event": "start", "examples": 12, "examples_done": 8}
    examples = [event for event in events if event.get("event") == "example"]
    assert [event["examples_done"] for event in examples] == [9, 10, 11, 12]


def test_a_stopped_run_is_not_mixed_with_another(models, data, tmp_path, child):
    out, work = tmp_path / "out", tmp_path / "work"
    assert child.run(models("llama"), out, "--data", data, signal="SIGINT", example=3) == 3
    first = (models("llama"), tmp_path / "x", "--data", data, "--work", work)
    assert child.run(*first, signal="SIGINT", example=3) == 3
    changed = write_data(tmp_path / "changed.jsonl", 12, seed=1)
    for more in (("--samples", 9), ("--seed", 1), ("--max-length", 5), ("--data", changed)):
        assert child.run(models("llama"), out, "--data", data, *more) == 1, more
        assert "LedgerMismatchError" in child.said()
        place = tmp_path / "y"
        assert child.run(models("llama"), place, "--data", data, "--work", work, *more) == 1
        assert "holds sums of another run" in child.said()
        shutil.rmtree(place)
    fresh = ("--data", data, "--samples", 9, "--fresh")
    assert child.run(models("llama"), out, *fresh) == 0
    assert child.run(models("llama"), tmp_path / "y", *fresh, "--work", work) == 0
    assert child.run(models("llama"), tmp_path / "z", *fresh) == 0
    assert tree(out) == tree(tmp_path / "z") == tree(tmp_path / "y")


def test_a_run_again_does_nothing(models, data, tmp_path, capsys):
    estimated(models("llama"), tmp_path / "out", "--data", data)
    before = tree(tmp_path / "out")
    capsys.readouterr()
    assert run(models("llama"), tmp_path / "out", "--data", data) == 0
    assert "was already estimated" in capsys.readouterr().out
    assert tree(tmp_path / "out") == before


# --- what is refused ------------------------------------------------------------------------------


def bad_file(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


BAD_DATA = {
    "missing": (lambda folder: str(folder / "no.jsonl"), "no.jsonl: No such file"),
    "empty": (bad_file("d.jsonl", b"\n \n"), "no example with any text in it"),
    "blank": (bad_file("d.txt", b"\n \n"), "no example with any text in it"),
    "kind": (bad_file("d.csv", b"text\n"), "data is read from .txt"),
    "no JSON": (bad_file("d.jsonl", b'{"text": "w1 w2"}\n{"text": \n'), "d.jsonl:2: this line is"),
    "no object": (bad_file("d.jsonl", b"[1]\n"), "d.jsonl:1: a JSON object is needed"),
    "no field": (bad_file("d.jsonl", b'{"a": "w1"}\n'), "d.jsonl:1: no field 'text'; its fields"),
    "no text": (bad_file("d.jsonl", b'{"text": 3}\n'), "d.jsonl:1: field 'text' is 3, not a text"),
    "no UTF-8": (bad_file("d.txt", b"\xff\xfe\n"), "d.txt: not text in UTF-8"),
    "no Parquet": (bad_file("d.parquet", b"PAR1 or not"), "d.parquet: not a Parquet file"),
    "short": (bad_file("d.txt", b"w1 w2\n\nw1\n"), "d.txt:3: no token of this text can be"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(models, tmp_path, capsys, case):
    write, message = BAD_DATA[case]
    status = 2 if case == "kind" else 1
    data = write(tmp_path)
    said = refusal(capsys, models("llama"), tmp_path / "out", "--data", data, status=status)
    assert message in said
    assert "Traceback" not in said


def test_a_parquet_file_without_the_column(models, tmp_path, capsys):
    parquet.write_table(pyarrow.table({"a": ["w1"]}), tmp_path / "d.parquet")
    data = tmp_path / "d.parquet"
    assert "no column 'text'; it has a" in refusal(
        capsys, models("llama"), tmp_path / "out", "--data", data
    )


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "d.jsonl:2: label 3 is none of the model's 3: 0 (no), 1 (perhaps), 2 (yes)"),
        (-1, "label -1 is none"),
        ("never", "label 'never' is none"),
        (True, "field 'label' is true; a label is a whole number or a name"),
        (None, "field 'label' is null; a label"),
        ([1], "field 'label' is [1]; a label"),
    ],
)
def test_bad_labels(models, tmp_path, capsys, label, message):
    good = {"text": "w1 w2", "label": 1}
    data = write_jsonl(tmp_path / "d.jsonl", [good, {**good, "label": label}])
    assert message in refusal(capsys, models("bert"), tmp_path / "out", "--data", data)


def test_options_that_do_not_fit(models, data, tmp_path, capsys):
    (tmp_path / "d.txt").write_text("w1 w2")
    llama, bert, out = models("llama"), models("bert"), tmp_path / "out"
    for model, options, message in (
        (llama, ("--data", data, "--exact"), "--exact is for classifiers"),
        (llama, ("--data", data, "--text-field", "a", "--text-field", "b"), "only classifiers"),
        (bert, ("--data", data, *["--text-field", "a"] * 3), "3 text fields; give one, or two"),
        (bert, ("--data", tmp_path / "d.txt"), "a .txt file has texts alone, and 'label'"),
        (llama, ("--data", data, "--max-length", 99), "takes at most 24 tokens"),
        (llama, ("--data", data, "--deepspeed", "zero3"), "torchrun --nproc-per-node"),
        ("s3://b/model", ("--data", data), "loads a model from a local folder"),
    ):
        assert message in refusal(capsys, model, out, *options, status=2)
    for option in (("--samples", "0"), ("--seed", "x"), ("--max-length", "-1")):
        with pytest.raises(SystemExit):
            run(llama, out, "--data", data, *option)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(models, data, tmp_path, capsys):
    options = ("--data", data, "--device", "cuda")
    assert "torch finds no CUDA device" in refusal(
        capsys, models("llama"), tmp_path / "out", *options
    )


def broken(models: Callable[[str], Path], kind: str, folder: Path, remove: str) -> Path:
    shutil.copytree(models(kind), folder)
    for path in folder.glob(remove):
        path.unlink()
    return folder


def test_models_that_cannot_be_used(models, data, tmp_path, capsys):
    out, options = tmp_path / "out", ("--data", data)
    no_tokenizer = broken(models, "llama", tmp_path / "a", "tokenizer*")
    assert "no tokenizer in it" in refusal(capsys, no_tokenizer, out, *options)
    no_config = broken(models, "llama", tmp_path / "b", "config.json")
    assert "no config.json in it" in refusal(capsys, no_config, out, *options)
    empty = tmp_path / "c"
    empty.mkdir()
    assert "no checkpoint in this folder" in refusal(capsys, empty, out, *options)
    adapter = broken(models, "llama", tmp_path / "d", "model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    assert "an adapter; transformers loads whole models" in refusal(capsys, adapter, out, *options)
    both = f"{models('llama')}+{adapter}"
    assert "an adapter; transformers loads whole models" in refusal(capsys, both, out, *options)
    quantised = broken(models, "llama", tmp_path / "e", "nothing")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (quantised / "config.json").write_text(json.dumps(config))
    assert "quantised" in refusal(capsys, quantised, out, *options)


def test_a_folder_with_two_checkpoints(models, data, tmp_path, capsys):
    folder = broken(models, "llama", tmp_path / "model", "nothing")
    tensors = load_file(folder / SINGLE)
    save_file(tensors, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors"),
    }
    (folder / INDEX).write_text(json.dumps(index))
    said = refusal(capsys, folder, tmp_path / "out", "--data", data)
    assert "two checkpoints" in said
    (folder / SINGLE).unlink()
    estimated(folder, tmp_path / "out", "--data", data)


def test_code_that_comes_with_a_model_is_not_run(models, data, tmp_path, capsys):
    folder = broken(models, "llama", tmp_path / "model", "nothing")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('run')")
    said = refusal(capsys, folder, tmp_path / "out", "--data", data)
    assert "transformers cannot load its config.json" in said


def test_a_head_is_never_made_up(models, data, tmp_path, capsys):
    out = tmp_path / "out"
    for kind, task, missing in (
        ("llama", "classification", "score.weight"),
        ("bert", "masked-lm", "cls.predictions"),
        ("bert-mlm", "classification", "classifier"),
    ):
        said = refusal(capsys, models(kind), out, "--data", data, "--task", task)
        assert "its checkpoint has no tensor for" in said
        assert missing in said
    said = refusal(capsys, models("gpt2"), out, "--data", data, "--task", "masked-lm")
    assert "transformers cannot load it for masked-lm" in said
    whole = models("llama")
    lacking = rewritten(
        whole, tmp_path / "lacking", lambda t: {k: v for k, v in t.items() if "1.mlp.up" not in k}
    )
    said = refusal(capsys, lacking, out, "--data", data)
    assert "no tensor for 1 of 21 parameters of LlamaForCausalLM" in said
    assert "model.layers.1.mlp.up_proj.weight" in said


def test_a_task_that_nobody_named(models, data, tmp_path, capsys):
    folder = broken(models, "llama", tmp_path / "model", "nothing")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    said = refusal(capsys, folder, tmp_path / "out", "--data", data, status=2)
    assert "config.json says LlamaModel, which is none of causal-lm, masked-lm" in said
    found = estimated(folder, tmp_path / "out", "--data", data, "--task", "causal-lm")
    agree(found, causal_oracle(models("llama"), [record["text"] for record in records(data)]))


def test_regression_is_no_classification(data, tmp_path, capsys):
    folder = write_model(tmp_path / "model", "llama-cls", num_labels=1)
    said = refusal(capsys, folder, tmp_path / "out", "--data", data, status=2)
    assert "only a classifier with one label of several" in said


def test_a_tensor_of_another_shape(models, data, tmp_path, capsys):
    folder = rewritten(
        models("llama"),
        tmp_path / "model",
        lambda t: t | {"model.norm.weight": torch.ones(7)},
    )
    said = refusal(capsys, folder, tmp_path / "out", "--data", data)
    assert "transformers cannot load it" in said


def test_a_tokenizer_of_another_model(data, tmp_path, capsys):
    folder = write_model(tmp_path / "model", "llama", vocab_size=20)
    said = refusal(capsys, folder, tmp_path / "out", "--data", data)
    assert "and the model knows 20. It belongs to another model" in said


def test_a_tokenizer_without_a_mask(data, tmp_path, capsys):
    folder = write_model(tmp_path / "model", "bert-mlm")
    write_tokenizer(folder, mask=False)
    said = refusal(capsys, folder, tmp_path / "out", "--data", data, status=2)
    assert "has no mask token" in said


def test_nan_names_the_example(models, tmp_path, capsys):
    def spoil(tensors: Tensors) -> Tensors:
        tensors["transformer.wte.weight"][len(SPECIAL) + 7] = float("inf")
        return tensors

    folder = rewritten(models("gpt2"), tmp_path / "model", spoil)
    (tmp_path / "d.txt").write_text("w1 w2\nw3 w4\nw7 w1\n")
    assert run(folder, tmp_path / "out", "--data", tmp_path / "d.txt") == 1
    said = capsys.readouterr().err
    assert "d.txt:1: the gradient of" in said  # tied: it is an output of every example
    assert not (tmp_path / "out" / SINGLE).exists()


def test_a_model_that_takes_fewer_tokens_than_it_says(models, tmp_path, capsys, monkeypatch):
    """Positions of RoBERTa begin behind the padding's; of a type that is not known to, likewise."""
    (tmp_path / "d.txt").write_text(" ".join(["w3"] * (POSITIONS + 1)))
    out, options = tmp_path / "out", ("--data", tmp_path / "d.txt")
    with monkeypatch.context() as patched:
        patched.setattr("shardmerge.estimate.models._COUNTED_FROM_PADDING", frozenset())
        assert run(models("roberta"), out, *options) == 1
    said = capsys.readouterr().err
    assert f"d.txt:1: the model does not take its {POSITIONS} tokens" in said
    agree(
        estimated(models("roberta"), out, *options, "--fresh"),
        causal_oracle(models("roberta"), [" ".join(["w3"] * (POSITIONS - 2))]),
    )


def test_a_device_without_enough_memory(models, data, tmp_path, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(fisher, "_log_p", fail)
    assert run(models("llama"), tmp_path / "out", "--data", data) == 1
    said = capsys.readouterr().err
    assert "DeviceError" in said
    assert "tried to allocate 2 GiB" in said


def test_out_is_occupied(models, data, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(models("bert"), out)
    before = tree(out)
    assert run(models("llama"), out, "--data", data) == 1
    assert "holds another checkpoint" in capsys.readouterr().err
    assert tree(out) == before
    assert run(models("bert"), models("bert"), "--data", data) == 1
    assert "is where the source" in capsys.readouterr().err
    assert run(models("llama"), out, "--data", data, "--overwrite") == 0
    assert set(load_file(out / SINGLE)) == set(load_file(models("llama") / SINGLE))


def test_without_transformers(models, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = refusal(capsys, models("llama"), tmp_path / "out", "--data", data, status=2)
    assert "pip install 'shardmerge[transformers]'" in said


# --- what is shown, and where it goes -------------------------------------------------------------


def test_progress_in_lines(capsys):
    now = 0.0
    counter = Counter(Telling.LINES, clock=lambda: now)
    counter.start(total=40, done=10)
    for done in range(11, 41):
        now += 1.0
        counter.done(done)
    assert capsys.readouterr().err.splitlines() == [
        "10 examples of 40 are done already",
        "20/40 examples, 0:20 left",
        "30/40 examples, 0:10 left",
        "40/40 examples, 0:00 left",
    ]


def test_s3(bucket, models, data, tmp_path, capsys):
    assert run(models("llama"), f"{bucket}/out", "--data", data) == 2
    assert "Give --work FOLDER" in capsys.readouterr().err
    work = tmp_path / "work"
    assert run(models("llama"), f"{bucket}/out", "--data", data, "--work", work) == 0
    estimated(models("llama"), tmp_path / "here", "--data", data)
    assert main(["diff", f"{bucket}/out", str(tmp_path / "here"), "--json"]) == 0
    assert main(["verify", f"{bucket}/out"]) == 0


def test_a_model_of_the_hub(models, data, tmp_path):
    """The second run goes on from the first though the model is in the cache by then."""
    with Hub({"org/model": {"main": models("llama")}}, token="hf_secret") as hub:
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }
        order = {"arguments": ["fisher", "org/model", str(tmp_path / "out"), "--data", data]}
        for more, status in (({"signal": "SIGINT", "example": 4}, 3), ({}, 0)):
            command = [sys.executable, "-m", "tests.fisher_child", json.dumps({**order, **more})]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == status, done.stderr
    assert "5 examples of 12 are done already" in done.stderr
    found = estimated(models("llama"), tmp_path / "here", "--data", data)
    agree(load_file(tmp_path / "out" / SINGLE), {name: v.double() for name, v in found.items()})


def test_two_models_are_merged_by_their_information(tmp_path):
    lines = [texts(8, seed=seed) for seed in (1, 2)]
    folders = [
        write_model(tmp_path / f"model{seed}", "llama", seed=seed, dtype="bfloat16")
        for seed in (1, 2)
    ]
    for number, folder in enumerate(folders):
        (tmp_path / f"{number}.txt").write_text("\n".join(lines[number]))
        estimated(folder, tmp_path / f"f{number}", "--data", tmp_path / f"{number}.txt")
    recipe = recipe_of("fisher", None, {}, parameters={"normalize": False}, dtype="float32")
    recipe["models"] = [
        {"model": str(folder), "fisher": str(tmp_path / f"f{number}")}
        for number, folder in enumerate(folders)
    ]
    path = write_recipe(tmp_path / "recipe.yml", recipe)
    assert main(["merge", path, str(tmp_path / "merged"), "--quiet"]) == 0
    merged = load_file(tmp_path / "merged" / SINGLE)
    held = [load_file(folder / SINGLE) for folder in folders]
    information = [load_file(tmp_path / f"f{number}" / SINGLE) for number in range(2)]
    assert set(merged) == set(held[0])
    for name, value in merged.items():
        mass = [f[name].double() + 1e-6 for f in information]
        wanted = sum(m * h[name].double() for m, h in zip(mass, held, strict=True)) / sum(mass)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
    assert main(["verify", str(tmp_path / "f0")]) == 0


def test_the_next_token_is_not_asked_of_an_encoder(models, data, tmp_path, capsys):
    """Each of its tokens sees those that follow."""
    options = ("--data", data, "--task", "causal-lm")
    told = refusal(capsys, models("bert-mlm"), tmp_path / "out", *options, status=2)
    assert "an encoder" in told and "--task masked-lm" in told


def test_whole_numbers_that_became_floats_are_labels(models, tmp_path):
    """As pandas writes a column of whole numbers with a gap."""
    records = [{"text": "w1 w2", "label": 2}, {"text": "w3", "label": 0}]
    found = []
    for kind in (int, float):
        given = [{**record, "label": kind(record["label"])} for record in records]
        data = write_jsonl(tmp_path / f"{kind.__name__}.jsonl", given)
        found.append(estimated(models("bert"), tmp_path / f"{kind.__name__}", "--data", data))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
