"""The safetensors format: what is refused and why, and that nothing else is ever raised."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge import header as header_module
from shardmerge.errors import CheckpointError, HeaderError
from shardmerge.header import (
    MAX_HEADER_BYTES,
    header_size,
    is_plain_name,
    parse_header,
    parse_index,
    write_header,
    write_index,
)
from shardmerge.numerics import DTYPE_BY_TORCH_NAME, DType


def raw(fields: object, *, data: int = 0) -> tuple[bytes, int]:
    """The bytes of a header, and the size of a file with ``data`` bytes after it."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + data


def tensor(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_of_the_library_is_read_as_the_library_reads_it():
    tensors = {
        f"t.{name}": torch.zeros(2, 3, dtype=getattr(torch, name)) for name in DTYPE_BY_TORCH_NAME
    }
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.empty(0, 4), "é 日": torch.ones(3)}
    data = safetensors.torch.save(tensors, metadata={"format": "pt", "k": "v"})
    header = parse_header(data, len(data), "x")
    assert header.metadata == {"format": "pt", "k": "v"}
    assert set(header.tensors) == set(tensors)
    for name, value in tensors.items():
        found = header.tensors[name]
        assert found.shape == tuple(value.shape)
        assert found.dtype.torch_name == str(value.dtype).removeprefix("torch.")
        stored = data[found.offset : found.offset + found.nbytes]
        assert stored == value.flatten().view(torch.uint8).numpy().tobytes()
    offsets = [found.offset for found in header.tensors.values()]
    assert offsets == sorted(offsets)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=4)


@settings(max_examples=60)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(DType), shapes), max_size=8),
    st.sampled_from([1, 8, 512, 4096]),
    st.dictionaries(st.text(max_size=4).filter(str.isascii), st.just("v"), max_size=2),
)
def test_written_headers_are_aligned_and_come_back(tensors, align, metadata):
    listed = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    written = write_header(listed, metadata=metadata, align=align)
    assert len(written) % align == 0
    total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in listed)
    header = parse_header(written, len(written) + total, "x")
    assert header.metadata == metadata
    assert header.data_start == len(written)
    position = len(written)
    for name, dtype, shape in listed:
        found = header.tensors[name]
        assert (found.dtype, found.shape, found.offset) == (dtype, tuple(shape), position)
        position += found.nbytes


def test_the_library_loads_what_is_written(tmp_path):
    listed = [
        ("b", DType.BF16, [3, 5]),
        ("a", DType.F32, []),
        ("odd", DType.U8, [7]),
        ("none", DType.F32, [0, 3]),
        ("z", DType.F64, [2]),
    ]
    written = write_header(listed)
    assert len(written) == 4096
    data = bytes(range(30)) + bytes(4) + bytes(range(7)) + torch.ones(2).double().numpy().tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(written + data)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == {name for name, _, _ in listed}
        assert opened.get_tensor("b").view(torch.uint8).flatten().tolist() == list(range(30))
        assert opened.get_tensor("none").shape == (0, 3)
        assert opened.get_tensor("z").tolist() == [1.0, 1.0]


def test_zero_size_tensors_lie_anywhere_between_others():
    fields = {
        "b": tensor("U8", [4], 4, 8),
        "empty": tensor("F32", [0], 4, 4),
        "a": tensor("U8", [4], 0, 4),
        "end": tensor("F32", [3, 0], 8, 8),
    }
    data, size = raw(fields, data=8)
    assert list(parse_header(data, size, "x").tensors) == ["a", "empty", "b", "end"]


def test_a_header_without_tensors_and_null_metadata_are_valid():
    data, size = raw({"__metadata__": None})
    assert parse_header(data, size, "x").tensors == {}


HUGE = 10**4000
BROKEN = {
    "not an object": (b"[1]", 0, "does not start with"),
    "not JSON": (b"{1}", 0, "not JSON"),
    "empty": (b"", 0, "does not start with"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not UTF-8 at byte 2"),
    "NaN": (b'{"a": NaN}', 0, "NaN is not allowed"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "not JSON"),
    "digits": (b'{"a":' + b"1" * 10_000 + b"}", 0, "not JSON"),
    "after": (b'{} {"a": 1}', 0, "not JSON"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}',
        2,
        "'a' occurs twice",
    ),
    "key twice": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}',
        1,
        "'dtype' occurs twice",
    ),
    "half a character": (
        b'{"a\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        1,
        "half a character",
    ),
    "half a character in metadata": (b'{"__metadata__":{"a":"\\udc00"}}', 0, "half a character"),
    "metadata": ({"__metadata__": [1]}, 0, "not an object"),
    "metadata value": ({"__metadata__": {"a": 1}}, 0, "'a' is 1 and not a text"),
    "description": ({"a": 3}, 0, "its description is 3"),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 1]}}, 1, "dtype is missing"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, 1, "shape is missing"),
    "no offsets": ({"a": {"dtype": "U8", "shape": []}}, 1, "data_offsets is missing"),
    "F4": ({"a": tensor("F4", [2], 0, 1)}, 1, "'F4' is not supported"),
    "F8_E8M0": ({"a": tensor("F8_E8M0", [1], 0, 1)}, 1, "'F8_E8M0' is not supported"),
    "dtype list": ({"a": tensor(["U8"], [1], 0, 1)}, 1, "is not supported"),
    "dtype null": ({"a": tensor(None, [1], 0, 1)}, 1, "null is not supported"),
    "shape negative": ({"a": tensor("U8", [-1], 0, 1)}, 1, "shape [-1] is not a list"),
    "shape two negative": ({"a": tensor("U8", [-1, -1], 0, 1)}, 1, "is not a list"),
    "shape bool": ({"a": tensor("U8", [True], 0, 1)}, 1, "shape [true] is not a list"),
    "shape float": ({"a": tensor("U8", [1.0], 0, 1)}, 1, "shape [1.0] is not a list"),
    "shape text": ({"a": tensor("U8", "1", 0, 1)}, 1, "is not a list"),
    "shape null": ({"a": tensor("U8", None, 0, 1)}, 1, "is not a list"),
    "shape huge": ({"a": tensor("U8", [HUGE], 0, 1)}, 1, "a number beyond 2**63"),
    "shape product": ({"a": tensor("U8", [2**62] * 9, 0, 1)}, 1, "more than 2**63"),
    "dimensions": ({"a": tensor("U8", [1] * 65, 0, 1)}, 1, "65 dimensions"),
    "offsets text": ({"a": tensor("U8", [1], "0", 1)}, 1, "are not two numbers"),
    "offsets bool": ({"a": tensor("U8", [1], False, True)}, 1, "are not two numbers"),
    "offsets negative": ({"a": tensor("U8", [2], -1, 1)}, 1, "are not two numbers"),
    "offsets huge": ({"a": tensor("U8", [1], HUGE, HUGE + 1)}, 1, "are not two numbers"),
    "three offsets": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}},
        1,
        "are not two numbers",
    ),
    "begin > end": ({"a": tensor("U8", [1], 1, 0)}, 1, "[1, 0] end before they begin"),
    "bytes": ({"a": tensor("F32", [2, 2], 0, 12)}, 12, "hold 12 bytes, but shape [2, 2] of F32"),
    "not from 0": ({"a": tensor("U8", [1], 1, 2)}, 2, "a hole of 1 bytes between the start"),
    "gap": (
        {"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 3, 4)},
        4,
        "a hole of 2 bytes between tensor 'a' and tensor 'b'",
    ),
    "overlap": (
        {"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 2, 6)},
        6,
        "tensor 'b' overlaps tensor 'a' by 2 bytes",
    ),
    "out of range": ({"a": tensor("U8", [9], 0, 9)}, 4, "5 bytes are missing"),
    "trailing": ({"a": tensor("U8", [4], 0, 4)}, 6, "2 bytes belong to no tensor"),
    "trailing, no tensor": ({}, 1, "1 bytes belong to no tensor"),
}


@pytest.mark.parametrize("fields, data, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_refused_with_the_reason(fields, data, message):
    content, size = raw(fields, data=data)
    with pytest.raises(HeaderError) as caught:
        parse_header(content, size, "folder/x.safetensors")
    assert message in str(caught.value)
    assert str(caught.value).startswith("folder/x.safetensors")
    str(caught.value).encode()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content, size, message",
    [
        (b"", 0, "has 0 bytes"),
        (b"\2\0\0", 3, "has 3 bytes"),
        (b"\xff" * 8, 100, "the header would have 18,446,744,073,709,551,615 bytes"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 2**40, "would have 100,000,001 bytes"),
        ((50).to_bytes(8, "little") + b"{}", 10, "48 bytes are missing"),
        (b"version https://git-lfs.github.com/spec/v1", 130, "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(100), 104, "zip archive"),
        (b"GGUF" + bytes(100), 104, "GGUF"),
    ],
)
def test_a_wrong_length_is_refused_with_the_reason(content, size, message):
    with pytest.raises(HeaderError, match=message):
        header_size(content, size, "x")
    with pytest.raises(HeaderError, match=message):
        parse_header(content, size, "x")


def test_a_header_that_was_not_read_whole_is_refused():
    content, size = raw({})
    with pytest.raises(HeaderError, match="only 9 could be read"):
        parse_header(content[:-1], size, "x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
numbers = st.integers(-2, 9) | st.sampled_from([2**63, 2**64, HUGE, True, 1.0, None, "1"])
tensor_like = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*(dtype.value for dtype in DType), "F4", "", 3]) | json_values,
        "shape": st.lists(numbers, max_size=3) | json_values,
        "data_offsets": st.lists(numbers, max_size=3) | json_values,
    },
)
header_like = st.dictionaries(
    st.text(max_size=3) | st.sampled_from(["__metadata__", "\ud800"]),
    tensor_like | json_values,
    max_size=4,
)


def only_header_errors(content: bytes, size: int) -> None:
    try:
        parse_header(content, size, "x")
    except HeaderError as error:
        str(error).encode()


@settings(max_examples=200, deadline=None)
@given(header_like, st.integers(0, 64))
def test_only_header_errors_for_any_json(fields, data):
    only_header_errors(*raw(fields, data=data))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans(), st.integers(0, 300))
def test_only_header_errors_for_any_bytes(content, framed, size):
    if framed:
        content = (len(content) + 1).to_bytes(8, "little") + b"{" + content
    only_header_errors(content, size)
    only_header_errors(content, len(content))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_only_header_errors_for_a_damaged_header(data):
    listed = [("a", DType.F32, [2]), ("b.weight", DType.BF16, [3, 4]), ("é", DType.I64, [])]
    content = bytearray(write_header(listed, align=8))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    only_header_errors(bytes(content), len(content) + 40)


plain_like = st.lists(
    st.sampled_from(
        [
            b'{"__metadata__":{"format":"pt"},',
            b'{"__metadata__":{"a":"\\ud800"},',
            b"{",
            b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},',
            b'"a":{"dtype":"U8","shape":[],"data_offsets":[2,3]}',
            b'"b":{"dtype":"U8","shape":[0,5],"data_offsets":[2,2]},',
            b'"b":{"dtype":"U8","shape":[02],"data_offsets":[0,2]}}',
            b'"c":{"dtype":"U8","shape":[2,],"data_offsets":[0,2]}}',
            b'"c":{"dtype":"U8","shape":[2],"data_offsets":[0,02]},',
            b'"c\\u0041":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            b'"d":{"dtype":"F4","shape":[2],"data_offsets":[0,2]}}',
            b'"e":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            b'"f":{"dtype":"F32","shape":[2],"data_offsets":[0,7]}}',
            b'"__metadata__":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            b'"g": {"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            b"}",
            b" ",
        ]
    ),
    max_size=5,
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(plain_like | st.builds(lambda text: b"{" + text, plain_like))
def test_the_fast_way_takes_nothing_that_the_full_one_refuses(text):
    fast = header_module._scan(text, 8)
    if fast is not None:
        assert fast == header_module._parse_fields(text, 8, "x")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_fast_way_agrees_with_the_full_one_on_damaged_headers(data):
    listed = [("a", DType.F32, [2]), ("b.weight", DType.BF16, [3, 4]), ("é", DType.I64, [])]
    text = bytearray(write_header(listed, align=8)[8:])
    position = data.draw(st.integers(0, len(text) - 1))
    text[position] = data.draw(st.integers(32, 127) | st.sampled_from(b'0123456789",:[]{}'))
    fast = header_module._scan(bytes(text), 8)
    if fast is not None:
        assert fast == header_module._parse_fields(bytes(text), 8, "x")


def test_headers_of_the_library_and_our_own_take_the_fast_way():
    tensors = {"a": torch.zeros(2, 3), "é": torch.tensor(1), "none": torch.empty(0)}
    for metadata in (None, {"format": "pt"}):
        data = safetensors.torch.save(tensors, metadata=metadata)
        start = header_size(data, len(data), "x")
        assert header_module._scan(data[8:start], start) is not None
        own = write_header([("a", DType.F32, [2, 3]), ("é", DType.I64, [])], metadata=metadata)
        assert header_module._scan(own[8:], len(own)) is not None


def test_writing_refuses_a_name_twice_and_the_reserved_one():
    for name in ("a", "__metadata__"):
        with pytest.raises(ValueError, match="twice, or is a reserved"):
            write_header([("a", DType.U8, []), (name, DType.U8, [])])


# --- the index ------------------------------------------------------------------------------------


@given(st.dictionaries(names, st.sampled_from(["model-1.safetensors", "m.safetensors"])))
def test_an_index_comes_back(weight_map):
    found, metadata = parse_index(write_index(weight_map, 17), "x")
    assert found == weight_map
    assert metadata == {"total_size": 17}


def test_an_index_is_written_as_hugging_face_writes_it():
    assert write_index({"b": "2.safetensors", "a": "1.safetensors"}, 3).decode() == (
        '{\n  "metadata": {\n    "total_size": 3\n  },\n  "weight_map": {\n'
        '    "a": "1.safetensors",\n    "b": "2.safetensors"\n  }\n}\n'
    )


@pytest.mark.parametrize(
    "shard",
    [
        "../x",
        "/etc/x",
        "a/b",
        "a\\b",
        "",
        ".",
        "..",
        "a\0b",
        "a\nb",
        "\ud800",
        3,
        None,
        ["a"],
        True,
    ],
)
def test_a_shard_outside_the_folder_is_refused(shard):
    assert not is_plain_name(shard)
    index = json.dumps({"weight_map": {"good": "x.safetensors", "a": shard}}).encode()
    with pytest.raises(CheckpointError, match=r"x\.json: tensor 'a' lies in") as caught:
        parse_index(index, "x.json")
    str(caught.value).encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "null and not a JSON object"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "weight_map is missing"),
        (b'{"weight_map": []}', "weight_map is not an object"),
        (b'{"weight_map": {"a": "x", "a": "x"}}', "'a' occurs twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "'weight_map' occurs twice"),
    ],
)
def test_a_broken_index_is_refused_with_the_reason(content, message):
    with pytest.raises(CheckpointError, match=message):
        parse_index(content, "x.json")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100) | st.builds(lambda value: json.dumps(value).encode(), json_values))
def test_only_checkpoint_errors_for_any_index(content):
    try:
        parse_index(content, "x")
    except CheckpointError as error:
        str(error).encode()
