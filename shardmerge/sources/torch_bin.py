"""Weights as ``torch.save`` writes them: ``pytorch_model.bin``, one file or indexed shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardmerge.errors import CheckpointError
from shardmerge.sources.folder import few
from shardmerge.sources.quantised import decode
from shardmerge.sources.sharded import Shard, open_shards
from shardmerge.sources.tensor import Checkpoint, TensorRef
from shardmerge.sources.torch_file import (
    StoredTensor,
    TorchFile,
    read_torch,
    reference,
    segments,
    window_of,
)
from shardmerge.stores.api import Store

BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_INSIDE = ("model", "state_dict", "module")
"""Where programs for training keep the state dict of the model in a larger dict."""


def holds_bins(names: Sequence[str]) -> bool:
    """Whether a folder is such a checkpoint."""
    return BIN in names or BIN_INDEX in names


def open_bins(url: str, store: Store) -> Checkpoint:
    """The checkpoint in the folder ``url``.

    Raises:
        CheckpointError: for a checkpoint that is damaged, or that holds more than tensors.
    """
    names = store.names(url)
    return open_shards(
        url,
        store,
        _read_shard,
        names=names,
        shard=None if BIN_INDEX in names else BIN,
        index=BIN_INDEX,
        suffix=BIN_SUFFIXES[0],
    )


def _read_shard(place: str, store: Store) -> Shard:
    tensors, version = read_bin(place, store)
    return Shard(place, version, lambda: tensors)


def open_bin(url: str, store: Store) -> Checkpoint:
    """The checkpoint in the single file ``url``."""
    folder, _, name = url.rpartition("/")
    place = store.join(folder or ("/" if url.startswith("/") else "."), name)
    tensors, version = read_bin(place, store)
    return Checkpoint(
        url=url,
        tensors=decode(tensors, None, url),
        shard_of=dict.fromkeys(tensors, 0),
        shards=(name,),
        versions={name: version},
    )


def read_bin(place: str, store: Store) -> tuple[dict[str, TensorRef], str]:
    """The tensors of the state dict in a file, in the order of their bytes; the file's version."""
    file = read_torch(window_of(place, store))
    tensors = state_dict(file)
    pieces = segments(file, tensors)
    found = [
        reference(name, tensor.dtype, tensor.shape, pieces[name])
        for name, tensor in tensors.items()
    ]
    found.sort(key=lambda tensor: tensor.segments[0].offset)
    return {tensor.name: tensor for tensor in found}, file.window.version or ""


def state_dict(file: TorchFile) -> dict[str, StoredTensor]:
    """The tensors of the state dict in a file, by name.

    Raises:
        CheckpointError: for a value that is none, and for tensors that are not in its top level.
    """
    what, value = file.window.what, file.value
    inner = [key for key in _INSIDE if isinstance(value, dict) and isinstance(value.get(key), dict)]
    if isinstance(value, dict) and len(inner) == 1:
        value = value[inner[0]]
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{what}: it holds a {_kind(value)} and no state dict: a map from names to tensors.\n"
            "  Save the state dict of the model: `torch.save(model.state_dict(), FILE)`."
        )
    found = tensors_of(value)
    nested = [
        str(key) for key, item in value.items() if isinstance(item, dict) and tensors_of(item)
    ]
    if not found or nested:
        lacks = f"tensors below {few(nested)}" if nested else "no tensor"
        raise CheckpointError(
            f"{what}: no plain state dict: it has {lacks}; its keys are "
            f"{few([ascii(key) for key in value if isinstance(key, str)], 5) or 'no texts'}.\n"
            "  Save the state dict of the model: `torch.save(model.state_dict(), FILE)`."
        )
    return found


def tensors_of(value: object) -> dict[str, StoredTensor]:
    """The tensors that a dict holds, by name."""
    if not isinstance(value, Mapping):
        return {}
    return {
        name: item
        for name, item in value.items()
        if isinstance(name, str) and isinstance(item, StoredTensor)
    }


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, StoredTensor) else type(value).__name__
