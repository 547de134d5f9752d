"""One bfloat16 checkpoint in Hugging Face layout: written from random numbers, and read by ranges.

The format is parsed and written here by hand, so that what checks shardmerge's output shares no
code with shardmerge.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NamedShape = tuple[str, tuple[int, ...]]

INDEX = "model.safetensors.index.json"
CHUNK = 2 << 20  # elements drawn or read at once: 8 MiB as float32
THREADS = 2
BASE_STD = 0.02
DELTA_STD = 0.002
UNCHANGED_EVERY = 10  # a fine-tune leaves one tensor in so many as it was


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies on disk."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Name and place of every tensor of the checkpoint in ``folder``."""
    index = folder / INDEX
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    found: dict[str, Stored] = {}
    for file in sorted(files):
        with (folder / file).open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            offset = 8 + length + entry["data_offsets"][0]
            found[name] = Stored(folder / file, offset, entry["dtype"], tuple(entry["shape"]))
    return found


def read_bf16(tensors: Sequence[Stored]) -> Iterator[list[NDArray[np.float32]]]:
    """The values of tensors of one size, side by side, a chunk at a time."""
    fds = [os.open(tensor.path, os.O_RDONLY) for tensor in tensors]
    elements = tensors[0].elements
    try:
        for start in range(0, elements, CHUNK):
            count = min(CHUNK, elements - start)
            yield [
                from_bf16(_bits(fd, tensor.offset + 2 * start, count))
                for fd, tensor in zip(fds, tensors, strict=True)
            ]
    finally:
        for fd in fds:
            os.close(fd)


def write_weights(
    folder: Path,
    tensors: Sequence[NamedShape],
    *,
    shard_bytes: int,
    key: tuple[int, int],
    base: Path | None,
) -> None:
    """Write the shards and the index of a checkpoint.

    Args:
        folder: an existing, empty folder.
        tensors: names and shapes in the order of the model.
        shard_bytes: a shard is closed before it grows beyond this.
        key: seed of the family and position of this checkpoint in it.
        base: the folder of the base model of a fine-tune, None for the base model itself.
    """
    shards = _shards(tensors, shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(files) == 1:
        files = ["model.safetensors"]
    position = {name: i for i, (name, _) in enumerate(tensors)}
    for file, shard in zip(files, shards, strict=True):
        source = base / file if base else None
        _Shard(folder / file, source, shard, position, key).write()
    if len(files) > 1:
        total = 2 * sum(math.prod(shape) for _, shape in tensors)
        weight_map = {t: f for f, shard in zip(files, shards, strict=True) for t, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def write_small_files(folder: Path, config: dict[str, object]) -> None:
    """Write the config, and a tokenizer that knows three special tokens and the 256 bytes."""
    special = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256))])}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, **plain} for i, token in enumerate(special)
        ],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [],
        },
    }
    absent = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    contents: dict[str, object] = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer.json": tokenizer | dict.fromkeys(absent),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **tokens},
        "special_tokens_map.json": tokens,
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2))


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of finite ``values``, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 ``bits``, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _shards(tensors: Sequence[NamedShape], shard_bytes: int) -> list[list[NamedShape]]:
    """Cut in the model's order; by name within a shard, as the safetensors library writes them."""
    shards: list[list[NamedShape]] = [[]]
    size = 0
    for name, shape in tensors:
        n_bytes = math.prod(shape) * 2
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += n_bytes
    return [sorted(shard) for shard in shards]


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    base: Path | None  # the same shard of the base model
    tensors: Sequence[NamedShape]
    position: dict[str, int]  # of each tensor in the model
    key: tuple[int, int]

    def write(self) -> None:
        """Write the shard, with every chunk drawn from its own random stream."""
        header, starts = self._header()
        out = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        # A fine-tune has the header of its base model, so elements have the same offsets in both.
        source = None if self.base is None else os.open(self.base, os.O_RDONLY)

        def work(chunk: tuple[NamedShape, int, int]) -> None:
            (name, shape), first, offset = chunk
            count = min(CHUNK, math.prod(shape) - first)
            rng = np.random.Generator(
                np.random.SFC64([*self.key, self.position[name], first // CHUNK])
            )
            if source is None:  # norms lie around one
                bits = to_bf16(_normal(rng, count, BASE_STD) + np.float32(len(shape) == 1))
            else:
                bits = _bits(source, offset, count)
                if (self.position[name] + self.key[1]) % UNCHANGED_EVERY:
                    bits = to_bf16(from_bf16(bits) + _normal(rng, count, DELTA_STD))
            _write_at(out, bits.tobytes(), offset)

        try:
            _write_at(out, header, 0)
            with ThreadPoolExecutor(THREADS) as pool:
                for _ in pool.map(work, self._chunks(len(header), starts)):
                    pass  # raises the error of a chunk, and cancels the rest
            os.fsync(out)  # so that no measurement pays for writing our inputs back
        finally:
            os.close(out)
            if source is not None:
                os.close(source)

    def _header(self) -> tuple[bytes, list[int]]:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = [], 0
        for name, shape in self.tensors:
            start, end = end, end + 2 * math.prod(shape)
            starts.append(start)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text, starts

    def _chunks(self, data: int, starts: list[int]) -> Iterator[tuple[NamedShape, int, int]]:
        for tensor, start in zip(self.tensors, starts, strict=True):
            for first in range(0, math.prod(tensor[1]), CHUNK):
                yield tensor, first, data + start + 2 * first


def _normal(rng: np.random.Generator, count: int, std: float) -> NDArray[np.float32]:
    values = rng.standard_normal(count, dtype=np.float32)
    values *= np.float32(std)
    return values


def _bits(fd: int, offset: int, count: int) -> NDArray[np.uint16]:
    data = os.pread(fd, count * 2, offset)
    if len(data) != count * 2:
        raise EOFError(f"{len(data)} of {count * 2} bytes at offset {offset}")
    return np.frombuffer(data, np.uint16)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
