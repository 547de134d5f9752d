"""Weights of torch.save: every element where torch has it, and nothing of a file is ever run."""

from __future__ import annotations

import collections
import copyreg
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.cli import main
from shardmerge.errors import CheckpointError, SourceChangedError
from shardmerge.numerics import DType
from shardmerge.sources import open_checkpoint, pickles
from shardmerge.sources.pickles import load_pickle
from shardmerge.sources.torch_file import NAMES, StoredTensor, read_torch, window_of
from shardmerge.sources.zips import Window
from shardmerge.stores.local import LocalStore
from tests.support import contents, read_tensors, upload, write_checkpoint

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ONE, TWO = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"


def raw(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def refusal(url: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(url))
    return str(caught.value)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(11, 4)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("ids", torch.arange(7))


def weights() -> dict[str, Any]:
    torch.manual_seed(0)
    line = torch.randn(20)
    return {
        **Model().state_dict(),
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "half": torch.randn(5).half(),
        "bf16": torch.randn(4, 3).bfloat16(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "u16": torch.arange(3, dtype=torch.int16).view(torch.uint16),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "line": line,
        "slice": line[5:9],
        "transposed": torch.randn(3, 4).t(),
        "columns": torch.randn(6, 5)[:, 1:4],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "one row": torch.randn(8, 3)[2:3],
    }


def check(checkpoint: Any, values: dict[str, Any]) -> None:
    held = contents(checkpoint)
    assert set(held) == set(values)
    for name, value in values.items():
        tensor = checkpoint.tensors[name]
        assert tensor.shape == tuple(value.shape)
        assert tensor.dtype.torch_name == str(value.dtype).removeprefix("torch.")
        assert held[name] == raw(value), name


# --- what is read ---------------------------------------------------------------------------------


def test_a_single_file(tmp_path):
    values = weights()
    torch.save(values, tmp_path / BIN)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    checkpoint = open_checkpoint(str(tmp_path))
    check(checkpoint, values)
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.shards == (BIN,)
    assert checkpoint.files == ("tokenizer.json",)
    assert checkpoint.ignored == ()
    assert set(checkpoint.versions) == {BIN, "config.json"}
    tied = (checkpoint.tensors[name].segments for name in ("emb.weight", "head.weight"))
    assert len(set(tied)) == 1
    counts = {name: len(tensor.segments) for name, tensor in checkpoint.tensors.items()}
    assert counts["transposed"] == 12
    assert counts["columns"] == 6
    assert counts["slice"] == counts["one row"] == counts["empty"] == 1


def test_indexed_shards_and_what_does_not_fit(tmp_path):
    values = {name: value for name, value in weights().items() if name != "head.weight"}
    names = list(values)
    for shard, own in ((TWO, names[:4]), (ONE, names[4:])):
        torch.save({name: values[name] for name in own}, tmp_path / shard)
    weight_map = {name: TWO if name in names[:4] else ONE for name in names}
    (tmp_path / BIN_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / BIN).write_bytes(b"of another checkpoint")
    checkpoint = open_checkpoint(str(tmp_path))
    check(checkpoint, values)
    assert checkpoint.shards == (ONE, TWO)
    assert all(checkpoint.shard_of[name] == int(name in names[:4]) for name in names)
    assert checkpoint.ignored == (BIN,)
    assert set(checkpoint.versions) == {ONE, TWO, BIN_INDEX}
    (tmp_path / ONE).rename(tmp_path / "elsewhere")
    assert f"shards missing (1 of 2): {ONE}" in refusal(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / ONE)
    (tmp_path / BIN_INDEX).write_text(json.dumps({"weight_map": weight_map | {"lost": ONE}}))
    assert f"not in the shard that the index names (1): 'lost' ({ONE})" in refusal(tmp_path)
    (tmp_path / BIN_INDEX).unlink()
    (tmp_path / BIN).unlink()
    assert f"shards of torch.save without an index.\n  {BIN_INDEX}" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_a_file_of_a_training(tmp_path, key):
    values = {"a": torch.randn(3), "b.c": torch.randn(2, 2)}
    extra = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 3, "lr": [0.1]}
    path = tmp_path / "last.ckpt"
    torch.save({key: values, **extra}, path)
    checkpoint = open_checkpoint(str(path))
    check(checkpoint, values)
    assert checkpoint.shards == ("last.ckpt",)
    assert checkpoint.config == {}


def test_many_tensors_need_more_than_the_first_read(tmp_path):
    values = {f"layer.{i}.{'x' * 40}": torch.full((2,), float(i)) for i in range(1500)}
    torch.save(values, tmp_path / BIN)
    check(open_checkpoint(str(tmp_path)), values)


def test_an_archive_with_large_fields(tmp_path, monkeypatch):
    """What an archive of more than 4 GiB looks like, made small."""
    values = {"a": torch.randn(300), "b": torch.randn(5)}
    torch.save(values, tmp_path / "plain.bin")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 600)
    (tmp_path / "plain.bin").rename(tmp_path / BIN)
    rezip(tmp_path / BIN, lambda _: None)
    assert b"PK\x06\x06" in (tmp_path / BIN).read_bytes()
    check(open_checkpoint(str(tmp_path)), values)


def test_a_file_that_changes_is_noticed(tmp_path):
    torch.save({"a": torch.randn(3)}, tmp_path / BIN)
    checkpoint = open_checkpoint(str(tmp_path))
    torch.save({"a": torch.randn(3)}, tmp_path / BIN)
    with pytest.raises(SourceChangedError):
        contents(checkpoint)
    assert open_checkpoint(str(tmp_path)).versions != checkpoint.versions


def test_over_s3(bucket, tmp_path):
    values = weights()
    folder = tmp_path / "bins"
    folder.mkdir()
    torch.save(values, folder / BIN)
    url = upload(bucket, folder, "bins")
    check(open_checkpoint(url), values)
    check(open_checkpoint(f"{url}/{BIN}"), values)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "a tensor and no state dict"),
        ([torch.ones(2)], "a list and no state dict"),
        ({}, "it has no tensor"),
        ({"a": 1, 2: 3}, "no tensor; its keys are 'a'"),
        ({"a": torch.ones(1), "more": {"b": torch.ones(1)}}, "tensors below more"),
        ({"model": {"a": {"b": torch.ones(1)}}}, "tensors below a"),
        ({"a": torch.randn(80, 80).t()}, "'a' of shape [80, 80] is stored with strides [1, 80]"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
        ({"a": torch.ones(2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        (Model(), "refused: it names tests.test_torch_files.Model"),
    ],
)
def test_values_that_are_no_state_dict(tmp_path, value, message):
    torch.save(value, tmp_path / BIN)
    said = refusal(tmp_path)
    assert message in said
    assert said.startswith(f"{tmp_path}/{BIN}: ")


def rezip(path: Path, change: Callable[[dict[str, bytes]], object], **settings: int) -> None:
    """Write an archive again with other entries."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w", **settings) as new:
        for name, data in entries.items():
            new.writestr(name, data)


def test_archives_of_another_kind(tmp_path):
    path = tmp_path / BIN
    values = {"a": torch.randn(50)}
    torch.save(values, path, _use_new_zipfile_serialization=False)
    assert "format from before torch 1.6" in refusal(tmp_path)
    assert "torch.save(torch.load(OLD, weights_only=True), NEW)" in refusal(tmp_path)

    def saved(change: Callable[[dict[str, bytes]], object], **settings: int) -> str:
        torch.save(values, path)
        rezip(path, change, **settings)
        return refusal(tmp_path)

    root = BIN.removesuffix(".bin")
    assert "is compressed" in saved(lambda _: None, compression=zipfile.ZIP_DEFLATED)
    assert "not little-endian" in saved(lambda e: e.update({f"{root}/byteorder": b"big"}))
    assert "there is no entry data/0" in saved(lambda e: e.pop(f"{root}/data/0"))
    assert "should have 200 bytes, and has 4" in saved(
        lambda e: e.update({f"{root}/data/0": b"abcd"})
    )
    assert "TorchScript" in saved(lambda e: e.update({f"{root}/constants.pkl": b""}))
    assert "not one of torch.save" in saved(lambda e: e.pop(f"{root}/data.pkl"))
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"", "do not begin as torch's files do"),
        (b"x" * 100, "do not begin as torch's files do"),
        (b"GGUF" + b"x" * 100, "a GGUF file"),
    ):
        path.write_bytes(content)
        assert message in refusal(tmp_path)


def test_two_entries_of_one_name(tmp_path):
    torch.save({"a": torch.randn(50)}, tmp_path / BIN)
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / BIN, "a") as archive:
        archive.writestr("pytorch_model/data/0", b"x" * 200)
    assert "two entries have the same name" in refusal(tmp_path)


def test_a_file_that_is_cut_off_is_named_with_its_size(tmp_path):
    torch.save(weights(), tmp_path / BIN)
    whole = (tmp_path / BIN).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100):
        (tmp_path / BIN).write_bytes(whole[:size])
        said = refusal(tmp_path)
        assert f"{tmp_path}/{BIN}: " in said
        assert "Copy or download it again" in said
    (tmp_path / BIN).unlink()
    (tmp_path / BIN).symlink_to("nothing")
    assert "a link to a file that is gone" in refusal(tmp_path)


# --- hostile pickles ------------------------------------------------------------------------------

MARKER = "executed"


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self._reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self._reduced


class Registered:
    """Pickled by the number of an extension."""

    def __init__(self, *_: Any) -> None:
        Path(MARKER).touch()


class WithState:
    """Runs when it is given its state."""

    def __setstate__(self, _: Any) -> None:
        Path(MARKER).touch()


def with_state() -> Any:
    found = WithState()
    found.state = 1
    return found


def touch() -> Any:
    return Calls(os.system, f"touch {MARKER}")


ATTACKS: dict[str, tuple[Callable[[], Any], str]] = {
    "a shell": (touch, "posix.system"),
    "exec": (
        lambda: Calls(exec, f"open({MARKER!r}, 'w').close()"),
        "exec",
    ),
    "eval": (lambda: Calls(eval, f"open({MARKER!r}, 'w')"), "eval"),
    "open": (lambda: Calls(io.open, MARKER, "w"), "open"),
    "nested in a tensor": (
        lambda: Calls(torch._utils._rebuild_tensor_v2, touch(), 0, (1,), (1,), False, {}),
        "posix.system",
    ),
    "nested in a dict of state": (
        lambda: Calls(collections.OrderedDict, (), state={"x": touch()}),
        "posix.system",
    ),
    "as a function of a tensor's type": (
        lambda: Calls(
            torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {MARKER}",), {}
        ),
        "posix.system",
    ),
    "by setstate": (with_state, "tests.test_torch_files.WithState"),
    "by an attribute": (lambda: Calls(getattr, Registered, "mro"), "getattr"),
    "by copyreg": (
        lambda: Calls(copyreg._reconstructor, Registered, object, None),
        "_reconstructor",
    ),
    "as a factory of values": (
        lambda: Calls(collections.defaultdict, Registered, state=None),
        "tests.test_torch_files.Registered",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_a_program(tmp_path, monkeypatch, attack, protocol):
    monkeypatch.chdir(tmp_path)
    make, name = ATTACKS[attack]
    torch.save({"a": torch.ones(1), "x": make()}, "model.pt", pickle_protocol=protocol)
    said = refusal("model.pt")
    assert "refused: it names " in said
    assert name in said
    assert "Nothing of it was run here" in said
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("attack", ["a shell", "exec", "by setstate", "nested in a dict of state"])
def test_the_attacks_work_on_who_trusts_the_file(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": ATTACKS[attack][0]()}, "model.pt")
    torch.load("model.pt", weights_only=False)
    assert Path(MARKER).exists()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


SYSTEM = b"cos\nsystem\n"
CALL = b"(" + text(f"touch {MARKER}") + b"t"
HAND_WRITTEN = {
    "a call": (SYSTEM + CALL + b"R.", "os.system"),
    "by the stack": (text("os") + text("system") + b"\x93" + CALL + b"R.", "os.system"),
    "by an attribute of a builtin": (
        text("builtins") + text("object.__subclasses__") + b"\x93)R.",
        "builtins.object.__subclasses__",
    ),
    "an instance": (b"(" + text(f"touch {MARKER}") + b"ios\nsystem\n.", "os.system"),
    "an extension": (b"\x82\xf0.", "a registered extension of copyreg"),
    "a large extension": (b"\x84\xf0\x00\x00\x00.", "a registered extension of copyreg"),
    "a persistent id": (SYSTEM + CALL + b"RQ.", "os.system"),
    "the type of a storage": (
        b"(" + text("storage") + SYSTEM + text("0") + text("cpu") + b"K\x01tQ.",
        "os.system",
    ),
    "a name that looks allowed": (b"ctorch\nSize.__class__\n.", "torch.Size.__class__"),
    "a name in another alphabet": (text("\u043es") + text("system") + b"\x93.", r"\u043es.system"),
    "a list that is called": (b"](K\x01tR.", "a list is to be called"),
    "a text that is called": (text("os.system") + CALL + b"R.", "a str is to be called"),
    "what was made is called": (
        b"ctorch\ndevice\n(" + text("cpu") + b"tR" + CALL + b"R.",
        "a Made is to be called",
    ),
    "a function that gets a state": (
        b"ctorch._utils\n_rebuild_parameter\n}b.",
        "a Name is given a state",
    ),
    "a call by a tensor's type": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(]ctorch\nTensor\n" + CALL + b"}tR.",
        "a list is to be called",
    ),
    "a storage that is a number": (b"K\x01Q.", "something that is no storage"),
    "a tensor without storage": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)\x85)tR.",
        "a tensor lacks its storage",
    ),
    "a dict as a key": (b"}}K\x01s.", "a dict is used as a key"),
    "a deep tuple as a key": (b"})" + b"\x85" * 100_000 + b"K\x01s.", "a tuple is used as a key"),
    "text numbers": (b"I1\n.", "not one that torch writes"),
    "buffers outside": (b"\x97.", "not one that torch writes"),
    "a mark without end": (b"(" * 1000, "nested more than"),
    "a text without end": (b"X\xff\xff\xff\x7fab.", "inside of a value of 2,147,483,647 bytes"),
    "bytes without end": (b"\x8e" + b"\xff" * 8 + b".", "inside of a value"),
    "half a character": (b"X\x03\x00\x00\x00\xed\xa0\x80.", "not UTF-8"),
    "what is not in the memo": (b"h\x05.", "lacks what it needs"),
    "nothing": (b"", "lacks what it needs"),
    "an empty stack": (b".", "lacks what it needs"),
    "values left over": (b"K\x01K\x02.", "values that belong nowhere"),
    "a newer protocol": (b"\x80\x09.", "newer than 5"),
}


@pytest.mark.parametrize("case", HAND_WRITTEN)
def test_pickles_that_no_program_writes(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, message = HAND_WRITTEN[case]
    torch.save({}, BIN)
    rezip(Path(BIN), lambda entries: entries.update({"pytorch_model/data.pkl": data}))
    assert message in refusal(BIN)
    assert not Path(MARKER).exists()


def test_size_and_depth_are_bounded(monkeypatch):
    deep = load_pickle(b"]" * 100_000 + b"a" * 99_999 + b".", "x", NAMES)
    assert isinstance(deep, list)
    del deep  # which must not overflow the stack either
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(CheckpointError, match="more than 1,000 opcodes"):
        load_pickle(b"N0" * 1000 + b"N.", "x", NAMES)
    monkeypatch.setattr(pickles, "MAX_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100 are read"):
        load_pickle(b"N." * 100, "x", NAMES)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=20,
)


@given(PLAIN, st.integers(3, 5))
@settings(max_examples=60, deadline=None)
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    assert load_pickle(data, "x", NAMES) == value


@given(st.binary(max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_or_refused(data, chance):
    value = {"a": [1, (2.5, None)], "b": {"c": "x"}}
    whole = bytearray(pickle.dumps(value, chance.choice([2, 4])))
    at = chance.randrange(len(whole))
    whole[at : at + chance.randrange(4)] = data
    for attempt in (bytes(data), bytes(whole)):
        try:
            load_pickle(attempt, "x", NAMES)
        except CheckpointError as refused:
            assert str(refused).startswith("x: ")


def test_any_damage_to_a_file_is_read_or_refused(tmp_path):
    values = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    torch.save(values, tmp_path / BIN)
    whole = (tmp_path / BIN).read_bytes()
    chance = random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        (tmp_path / BIN).write_bytes(data)
        try:
            checkpoint = open_checkpoint(str(tmp_path))
        except CheckpointError as refused:
            assert BIN in str(refused)
        else:
            for tensor in checkpoint.tensors.values():
                assert sum(segment.nbytes for segment in tensor.segments) == tensor.nbytes
                for segment in tensor.segments:
                    assert 0 <= segment.offset <= segment.offset + segment.nbytes <= len(data)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_view_of_a_storage_has_its_elements(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    view = torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape)
    for dimension in range(view.ndim):
        size = view.shape[dimension]
        begin = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(0, size - begin))
        view = view.narrow(dimension, begin, length)
    view = view.permute(data.draw(st.permutations(range(view.ndim))))
    path = tmp_path_factory.mktemp("views") / BIN
    torch.save({"view": view}, path)
    check(open_checkpoint(str(path)), {"view": view})


def test_a_window_reads_only_what_it_must(tmp_path):
    path = tmp_path / BIN
    torch.save({"a": torch.randn(1 << 20), "b": torch.randn(3)}, path)
    store = CountingStore()
    file = read_torch(Window(str(path), 0, path.stat().st_size, None, store, "x"))
    assert isinstance(file.value, dict) and isinstance(file.value["a"], StoredTensor)
    assert store.nbytes <= 2 * (64 << 10) + 1000
    assert store.calls <= 3
    assert read_torch(window_of(str(path), LocalStore())).value == file.value


class CountingStore(LocalStore):
    def __init__(self) -> None:
        super().__init__()
        self.calls = self.nbytes = 0

    def read_ranges(self, ranges: Any) -> None:
        self.calls += 1
        self.nbytes += sum(item.into.nbytes for item in ranges)
        super().read_ranges(ranges)


# --- merged ---------------------------------------------------------------------------------------


def test_a_merge_with_safetensors(tmp_path):
    specs = {"a": (DType.F32, (7, 3)), "b": (DType.F32, (5,))}
    write_checkpoint(tmp_path / "st", specs, seed=1)
    held = {
        name: torch.from_numpy(np.frombuffer(data, np.float32).copy()).reshape(shape)
        for name, (_, shape, data) in read_tensors(tmp_path / "st").items()
    }
    other = {name: torch.randn_like(value) for name, value in held.items()}
    (tmp_path / "bin").mkdir()
    torch.save(other, tmp_path / "bin" / BIN)
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(tmp_path / name), "parameters": {"weight": weight}}
            for name, weight in (("bin", 0.25), ("st", 0.75))
        ],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")]) == 0
    for name, (_, shape, data) in read_tensors(tmp_path / "out").items():
        wanted = 0.25 * other[name].double() + 0.75 * held[name].double()
        found = np.frombuffer(data, np.float32).reshape(shape)
        np.testing.assert_array_equal(found, wanted.float().numpy())
