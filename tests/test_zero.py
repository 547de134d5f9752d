"""DeepSpeed's checkpoints, trained for the tests, against what DeepSpeed makes of them itself."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
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

from shardmerge import match
from shardmerge.cli import main
from shardmerge.errors import CheckpointError, SourceChangedError
from shardmerge.numerics import DType
from shardmerge.sources import Checkpoint, open_checkpoint
from shardmerge.sources.tensor import Segment, TensorRef
from shardmerge.sources.zero_layout import Partition, frozen, gathered, joined
from tests.servers import deepspeed
from tests.support import contents, loaded, read_tensors, upload, write_checkpoint

STEP = "global_step2"
MODEL = "mp_rank_00_model_states.pt"


def optim(rank: int, prefix: str = "bf16_") -> str:
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def reference(zero_runs: Path, case: str) -> dict[str, np.ndarray]:
    with np.load(zero_runs / f"{case}.npz") as found:
        return dict(found)


def check(checkpoint: Checkpoint, wanted: dict[str, np.ndarray]) -> None:
    """Bit for bit; tensors that are not trained are stored as they were trained with."""
    held = contents(checkpoint)
    for name, value in wanted.items():
        tensor = checkpoint.tensors[name]
        assert tensor.shape == value.shape
        if not name.startswith(("frozen", "scale")):
            assert tensor.dtype is DType.F32
        found = loaded(held[name], tensor.dtype).astype(np.float32)
        assert found.tobytes() == value.tobytes(), name


@pytest.fixture
def copied(zero_runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a training folder, to be changed."""

    def copy(case: str) -> Path:
        return Path(shutil.copytree(zero_runs / case, tmp_path / case))

    return copy


def refusal(url: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(url))
    return str(caught.value)


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", deepspeed.CASES)
def test_every_element_is_where_deepspeed_has_it(zero_runs, case):
    wanted = reference(zero_runs, case)
    checkpoint = open_checkpoint(str(zero_runs / case))
    check(checkpoint, wanted)
    # DeepSpeed's converter loses what is frozen in ZeRO-1 with bfloat16.
    lost = {"frozen.weight", "frozen.bias"} if case == "1-bf16" else set()
    assert set(checkpoint.tensors) - set(wanted) == lost
    assert list(checkpoint.tensors)[:3] == ["gate", "scale", "emb.weight"]  # the model's order
    assert len(checkpoint.tensors["emb.weight"].segments) == 2
    assert checkpoint.tensors["head.weight"].segments == checkpoint.tensors["emb.weight"].segments
    assert checkpoint.cut
    assert open_checkpoint(str(zero_runs / case / STEP)).tensors == checkpoint.tensors
    files = {path.name for path in (zero_runs / case / STEP).iterdir()}
    assert set(checkpoint.versions) == set(checkpoint.shards) == files


def test_frozen_tensors_that_deepspeed_loses(zero_runs):
    checkpoint = open_checkpoint(str(zero_runs / "1-bf16"))
    other = open_checkpoint(str(zero_runs / "2-bf16"))
    for name in ("frozen.weight", "frozen.bias"):
        assert contents(checkpoint)[name] == contents(other)[name]


def test_a_universal_checkpoint(zero_runs):
    checkpoint = open_checkpoint(str(zero_runs / "3-bf16-universal"))
    wanted = reference(zero_runs, "3-bf16")
    check(checkpoint, wanted)
    assert set(checkpoint.tensors) == set(wanted)
    assert "zero/emb.weight/fp32.pt" in checkpoint.versions


def test_config_and_tokenizer_lie_beside_the_step_or_above_it(copied):
    folder = copied("3-bf16")
    plain = open_checkpoint(str(folder))
    assert (plain.url, plain.config, plain.files) == (str(folder / STEP), {}, ())
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "trainer_state.json").write_text("{}")
    for url in (folder, folder / STEP):
        above = open_checkpoint(str(url))
        assert above.url == str(folder)
        assert above.config == {"model_type": "x"}
        assert above.files == ("tokenizer.json",)
        assert above.ignored == ()
        assert above.shards == tuple(f"{STEP}/{name}" for name in plain.shards)
        assert set(above.versions) == {*above.shards, "config.json"}
        assert contents(above) == contents(plain)
    (folder / STEP / "config.json").write_text('{"model_type": "y"}')
    assert open_checkpoint(str(folder)).config == {"model_type": "y"}


def test_a_folder_with_safetensors_is_read_by_them_unless_the_step_is_given(copied):
    folder = copied("3-bf16")
    write_checkpoint(folder, {"a": (DType.F32, (2,))})
    assert open_checkpoint(str(folder)).ignored == (f"{STEP}/",)
    assert "emb.weight" in open_checkpoint(str(folder / STEP)).tensors


def test_which_step(copied):
    folder = copied("2-bf16")
    (folder / "latest").unlink()
    assert "emb.weight" in open_checkpoint(str(folder)).tensors
    shutil.copytree(folder / STEP, folder / "global_step9")
    assert "2 DeepSpeed checkpoints (global_step2, global_step9)" in refusal(folder)
    (folder / "latest").write_text("global_step9\n")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.url == str(folder / "global_step9")
    for named in ("global_step7", "../other", ""):
        (folder / "latest").write_text(named)
        assert "which is not there. It holds global_step2" in refusal(folder)


def test_a_rank_that_changes_is_noticed(copied):
    folder = copied("2-bf16")
    checkpoint = open_checkpoint(str(folder))
    path = folder / STEP / optim(1)
    path.write_bytes(path.read_bytes())
    with pytest.raises(SourceChangedError, match="rank_1"):
        contents(checkpoint)


def test_over_s3(bucket, zero_runs):
    for case in ("2-bf16", "3-bf16"):
        url = upload(bucket, zero_runs / case, case)
        check(open_checkpoint(url), reference(zero_runs, case))


# --- what is refused ------------------------------------------------------------------------------


def test_ranks_that_are_missing_or_too_many(copied):
    folder = copied("3-bf16") / STEP
    (folder / optim(1)).rename(folder.parent / "elsewhere")
    said = refusal(folder)
    assert "optimizer states of 2 ranks are needed, and 1 are there; missing: rank 1" in said
    (folder.parent / "elsewhere").rename(folder / optim(1))
    shutil.copy(folder / optim(1), folder / optim(2))
    assert f"it was written by 2 ranks, and 3 have optimizer states: {optim(2)}" in refusal(folder)
    (folder / optim(2)).rename(folder / optim(1, ""))
    assert "are both of rank 1: two checkpoints lie in one folder" in refusal(folder)
    (folder / optim(1, "")).unlink()
    (folder / model(1)).unlink()
    assert "model states of 2 ranks are needed, and 1 are there; missing: rank 1" in refusal(folder)
    (folder / model(0)).unlink()
    assert "the model states of rank 0 are missing" in refusal(folder)
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    shutil.copy(folder.parent / "latest", folder / model(0))
    assert "no *_optim_states.pt, which hold DeepSpeed's float32 weights" in refusal(folder)


def test_a_rank_that_is_cut_off(copied):
    folder = copied("2-fp32") / STEP
    path = folder / optim(1, "")
    data = path.read_bytes()
    path.write_bytes(data[:5000])
    said = refusal(folder)
    assert said.startswith(f"{path}: 5,000 bytes that do not end as torch's files do")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallel rank 1"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor parallel rank 1"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "of mixtures of experts"),
        ("expp_rank_1_mp_rank_00_optim_states.pt", "of mixtures of experts"),
        ("layer_01-model_00-model_states.pt", "of pipeline parallelism"),
    ],
)
def test_other_kinds_of_parallelism(copied, name, message):
    folder = copied("2-bf16") / STEP
    shutil.copy(folder / MODEL, folder / name)
    said = refusal(folder)
    assert message in said
    assert name in said
    assert "not supported" in said


def test_one_file_of_many(zero_runs):
    path = zero_runs / "2-bf16" / STEP / MODEL
    assert "one of the files of a DeepSpeed checkpoint. Give the folder" in refusal(path)


def edited(path: Path, change: Callable[[Any], object]) -> None:
    """Change a file that torch can load without DeepSpeed."""
    value = torch.load(path, weights_only=True)
    change(value)
    torch.save(value, path)


def test_model_states_of_another_checkpoint(copied):
    folder = copied("3-bf16") / STEP

    def larger(value: Any) -> None:
        value["param_shapes"][0]["up.weight"] = torch.Size([30, 17])

    edited(folder / model(0), larger)
    said = refusal(folder)
    assert "a rank's pieces of all parameters should be 1,407 elements, and are 1,399" in said
    folder = copied("2-bf16") / STEP
    edited(folder / MODEL, larger)
    assert "by the shapes of all parameters" in refusal(folder)
    edited(folder / MODEL, lambda value: value.pop("param_shapes"))
    assert "no param_shapes in it" in refusal(folder)


def test_a_frozen_tensor_that_a_rank_lacks(copied):
    folder = copied("3-bf16") / STEP
    edited(folder / model(1), lambda value: value["frozen_param_fragments"].pop("frozen.bias"))
    assert "'frozen.bias' is in the model states of 1 ranks of 2" in refusal(folder)


def test_a_tensor_of_the_model_that_nothing_accounts_for(copied):
    folder = copied("3-bf16") / STEP
    edited(folder / model(0), lambda value: value["shared_params"].clear())
    assert "neither trained, frozen, tied nor buffers (1): head.weight" in refusal(folder)


def test_universal_parameters_that_do_not_fit(zero_runs, tmp_path):
    folder = Path(shutil.copytree(zero_runs / "3-bf16-universal", tmp_path / "universal"))
    torch.save(torch.ones(3), folder / "zero" / "gate" / "fp32.pt")
    assert "3 elements; 'gate' of shape [1] needs 1" in refusal(folder)
    torch.save({"param": torch.ones(1), "cat_dim": 0}, folder / "zero" / "gate" / "fp32.pt")
    assert contents(open_checkpoint(str(folder)))["gate"] == np.ones(1, np.float32).tobytes()
    shutil.rmtree(folder / "zero" / "gate")
    assert "parameters missing (1): gate" in refusal(folder)


def test_a_rank_that_would_run_a_program(copied, monkeypatch):
    folder = copied("2-bf16") / STEP

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, ("touch executed",)

    monkeypatch.chdir(folder)
    torch.save({"optimizer_state_dict": {"zero_stage": 2, "x": Attack()}}, optim(1))
    said = refusal(folder)
    assert f"{optim(1)}: refused: it names posix.system" in said
    assert not Path("executed").exists()


def test_any_damage_is_refused_or_harmless(copied):
    chance = random.Random(0)
    for case, name in (("2-bf16", optim(1)), ("2-bf16", MODEL), ("3-bf16", model(1))):
        folder = copied(case) / STEP
        whole = (folder / name).read_bytes()
        with zipfile.ZipFile(folder / name) as archive:
            described = archive.getinfo(f"{name.removesuffix('.pt')}/data.pkl").file_size
        for _ in range(100):
            data = bytearray(whole)
            data[chance.randrange(described)] = chance.randrange(256)
            (folder / name).write_bytes(data)
            try:
                checkpoint = open_checkpoint(str(folder))
            except CheckpointError as refused:
                assert str(folder) in str(refused)
            else:
                for tensor in checkpoint.tensors.values():
                    assert sum(segment.nbytes for segment in tensor.segments) == tensor.nbytes
        shutil.rmtree(folder.parent)


# --- the layout, without files --------------------------------------------------------------------


def flat(url: str, numel: int) -> TensorRef:
    return TensorRef("flat", DType.F32, (numel,), (Segment(url, 0, 4 * numel),))


def elements(tensor: TensorRef, files: dict[str, np.ndarray]) -> np.ndarray:
    parts = [files[s.url][s.offset // 4 : (s.offset + s.nbytes) // 4] for s in tensor.segments]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@settings(deadline=None)
@given(SIZES, st.integers(1, 7))
def test_parameters_that_cross_ranks_have_exactly_their_elements(sizes, world):
    values = np.arange(sum(sizes), dtype=np.float32)
    padded = np.concatenate([values, np.full(-len(values) % (2 * world), np.nan, np.float32)])
    files = {str(rank): part for rank, part in enumerate(np.split(padded, world))}
    ranks = [Partition(url, (flat(url, len(part)),)) for url, part in files.items()]
    shapes = {f"p{i}": (size,) for i, size in enumerate(sizes)}
    found = list(joined(ranks, [shapes], None, "x"))
    assert [tensor.name for tensor in found] == list(shapes)
    begin = 0
    for tensor, size in zip(found, sizes, strict=True):
        np.testing.assert_array_equal(elements(tensor, files), values[begin : begin + size])
        begin += size
    with pytest.raises(CheckpointError, match="needs"):
        list(joined(ranks, [shapes | {"more": (2 * world + 1,)}], None, "x"))


@settings(deadline=None)
@given(SIZES, st.integers(1, 7), st.integers(1, 4))
def test_parameters_of_zero_3_have_exactly_their_elements(sizes, world, groups):
    parts: list[list[np.ndarray]] = [[] for _ in range(world)]
    wanted = []
    for number, size in enumerate(sizes):
        value = np.arange(size, dtype=np.float32) + 1000 * number
        wanted.append(value)
        piece = math.ceil(size / world)
        padded = np.concatenate([value, np.full(piece * world - size, np.nan, np.float32)])
        for rank in range(world):
            parts[rank].append(padded[rank * piece : (rank + 1) * piece])
    files, ranks = {}, []
    for rank in range(world):
        whole = np.concatenate(parts[rank])
        held = np.array_split(whole, groups)
        files |= {f"{rank}.{i}": part for i, part in enumerate(held)}
        refs = tuple(flat(f"{rank}.{i}", len(part)) for i, part in enumerate(held))
        ranks.append(Partition(str(rank), refs))
    shapes = {f"p{i}": (size,) for i, size in enumerate(sizes)}
    found = list(gathered(ranks, [shapes]))
    for tensor, value in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(elements(tensor, files), value)
    for number, value in enumerate(wanted):
        fragments = {f"f{rank}": parts[rank][number] for rank in range(world)}
        refs = [flat(url, len(part)) for url, part in fragments.items()]
        tensor = frozen("p", value.shape, refs, "x")
        np.testing.assert_array_equal(elements(tensor, fragments), value)


# --- merged ---------------------------------------------------------------------------------------


def test_an_output_of_such_a_base_model_is_cut_by_size(zero_runs, tmp_path, monkeypatch):
    recipe = {"merge_method": "passthrough", "models": [{"model": str(zero_runs / "3-bf16")}]}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    for limit, count in ((4000, 5), (10**9, 1)):
        monkeypatch.setattr(match, "SHARD_BYTES", limit)
        out = tmp_path / str(limit)
        assert main(["merge", str(tmp_path / "recipe.yml"), str(out)]) == 0
        assert len(list(out.glob("*.safetensors"))) == count
        assert len(read_tensors(out)) == 11


def test_a_merge_of_three_kinds_of_checkpoints(zero_runs, copied, tmp_path):
    training = copied("3-bf16")
    (training / "config.json").write_text('{"model_type": "x", "torch_dtype": "bfloat16"}')
    (training / "tokenizer.json").write_text('{"a": 1}')
    wanted = reference(zero_runs, "3-bf16")
    specs = {name: (DType.F32, value.shape) for name, value in wanted.items()}
    write_checkpoint(tmp_path / "hf", specs, seed=3)
    bins = {name: torch.randn(value.shape) for name, value in wanted.items()}
    (tmp_path / "bin").mkdir()
    torch.save(bins, tmp_path / "bin" / "pytorch_model.bin")
    shares = (0.5, 0.3, 0.2)
    models = ("hf", "bin", "3-bf16")
    recipe = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [
            {"model": str(tmp_path / name), "parameters": {"weight": weight}}
            for name, weight in zip(models, shares, strict=True)
        ],
    }
    for base, out in (("hf", "out"), ("3-bf16", "based")):
        recipe["base_model"] = str(tmp_path / base)
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
        assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / out)]) == 0
        found = read_tensors(tmp_path / out)
        assert set(found) == set(wanted)
        hf = read_tensors(tmp_path / "hf")
        for name, (dtype, shape, data) in found.items():
            inputs = (loaded(hf[name][2], DType.F32).reshape(shape), bins[name], wanted[name])
            wide = [np.asarray(value, np.float64) for value in inputs]
            total = sum(w * v for w, v in zip(shares, wide, strict=True))
            assert dtype is DType.F32
            np.testing.assert_allclose(
                loaded(data, dtype).reshape(shape), total, rtol=2e-7, atol=1e-7
            )
    config = json.loads((tmp_path / "based" / "config.json").read_text())
    assert config == {"model_type": "x", "torch_dtype": "float32"}
    assert (tmp_path / "based" / "tokenizer.json").read_text() == '{"a": 1}'
    assert main(["verify", str(tmp_path / "based")]) == 0
