"""Checkpoints of ``torch.distributed.checkpoint``, as FSDP and torchtitan write them.

``.metadata`` says where each chunk of each tensor lies: a range of a ``.distcp`` file, which is
what ``torch.save`` makes of the chunk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.errors import CheckpointError
from shardmerge.header import is_plain_name
from shardmerge.numerics import DType
from shardmerge.sources.folder import CONFIG, beside, few, home_of, read_config
from shardmerge.sources.pickles import Made, Name, check_size, load_pickle
from shardmerge.sources.tensor import Checkpoint, Segment, TensorRef, ranges
from shardmerge.sources.torch_file import (
    MAX_RUNS,
    NAMES,
    StoredTensor,
    dtype_named,
    ends,
    read_torch,
    reference,
    segments,
    sizes_of,
)
from shardmerge.sources.zips import Window
from shardmerge.stores.api import Stat, Store

METADATA = ".metadata"
FSDP_FOLDER = "pytorch_model_fsdp_0/"
"""Where Hugging Face's libraries put the model, beside the optimizer."""
FSDP_OPTIMIZER_FOLDER = "optimizer_0/"
CHUNK_END_BYTES = 2048
"""Read from both ends of a chunk at first: all that is needed, but for long lists of sizes."""
MAX_PIECES = 1_000_000
"""Ranges of all tensors together; each takes about 150 bytes of memory."""

_CHUNKS_AT_A_TIME = 2048
_MODEL = "model"
_CONVERT = (
    "Convert it first: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE`"
)


def holds_dcp(names: Sequence[str]) -> bool:
    """Whether a folder is such a checkpoint, or has one in it."""
    return (
        METADATA in names
        or FSDP_FOLDER in names
        or any(name.endswith((".distcp", ".metadata")) for name in names)
    )


def open_dcp(url: str, store: Store, state: str | None = None) -> Checkpoint:
    """The checkpoint in ``url``, or in its folder ``pytorch_model_fsdp_0``.

    Of a checkpoint of a whole training, the tensors of the model are taken (``model_names``).

    Args:
        state: of the optimizer (``exp_avg_sq``), which is given in place of the weights, of the
            parameters that were trained only; from ``optimizer_0`` where there is one.
    Raises:
        CheckpointError: for a checkpoint that is not whole, or of a kind that is not supported; for
            one without this state.
    """
    place, names = url, store.names(url)
    folder = FSDP_FOLDER if state is None else FSDP_OPTIMIZER_FOLDER
    if METADATA not in names and folder in names:
        place = store.join(url, folder.rstrip("/"))
        names = store.names(place)
    described, version = _read_metadata(place, store, names, state)
    files = {chunk.file for tensor in described for chunk in tensor.chunks}
    found = _stat_all(place, store, names, files)
    tensors = dict(_tensors(place, store, described, found))
    home, prefix = home_of(place, store, names)
    inside = names if home == place else store.names(home)
    shards = sorted(prefix + name for name in found)
    number_of = {store.join(home, shard): number for number, shard in enumerate(shards)}
    versions = {prefix + name: stat.version for name, stat in found.items()}
    versions[prefix + METADATA] = version
    config = read_config(home, store, versions) if CONFIG in inside else {}
    own = frozenset({prefix} if prefix else found)
    copied, ignored = beside(home, store, inside, own)
    return Checkpoint(
        url=home,
        tensors=tensors,
        shard_of={name: number_of[ref.segments[0].url] for name, ref in tensors.items()},
        shards=tuple(shards),
        config=config,
        files=copied,
        ignored=ignored,
        versions=versions,
        cut=True,
    )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of a tensor, and the range of a file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


# --- names ----------------------------------------------------------------------------------------


def model_names(paths: Mapping[str, tuple[str, ...]]) -> dict[str, str] | list[str]:
    """Which keys are tensors of the model, and under which names.

    A checkpoint is a tree of dicts whose leaves have their paths joined by dots as keys. Steps that
    all paths have in common are left out. Where several dicts lie side by side, one of them must be
    called ``model``: it is taken, and the others (the optimizer) are not read.

    Args:
        paths: of each tensor, by key.

    Returns:
        Names by key; or, where it cannot be told which dict is the model, the dicts that are there.
    """
    left = dict(paths)
    while left and all(len(path) > 1 for path in left.values()):
        firsts = sorted({path[0] for path in left.values()})
        if len(firsts) > 1 and _MODEL not in firsts:
            return firsts
        wanted = firsts[0] if len(firsts) == 1 else _MODEL
        left = {key: path[1:] for key, path in left.items() if path[0] == wanted}
    nested = sorted({path[0] for path in left.values() if len(path) > 1})
    if nested:
        if _MODEL not in nested:
            return nested
        inside = {key: path[1:] for key, path in left.items() if path[0] == _MODEL and path[1:]}
        return model_names(inside)
    return {key: path[0] for key, path in left.items()}


def state_names(paths: Mapping[str, tuple[str, ...]], state: str) -> dict[str, str]:
    """Which keys are a state of the optimizer, and the names of their parameters.

    Torch writes them as ``optim.state.<parameter>.exp_avg_sq``, the first step named as one likes.

    Args:
        paths: of each tensor, by key.
    """
    pattern = re.compile(rf"(?:[^.]+\.)?state\.(.+)\.{re.escape(state)}")
    found = {key: pattern.fullmatch(".".join(path)) for key, path in paths.items()}
    return {key: match[1] for key, match in found.items() if match}


def _paths(keys: Iterable[str], planned: object) -> dict[str, tuple[str, ...]]:
    """The path of each key: as the planner wrote it down, else guessed from the keys."""
    listed = list(keys)
    if isinstance(planned, dict):
        found = {
            key: tuple([str(step) for step in path if isinstance(step, str | int)])
            for key in listed
            if isinstance(path := planned.get(key), tuple)
        }
        if len(found) == len(listed) and all(found.values()):
            return found
    tops = {key.partition(".")[0] for key in listed}
    if _MODEL in tops and tops & {"optimizer", "optim", "optimizers"}:
        return {key: tuple(key.split(".", 1)) for key in listed}
    return {key: (key,) for key in listed}


# --- the metadata ---------------------------------------------------------------------------------


def _read_metadata(
    place: str, store: Store, names: Sequence[str], state: str | None
) -> tuple[list[_Tensor], str]:
    where = store.join(place, METADATA)
    found = store.stat(where) if METADATA in names else None
    if found is None:
        partial = [name for name in names if name.endswith(".metadata") and name != METADATA]
        raise CheckpointError(
            f"{place}: no {METADATA}, which says where the tensors lie"
            + (f"; {few(partial)}, of single ranks, are not read" if partial else "")
            + ".\n  It is written last: the checkpoint or its copy is not complete. Copy it too."
        )
    check_size(found.size, where)
    fields = _fields(load_pickle(store.read(where), where, NAMES), "Metadata")
    described, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise _damaged(where, "it lacks its list of tensors")
    kinds = {
        key: own
        for key, value in described.items()
        if isinstance(key, str) and (own := _fields(value, "TensorStorageMetadata"))
    }
    paths = _paths(kinds, fields.get("planner_data"))
    chosen = model_names(paths) if state is None else state_names(paths, state)
    if not chosen and state is not None:
        raise CheckpointError(
            f"{where}: no {state} of any parameter among its {len(kinds):,} tensors: the optimizer "
            "was not saved,\n  or is not Adam. Take the squared task vector instead: "
            "--from task-vector."
        )
    if isinstance(chosen, list):
        raise CheckpointError(
            f"{where}: a state dict of {few(chosen, 8)}, and none of them is called 'model': it\n"
            f"  cannot be told which is to be merged. Save that one alone. {_CONVERT}."
        )
    if not chosen:
        raise CheckpointError(f"{where}: it lists no tensor. Give the folder of the model.")
    twice = len(chosen) - len(set(chosen.values()))
    if twice:
        raise _damaged(where, f"{twice:,} names of tensors occur twice")
    places = dict(_places(stored, where))
    return [
        _described(name, key, kinds[key], places, where) for key, name in chosen.items()
    ], found.version


def _fields(value: object, kind: str) -> Mapping[object, object]:
    """The state of an object of a class of torch's; empty for anything else."""
    if isinstance(value, Made) and value.name.endswith(f".{kind}"):
        return value.state if isinstance(value.state, dict) else {}
    return {}


def _places(
    stored: Mapping[object, object], where: str
) -> Iterator[tuple[tuple[str, tuple[int, ...]], tuple[str, int, int]]]:
    """File, offset and bytes of each chunk, by key and the chunk's place in the tensor."""
    for index, info in stored.items():
        own, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        key, offsets = own.get("fqn"), sizes_of(own.get("offset") or ())
        file, offset, nbytes = (place.get(k) for k in ("relative_path", "offset", "length"))
        if place.get("transform_descriptors"):
            raise CheckpointError(
                f"{where}: its chunks are compressed or otherwise transformed, which cannot be "
                f"read in place.\n  {_CONVERT}."
            )
        if (
            isinstance(key, str)
            and offsets is not None
            and isinstance(file, str)
            and isinstance(offset, int)
            and isinstance(nbytes, int)
        ):
            yield (key, offsets), (file, offset, nbytes)


def _described(
    name: str,
    key: str,
    fields: Mapping[object, object],
    places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]],
    where: str,
) -> _Tensor:
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, Made) else None
    code = state[0] if isinstance(state, tuple) and state else None
    dtype, shape, listed = dtype_named(code), sizes_of(fields.get("size")), fields.get("chunks")
    if dtype is None:
        told = code.text if isinstance(code, Name) else "unknown"
        raise CheckpointError(f"{where}: {name!r} is of dtype {told}, which is not merged.")
    if shape is None or not isinstance(listed, list):
        raise _damaged(where, f"{name!r} lacks its shape or its chunks")
    chunks = []
    for item in listed:
        own = _fields(item, "ChunkStorageMetadata")
        offsets, sizes = sizes_of(own.get("offsets")), sizes_of(own.get("sizes"))
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
            raise _damaged(where, f"a chunk of {name!r} lacks its place")
        place = places.get((key, offsets))
        if place is None:
            raise _damaged(where, f"the chunk of {name!r} at {list(offsets)} lies in no file")
        if not is_plain_name(place[0]):
            raise _damaged(where, f"{place[0]!a} is not the name of a file in this folder")
        chunks.append(_Chunk(offsets, sizes, *place))
    return _Tensor(name, dtype, shape, tuple(chunks))


def _damaged(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"{where}: {why}.\n  It is damaged. Copy the checkpoint again.")


# --- chunks ---------------------------------------------------------------------------------------


def runs_of(
    chunk: Sequence[int], sizes: Sequence[int], shape: Sequence[int], most: int = MAX_RUNS
) -> list[int] | int:
    """First elements, in a tensor, of the runs of neighbours that a chunk of it is made of. Pure.

    All runs are of the same length: the chunk's elements by their number.

    Args:
        chunk: the chunk's place in the tensor.
        sizes: of the chunk.
        shape: of the tensor.
        most: runs that are listed; of more only the number is given.
    """
    inner = len(shape)
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)  # along this dimension neighbours are still neighbours
    count = math.prod(sizes[:inner])
    if count > most:
        return count
    if math.prod(sizes) == 0:
        return []
    firsts, step = [0], math.prod(shape)
    for dimension, (begin, size, whole) in enumerate(zip(chunk, sizes, shape, strict=True)):
        step //= whole
        steps = range(begin, begin + (size if dimension < inner else 1))
        firsts = [first + i * step for first in firsts for i in steps]
    return firsts


def _stat_all(
    place: str, store: Store, names: Sequence[str], files: Iterable[str]
) -> dict[str, Stat]:
    wanted = sorted(files)
    safetensors = [name for name in wanted if not name.endswith(".distcp")]
    if safetensors:
        raise CheckpointError(
            f"{place}: its chunks lie in {few(safetensors)}; only .distcp files of torch.save are "
            f"read.\n  {_CONVERT}."
        )
    missing = sorted(set(wanted).difference(names))
    found = {name: store.stat(store.join(place, name)) for name in wanted if name not in missing}
    missing += [name for name, stat in found.items() if stat is None]
    if missing:
        raise CheckpointError(
            f"{place}: files missing ({len(missing)} of {len(wanted)}): {few(missing)}.\n"
            "  The copy is not complete; run it again."
        )
    return {name: stat for name, stat in found.items() if stat is not None}


def _tensors(
    place: str, store: Store, described: Sequence[_Tensor], files: Mapping[str, Stat]
) -> Iterator[tuple[str, TensorRef]]:
    total = 0
    for some in _batches(described):
        windows = {
            chunk: _window(place, store, chunk, tensor, files)
            for tensor in some
            for chunk in tensor.chunks
        }
        ends(windows.values(), CHUNK_END_BYTES)
        for tensor in some:
            ref = _assembled(tensor, [windows[chunk] for chunk in tensor.chunks], place)
            total += len(ref.segments)
            if total > MAX_PIECES:
                raise CheckpointError(
                    f"{place}: its tensors lie in more than {MAX_PIECES:,} pieces, as when they "
                    f"are sharded\n  along their last dimensions. {_CONVERT}."
                )
            yield tensor.name, ref


def _batches(described: Sequence[_Tensor]) -> Iterator[list[_Tensor]]:
    """Tensors whose chunks are looked at by one call."""
    held: list[_Tensor] = []
    count = 0
    for tensor in described:
        held.append(tensor)
        count += len(tensor.chunks)
        if count >= _CHUNKS_AT_A_TIME:
            yield held
            held, count = [], 0
    if held:
        yield held


def _window(
    place: str, store: Store, chunk: _Chunk, tensor: _Tensor, files: Mapping[str, Stat]
) -> Window:
    url, found = store.join(place, chunk.file), files[chunk.file]
    if chunk.offset < 0 or chunk.nbytes < 0 or chunk.offset + chunk.nbytes > found.size:
        raise CheckpointError(
            f"{url}: cut off: {tensor.name!r} ends at byte {chunk.offset + chunk.nbytes:,}, it has "
            f"{found.size:,}.\n  Copy it again."
        )
    what = f"{url}, at byte {chunk.offset:,} ({tensor.name})"
    return Window(url, chunk.offset, chunk.nbytes, found.version, store, what)


def _pieces(chunk: _Chunk, tensor: _Tensor, window: Window) -> Iterator[tuple[int, Segment]]:
    """First element in the tensor, and bytes, of each run of a chunk."""
    file = read_torch(window, CHUNK_END_BYTES)
    value = file.value
    stored = value if isinstance(value, StoredTensor) else None
    if stored is None or stored.shape != chunk.sizes or stored.dtype is not tensor.dtype:
        held = "no tensor" if stored is None else f"{stored.dtype.value} {list(stored.shape)}"
        raise CheckpointError(
            f"{window.what}: {held}; {METADATA} says {tensor.dtype.value} {list(chunk.sizes)}.\n"
            "  They belong to different checkpoints. Copy it again."
        )
    firsts = runs_of(chunk.offsets, chunk.sizes, tensor.shape)
    if isinstance(firsts, int):
        raise CheckpointError(
            f"{window.what}: a chunk of {list(chunk.sizes)} of {list(tensor.shape)}, sharded along "
            f"another\n  dimension than the first: in {firsts:,} pieces; at most {MAX_RUNS:,} are "
            f"read. {_CONVERT}."
        )
    (parts,) = segments(file, {tensor.name: stored}).values()
    whole = TensorRef(tensor.name, tensor.dtype, chunk.sizes, tuple(parts))
    each = whole.numel // len(firsts) if firsts else 0
    for number, first in enumerate(firsts):
        for piece in ranges(whole, number * each, (number + 1) * each):
            yield first, piece
            first += piece.nbytes // tensor.dtype.itemsize


def _assembled(tensor: _Tensor, windows: Sequence[Window], place: str) -> TensorRef:
    """The tensor of its chunks.

    Raises:
        CheckpointError: for chunks that leave a hole or overlap.
    """
    within = all(
        begin + size <= whole
        for chunk in tensor.chunks
        for begin, size, whole in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
    )
    pieces = [
        piece
        for chunk, window in zip(tensor.chunks, windows, strict=True)
        for piece in (_pieces(chunk, tensor, window) if within else ())
    ]
    pieces.sort(key=lambda piece: piece[0])
    begins = [first for first, _ in pieces]
    stops = [first + segment.nbytes // tensor.dtype.itemsize for first, segment in pieces]
    whole = math.prod(tensor.shape)
    if not within or not windows or [0, *stops] != [*begins, whole]:
        raise CheckpointError(
            f"{place}: the chunks of {tensor.name!r} of shape {list(tensor.shape)} leave a hole, "
            "overlap\n  or reach beyond it. The checkpoint is damaged. Copy it again."
        )
    parts = [segment for _, segment in pieces] or [windows[0].segment(0, 0)]
    return reference(tensor.name, tensor.dtype, tensor.shape, parts)
