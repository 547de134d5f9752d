"""Checkpoints as Hugging Face's libraries write them: one safetensors file, or indexed shards.

Only headers, the index and ``config.json`` are read here, never an element. Whatever could make
another model out of the same bytes is refused: an index that does not fit its shards, packed or
quantised tensors whose values are not what is stored, several shards without an index.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from shardmerge.errors import CheckpointError
from shardmerge.header import Header, header_size, parse_header
from shardmerge.sources.folder import INDEX, SAFETENSORS, SINGLE, TRAINING_STATE, few, not_found
from shardmerge.sources.quantised import decode
from shardmerge.sources.sharded import Shard, Twins, open_shards
from shardmerge.sources.tensor import Checkpoint, Segment, TensorRef
from shardmerge.stores.api import Range, Stat, Store

_FIRST_READ_BYTES = 1 << 20  # most headers are shorter, so that one read per shard is enough


def open_hf(url: str, store: Store, twins: Twins | None = None) -> Checkpoint:
    """The checkpoint in the folder ``url``, or in the single ``.safetensors`` file ``url``.

    Args:
        twins: shared by checkpoints of one family, which takes less time and memory.
    Raises:
        CheckpointError: for a checkpoint that is missing, damaged or of an unsupported kind.
        StoreError: for bytes that could not be read.
    """
    if store.is_folder(url):
        names = store.names(url)
        return open_shards(
            url,
            store,
            _read_shard,
            names=names,
            shard=None if INDEX in names else _only_shard(url, names),
            index=INDEX,
            suffix=SAFETENSORS,
            twins=twins,
        )
    if store.stat(url) is None:
        raise CheckpointError(not_found(url, store))
    if not url.endswith(SAFETENSORS):
        raise CheckpointError(
            f"{url}: not a checkpoint: it is neither a folder nor a {SAFETENSORS} file, nor one of "
            f"torch.save.\n  {_CONVERT}."
        )
    return _open_file(url, store)


def read_header(url: str, store: Store) -> tuple[Header, Stat]:
    """The header of one shard, with its size and version.

    Raises:
        CheckpointError: for a shard that is not there; HeaderError for one that breaks the format.
    """
    data, found = _read_header(url, store)
    return parse_header(data, found.size, url), found


def _read_header(url: str, store: Store) -> tuple[bytes, Stat]:
    found = store.stat(url)
    if found is None:
        raise CheckpointError(
            f"{url}: no such shard, or a link to a file that is gone. Download or copy it again."
        )
    data = bytearray(min(found.size, _FIRST_READ_BYTES))
    store.read_ranges([Range(url, 0, memoryview(data), found.version)])
    size = header_size(data, found.size, url)
    first = len(data)
    if size > first:
        data.extend(bytes(size - first))
        store.read_ranges([Range(url, first, memoryview(data)[first:], found.version)])
    return bytes(memoryview(data)[:size]), found  # many are in memory before the first is parsed


def _open_file(url: str, store: Store) -> Checkpoint:
    folder, _, name = url.rpartition("/")
    place = store.join(folder or ("/" if url.startswith("/") else "."), name)
    shard = _read_shard(place, store)
    tensors = decode(dict(shard.tensors()), None, url)
    return Checkpoint(
        url=url,
        tensors=tensors,
        shard_of=dict.fromkeys(tensors, 0),
        shards=(name,),
        versions={name: shard.version},
    )


def _read_shard(place: str, store: Store) -> Shard:
    text, found = _read_header(place, store)

    def tensors() -> Mapping[str, TensorRef]:
        header = parse_header(text, found.size, place)
        return dict(_references(header, place, found.version))

    return Shard(place, found.version, tensors, text + found.size.to_bytes(8, "little"))


def _references(header: Header, url: str, version: str) -> Iterator[tuple[str, TensorRef]]:
    for name, tensor in header.tensors.items():
        segment = Segment(url, tensor.offset, tensor.nbytes, version)
        yield name, TensorRef(name, tensor.dtype, tensor.shape, (segment,))


# --- which shards ---------------------------------------------------------------------------------

_CONVERT = "Load it with transformers, write it with `save_pretrained`, and give that folder"
_KINDS: tuple[tuple[str, str], ...] = (
    (
        r"adapter_.*",
        "an adapter, and no model of its own.\n  Name it with the model that it belongs to: "
        "MODEL+ADAPTER",
    ),
    (r".*\.gguf", f"a GGUF file, which is not supported.\n  {_CONVERT}"),
    (
        r"pytorch_model-.*\.bin",
        "shards of torch.save without an index.\n  pytorch_model.bin.index.json would say what "
        "belongs together. Download it too",
    ),
    (
        r".*\.(bin|pth|pt|ckpt)",
        "weights as torch.save writes them, but not under the name pytorch_model.bin.\n"
        "  Give the path of that file to merge its tensors under the names that it has",
    ),
    (
        r".*\.(h5|msgpack|onnx)",
        f"weights for TensorFlow, Flax or ONNX, which are not supported.\n  {_CONVERT}",
    ),
    (
        r"consolidated.*\.safetensors",
        "weights under their author's own tensor names, which are not taken for a\n"
        "  checkpoint by themselves. Give the path of that file to merge them under these names",
    ),
    (r"model_index\.json", "a diffusers pipeline. Give one of its folders, such as `unet`"),
    (r"snapshots/", "a Hugging Face cache. Give the path of one folder in `snapshots`"),
)


def _only_shard(url: str, names: Sequence[str]) -> str:
    """The one file that is the checkpoint, in a folder without an index."""
    if SINGLE in names:
        return SINGLE
    found = [
        name
        for name in names
        if name.endswith(SAFETENSORS) and not name.startswith((".", "consolidated", "adapter_"))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{url}: {len(found)} {SAFETENSORS} files ({few(found)}) without an index.\n"
            f"  {INDEX} would say what belongs together. Download it too, or give\n"
            "  the path of one file."
        )
    raise CheckpointError(_other_kind(url, names))


def holds_safetensors(names: Sequence[str]) -> bool:
    """Whether a folder is to be read by its safetensors, whatever else it holds."""
    return INDEX in names or any(
        name.endswith(SAFETENSORS) and not name.startswith((".", "consolidated", "adapter_"))
        for name in names
    )


def _other_kind(url: str, names: Sequence[str]) -> str:
    """What a folder holds in place of a checkpoint, and what to do about it."""
    for pattern, kind in _KINDS:
        matching = [
            name
            for name in names
            if re.fullmatch(pattern, name) and not TRAINING_STATE.fullmatch(name)
        ]
        if matching:
            return f"{url}: no checkpoint in this folder. It holds {few(matching)}: {kind}."
    held = f"It holds {few(names)}" if names else "It is empty"
    return (
        f"{url}: no checkpoint in this folder. {held}.\n"
        f"  Give the folder that holds {INDEX} or {SINGLE}."
    )
