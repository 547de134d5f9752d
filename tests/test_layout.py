"""Laws of layouts: every output byte in one part, in order, in parts that a store takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardmerge import layout
from shardmerge.header import ALIGNMENT, parse_header
from shardmerge.layout import SINGLE_SHARD, Shard, Spec, lay_out
from shardmerge.numerics import DType

BLOCK, PART, LEAST = 16, 2048, 160
"""The proportions of the real ones, for small tensors: half a part is more than a least part."""
MIB = 2**20

many = settings(max_examples=300, deadline=None)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(layout, "CANONICAL_BLOCK", BLOCK)
    monkeypatch.setattr(layout, "PART_BYTES", PART)
    monkeypatch.setattr(layout, "LEAST_PART_BYTES", LEAST)


pytestmark = pytest.mark.usefixtures("small_parts")

lengths = st.one_of(st.integers(0, 2), st.integers(0, 60), st.integers(0, 2500))
shapes = st.one_of(
    st.just(()),
    st.tuples(lengths),
    st.tuples(st.integers(0, 50), st.integers(0, 50)),
    st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)),
)


@st.composite
def tensors(draw, dtypes: Sequence[DType] = tuple(DType), most: int = 14) -> list[Spec]:
    found = draw(st.lists(st.tuples(st.sampled_from(dtypes), shapes), max_size=most))
    return [Spec(f"t.{i}", dtype, shape) for i, (dtype, shape) in enumerate(found)]


@st.composite
def with_shards(draw) -> tuple[list[Spec], list[int]]:
    specs = draw(tensors())
    return specs, draw(st.lists(st.integers(0, 3), min_size=len(specs), max_size=len(specs)))


def laid_out(specs: Sequence[Spec], shard_bytes: int | None = None) -> tuple[Shard, ...]:
    return lay_out(specs, [0] * len(specs), shard_bytes)


# --- laws ---------------------------------------------------------------------------------------


def check_bytes(shard: Shard, number: int, specs: Sequence[Spec]) -> None:
    """Parts follow one another from first byte to last; pieces lie where the header says."""
    assert [part.number for part in shard.parts] == list(range(len(shard.parts)))
    assert {part.shard for part in shard.parts} == {number}
    assert [part.start for part in shard.parts] == [0, *(p.stop for p in shard.parts[:-1])]
    assert shard.parts[-1].stop == shard.nbytes
    header = parse_header(shard.header, shard.nbytes, shard.name)
    assert list(header.tensors) == [specs[tensor].name for tensor in shard.tensors]
    position = len(shard.header)
    for part in shard.parts:
        assert position == part.start + (len(shard.header) if part.number == 0 else 0)
        for piece in part.pieces:
            spec = specs[piece.tensor]
            found = header.tensors[spec.name]
            assert (found.dtype, found.shape) == (spec.dtype, spec.shape)
            assert position == found.offset + piece.start * spec.dtype.itemsize
            position += (piece.stop - piece.start) * spec.dtype.itemsize
        assert position == part.stop


def check_pieces(shard: Shard, specs: Sequence[Spec]) -> None:
    """Every element of every tensor once, cut between canonical blocks, whole within a unit."""
    covered: dict[int, list[tuple[int, int]]] = {}
    place = {tensor: i for i, tensor in enumerate(shard.tensors)}
    for unit in shard.units:
        inside = {piece.tensor for part in unit.parts for piece in part.pieces}
        assert list(unit.tensors) == sorted(inside, key=place.__getitem__)
        assert inside.isdisjoint(covered), "a tensor in two units"
        for part in unit.parts:
            for piece in part.pieces:
                covered.setdefault(piece.tensor, []).append((piece.start, piece.stop))
    assert list(covered) == list(shard.tensors)
    for tensor, pieces in covered.items():
        edges = [0, *(stop for _, stop in pieces)]
        assert pieces == list(pairwise(edges)) and edges[-1] == specs[tensor].numel
        assert all(edge % layout.CANONICAL_BLOCK == 0 for edge in edges[:-1])
        assert len(pieces) == 1 or all(start < stop for start, stop in pieces)


def check_sizes(shard: Shard, specs: Sequence[Spec]) -> None:
    """Parts that S3 takes, of about the usual size."""
    data_bytes = sum(specs[tensor].nbytes for tensor in shard.tensors)
    assert len(shard.parts) <= layout.MOST_PARTS
    assert all(part.nbytes >= layout.LEAST_PART_BYTES for part in shard.parts[:-1])
    usual = max(layout.PART_BYTES, data_bytes / (layout.MOST_PARTS // 3 - 1))
    itemsize = max((specs[tensor].dtype.itemsize for tensor in shard.tensors), default=1)
    most = usual + layout.LEAST_PART_BYTES + layout.CANONICAL_BLOCK * itemsize
    for part in shard.parts:
        header = len(shard.header) if part.number == 0 else 0
        assert part.nbytes - header <= most


def check_alignment(shard: Shard, specs: Sequence[Spec]) -> None:
    """The data begins at a page, every tensor at a multiple of its element; order is kept else."""
    header = parse_header(shard.header, shard.nbytes, shard.name)
    assert header.data_start == len(shard.header) and header.data_start % ALIGNMENT == 0
    for name, tensor in header.tensors.items():
        assert tensor.offset % tensor.dtype.itemsize == 0, name
    for size in (1, 2, 4, 8):
        alike = [t for t in shard.tensors if specs[t].dtype.itemsize == size]
        assert alike == sorted(alike)


def check_all(shards: Sequence[Shard], specs: Sequence[Spec]) -> None:
    assert sorted(t for shard in shards for t in shard.tensors) == list(range(len(specs)))
    for number, shard in enumerate(shards):
        assert shard.nbytes == len(shard.header) + sum(specs[t].nbytes for t in shard.tensors)
        check_bytes(shard, number, specs)
        check_pieces(shard, specs)
        check_sizes(shard, specs)
        check_alignment(shard, specs)


@many
@given(with_shards())
@example(([], []))
@example(([Spec("empty", DType.F32, (0, 4))], [0]))
@example(([Spec("scalar", DType.F64, ()), Spec("large", DType.F64, (2500,))], [1, 1]))
def test_laws_of_shards_that_are_given(drawn):
    specs, shard_of = drawn
    shards = lay_out(specs, shard_of, None)
    check_all(shards, specs)
    groups = [{t for t, s in enumerate(shard_of) if s == k} for k in sorted(set(shard_of))]
    assert [set(shard.tensors) for shard in shards] == (groups or [set()])


@many
@given(tensors(), st.one_of(st.integers(1, 400), st.integers(1, 20_000)))
def test_laws_of_shards_of_a_size(specs, shard_bytes):
    shards = laid_out(specs, shard_bytes)
    check_all(shards, specs)
    sizes = [[specs[t].nbytes for t in shard.tensors] for shard in shards]
    order = [sorted(shard.tensors) for shard in shards]
    assert [t for shard in order for t in shard] == list(range(len(specs)))
    for own in sizes:
        assert sum(own) <= shard_bytes or len(own) == 1
    for (own, following), (_, after) in zip(pairwise(sizes), pairwise(order), strict=True):
        assert sum(own) + specs[after[0]].nbytes > shard_bytes, "a shard more than needed"
        assert following


@many
@given(tensors(), st.integers(6, 60))
def test_no_more_parts_than_a_store_takes(specs, most):
    """With more data than fits the usual parts, they are larger."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MOST_PARTS", most)
        check_all(laid_out(specs), specs)


@many
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(6, 60))
def test_no_more_parts_where_tensors_are_just_too_large(sizes, most):
    """The worst case: least parts, and tensors that are cut in halves."""
    specs = []
    for i, size in enumerate(sizes):
        specs.append(Spec(f"small.{i}", DType.U8, (LEAST,)))
        specs.append(Spec(f"large.{i}", DType.U8, (PART + size,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MOST_PARTS", most)
        check_all(laid_out(specs), specs)


def test_names():
    specs = [Spec(f"t.{i}", DType.U8, (10,)) for i in range(3)]
    assert [shard.name for shard in laid_out(specs)] == [SINGLE_SHARD]
    assert [shard.name for shard in laid_out(specs, 10)] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert [shard.name for shard in laid_out([])] == [SINGLE_SHARD]


@many
@given(tensors())
def test_the_same_tensors_give_the_same_layout(specs):
    assert laid_out(specs, 3000) == laid_out(list(specs), 3000)


# --- what is written can be read ------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(tensors(dtypes=[dtype for dtype in DType if dtype not in (DType.U16, DType.U32, DType.U64)]))
def test_the_safetensors_library_loads_what_the_header_says(tmp_path_factory, specs):
    [shard] = laid_out(specs)
    rng = np.random.default_rng(len(specs))
    data = rng.integers(0, 2, shard.nbytes - len(shard.header), dtype=np.uint8).tobytes()
    path = tmp_path_factory.mktemp("layout") / shard.name
    path.write_bytes(shard.header + data)
    loaded = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    position = 0
    assert set(loaded) == {spec.name for spec in specs}
    for number in shard.tensors:
        spec = specs[number]
        tensor = loaded[spec.name]
        assert str(tensor.dtype) == f"torch.{spec.dtype.torch_name}"
        assert tuple(tensor.shape) == spec.shape
        raw = tensor.contiguous().reshape(-1).view(torch.uint8) if spec.numel else None
        stored = b"" if raw is None else raw.numpy().tobytes()
        assert stored == data[position : position + spec.nbytes]
        position += spec.nbytes


# --- the real constants ---------------------------------------------------------------------------


def transformer(layers: int, hidden: int, inner: int, vocabulary: int) -> Iterator[Spec]:
    yield Spec("embed", DType.BF16, (vocabulary, hidden))
    for layer in range(layers):
        yield Spec(f"{layer}.norm", DType.F32, (hidden,))
        for name in ("q", "k", "v", "o"):
            yield Spec(f"{layer}.{name}", DType.BF16, (hidden, hidden))
        for name in ("up", "gate", "down"):
            yield Spec(f"{layer}.{name}", DType.BF16, (inner, hidden))
    yield Spec("head", DType.BF16, (vocabulary, hidden))


@pytest.fixture
def real_parts(monkeypatch, small_parts):
    monkeypatch.undo()


@pytest.mark.usefixtures("real_parts")
def test_a_real_model_has_parts_of_about_64_mib():
    assert (layout.PART_BYTES, layout.LEAST_PART_BYTES) == (64 * MIB, 5 * MIB)
    assert layout.MOST_PARTS == 10_000
    specs = list(transformer(80, 8192, 28_672, 128_256))
    shards = lay_out(specs, [0] * len(specs), 5 * 10**9)
    check_all(shards, specs)
    sizes = [part.nbytes for shard in shards for part in shard.parts[:-1]]
    assert 40 * MIB <= np.mean(sizes) <= 64 * MIB


@pytest.mark.usefixtures("real_parts")
@pytest.mark.parametrize("elements", [32 * MIB + 1, 30 * MIB, 2**36])
def test_a_shard_of_half_a_terabyte_has_no_more_parts_than_a_store_takes(elements):
    count = math.ceil(2**39 / (2 * elements))
    specs = []
    for i in range(count):
        specs.append(Spec(f"large.{i}", DType.BF16, (elements,)))
        specs.append(Spec(f"small.{i}", DType.BF16, (3 * MIB,)))
    check_all(laid_out(specs), specs)
