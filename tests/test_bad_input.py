"""A user's mistakes: the exit status, what stderr says, and that nothing looks like a result.

Whatever is wrong with a recipe or a checkpoint is refused by ``plan`` and ``merge`` in the same
words; advice that is printed is followed here, to see that it works.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmerge.cli import main
from shardmerge.header import write_header
from shardmerge.numerics import DType
from tests.support import (
    INDEX,
    SINGLE,
    Specs,
    loaded,
    read_tensors,
    set_element,
    tree,
    visible,
    write_checkpoint,
)

BF16 = DType.BF16
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP0, UP1 = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2))
LLAMA: Specs = {
    EMBED: (BF16, (16, 8)),
    UP0: (BF16, (12, 8)),
    UP1: (BF16, (12, 8)),
    NORM: (BF16, (8,)),
    HEAD: (BF16, (16, 8)),
}
RECIPE = """\
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 3.0}}
parameters: {normalize: true, lambda: 0.5}
"""
SLICES = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: b, layer_range: [1, 2]}]
"""

Capture = pytest.CaptureFixture[str]
Change = Callable[[], object]


@pytest.fixture(autouse=True)
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model and two others in the current folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write_checkpoint(Path(name), LLAMA, seed=seed)


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's own
        status = stop.code if isinstance(stop.code, int) else -1
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, err


def refused(capsys: Capture, *arguments: str, status: int, error: str) -> str:
    """The message of a command that must fail; nothing is at OUT."""
    before = tree(Path())
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (status, "")
    assert err.startswith(f"{error}: "), err
    assert err.endswith("\n") and not err.endswith("\n\n")
    assert tree(Path()) == before
    assert not Path("out").exists()
    return err


def recipe_refused(capsys: Capture, text: str | bytes) -> str:
    Path("recipe.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    said = [
        refused(capsys, command, "recipe.yml", "out", status=2, error="RecipeError")
        for command in ("plan", "merge")
    ]
    assert said[0] == said[1]
    return said[0]


def models_refused(capsys: Capture, error: str, text: str = RECIPE) -> str:
    Path("recipe.yml").write_text(text)
    said = [
        refused(capsys, command, "recipe.yml", "out", status=1, error=error)
        for command in ("plan", "merge")
    ]
    assert said[0] == said[1]
    return said[0]


def merged(capsys: Capture, text: str, *options: str) -> dict[str, list[float]]:
    """The values of every tensor of a merge that must work."""
    Path("recipe.yml").write_text(text)
    status, _, err = run(capsys, "merge", "recipe.yml", "out", "--quiet", *options)
    assert status == 0, err
    return values("out")


def values(folder: str) -> dict[str, list[float]]:
    found = read_tensors(Path(folder))
    return {name: loaded(raw, dtype).tolist() for name, (dtype, _, raw) in found.items()}


def without(name: str) -> Specs:
    return {key: spec for key, spec in LLAMA.items() if key != name}


def in_order(text: str, *fragments: str) -> None:
    """All fragments are in the text, one after the other."""
    position = 0
    for fragment in fragments:
        assert fragment in text[position:], f"{fragment!r} not in {text[position:]!r}"
        position = text.index(fragment, position) + len(fragment)


# --- damaged shards -------------------------------------------------------------------------------


def raw_shard(fields: object, data: bytes = b"", *, length: int | None = None) -> Change:
    """Overwrite a's shard with this header and data."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    return lambda: Path("a", SINGLE).write_bytes(size + text + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def cut_off(nbytes: int) -> Change:
    def change() -> None:
        path = Path("a", SINGLE)
        path.write_bytes(path.read_bytes()[:-nbytes])

    return change


TWICE = b"{%b}" % b",".join([b'"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'] * 2)
DAMAGE: Mapping[str, tuple[Change, tuple[str, ...]]] = {
    "cut off": (cut_off(100), ("cut off", "100 bytes are missing", "download it again")),
    "cut off in the header": (cut_off(900), ("bytes are missing",)),
    "empty": (lambda: Path("a", SINGLE).write_bytes(b""), ("has 0 bytes",)),
    "too long": (
        lambda: Path("a", SINGLE).write_bytes(Path("a", SINGLE).read_bytes() + b"xx"),
        ("2 bytes belong to no tensor",),
    ),
    "overlapping": (
        raw_shard({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, bytes(12)),
        ("'y' overlaps tensor 'x' by 4 bytes",),
    ),
    "out of range": (
        raw_shard({"x": entry([2], 0, 8), "y": entry([2], 8, 16)}, bytes(12)),
        ("cut off", "4 bytes are missing"),
    ),
    "gapped": (
        raw_shard({"x": entry([2], 0, 8), "y": entry([2], 12, 20)}, bytes(20)),
        ("hole of 4 bytes between tensor 'x' and tensor 'y'",),
    ),
    "not from the start": (raw_shard({"x": entry([2], 4, 12)}, bytes(12)), ("hole of 4 bytes",)),
    "backwards": (raw_shard({"x": entry([2], 8, 0)}, bytes(8)), ("'x'", "end before they begin")),
    "negative": (raw_shard({"x": entry([2], -8, 0)}, bytes(8)), ("'x'", "[-8, 0]")),
    "absurd length": (raw_shard({}, length=2**60), ("1,152,921,504,606,846,976", "100,000,000")),
    "length beyond the file": (raw_shard({}, length=1000), ("1,000 bytes, but 2 follow",)),
    "wrong byte count": (
        raw_shard({"x": entry([3], 0, 8)}, bytes(8)),
        ("'x'", "hold 8 bytes", "[3] of F32 needs 12"),
    ),
    "absurd shape": (raw_shard({"x": entry([2**40, 2**40], 0, 8)}, bytes(8)), ("'x'", "2**63")),
    "unknown dtype": (
        raw_shard({"x": entry([2], 0, 8, "F31")}, bytes(8)),
        ("'x'", "'F31' is not supported", "BF16"),
    ),
    "name twice": (raw_shard(TWICE, bytes(4)), ("the name 'x' occurs twice",)),
    "not JSON": (raw_shard(b"{hello", bytes(4)), ("not JSON",)),
    "not an object": (raw_shard([1, 2], bytes(4)), ("does not start with '{'",)),
    "not UTF-8": (raw_shard(b'{"\xff":{}}', bytes(4)), ("not UTF-8",)),
    "deep": (raw_shard(b'{"x":' + b"[" * 100_000), ("not JSON",)),
    "a Git LFS pointer": (
        lambda: Path("a", SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        ("Git LFS pointer", "git lfs pull"),
    ),
    "a web page": (
        lambda: Path("a", SINGLE).write_text("<!DOCTYPE html><html></html>"),
        ("a web page",),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard(capsys: Capture, damage: str) -> None:
    change, fragments = DAMAGE[damage]
    change()
    said = models_refused(capsys, "HeaderError")
    in_order(said, f"{Path('a', SINGLE).absolute()}: ", *fragments)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(capsys: Capture, data: st.DataObject) -> None:
    """Flipped, cut, repeated bytes of a header: exit 0 or 1, in words."""
    Path("recipe.yml").write_text(RECIPE)
    whole = Path("base", SINGLE).read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 420))
        size = data.draw(st.integers(0, 3))
        damaged[at : at + size] = data.draw(st.binary(max_size=4))
    Path("a", SINGLE).write_bytes(damaged)
    status, out, err = run(capsys, "plan", "recipe.yml", "out")
    assert status in (0, 1)
    assert bool(out) == (status == 0) and bool(err) == (status == 1)


# --- indexes --------------------------------------------------------------------------------------


def reindexed(change: Callable[[dict[str, str]], object]) -> Path:
    """a in two shards, with another index."""
    shutil.rmtree("a")
    write_checkpoint(Path("a"), LLAMA, seed=1, shards=2)
    path = Path("a", INDEX)
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return path.absolute()


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b.safetensors", ""]
)
def test_an_index_that_leads_out_of_its_folder(capsys: Capture, shard: str) -> None:
    place = reindexed(lambda weight_map: weight_map.update({HEAD: shard}))
    said = models_refused(capsys, "CheckpointError")
    in_order(said, f"{place}: ", f"'{HEAD}'", repr(shard), "plain name", "Correct it")
    assert "root:" not in said  # nothing of such a file is shown


def test_an_index_that_names_a_missing_shard(capsys: Capture) -> None:
    place = reindexed(lambda weight_map: None)
    Path("a/model-00002-of-00002.safetensors").unlink()
    said = models_refused(capsys, "CheckpointError")
    in_order(said, f"{place}: ", "1 of 2", "model-00002-of-00002.safetensors", "not complete")


def test_an_index_that_lacks_a_tensor_or_has_one_too_many(capsys: Capture) -> None:
    place = reindexed(lambda weight_map: weight_map.pop(HEAD))
    in_order(models_refused(capsys, "CheckpointError"), f"{place}: ", "not in the index", HEAD)
    place = reindexed(lambda weight_map: weight_map.update({"more": weight_map[HEAD]}))
    in_order(models_refused(capsys, "CheckpointError"), f"{place}: ", "not in the shard", "more")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(capsys: Capture, text: str) -> None:
    place = reindexed(lambda weight_map: None)
    place.write_text(text)
    assert f"CheckpointError: {place}" in models_refused(capsys, "CheckpointError")


def test_shards_without_an_index(capsys: Capture) -> None:
    reindexed(lambda weight_map: None).unlink()
    in_order(models_refused(capsys, "CheckpointError"), "a: 2 .safetensors files", INDEX)


@pytest.mark.parametrize(("text", "why"), [("{", "not JSON"), ("[1]", "not a JSON object")])
@pytest.mark.parametrize("model", ["base", "a"])
def test_a_damaged_config(capsys: Capture, model: str, text: str, why: str) -> None:
    path = Path(model, "config.json")
    path.write_text(text)
    in_order(models_refused(capsys, "CheckpointError"), str(path.absolute()), why)


# --- other kinds of checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_checkpoint_that_says_so(
    capsys: Capture, declared: dict[str, object], method: str, nested: bool
) -> None:
    config: dict[str, object] = {"quantization_config": declared}
    path = Path("a/config.json")
    path.write_text(json.dumps({"text_config": config} if nested else config))
    said = models_refused(capsys, "CheckpointError")
    in_order(said, str(path.absolute()), f"quantised by {method}", "Dequantise it first")


@pytest.mark.parametrize(
    ("packed", "method"),
    [
        ({"q.qweight": DType.I32, "q.qzeros": DType.I32, "q.scales": DType.F16}, "GPTQ or AWQ"),
        (
            {"q.weight": DType.U8, "q.weight.quant_state.bitsandbytes__nf4": DType.U8},
            "bitsandbytes, 4 bits",
        ),
        ({"q.weight": DType.I8, "q.SCB": DType.F32}, "bitsandbytes, 8 bits"),
        ({"q_blocks": DType.U8, "q_scales": DType.U8}, "mxfp4"),
        ({"q.weight_packed": DType.I32, "q.weight_scale": DType.BF16}, "compressed-tensors"),
    ],
)
def test_a_quantised_checkpoint_that_does_not_say_so(
    capsys: Capture, packed: dict[str, DType], method: str
) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        specs = {**LLAMA, **{key: (dtype, (4, 4)) for key, dtype in packed.items()}}
        write_checkpoint(Path(name), specs, seed=seed)
    in_order(models_refused(capsys, "CheckpointError"), "base: ", f"({method}", "Dequantise")


def only(*names: str) -> Change:
    """Leave nothing in a but these files."""

    def change() -> None:
        shutil.rmtree("a")
        for name in names:
            Path("a", name).parent.mkdir(parents=True, exist_ok=True)
            Path("a", name).write_bytes(b"x")

    return change


@pytest.mark.parametrize(
    ("names", "fragments"),
    [
        (("pytorch_model.bin", "config.json"), ("pytorch_model.bin", "Copy or download it again")),
        (("pytorch_model-00001-of-00002.bin",), ("torch.save", "pytorch_model.bin.index.json")),
        (("weights.pth",), ("weights.pth", "Give the path of that file")),
        (("adapter_config.json", "adapter_model.safetensors"), ("adapter", "MODEL+ADAPTER")),
        (("model.gguf",), ("GGUF",)),
        (("global_step7/mp_rank_00.pt", "latest"), ("latest names the step 'x'", "global_step7")),
        (("global_step7/mp_rank_00.pt",), ("model states of rank 0 are missing", "Copy them")),
        (("__0_0.distcp",), ("no .metadata", "Copy it too")),
        (("config.json",), ("no checkpoint in this folder", "model.safetensors")),
        (("snapshots/0123/config.json",), ("Hugging Face cache", "snapshots")),
    ],
)
def test_a_folder_of_another_kind(
    capsys: Capture, names: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    only(*names)()
    said = models_refused(capsys, "CheckpointError")
    assert re.match(r"CheckpointError: (/.*/)?a(/\S+)?: ", said), said
    in_order(said, *fragments)


@pytest.mark.parametrize(
    ("path", "error", "fragments"),
    [
        ("aa", "CheckpointError", ("aa: no such folder or file", "a")),
        ("quite-different", "CheckpointError", ("no such folder or file here", "Check the path")),
        (
            "no/such",
            "CheckpointError",
            ("no such folder or file here", "taken as a model of the Hub"),
        ),
        ("recipe.yml", "CheckpointError", ("neither a folder nor a .safetensors file",)),
        ("ftq://bucket/a", "StoreError", ("ftq://: no such kind of place is known", "s3://")),
        ("a@v2", "CheckpointError", ("a has no revision 'v2'", "Hugging Face Hub")),
    ],
)
def test_a_model_that_is_not_there(
    capsys: Capture, path: str, error: str, fragments: tuple[str, ...]
) -> None:
    in_order(
        models_refused(capsys, error, RECIPE.replace("model: a", f"model: {path}")), *fragments
    )


# --- models that do not fit together --------------------------------------------------------------


def rule_of(said: str) -> str:
    """The rules that a message prints, as a line of a recipe."""
    found = re.search(r"rules: \[\{.*\}\]", said)
    assert found, said
    return found[0] + "\n"


def test_shapes_that_differ(capsys: Capture) -> None:
    write_checkpoint(Path("a"), LLAMA | {UP1: (BF16, (12, 9))}, seed=1)
    said = models_refused(capsys, "PlanError")
    in_order(said, "1 tensor ", UP1, "[12, 8] in base and b", "[12, 9] in a", "from: base")
    out = merged(capsys, RECIPE + rule_of(said))
    assert out[UP1] == values("base")[UP1]
    assert out[UP0] != values("base")[UP0]


def test_many_shapes_that_differ_are_told_together(capsys: Capture) -> None:
    specs = {f"model.layers.{i}.weight": (BF16, (4, 4)) for i in range(50)}
    wider = dict.fromkeys(specs, (BF16, (4, 5)))
    for name, own in (("base", specs), ("a", wider), ("b", specs)):
        write_checkpoint(Path(name), own)
    said = models_refused(capsys, "PlanError")
    in_order(said, "50 tensors are", "and 40 more", '"model.layers.*.weight", from: base')
    assert len(said.splitlines()) < 20


def test_dtypes_of_another_kind(capsys: Capture) -> None:
    write_checkpoint(Path("a"), LLAMA | {NORM: (DType.I64, (8,))}, seed=1)
    said = models_refused(capsys, "PlanError")
    in_order(said, NORM, "bfloat16 in base and b", "int64 in a", "from: base")
    assert merged(capsys, RECIPE + rule_of(said))[NORM] == values("base")[NORM]


@pytest.mark.parametrize("base", ["base", "my base #2", "1000"])
def test_vocabularies_that_differ(capsys: Capture, base: str) -> None:
    """The rule that is printed, pasted into the recipe, solves it, whatever the model's name."""
    Path("base").rename(base)
    recipe = RECIPE.replace("base_model: base", f"base_model: '{base}'")
    larger = LLAMA | {EMBED: (BF16, (20, 8)), HEAD: (BF16, (20, 8))}
    write_checkpoint(Path("a"), larger, seed=1, files={"tokenizer.json": "of a"})
    Path(base, "tokenizer.json").write_text("of base")
    said = models_refused(capsys, "PlanError", recipe)
    in_order(said, "vocabulary sizes differ", "2 tensors", EMBED, f"in {base}", "[20, 8] in a")
    tokenizer = re.search(r"tokenizer_source: .+", said)
    assert tokenizer
    out = merged(capsys, recipe + rule_of(said) + tokenizer[0])
    assert [out[name] for name in (EMBED, HEAD)] == [values(base)[n] for n in (EMBED, HEAD)]
    assert out[NORM] not in (values(base)[NORM], values("a")[NORM])
    assert Path("out/tokenizer.json").read_text() == "of base"


def test_the_larger_vocabulary_can_be_kept(capsys: Capture) -> None:
    larger = LLAMA | {EMBED: (BF16, (20, 8)), HEAD: (BF16, (20, 8))}
    write_checkpoint(Path("a"), larger, seed=1, files={"tokenizer.json": "of a"})
    for name in ("base", "b"):
        Path(name, "config.json").write_text('{"vocab_size": 16, "model_type": "tiny"}')
    said = models_refused(capsys, "PlanError")
    rule = rule_of(said).replace("from: base", "from: a")
    out = merged(capsys, RECIPE + rule + "tokenizer_source: a\n")
    assert out[EMBED] == values("a")[EMBED]
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 20
    assert Path("out/tokenizer.json").read_text() == "of a"


def test_a_tensor_that_one_model_lacks(capsys: Capture) -> None:
    """Each way out that is printed works, and does what it says."""
    write_checkpoint(Path("a"), without(NORM), seed=1)
    said = models_refused(capsys, "PlanError")
    in_order(said, f"1 tensor is not in every input: {NORM}", "b and base have it, a does not")
    rule = rule_of(said)
    others = re.findall(r"in place of '(.+?)': (.+?)  \((.+?)\)", said)
    assert [action for _, action, _ in others] == ["missing: skip", "from: b", "drop: true"]
    base, b = values("base")[NORM], values("b")[NORM]
    expected = {
        "missing: base": [x + 0.5 * 3 / 4 * (y - x) for x, y in zip(base, b, strict=True)],
        "missing: skip": [x + 0.5 * (y - x) for x, y in zip(base, b, strict=True)],
        "from: b": b,
        "drop: true": None,
    }
    for action, wanted in expected.items():
        out = merged(capsys, RECIPE + rule.replace("missing: base", action), "--overwrite")
        assert (NORM in out) == (wanted is not None)
        if wanted is not None:
            assert out[NORM] == pytest.approx(wanted, rel=2**-7)


def test_a_tensor_that_the_base_model_lacks(capsys: Capture) -> None:
    write_checkpoint(Path("base"), without(NORM))
    said = models_refused(capsys, "PlanError")
    in_order(said, NORM, "a and b have it, base does not")
    assert "missing: base" not in said and "missing: skip" not in said  # neither would help
    assert merged(capsys, RECIPE + rule_of(said))[NORM] == values("a")[NORM]


def test_integers_that_differ(capsys: Capture) -> None:
    specs = LLAMA | {"ids": (DType.I64, (4,))}
    for seed, name in enumerate(("base", "a", "b")):
        write_checkpoint(Path(name), specs, seed=seed)
    set_element(Path("b"), "ids", 2, 77)
    Path("recipe.yml").write_text(RECIPE)
    status, out, err = run(capsys, "merge", "recipe.yml", "out", "--quiet")
    assert (status, out) == (1, "")
    in_order(err, "CheckpointError: ids holds int64", str(Path("base").absolute()), "b", "from: ")
    assert visible(Path("out")) == {}
    rule = rule_of(err).replace("<model>", "b")
    status, _, again = run(capsys, "merge", "recipe.yml", "out", "--quiet")
    assert (status, again) == (1, err)  # not by luck
    assert merged(capsys, RECIPE + rule, "--fresh")["ids"] == [0, 1, 77, 3]


def test_nothing_in_common(capsys: Capture) -> None:
    write_checkpoint(Path("a"), {f"transformer.{name}": spec for name, spec in LLAMA.items()})
    in_order(models_refused(capsys, "PlanError"), "a", "base", "no tensor name in common")


def test_layers_beyond_a_model(capsys: Capture) -> None:
    said = models_refused(capsys, "PlanError", SLICES.replace("[1, 2]", "[1, 5]"))
    in_order(said, "slices[1].sources[0]", "[1, 5]", "2 layers of b")


def test_a_rule_that_matches_nothing(capsys: Capture) -> None:
    text = RECIPE + "rules: [{tensors: model.norm.wieght, from: a}]\n"
    in_order(
        models_refused(capsys, "PlanError", text), "rules[0]", "wieght", f"Did you mean '{NORM}'"
    )


# --- values ---------------------------------------------------------------------------------------


def not_finite(capsys: Capture, text: str = RECIPE) -> str:
    Path("recipe.yml").write_text(text)
    status, out, err = run(capsys, "merge", "recipe.yml", "out", "--quiet")
    assert (status, out) == (1, "")
    assert visible(Path("out")) == {}
    return err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(capsys: Capture, value: float) -> None:
    set_element(Path("a"), NORM, 3, value)
    set_element(Path("b"), UP0, 0, value)
    err = not_finite(capsys)
    in_order(err, "NonFiniteError: NaN or infinity in 2 tensors", "nothing was published")
    assert f"{NORM}: {Path('a', SINGLE).absolute()}" in err
    assert f"{UP0}: {Path('b', SINGLE).absolute()}" in err
    assert EMBED not in err


def test_nan_in_two_models_is_one_tensor(capsys: Capture) -> None:
    for name in ("a", "b"):
        set_element(Path(name), NORM, 3, float("nan"))
    err = not_finite(capsys)
    assert "in 1 tensor" in err
    assert all(str(Path(name, SINGLE).absolute()) in err for name in ("a", "b"))


def test_results_that_overflow(capsys: Capture) -> None:
    set_element(Path("a"), NORM, 3, 3e38)
    err = not_finite(capsys, RECIPE.replace("lambda: 0.5", "lambda: 50.0"))
    in_order(err, "NonFiniteError", f"{NORM}: the result")


def test_results_that_are_too_large_for_what_is_written(capsys: Capture) -> None:
    set_element(Path("a"), NORM, 3, 1e6)
    in_order(not_finite(capsys, RECIPE + "out_dtype: float16\n"), f"{NORM}: the result")


def test_allowing_what_is_not_finite_goes_on_from_there(capsys: Capture) -> None:
    """As the message says: nothing that was done is done again."""
    set_element(Path("a"), NORM, 3, float("inf"))
    assert "allow_non_finite: true" in not_finite(capsys)
    Path("recipe.yml").write_text(RECIPE + "allow_non_finite: true\n")
    status, out, err = run(capsys, "merge", "recipe.yml", "out", "--json")
    assert status == 0
    events = [json.loads(line) for line in err.splitlines()]
    assert [event["event"] for event in events] == ["start"]
    assert events[0]["tasks_done"] == events[0]["tasks"] == 1
    assert json.loads(out)["tensors"] == len(LLAMA)
    assert values("out")[NORM][3] == float("inf")


def test_taking_such_a_tensor_from_another_model(capsys: Capture) -> None:
    set_element(Path("a"), NORM, 3, float("nan"))
    not_finite(capsys)
    Path("recipe.yml").write_text(RECIPE + f"rules: [{{tensors: {NORM}, from: base}}]\n")
    status, _, err = run(capsys, "merge", "recipe.yml", "out", "--quiet")
    assert status == 1
    in_order(err, "LedgerMismatchError", "recipe changed", "rules", "--fresh")
    assert run(capsys, "merge", "recipe.yml", "out", "--quiet", "--fresh")[0] == 0
    assert values("out")[NORM] == values("base")[NORM]


# --- recipes --------------------------------------------------------------------------------------

KEYS = "unknown key '{}'"
BAD_RECIPES: Mapping[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("recipe.yml: is empty", "merge_method and models")),
    "only a comment": ("# later\n", ("recipe.yml: is empty",)),
    "malformed": ("merge_method: [linear\nmodels: {", ("line 2, column 7", "not valid YAML")),
    "tabs": ("models:\n\t- model: a\n", ("line 2, column 1", "indent with spaces")),
    "a list": ("- a\n- b\n", ("must be a mapping", "not a list")),
    "a text": ("hello\n", ("must be a mapping", "'hello'")),
    "binary": (bytes(range(256)), ("not UTF-8 text (byte 128)", "a YAML file")),
    "a zip archive": (b"PK\x03\x04" + bytes(99), ("not valid YAML", "#x0003")),
    "several documents": (RECIPE + "---\n" + RECIPE, ("several YAML documents",)),
    "a key twice": (RECIPE + "base_model: b\n", ("'base_model' is given twice", "line 2")),
    "a Python object": ("x: !!python/object:os.system {}\n", ("tag", "python/object")),
    "unknown key": (
        RECIPE + "out_dtyp: float32\n",
        (KEYS.format("out_dtyp"), "shard_size", "Did you mean 'out_dtype'?"),
    ),
    "unknown key of a model": (
        RECIPE.replace("model: b", "modle: b"),
        ("models[1]: " + KEYS.format("modle"), "Did you mean 'model'?"),
    ),
    "unknown parameter": (
        RECIPE.replace("weight: 1.0", "wieght: 1.0"),
        ("models[0].parameters", "'wieght' of task_arithmetic", "Did you mean 'weight'?"),
    ),
    "unknown shared parameter": (
        RECIPE.replace("lambda", "lamda"),
        ("parameters", "'lamda'", "Did you mean 'lambda'?"),
    ),
    "unknown key of a slice": (
        SLICES.replace("sources: [{model: b", "source: [{model: b"),
        ("slices[1]: " + KEYS.format("source"), "Did you mean 'sources'?"),
    ),
    "unknown key of a source": (
        SLICES.replace("layer_range: [1", "layer_rang: [1"),
        ("slices[1].sources[0]: " + KEYS.format("layer_rang"), "Did you mean 'layer_range'?"),
    ),
    "unknown key of a rule": (
        RECIPE + "rules: [{tensor: x, from: a}]\n",
        ("rules[0]: " + KEYS.format("tensor"), "Did you mean 'tensors'?"),
    ),
    "unknown key of a filter": (
        RECIPE.replace("weight: 1.0", "weight: [{fliter: mlp, value: 1}]"),
        ("models[0].parameters.weight[0]: " + KEYS.format("fliter"), "Did you mean 'filter'?"),
    ),
    "unknown key of a model's name": (
        RECIPE.replace("model: a", "model: {pth: a}"),
        ("models[0].model: " + KEYS.format("pth"), "Did you mean 'path'?"),
    ),
    "unknown choice": (
        RECIPE + "rules: [{tensors: x, missing: skp}]\n",
        ("rules[0].missing: ", "'skp'", "error, base, skip", "Did you mean 'skip'?"),
    ),
    "unknown method": (
        RECIPE.replace("task_arithmetic", "task_aritmetic"),
        ("merge_method: ", "'task_aritmetic'", "slerp", "Did you mean 'task_arithmetic'?"),
    ),
    "a method of mergekit's": (
        RECIPE.replace("task_arithmetic", "model_stock"),
        ("'model_stock' is a method of mergekit that is not supported yet", "ties"),
    ),
    "modules": (RECIPE + "modules: {x: {}}\n", ("'modules' is not supported yet",)),
    "tokenizer": (RECIPE + "tokenizer: {source: base}\n", ("'tokenizer'", "tokenizer_source")),
    "chat_template": (RECIPE + "chat_template: auto\n", ("'chat_template'", "remove it")),
    "union": (RECIPE + "tokenizer_source: union\n", ("'union'", "write base")),
    "LoRA": (RECIPE.replace("model: a", "model: a+"), ("models[0].model", "model+lora")),
    "no method": (RECIPE.replace("merge_method", "dtype"), ("needs 'merge_method'",)),
    "no models": ("merge_method: linear\n", ("exactly one of models and slices",)),
    "an empty list": ("merge_method: linear\nmodels: []\n", ("models", "an empty list")),
    "no base model": (
        RECIPE.replace("base_model: base\n", ""),
        ("base_model: is missing", "task vectors", "add base_model: <path>"),
    ),
    "no weight": (
        RECIPE.replace("parameters: {weight: 3.0}", ""),
        ("models[1]", "no 'weight'", "top-level parameters"),
    ),
    "density beyond 1": (
        RECIPE.replace("task_arithmetic", "ties").replace("weight: 1.0", "weight: 1, density: 1.5"),
        ("models[0].parameters.density", "from 0 to 1", "not 1.5"),
    ),
    "density below 0": (
        RECIPE.replace("task_arithmetic", "dare_ties").replace("lambda: 0.5", "density: -0.1"),
        ("parameters.density", "from 0 to 1", "not -0.1"),
    ),
    "a weight that is not finite": (
        RECIPE.replace("weight: 1.0", "weight: .nan"),
        ("models[0].parameters.weight", "finite number", "nan"),
    ),
    "a negative weight": (
        "merge_method: fisher\nmodels: [{model: a, fisher: b, parameters: {weight: -1}}]\n",
        ("models[0].parameters.weight", "at least 0", "not -1"),
    ),
    "a weight in quotes": (
        RECIPE.replace("weight: 1.0", "weight: '1.0'"),
        ("must be a number", "'1.0'", "remove the quotes"),
    ),
    "weights that sum to zero": (
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
        "- {model: b, parameters: {weight: -1}}\n",
        ("linear", "[1.0, -1.0] sum to 0", "normalize: false"),
    ),
    "weights that are all zero": (
        "merge_method: fisher\nparameters: {weight: 0}\nmodels: [{model: a, fisher: b}]\n",
        ("fisher", "all weights are 0"),
    ),
    "too many models": (
        RECIPE.replace("task_arithmetic", "slerp"),
        ("slerp", "exactly 1 model", "there are 2 (a, b)"),
    ),
    "a dtype that is none": (RECIPE + "dtype: bf16\n", ("dtype", "'bf16'", "bfloat16")),
    "a seed that is none": (RECIPE + "seed: -1\n", ("seed", "whole number from 0", "not -1")),
    "a size that is none": (RECIPE + "shard_size: 5B\n", ("shard_size", "ambiguous", "5GB")),
    "a tiny shard": (RECIPE + "shard_size: 10\n", ("shard_size", "at least 4096 bytes")),
    "a rule without effect": (RECIPE + "rules: [{tensors: x}]\n", ("rules[0]", "does nothing")),
    "a rule from elsewhere": (
        RECIPE + "rules: [{tensors: x, from: c}]\n",
        ("rules[0].from", "unknown model 'c'", "base, a, b"),
    ),
}


@pytest.mark.parametrize("wrong", BAD_RECIPES)
def test_a_bad_recipe(capsys: Capture, wrong: str) -> None:
    text, fragments = BAD_RECIPES[wrong]
    in_order(recipe_refused(capsys, text), *fragments)


def test_all_errors_of_a_recipe_are_told_at_once(capsys: Capture) -> None:
    said = recipe_refused(
        capsys,
        "merge_method: ties\nmodels: [{model: a, parameters: {desnity: 0.5}}]\ndtype: int4\n"
        "seed: -1\nrulez: []\nshard_size: 5B\n",
    )
    lines = said.splitlines()
    assert len(lines) == 7
    for place in ("models[0].parameters", "dtype", "seed", "rulez", "shard_size", "base_model"):
        assert sum(place in line.partition(" (")[0] for line in lines) == 1, place
    assert "no 'weight'" in said


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nope.yml", "No such file"),
        (".", "Is a directory"),
        ("a", "Is a directory"),
        (f"a/{SINGLE}", "a recipe is a YAML file"),
        ("", "its path is empty"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_recipe_that_is_not_there(capsys: Capture, path: str, why: str) -> None:
    for command in ("plan", "merge"):
        said = refused(capsys, command, path, "out", status=2, error="RecipeError")
        in_order(said, f"{path or 'recipe'}: ", why)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_change_of_a_recipe_is_read_or_refused(capsys: Capture, data: st.DataObject) -> None:
    """Lines swapped, dropped or repeated, words replaced by others: never an exit without words."""
    text = RECIPE + "dtype: float32\nrules: [{tensors: '*.norm.*', from: a}]\n"
    words = [*re.findall(r"[\w.*]+|[^\w\s]", text), "-", "null", "1e400", "[]", "{}", "ties", "&x"]
    pieces = re.findall(r"[\w.*]+|\W", text)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pieces) - 1))
        pieces[at : at + data.draw(st.integers(0, 2))] = [data.draw(st.sampled_from(words))]
    Path("recipe.yml").write_text("".join(pieces))
    status, out, err = run(capsys, "plan", "recipe.yml", "out")
    assert status in (0, 1, 2)
    assert bool(out) == (status == 0) and bool(err) == (status != 0)


# --- arguments ------------------------------------------------------------------------------------


def test_a_memory_budget_that_is_too_small(capsys: Capture) -> None:
    """The budget that is printed is enough, and one MiB less is not."""
    Path("recipe.yml").write_text(RECIPE)
    command = ("merge", "recipe.yml", "out", "--memory")
    said = refused(capsys, *command, "1MiB", status=1, error="MemoryBudgetError")
    in_order(said, "needs", "MiB", "the budget is 1.0 MiB", "program itself")
    enough = re.search(r"--memory (\d+)MiB", said)
    assert enough
    less = f"{int(enough[1]) - 1}MiB"
    assert said.replace(" 1.0 MiB", " x") == refused(
        capsys, *command, less, status=1, error="MemoryBudgetError"
    ).replace(f" {less[:-3]}.0 MiB", " x")
    status, _, err = run(capsys, *command, f"{enough[1]}MiB", "--quiet")
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("option", "value", "fragments"),
    [
        ("--memory", "lots", ("'lots' is no size", "4GiB")),
        ("--memory", "4 gigs", ("'4 gigs' is no size",)),
        ("--memory", "4G", ("'4G' is no size",)),
        ("--memory", "nan", ("'nan' is no size",)),
        ("--memory", "1e3GiB", ("is no size",)),
        ("--memory", "9" * 400, ("is no size",)),
        ("--memory", "", ("'' is no size",)),
        ("--threads", "0", ("'0' is no count", "1")),
        ("--threads", "-2", ("--threads",)),
        ("--threads", "two", ("'two' is no count",)),
        ("--threads", "1.5", ("'1.5' is no count",)),
        ("--threads", "9" * 5000, ("is no count",)),
        ("--executor", "dask", ("'dask'", "local", "ray")),
        ("--nonsense", "1", ("--nonsense",)),
    ],
)
def test_bad_options(capsys: Capture, option: str, value: str, fragments: tuple[str, ...]) -> None:
    Path("recipe.yml").write_text(RECIPE)
    status, out, err = run(capsys, "merge", "recipe.yml", "out", option, value)
    assert (status, out) == (2, "")
    in_order(err, "usage: shardmerge", "error:", *fragments)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((), ("COMMAND",)),
        (("mrege", "r", "o"), ("'mrege'", "merge", "plan", "verify")),
        (("merge",), ("recipe", "out")),
        (("merge", "recipe.yml"), ("out",)),
        (("merge", "recipe.yml", "out", "more"), ("more",)),
        (("explain",), ("method",)),
        (("diff", "a"), ("b",)),
    ],
)
def test_bad_usage(capsys: Capture, arguments: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    in_order(err, "usage: shardmerge", "error:", *fragments)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("explain", "tise"), 2, "UsageError: unknown merge method 'tise'"),
        (("inspect", "nope"), 1, "CheckpointError: nope: no such folder or file"),
        (("inspect", "a/config.json"), 1, "CheckpointError: a/config.json: not a checkpoint"),
        (("inspect", ""), 1, "StoreError: an empty path"),
        (("diff", "a", "nope"), 1, "CheckpointError: nope: no such"),
        (("verify", "nope"), 1, "CheckpointError: nope: no such folder"),
        (("verify", f"a/{SINGLE}"), 1, f"CheckpointError: a/{SINGLE}: no such folder"),
    ],
)
def test_other_commands(
    capsys: Capture, arguments: tuple[str, ...], status: int, said: str
) -> None:
    error = said.partition(":")[0]
    assert said in refused(capsys, *arguments, status=status, error=error)


# --- OUT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "merge"])
@pytest.mark.parametrize(
    ("out", "status", "error", "why"),
    [
        ("", 2, "UsageError", "OUT is empty"),
        ("gs://bucket/out", 2, "UsageError", "local folder"),
        ("file:///tmp/out", 2, "UsageError", "local folder"),
        ("x" * 300, 1, "OutputError", "File name too long"),
    ],
)
def test_an_out_that_is_no_folder(
    capsys: Capture, command: str, out: str, status: int, error: str, why: str
) -> None:
    Path("recipe.yml").write_text(RECIPE)
    assert why in refused(capsys, command, "recipe.yml", out, status=status, error=error)


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("base", "where the source base lies"),
        ("./a/../b/", "where the source b lies"),
        ("link", "where the source a lies"),
        ("recipe.yml", "Not a directory"),
        ("recipe.yml/out", "Not a directory"),
    ],
)
def test_an_out_that_cannot_be(capsys: Capture, out: str, why: str) -> None:
    Path("recipe.yml").write_text(RECIPE)
    Path("link").symlink_to("a")
    for options in ((), ("--overwrite",), ("--fresh",)):
        arguments = ("merge", "recipe.yml", out, *options)
        assert why in refused(capsys, *arguments, status=1, error="OutputError")


@pytest.mark.parametrize(
    "name", [SINGLE, INDEX, "config.json", "README.md", "pytorch_model.bin", "model.gguf"]
)
def test_an_out_that_holds_something_else(capsys: Capture, name: str) -> None:
    Path("recipe.yml").write_text(RECIPE)
    Path("out").mkdir()
    Path("out", name).write_text("precious")
    before = tree(Path())
    status, out, err = run(capsys, "merge", "recipe.yml", "out")
    assert (status, out) == (1, "")
    in_order(err, "OutputError: out holds another checkpoint", name, "--overwrite")
    assert tree(Path()) == before  # not even an empty folder of ours


def test_a_refusal_changes_nothing_for_the_checkpoint_that_is_there(capsys: Capture) -> None:
    first = merged(capsys, RECIPE)
    before = tree(Path("out"))
    Path("recipe.yml").write_text(RECIPE.replace("0.5", "0.25"))
    assert "--overwrite" in run(capsys, "merge", "recipe.yml", "out")[2]
    assert tree(Path("out")) == before
    Path("recipe.yml").write_text(RECIPE)
    status, out, err = run(capsys, "merge", "recipe.yml", "out")
    assert (status, err) == (0, "") and "already merged" in out
    assert merged(capsys, RECIPE.replace("0.5", "0.25"), "--overwrite") != first


def test_files_that_are_not_in_the_way_stay(capsys: Capture) -> None:
    Path("out").mkdir()
    Path("out/notes.md").write_text("mine")
    merged(capsys, RECIPE)
    assert Path("out/notes.md").read_text() == "mine"


def test_an_unfinished_out_is_no_checkpoint(capsys: Capture) -> None:
    set_element(Path("a"), NORM, 3, float("nan"))
    not_finite(capsys)
    for command in ("inspect", "verify"):
        status, out, err = run(capsys, command, "out")
        assert (status, out) == (1, "")
        assert "out: " in err
    assert list(Path("out").rglob("*.safetensors")) == []


def test_a_header_that_lies_about_nothing_is_still_read(capsys: Capture) -> None:
    """The damage above is refused for its damage: the same bytes, undamaged, are merged."""
    header = write_header([(name, *spec) for name, spec in LLAMA.items()], align=8)
    data = b"".join(read_tensors(Path("a"))[name][2] for name in LLAMA)
    Path("a", SINGLE).write_bytes(header + data)
    assert len(merged(capsys, RECIPE)) == len(LLAMA)
