"""Checkpoints of torch.distributed: what it wrote on one process and on two, bit for bit."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.cli import main
from shardmerge.errors import CheckpointError, SourceChangedError
from shardmerge.numerics import DType
from shardmerge.sources import Checkpoint, open_checkpoint
from shardmerge.sources import dcp as source
from tests.servers.processes import free_ports
from tests.support import contents, loaded, read_tensors, upload, write_checkpoint

WORLD = 2
TRAIN = """
import os, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

out = sys.argv[1]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(2, 5)).sum().backward()
optimizer.step()
dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()},
         checkpoint_id=f"{out}/fsdp")
whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
full = {
    "rows": torch.randn(7, 5), "half": torch.randn(6, 4).bfloat16(), "columns": torch.randn(4, 6),
    "middle": torch.randn(2, 5, 3), "scalar": torch.tensor(3.0), "one": torch.randn(1),
    "empty": torch.empty(0, 3), "ids": torch.arange(9),
}
places = {"columns": Shard(1), "middle": Shard(1), "scalar": Replicate()}
parts = {
    name: distribute_tensor(value, mesh, [places.get(name, Shard(0))])
    for name, value in full.items()
}
dcp.save(parts, checkpoint_id=f"{out}/plain")
wide = distribute_tensor(torch.randn(5000, 4), mesh, [Shard(1)])
dcp.save({"wide": wide}, checkpoint_id=f"{out}/wide")
if dist.get_rank() == 0:
    torch.save({"fsdp": whole, "plain": full}, f"{out}/wanted.pt")
dist.destroy_process_group()
"""

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write; tests copy what they change."""
    folder = tmp_path_factory.mktemp("dcp")
    (folder / "train.py").write_text(TRAIN)
    (port,) = free_ports(1)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    command = [sys.executable, str(folder / "train.py"), str(folder)]
    started = [
        subprocess.Popen(command, env={**env, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    for process in started:
        _, said = process.communicate(timeout=250)
        assert process.returncode == 0, said.decode()
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(case: str) -> Path:
        return Path(shutil.copytree(runs / case, tmp_path / case))

    return copy


def save(folder: Path, value: dict[str, Any], **settings: Any) -> str:
    with pytest.warns(UserWarning):
        dcp.save(value, checkpoint_id=str(folder), no_dist=True, **settings)
    return str(folder)


def check(checkpoint: Checkpoint, wanted: Tensors) -> None:
    held = contents(checkpoint)
    assert set(held) == set(wanted)
    for name, value in wanted.items():
        tensor = checkpoint.tensors[name]
        assert tensor.shape == tuple(value.shape)
        assert tensor.dtype.torch_name == str(value.dtype).removeprefix("torch.")
        flat = value.detach().contiguous().reshape(-1)
        assert held[name] == flat.view(torch.uint8).numpy().tobytes(), name


def refusal(url: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(url))
    return str(caught.value)


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["fsdp", "plain"])
def test_what_two_processes_wrote(runs, case):
    checkpoint = open_checkpoint(str(runs / case))
    check(checkpoint, torch.load(runs / "wanted.pt")[case])
    assert set(checkpoint.versions) == {path.name for path in (runs / case).iterdir()}
    assert checkpoint.shards == ("__0_0.distcp", "__1_0.distcp")
    assert checkpoint.cut
    counts = {name: len(tensor.segments) for name, tensor in checkpoint.tensors.items()}
    if case == "plain":
        wanted = {"rows": 2, "half": 2, "columns": 8, "middle": 4, "scalar": 1, "one": 1}
        assert counts == wanted | {"empty": 1, "ids": 2}
    else:
        assert set(counts) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}


WEIGHTS = {"model.layers.0.weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(5).half()}
OPTIMIZER = {"state": {"bias": {"exp_avg": torch.zeros(5)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "value",
    [
        WEIGHTS,
        {"model": WEIGHTS},
        {"model": WEIGHTS, "optimizer": OPTIMIZER},
        {"model": WEIGHTS, "step": torch.tensor(3), "lr": 0.1},
        {"app": {"model": WEIGHTS, "optim": OPTIMIZER}},
        {"weights": WEIGHTS, "epoch": 3},
    ],
)
def test_names_are_those_of_the_model(tmp_path, value):
    check(open_checkpoint(save(tmp_path / "x", value)), WEIGHTS)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["model", "optimizer", "a"]), st.sampled_from("bc"))
        | st.tuples(st.sampled_from("de")),
        st.none(),
        max_size=6,
    )
)
def test_chosen_names_are_unique_and_of_the_tensors_there_are(paths):
    found = source.model_names({".".join(path): path for path in paths})
    if isinstance(found, dict):
        assert len(set(found.values())) == len(found)
        assert all(key.endswith(name) for key, name in found.items())


def test_without_the_planners_paths_names_are_guessed():
    keys = ["model.a.b", "optimizer.state.x"]
    assert source._paths(keys, None) == {
        "model.a.b": ("model", "a.b"),
        "optimizer.state.x": ("optimizer", "state.x"),
    }
    assert source._paths(["model.a", "lm_head"], None) == {
        "model.a": ("model.a",),
        "lm_head": ("lm_head",),
    }


def test_the_folder_of_hugging_faces_trainer(tmp_path):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    save(folder / "pytorch_model_fsdp_0", {"model": WEIGHTS})
    save(folder / "optimizer_0", {"optimizer": OPTIMIZER})
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    for url in (folder, folder / "pytorch_model_fsdp_0"):
        checkpoint = open_checkpoint(str(url))
        check(checkpoint, WEIGHTS)
        assert checkpoint.url == str(folder)
        assert checkpoint.config == {"model_type": "x"}
        assert checkpoint.files == ("tokenizer.json",)
        assert checkpoint.ignored == ("optimizer_0/",)
        assert "pytorch_model_fsdp_0/.metadata" in checkpoint.versions


def test_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_CHUNKS_AT_A_TIME", 7)
    values = {f"layer.{i}": torch.full((3,), float(i)) for i in range(50)}
    check(open_checkpoint(save(tmp_path / "x", values)), values)


def test_a_file_that_changes_is_noticed(copied):
    folder = copied("plain")
    checkpoint = open_checkpoint(str(folder))
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes())
    with pytest.raises(SourceChangedError, match="__1_0"):
        contents(checkpoint)


def test_over_s3(bucket, runs):
    wanted = torch.load(runs / "wanted.pt")
    for case in ("fsdp", "plain"):
        check(open_checkpoint(upload(bucket, runs / case, case)), wanted[case])


# --- what is refused ------------------------------------------------------------------------------


def test_files_that_are_missing_or_cut_off(copied):
    folder = copied("plain")
    path = folder / "__1_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    assert f"{path}: cut off: " in refusal(folder)
    path.write_bytes(whole[:-50] + bytes(50))
    assert "__1_0.distcp, at byte " in refusal(folder)
    path.unlink()
    assert "files missing (1 of 2): __1_0.distcp" in refusal(folder)
    (folder / ".metadata").unlink()
    assert "no .metadata, which says where the tensors lie" in refusal(folder)
    (folder / "__0.metadata").touch()
    assert "__0.metadata, of single ranks, are not read" in refusal(folder)


def test_files_of_another_checkpoint(runs, copied):
    folder = copied("fsdp")
    shutil.copy(runs / "wide" / ".metadata", folder / ".metadata")
    assert "__0_0.distcp" in refusal(folder)


def test_too_many_pieces(runs, monkeypatch):
    assert "in 5,000 pieces; at most 4,096 are read" in refusal(runs / "wide")
    monkeypatch.setattr(source, "MAX_PIECES", 10)
    assert "in more than 10 pieces" in refusal(runs / "plain")


def test_dicts_of_which_none_is_the_model(tmp_path):
    value = {"generator": {"a": torch.ones(1)}, "critic": {"a": torch.ones(1)}}
    said = refusal(save(tmp_path / "x", value))
    assert "a state dict of critic, generator, and none of them is called 'model'" in said
    assert "it lists no tensor" in refusal(save(tmp_path / "y", {"lr": 0.1}))
    value = {"a": torch.ones(1, dtype=torch.complex64)}
    assert "of dtype torch.complex64" in refusal(save(tmp_path / "z", value))


def changed(folder: Path, change: Callable[[Any], object]) -> str:
    """What is said of a checkpoint whose metadata was changed."""
    path = folder / ".metadata"
    before = path.read_bytes()
    metadata = pickle.loads(before)
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    said = refusal(folder)
    path.write_bytes(before)
    return said


def test_metadata_that_does_not_fit(copied):
    folder = copied("plain")

    def first(metadata: Any, name: str) -> Any:
        return metadata.state_dict_metadata[name]

    def drop(metadata: Any) -> None:
        del first(metadata, "rows").chunks[0]

    def shift(metadata: Any) -> None:
        first(metadata, "rows").size = torch.Size([6, 5])

    def retype(metadata: Any) -> None:
        first(metadata, "rows").properties.dtype = torch.int32

    def lose(metadata: Any) -> None:
        metadata.storage_data.clear()

    def lead_out(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../x.distcp"

    def compress(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["zstd"]

    def move(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "model.safetensors"

    for change, message in (
        (drop, "the chunks of 'rows' of shape [7, 5] leave a hole"),
        (shift, "the chunks of 'rows' of shape [6, 5] leave a hole"),
        (retype, "F32 [4, 5]; .metadata says I32 [4, 5]"),
        (lose, "lies in no file"),
        (lead_out, "'../x.distcp' is not the name of a file in this folder"),
        (compress, "compressed or otherwise transformed"),
        (move, "only .distcp files of torch.save are read"),
    ):
        assert message in changed(folder, change)


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_metadata_and_chunks_that_would_run_a_program(copied, monkeypatch):
    folder = copied("plain")
    monkeypatch.chdir(folder)

    def attack(metadata: Any) -> None:
        metadata.planner_data = Attack()

    assert ".metadata: refused: it names posix.system" in changed(folder, attack)
    (folder / ".metadata").write_bytes(pickle.dumps([Attack()]))
    assert "refused: it names posix.system" in refusal(folder)
    (folder / ".metadata").write_bytes(pickle.dumps([1]))
    assert "it lacks its list of tensors" in refusal(folder)
    assert not Path("executed").exists()


def test_any_damage_is_refused_or_harmless(copied):
    folder = copied("fsdp")
    chance = random.Random(0)
    for name in (".metadata", "__0_0.distcp"):
        whole = (folder / name).read_bytes()
        for _ in range(200):
            data = bytearray(whole)
            data[chance.randrange(len(data))] = chance.randrange(256)
            (folder / name).write_bytes(data)
            try:
                checkpoint = open_checkpoint(str(folder))
            except CheckpointError as refused:
                assert str(folder) in str(refused)
            else:
                for tensor in checkpoint.tensors.values():
                    assert sum(segment.nbytes for segment in tensor.segments) == tensor.nbytes
        (folder / name).write_bytes(whole)


# --- chunks, without files ------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.data()), max_size=4))
def test_runs_of_a_chunk_are_exactly_its_elements(dimensions):
    shape = [size for size, _ in dimensions]
    begins = [data.draw(st.integers(0, size - 1)) for size, data in dimensions]
    sizes = [
        data.draw(st.integers(0, size - begin))
        for (size, data), begin in zip(dimensions, begins, strict=True)
    ]
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    part = whole[tuple(slice(b, b + s) for b, s in zip(begins, sizes, strict=True))]
    firsts = source.runs_of(begins, sizes, shape)
    assert isinstance(firsts, list)
    each = part.size // len(firsts) if firsts else 0
    covered = [first + i for first in firsts for i in range(each)]
    assert covered == part.flatten().tolist()
    if part.size:
        assert source.runs_of(begins, sizes, shape, most=0) == len(firsts)


# --- merged ---------------------------------------------------------------------------------------


def test_a_merge_with_safetensors(runs, tmp_path):
    wanted = torch.load(runs / "wanted.pt")["fsdp"]
    specs = {name: (DType.F32, tuple(value.shape)) for name, value in wanted.items()}
    write_checkpoint(tmp_path / "hf", specs)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(runs / "fsdp"),
        "models": [{"model": str(tmp_path / "hf"), "parameters": {"weight": 0.5}}],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")]) == 0
    other = read_tensors(tmp_path / "hf")
    for name, (dtype, shape, data) in read_tensors(tmp_path / "out").items():
        base = wanted[name].double().numpy()
        model = loaded(other[name][2], DType.F32).reshape(shape)
        np.testing.assert_allclose(
            loaded(data, dtype).reshape(shape), base + 0.5 * (model - base), rtol=1e-6, atol=1e-7
        )
