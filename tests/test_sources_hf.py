"""Checkpoints on disk: what is read, in which order, what is left alone and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmerge.errors import CheckpointError, HeaderError
from shardmerge.header import write_header
from shardmerge.numerics import DType
from shardmerge.sources import Twins, open_checkpoint
from shardmerge.stores import Range, Stores

FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def save_raw(path: Path, tensors: dict[str, tuple[DType, list[int]]]) -> None:
    """A shard of zeros of any dtype."""
    listed = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    nbytes = sum(dtype.itemsize * int(np.prod(shape)) for _, dtype, shape in listed)
    path.write_bytes(write_header(listed, align=8) + bytes(nbytes))


def save_sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], **index) -> None:
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    for shard, tensors in shards.items():
        save(folder / shard, tensors)
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map | index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def configure(folder: Path, **config) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def stored(checkpoint, name: str) -> bytes:
    parts = []
    for segment in checkpoint.tensors[name].segments:
        buffer = bytearray(segment.nbytes)
        Stores().read([Range(segment.url, segment.offset, memoryview(buffer))])
        parts.append(bytes(buffer))
    return b"".join(parts)


def refusal(url: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(url))
    message = str(caught.value)
    assert message.startswith(str(url)), message
    return message


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# --- what is read ---------------------------------------------------------------------------------


def test_a_sharded_checkpoint_in_the_order_of_its_bytes(tmp_path):
    torch.manual_seed(0)
    values = {
        "z": torch.randn(3, 4).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "long": torch.arange(5),
    }
    other = {"a": torch.randn(2, 2, dtype=torch.float64), "f8": torch.ones(4).to(torch.float8_e5m2)}
    save_sharded(tmp_path, {TWO: values, ONE: other})
    configure(tmp_path, model_type="llama", quantization_config=None)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.url == str(tmp_path)
    assert checkpoint.shards == (ONE, TWO)
    assert checkpoint.config["model_type"] == "llama"
    assert set(checkpoint.tensors) == set(values) | set(other)
    assert checkpoint.shard_of == {name: int(name in values) for name in checkpoint.tensors}
    assert list(checkpoint.shard_of) == list(checkpoint.tensors)
    places = [
        (checkpoint.shard_of[name], tensor.segments[0].offset)
        for name, tensor in checkpoint.tensors.items()
    ]
    assert places == sorted(places)
    for name, value in (values | other).items():
        tensor = checkpoint.tensors[name]
        assert tensor.name == name
        assert tensor.shape == tuple(value.shape)
        assert stored(checkpoint, name) == value.flatten().view(torch.uint8).numpy().tobytes()
    assert set(checkpoint.versions) == {ONE, TWO, "model.safetensors.index.json", "config.json"}


def test_twins_are_read_as_if_alone(tmp_path):
    """The same headers with other elements, then other headers under the same index."""
    for number, rows in enumerate((3, 3, 5)):
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        values = {"a": torch.full((rows, 4), float(number)), "b": torch.ones(2)}
        save_sharded(folder, {ONE: values, TWO: {"c": torch.full((7,), float(number))}})
    twins = Twins()
    for folder in sorted(tmp_path.iterdir()):
        alone, together = (open_checkpoint(str(folder), twins=t) for t in (None, twins))
        assert together == alone
        assert list(together.tensors) == list(alone.tensors)
        assert stored(together, "c") == stored(alone, "c")


def test_a_twin_of_a_good_checkpoint_may_be_cut_off(tmp_path):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        save_sharded(tmp_path / name, {ONE: {"a": torch.ones(9)}, TWO: {"b": torch.ones(9)}})
    with (tmp_path / "bad" / TWO).open("r+b") as file:
        file.truncate((tmp_path / "good" / TWO).stat().st_size - 1)
    twins = Twins()
    open_checkpoint(str(tmp_path / "good"), twins=twins)
    with pytest.raises(CheckpointError, match="cut off"):
        open_checkpoint(str(tmp_path / "bad"), twins=twins)


def test_a_header_beyond_the_first_read(tmp_path):
    names = [f"layer.{number}." + "x" * 100 for number in range(8000)]
    save_raw(tmp_path / "model.safetensors", {name: (DType.U8, [1]) for name in names})
    assert list(open_checkpoint(str(tmp_path)).tensors) == names


def test_the_version_of_a_shard_changes_with_it(tmp_path):
    save(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    before = open_checkpoint(str(tmp_path)).versions
    assert open_checkpoint(str(tmp_path)).versions == before
    save(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    after = open_checkpoint(str(tmp_path))
    assert after.versions != before
    assert stored(after, "a") == np.ones(2, np.float32).tobytes()


def test_a_single_file_is_a_checkpoint_of_its_own(tmp_path, monkeypatch):
    save(tmp_path / "fisher.safetensors", {"a": torch.zeros(2)})
    (tmp_path / "config.json").write_text("not looked at")
    monkeypatch.chdir(tmp_path)
    for url in (str(tmp_path / "fisher.safetensors"), "fisher.safetensors"):
        checkpoint = open_checkpoint(url)
        assert checkpoint.url == url
        assert checkpoint.shards == ("fisher.safetensors",)
        assert list(checkpoint.versions) == ["fisher.safetensors"]
        assert checkpoint.tensors["a"].segments[0].url == str(tmp_path / "fisher.safetensors")
        assert checkpoint.config == {} and checkpoint.files == ()


def test_the_order_in_which_a_folder_is_looked_at(tmp_path):
    save(tmp_path / "consolidated.safetensors", {"author": torch.zeros(1)})
    save(tmp_path / "adapter_model.safetensors", {"lora": torch.zeros(1)})
    save(tmp_path / "fisher.safetensors", {"other": torch.zeros(1)})
    save(tmp_path / "._fisher.safetensors", {"hidden": torch.zeros(1)})
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["other"]
    save(tmp_path / "model.safetensors", {"single": torch.zeros(1)})
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["single"]
    save_sharded(tmp_path, {ONE: {"sharded": torch.zeros(1)}})
    checkpoint = open_checkpoint(str(tmp_path))
    assert list(checkpoint.tensors) == ["sharded"]
    assert set(checkpoint.ignored) >= {
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "fisher.safetensors",
        "model.safetensors",
    }


def test_a_cache_snapshot_of_symbolic_links(tmp_path):
    blobs = tmp_path / "blobs"
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    save_sharded(blobs, {ONE: {"a": torch.ones(2)}, TWO: {"b": torch.zeros(3)}})
    configure(blobs, model_type="x")
    (blobs / "tokenizer.json").write_text("{}")
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    checkpoint = open_checkpoint(str(snapshot))
    assert checkpoint.shards == (ONE, TWO)
    assert checkpoint.files == ("tokenizer.json",)
    assert stored(checkpoint, "a") == np.ones(2, np.float32).tobytes()
    assert "Give the path of one folder in `snapshots`" in refusal(tmp_path)
    (blobs / f"{0:040x}").unlink()  # the config's
    assert "config.json: a link to a file that is gone" in refusal(snapshot)


def test_files_that_a_copy_needs_and_weights_that_are_not_read(tmp_path):
    save(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    configure(tmp_path, model_type="x")
    needed = [
        "1_Pooling/config.json",
        "additional_chat_templates/tool.jinja",
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "preprocessor_config.json",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model.v3",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    weights = [
        "consolidated.00.pth",
        "consolidated.safetensors",
        "model.gguf",
        "model.h5",
        "model.msgpack",
        "model.onnx",
        "original/",
        "other.safetensors",
        "onnx/",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "x.pt",
    ]
    neither = [
        "README.md",
        ".gitattributes",
        ".hidden.json",
        ".cache/x.json",
        ".git/x.json",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "scaler.pt",
        "trainer_state.json",
        "quantize_config.json",
        "adapter_config.json",
        "shardmerge.json",
        "events.out.tfevents.1",
        "runs/x.txt",
        "original/params.json",
        "all_results.json",
        "picture.png",
        "onnx/config.json",
        "1_Pooling/deeper/x.json",
        "1_Pooling/README.md",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
    ]
    for name in (*needed, *weights, *neither):
        path = tmp_path / name
        if not name.endswith("/"):
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(b"{}")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    (tmp_path / "gone.json").symlink_to("nothing")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.files == tuple(sorted(needed))
    assert checkpoint.ignored == tuple(sorted(weights))


# --- what is refused ------------------------------------------------------------------------------


def test_a_path_that_does_not_exist(tmp_path, monkeypatch):
    (tmp_path / "Llama-3-8B").mkdir()
    (tmp_path / "Llama-3-8B-Instruct").mkdir()
    message = refusal(tmp_path / "LLama-3-8b")
    assert "no such folder or file" in message
    assert "Llama-3-8B" in message
    assert "Check the path" in refusal(tmp_path / "quite-different")
    assert "does not exist either" in refusal(tmp_path / "no" / "folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "taken as a model of the Hub" in refusal("org/some-model")


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "It is empty"),
        (["notes.md"], "no checkpoint in this folder. It holds notes.md"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "an adapter, and no model",
        ),
        (["adapter_config.json", "adapter_model.bin"], "an adapter, and no model"),
        (["pytorch_model.bin", "config.json"], "do not begin as torch's files do"),
        (["pytorch_model.bin.index.json"], "pytorch_model.bin.index.json is not JSON"),
        (["pytorch_model-00001-of-00002.bin"], "shards of torch.save without an index"),
        (["consolidated.00.pth"], "not under the name pytorch_model.bin"),
        (["training_args.bin"], "no checkpoint in this folder"),
        (["model-Q4_K_M.gguf"], "a GGUF file"),
        (["tf_model.h5"], "TensorFlow"),
        (["latest", "zero_to_fp32.py", "global_step5/x.pt"], "latest names the step ''"),
        (["global_step5/x.pt"], "global_step5: the model states of rank 0 are missing"),
        (["__0_0.distcp"], "no .metadata, which says where the tensors lie"),
        (["consolidated.safetensors"], "Give the path of that file"),
        (["model_index.json", "unet/config.json"], "a diffusers pipeline"),
        (["a.safetensors", "b.safetensors"], "2 .safetensors files (a.safetensors, b.safetensors)"),
        ([ONE, TWO, "config.json"], "model.safetensors.index.json would say"),
    ],
)
def test_a_folder_without_a_readable_checkpoint_says_what_it_holds(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert message in refusal(tmp_path)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "neither a folder nor a .safetensors file, nor one of torch.save" in refusal(
        tmp_path / "model.gguf"
    )


def test_damaged_files_are_named(tmp_path):
    save(tmp_path / "model.safetensors", {"a": torch.zeros(100)})
    configure(tmp_path, model_type="x")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-40])
    with pytest.raises(
        HeaderError, match=r"model\.safetensors: cut off(?s:.*)40 bytes are missing"
    ):
        open_checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole)
    for content in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        assert "config.json is not" in refusal(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": 1, "a": 2}')
    assert open_checkpoint(str(tmp_path)).config == {"a": 2}


def test_an_index_that_does_not_fit_its_shards(tmp_path):
    a, b = {"a": torch.zeros(1)}, {"b": torch.zeros(1)}
    index = tmp_path / "model.safetensors.index.json"

    save_sharded(tmp_path, {ONE: a}, b=TWO)
    assert f"shards missing (1 of 2): {TWO}" in refusal(tmp_path)

    save_sharded(tmp_path, {ONE: a, TWO: b}, c=TWO, d=ONE, e=ONE, f=ONE)
    message = refusal(tmp_path)
    assert (
        f"that are not in the shard that the index names (4): 'c' ({TWO}), 'd' ({ONE})" in message
    )
    assert "and 1 more" in message
    assert str(index) in message

    save_sharded(tmp_path, {ONE: a, TWO: b}, a=TWO, b=ONE)
    assert "not in the shard that the index names (2)" in refusal(tmp_path)

    save_sharded(tmp_path, {ONE: a | {"c": torch.ones(1)}, TWO: b | a})
    assert f"tensors in two shards (1): 'a' ({ONE}, {TWO})" in refusal(tmp_path)

    save_sharded(tmp_path, {ONE: a, TWO: b | {"extra": torch.zeros(1)}})
    content = json.loads(index.read_text())
    del content["weight_map"]["extra"]
    index.write_text(json.dumps(content))
    assert f"tensors in a shard but not in the index (1): 'extra' ({TWO})" in refusal(tmp_path)

    for weight_map, message in (
        ({}, "names no tensor"),
        ({"a": "../x"}, "not\n  the plain name"),
        ({"a": "pytorch_model-1.bin"}, "no .safetensors files"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert message in refusal(tmp_path)

    index.unlink()
    index.symlink_to("nothing")
    assert "a link to a file that is gone" in refusal(tmp_path)


# --- quantised checkpoints ------------------------------------------------------------------------


def save_fp8(
    folder: Path, changes: dict[str, tuple[DType, list[int]] | None] | None = None
) -> None:
    tensors: dict[str, tuple[DType, list[int]] | None] = {
        "norm.weight": (DType.BF16, [256]),
        "q.weight": (DType.F8_E4M3, [300, 256]),
        "q.weight_scale_inv": (DType.F32, [3, 2]),
        "v.weight_scale_inv": (DType.BF16, [1, 1]),
        "v.weight": (DType.F8_E4M3, [1, 128]),
    }
    tensors |= changes or {}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_raw(folder / "model.safetensors", kept)


@pytest.mark.parametrize("declared", [True, False])
def test_block_scaled_fp8_joins_weights_and_scales(tmp_path, declared):
    save_fp8(tmp_path)
    configure(tmp_path, **({"quantization_config": FP8} if declared else {}))
    checkpoint = open_checkpoint(str(tmp_path))
    assert list(checkpoint.tensors) == ["norm.weight", "q.weight", "v.weight"]
    assert list(checkpoint.shard_of) == list(checkpoint.tensors)
    assert checkpoint.tensors["norm.weight"].decode is None
    decode = checkpoint.tensors["q.weight"].decode
    assert decode is not None
    assert (decode.rows, decode.columns) == (128, 128)
    assert decode.scale.name == "q.weight_scale_inv"
    assert decode.scale.shape == (3, 2)
    assert decode.scale.segments[0].nbytes == 24


def test_blocks_of_another_size_need_the_declaration(tmp_path):
    save_fp8(tmp_path, {"q.weight_scale_inv": (DType.F32, [5, 8]), "v.weight": None})
    (tmp_path / "config.json").unlink(missing_ok=True)
    assert "(no quantization_config: blocks of (128, 128) tried)" in refusal(tmp_path)
    save_fp8(
        tmp_path,
        {
            "q.weight_scale_inv": (DType.F32, [5, 8]),
            "v.weight": None,
            "v.weight_scale_inv": None,
        },
    )
    configure(tmp_path, quantization_config=FP8 | {"weight_block_size": [64, 32]})
    decode = open_checkpoint(str(tmp_path)).tensors["q.weight"].decode
    assert decode is not None
    assert (decode.rows, decode.columns) == (64, 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q.weight": None}, "scales 'q.weight_scale_inv' without an fp8 tensor"),
        ({"q.weight": (DType.BF16, [300, 256])}, "scales 'q.weight_scale_inv' without an fp8"),
        ({"q.weight_scale_inv": None}, "fp8 tensor 'q.weight' without scales"),
        (
            {"q.weight_scale_inv": (DType.F32, [2, 2])},
            "[300, 256] in blocks of [128, 128] needs [3",
        ),
        ({"q.weight_scale_inv": (DType.F16, [3, 2])}, "are F16; F32 or BF16 are read"),
        ({"q.weight": (DType.F8_E4M3, [3, 1, 2])}, "[3, 1, 2] is not a matrix"),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_scales_that_do_not_fit_are_named(tmp_path, changes, message, declared):
    save_fp8(tmp_path, changes)
    configure(tmp_path, **({"quantization_config": FP8} if declared else {}))
    assert message in refusal(tmp_path)


def test_fp8_without_scales_holds_its_values_unless_scales_are_declared(tmp_path):
    save_raw(tmp_path / "model.safetensors", {"a.weight": (DType.F8_E4M3, [4, 4])})
    assert open_checkpoint(str(tmp_path)).tensors["a.weight"].decode is None
    configure(tmp_path, quantization_config=FP8)
    assert "fp8 tensor 'a.weight' without scales" in refusal(tmp_path)


@pytest.mark.parametrize(
    "declared, method",
    [
        *(
            ({"quant_method": method}, f"quantised by {method}")
            for method in [
                "gptq",
                "awq",
                "mxfp4",
                "compressed-tensors",
                "hqq",
                "quanto",
                "torchao",
                "fbgemm_fp8",
            ]
        ),
        ({"load_in_4bit": True}, "quantised by bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by bitsandbytes"),
        ({"quant_algo": "NVFP4"}, "quantised by NVFP4"),
        ({"bits": 4}, "an unnamed method"),
        ({"quant_method": "fp8"}, "weight_block_size None"),
        (FP8 | {"activation_scheme": "static"}, "'static'"),
        (FP8 | {"weight_block_size": [128]}, "[128]"),
        (FP8 | {"weight_block_size": [0, 128]}, "[0, 128]"),
    ],
)
def test_other_quantisation_is_refused_by_name(tmp_path, declared, method):
    save(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
    for config in (
        {"quantization_config": declared},
        {"text_config": {"quantization_config": declared}},
    ):
        configure(tmp_path, **config)
        message = refusal(tmp_path)
        assert method in message
        assert "Dequantise it first" in message


@pytest.mark.parametrize(
    "tensors, method",
    [
        ({"q.qweight": (DType.I32, [2, 2]), "q.qzeros": (DType.I32, [1])}, "GPTQ or AWQ"),
        ({"q.qweight": (DType.I32, [2, 2]), "q.scales": (DType.F16, [1])}, "GPTQ or AWQ"),
        ({"e.up_blocks": (DType.U8, [2]), "e.up_scales": (DType.U8, [1])}, "mxfp4"),
        ({"q.weight_packed": (DType.I32, [2])}, "compressed-tensors"),
        ({"q.weight": (DType.U8, [2]), "q.weight.quant_state.bitsandbytes__nf4": (DType.U8, [3])},
         "bitsandbytes, 4"),
        ({"q.weight": (DType.I8, [2]), "q.SCB": (DType.F32, [1])}, "bitsandbytes, 8"),
        ({"q.weight": (DType.U32, [2]), "q.scales": (DType.BF16, [1])}, "MLX"),
        ({"q.weight": (DType.F8_E4M3, [2]), "q.weight_scale": (DType.F32, [])}, "scale per tensor"),
        ({"q.W_q": (DType.U8, [2])}, "HQQ"),
        ({"q.weight._data": (DType.I8, [2]), "q.weight._scale": (DType.F32, [1])}, "quanto"),
    ],
)  # fmt: skip
def test_packed_tensors_are_known_by_their_names(tmp_path, tensors, method):
    save_raw(tmp_path / "model.safetensors", tensors)
    for url in (tmp_path, tmp_path / "model.safetensors"):
        assert method in refusal(url)


def test_names_alike_are_not_taken_for_packed(tmp_path):
    tensors = {
        "a.scales": (DType.F32, [1]),
        "a.weight": (DType.BF16, [2]),
        "b_scales": (DType.F32, [1]),
        "b_blocks": (DType.F32, [1]),
        "c.weight_scale": (DType.F32, [1]),
        "d._scale": (DType.F32, [1]),
    }
    save_raw(tmp_path / "model.safetensors", tensors)
    assert set(open_checkpoint(str(tmp_path)).tensors) == set(tensors)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damage_is_always_a_checkpoint_error(tmp_path, data):
    shards = {ONE: {"a": torch.zeros(3)}, TWO: {"b": torch.zeros(2, 2)}}
    save_sharded(tmp_path, shards)
    configure(tmp_path, quantization_config=FP8)
    path = tmp_path / data.draw(
        st.sampled_from([ONE, TWO, "config.json", "model.safetensors.index.json"])
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        open_checkpoint(str(tmp_path))
    except CheckpointError as error:
        str(error).encode()
