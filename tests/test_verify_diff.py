"""Published folders against their record, and the distance between two checkpoints."""

from __future__ import annotations

import json
import math
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge import diff as diff_module
from shardmerge import verify as verify_module
from shardmerge.diff import diff, to_float64
from shardmerge.errors import CheckpointError
from shardmerge.header import write_header, write_index
from shardmerge.numerics import DTYPE_BY_TORCH_NAME, DType
from shardmerge.verify import verify

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def save(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})


def record(folder: Path) -> None:
    """Write the provenance record of the shards as they are."""
    shards = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        shards[path.name] = {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    (folder / "shardmerge.json").write_text(json.dumps({"shards": shards, "recipe": {}}))


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "out"
    save(folder, ONE, {"a": torch.arange(4.0), "b": torch.ones(2, 3)})
    save(folder, TWO, {"c": torch.zeros(7, dtype=torch.bfloat16)})
    index = write_index({"a": ONE, "b": ONE, "c": TWO}, 16 + 24 + 14)
    (folder / "model.safetensors.index.json").write_bytes(index)
    record(folder)
    return folder


def only_problem(folder: Path) -> str:
    [problem] = verify(str(folder)).problems
    return problem


# --- verify ---------------------------------------------------------------------------------------


def test_a_good_folder_has_no_problem(published, monkeypatch):
    monkeypatch.setattr(verify_module, "_BUFFER_BYTES", 7)  # many reads per shard
    report = verify(str(published))
    assert report.problems == ()
    assert (report.shards, report.tensors, report.checksums) == (2, 3, True)
    assert report.bytes == sum((published / name).stat().st_size for name in (ONE, TWO))
    assert "no problem in 2 shards, 3 tensors" in report.summary
    assert "checksums compared" in report.summary


def test_a_good_single_file_has_no_problem(tmp_path):
    save(tmp_path, "model.safetensors", {"a": torch.ones(3)})
    record(tmp_path)
    report = verify(str(tmp_path))
    assert report.problems == ()
    assert (report.shards, report.tensors, report.checksums) == (1, 1, True)


def test_without_a_record_only_the_structure_is_checked_and_it_says_so(published):
    (published / "shardmerge.json").unlink()
    content = bytearray((published / ONE).read_bytes())
    content[-1] ^= 1
    (published / ONE).write_bytes(content)
    report = verify(str(published))
    assert report.problems == ()
    assert not report.checksums
    assert "structure only: no checksums compared" in report.summary


@pytest.mark.parametrize("position", [-1, -30, 20])
def test_one_changed_bit_is_found(published, position):
    content = bytearray((published / ONE).read_bytes())
    content[position] ^= 4
    (published / ONE).write_bytes(content)
    problems = verify(str(published)).problems
    assert any(f"{ONE}: its bytes have changed: CRC-32" in problem for problem in problems)
    assert all(TWO not in problem for problem in problems)


def test_a_truncated_and_a_longer_shard_are_found(published):
    for change in (lambda data: data[:-3], lambda data: data + b"123"):
        whole = (published / ONE).read_bytes()
        (published / ONE).write_bytes(change(whole))
        problems = "\n".join(verify(str(published)).problems)
        assert "cut off" in problems or "3 bytes belong to no tensor" in problems
        assert f"shardmerge.json says {len(whole):,}" in problems
        (published / ONE).write_bytes(whole)


def test_missing_and_extra_shards_are_found(published):
    (published / ONE).rename(published / "other.safetensors")
    problems = "\n".join(verify(str(published)).problems)
    assert f"{ONE}: no such shard" in problems
    assert "shards of no checkpoint (1): other.safetensors" in problems
    (published / "other.safetensors").rename(published / ONE)
    assert verify(str(published)).problems == ()

    content = json.loads((published / "shardmerge.json").read_text())
    content["shards"]["gone.safetensors"] = content["shards"].pop(TWO)
    (published / "shardmerge.json").write_text(json.dumps(content))
    problems = "\n".join(verify(str(published)).problems)
    assert "shardmerge.json: names shards of no checkpoint (1): gone" in problems
    assert f"shardmerge.json: has no checksum of shards (1): {TWO}" in problems


def test_an_index_that_does_not_fit_is_found(published):
    index = published / "model.safetensors.index.json"
    for weight_map, total, message in (
        ({"a": ONE, "b": ONE, "c": TWO}, 55, "total_size is 55, but the tensors have 54 bytes"),
        ({"a": ONE, "c": TWO}, 54, f"tensors in a shard but not in the index (1): 'b' ({ONE})"),
        (
            {"a": ONE, "b": ONE, "c": TWO, "d": TWO},
            54,
            f"tensors in the index but not in their shard (1): 'd' ({TWO})",
        ),
    ):
        index.write_bytes(write_index(weight_map, total))
        assert message in only_problem(published)
    index.write_bytes(write_index({"a": ONE, "b": TWO, "c": TWO}, 54))
    problems = "\n".join(verify(str(published)).problems)
    assert f"'b' ({ONE}, by the index {TWO})" in problems
    index.write_bytes(b"{")
    assert "is not JSON" in only_problem(published)
    index.unlink()
    assert "not published yet" in only_problem(published)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not JSON"),
        (b"[]", "has no object `shards`"),
        (b'{"shards": []}', "has no object `shards`"),
    ],
)
def test_a_damaged_record_is_a_problem(published, content, message):
    (published / "shardmerge.json").write_bytes(content)
    assert message in only_problem(published)
    assert not verify(str(published)).checksums


@pytest.mark.parametrize(
    "entry", [3, {}, {"bytes": True, "crc32": "00000000"}, {"bytes": 1, "crc32": "0x0000"}]
)
def test_a_damaged_entry_of_the_record_is_a_problem(published, entry):
    content = json.loads((published / "shardmerge.json").read_text())
    content["shards"][ONE] = entry
    (published / "shardmerge.json").write_text(json.dumps(content))
    problems = verify(str(published)).problems
    assert any(f"the entry '{ONE}' is damaged" in problem for problem in problems)


def test_verify_needs_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(str(tmp_path / "gone"))


# --- elements as numbers --------------------------------------------------------------------------


def values_of(tensor: torch.Tensor) -> np.ndarray:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
    out = np.full(tensor.numel(), 7.0)
    to_float64(raw, DTYPE_BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")], out)
    return out


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_every_code_of_a_small_float_is_read_as_torch_reads_it(name):
    dtype = getattr(torch, name)
    codes = torch.arange(256 ** (dtype.itemsize), dtype=torch.int32)
    tensor = codes.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    assert np.array_equal(values_of(tensor), tensor.double().numpy(), equal_nan=True)


@pytest.mark.parametrize("name", sorted(DTYPE_BY_TORCH_NAME))
def test_every_dtype_is_read_as_torch_reads_it(name):
    dtype = getattr(torch, name)
    tensor = torch.tensor([0, 1, 3, 100, 77]).to(dtype)
    assert values_of(tensor).tolist() == tensor.double().tolist()


# --- diff -----------------------------------------------------------------------------------------


def compare(tmp_path: Path, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    save(tmp_path / "a", "model.safetensors", a)
    save(tmp_path / "b", "model.safetensors", b)
    return {found.name: found for found in diff(str(tmp_path / "a"), str(tmp_path / "b"))}


def check_numbers(found, x: torch.Tensor, y: torch.Tensor) -> None:
    x, y = x.double().flatten(), y.double().flatten()
    assert found.status == "compared"
    assert found.differing == int((x != y).sum())
    assert found.max_abs == (x - y).abs().max()
    assert found.mean_abs == pytest.approx(float((x - y).abs().mean()))
    assert found.norm_a == pytest.approx(float(x.norm()))
    assert found.norm_b == pytest.approx(float(y.norm()))
    assert found.norm_diff == pytest.approx(float((x - y).norm()))
    cosine = float(torch.nn.functional.cosine_similarity(x, y, dim=0))
    assert found.cosine == pytest.approx(cosine, abs=1e-12)


@pytest.mark.parametrize("tile", [7, 64, 1 << 19])
def test_numbers_are_those_of_float64_whatever_the_tile(tmp_path, monkeypatch, tile):
    monkeypatch.setattr(diff_module, "TILE_ELEMENTS", tile)
    torch.manual_seed(0)
    names = [n for n, dtype in DTYPE_BY_TORCH_NAME.items() if dtype.is_float]
    a = {name: torch.randn(9, 11).to(getattr(torch, name)) for name in names}
    b = {name: torch.randn(9, 11).to(getattr(torch, name)) for name in names}
    b["float16"] = b["float16"].float()  # other dtypes on the two sides
    a["same"] = b["same"] = torch.randn(50)
    a["int"], b["int"] = torch.arange(40), torch.arange(40) * 2
    a["mask"], b["mask"] = torch.arange(40) % 2 == 0, torch.arange(40) % 3 == 0
    found = compare(tmp_path, a, b)
    for name in a:
        check_numbers(found[name], a[name], b[name])
        assert found[name].same == (name == "same")
        assert found[name].non_finite == 0
    assert found["float16"].dtype_a == "F16"
    assert found["float16"].dtype_b == "F32"


def test_names_and_shapes_that_differ_are_reported(tmp_path):
    a = {"both": torch.ones(2), "a": torch.ones(2), "shape": torch.ones(2, 3)}
    b = {"both": torch.ones(2), "b": torch.ones(2), "shape": torch.ones(3, 2)}
    found = compare(tmp_path, a, b)
    assert {name: entry.status for name, entry in found.items()} == {
        "both": "compared",
        "a": "only in a",
        "b": "only in b",
        "shape": "shapes differ",
    }
    assert list(found)[-1] == "b"
    assert [name for name, entry in found.items() if entry.same] == ["both"]
    assert (found["shape"].shape_a, found["shape"].shape_b) == ((2, 3), (3, 2))
    assert (found["a"].dtype_a, found["a"].dtype_b, found["b"].shape_a) == ("F32", None, None)


def test_nothing_scalars_and_zeros(tmp_path):
    a = {"none": torch.empty(0, 3), "one": torch.tensor(3.0), "zero": torch.zeros(4)}
    b = {"none": torch.empty(0, 3), "one": torch.tensor(1.0), "zero": torch.tensor([0.0, -0, 0, 0])}
    b["zero"][2] = -0.0
    a["half"], b["half"] = torch.zeros(2), torch.ones(2)
    found = compare(tmp_path, a, b)
    assert found["none"].same and found["none"].cosine == 1 and found["none"].mean_abs == 0
    assert (found["one"].max_abs, found["one"].differing) == (2, 1)
    assert found["zero"].same and found["zero"].cosine == 1
    assert found["half"].cosine == 0


def test_non_finite_elements_are_counted_and_left_out_of_the_numbers(tmp_path):
    nan, inf = math.nan, math.inf
    a = {"x": torch.tensor([nan, nan, 1, inf, inf, inf, 3])}
    b = {"x": torch.tensor([nan, 1, nan, inf, -inf, 1, 5])}
    found = compare(tmp_path, a, b)["x"]
    assert found.non_finite == 6
    assert found.differing == 5  # all but the two NaN and the two +inf
    assert (found.max_abs, found.mean_abs, found.norm_a, found.norm_b) == (2, 2, 3, 5)
    assert found.cosine == 1


def test_large_integers_differ_even_where_float64_does_not(tmp_path):
    a, b = {"x": torch.tensor([2**62, 5])}, {"x": torch.tensor([2**62 + 1, 5])}
    assert compare(tmp_path, a, b)["x"].differing == 1


@pytest.mark.parametrize("tile", [1, 5, 300, 1 << 19])
def test_block_scaled_fp8_is_compared_by_its_values(tmp_path, monkeypatch, tile):
    monkeypatch.setattr(diff_module, "TILE_ELEMENTS", tile)
    torch.manual_seed(0)
    stored = torch.randn(7, 10).to(torch.float8_e4m3fn)
    scale = torch.rand(4, 3) + 0.5
    values = (
        stored.double() * scale.double().repeat_interleave(2, 0)[:7].repeat_interleave(4, 1)[:, :10]
    )
    plain = torch.randn(7, 10)
    save(tmp_path / "a", "model.safetensors", {"q.weight": stored, "q.weight_scale_inv": scale})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 4]}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    save(tmp_path / "b", "model.safetensors", {"q.weight": plain})
    [found] = diff(str(tmp_path / "a"), str(tmp_path / "b"))
    check_numbers(found, values, plain)


@settings(max_examples=100)
@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_rectangles_cover_a_flat_range_once_and_in_order(columns, start, count):
    covered = []
    pieces = list(diff_module._rectangles(start, start + count, columns))
    for begin, row, rows, column, width in pieces:
        assert begin == len(covered)
        assert rows == 1 or (column == 0 and width == columns)
        covered += [
            r * columns + c for r in range(row, row + rows) for c in range(column, column + width)
        ]
    assert covered == list(range(start, start + count))
    assert len(pieces) <= 3


def test_memory_does_not_depend_on_the_size_of_a_tensor(tmp_path):
    shape = [3, diff_module.TILE_ELEMENTS]
    for name in "ab":
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            header = write_header([("x", DType.BF16, shape)])
            file.write(header)
            file.truncate(len(header) + 6 * diff_module.TILE_ELEMENTS)
            if name == "b":
                file.seek(-2, 2)
                file.write(b"\x80\x3f")  # 1.0
    tracemalloc.start()
    try:
        [found] = diff(str(tmp_path / "a"), str(tmp_path / "b"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.differing, found.max_abs, found.norm_diff) == (1, 1.0, 1.0)
    assert peak < 32 << 20
