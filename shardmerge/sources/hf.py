"""Checkpoints as Hugging Face's libraries write them: one safetensors file, or indexed shards.

Only headers, the index and ``config.json`` are read here, never an element. Whatever could make
another model out of the same bytes is refused: an index that does not fit its shards, packed or
quantised tensors whose values are not what is stored, several shards without an index.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from shardmerge.errors import CheckpointError
from shardmerge.header import Header, header_size, parse_header, parse_index
from shardmerge.numerics import DType
from shardmerge.sources.tensor import BlockScale, Checkpoint, Segment, TensorRef
from shardmerge.stores.api import Range, Stat, Store, scheme_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
SAFETENSORS = ".safetensors"

MAX_COPIED_BYTES = 64 << 20
"""Nothing beside the weights is larger; a bigger file is data that somebody left there."""

_FIRST_READ_BYTES = 1 << 20  # most headers are shorter, so that one read per shard is enough
_AT_A_TIME = 16

T = TypeVar("T")


class Twins:
    """What was made of texts that several checkpoints have: one family differs in elements alone.

    DeepSeek-V3's headers take 0.6 s of CPU to read and check, those of a twin 0.3 s. One checkpoint
    at a time: Python's threads would only take turns, which costs half as much again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[bytes, Any] = {}

    def once(self, texts: Iterable[bytes], make: Callable[[], T]) -> T:
        """What ``make`` gives for these texts; errors are those of each checkpoint itself."""
        digest = hashlib.blake2b(digest_size=16)
        for text in texts:
            digest.update(len(text).to_bytes(8, "little") + text)
        key = digest.digest()
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            found: T = self._made[key]
            return found


def open_hf(url: str, store: Store, twins: Twins | None = None) -> Checkpoint:
    """The checkpoint in the folder ``url``, or in the single ``.safetensors`` file ``url``.

    Args:
        twins: shared by checkpoints of one family, which takes less time and memory.
    Raises:
        CheckpointError: for a checkpoint that is missing, damaged or of an unsupported kind.
        StoreError: for bytes that could not be read.
    """
    if store.is_folder(url):
        return _open_folder(url, store, twins or Twins())
    if store.stat(url) is None:
        raise CheckpointError(_not_found(url, store))
    if not url.endswith(SAFETENSORS):
        raise CheckpointError(
            f"{url}: not a checkpoint: it is neither a folder nor a {SAFETENSORS} file.\n"
            f"  {_CONVERT}."
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
    header, found = read_header(place, store)
    tensors = _decode(dict(_references(header, place, found.version)), None, url)
    return Checkpoint(
        url=url,
        tensors=tensors,
        shard_of=dict.fromkeys(tensors, 0),
        shards=(name,),
        versions={name: found.version},
    )


@dataclass(frozen=True, slots=True)
class _File:
    """A shard's header, and where it is from."""

    shard: str
    url: str
    text: bytes
    found: Stat


@dataclass(frozen=True, slots=True)
class _Stored:
    """The tensors of a folder, and the addresses and versions of its shards."""

    tensors: Mapping[str, TensorRef]
    shard_of: Mapping[str, int]
    places: tuple[tuple[str, str], ...]


def _open_folder(url: str, store: Store, twins: Twins) -> Checkpoint:
    names = store.names(url)
    versions: dict[str, str] = {}
    index, place = b"", store.join(url, INDEX)
    weight_map: Mapping[str, str] | None = None
    if INDEX in names:
        index = _read_small(url, store, INDEX, versions)
        weight_map = twins.once([index], lambda: parse_index(index, place)[0])
        shards = sorted(set(weight_map.values()))
        _refuse_missing_shards(shards, names, place)
    else:
        shards = [_only_shard(url, names)]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        places = [store.join(url, shard) for shard in shards]
        headers = list(pool.map(lambda place: _read_header(place, store), places))
    files = [
        _File(shard, where, text, found)
        for shard, where, (text, found) in zip(shards, places, headers, strict=True)
    ]
    versions |= {file.shard: file.found.version for file in files}
    config = _read_config(url, store, versions) if CONFIG in names else {}
    block = _block_size(config, store.join(url, CONFIG))
    rest = repr((block, [(file.shard, file.found.size) for file in files])).encode()
    stored = twins.once(
        [index, rest, *(file.text for file in files)],
        lambda: _stored(url, files, weight_map, block, place),
    )
    beside, ignored = _beside(url, store, names, frozenset(shards))
    return Checkpoint(
        url=url,
        tensors=_moved(stored, files),
        shard_of=stored.shard_of,
        shards=tuple(shards),
        config=config,
        files=beside,
        ignored=ignored,
        versions=versions,
    )


def _stored(
    url: str,
    files: Sequence[_File],
    weight_map: Mapping[str, str] | None,
    block: tuple[int, int] | None,
    index: str,
) -> _Stored:
    """The tensors of all shards; refused where these do not fit together."""
    shards = [file.shard for file in files]
    tensors: dict[str, TensorRef] = {}
    shard_of: dict[str, int] = {}
    twice: list[str] = []
    for number, file in enumerate(files):
        header = parse_header(file.text, file.found.size, file.url)
        for name, tensor in _references(header, file.url, file.found.version):
            if name in tensors:
                twice.append(f"{name!r} ({shards[shard_of[name]]}, {file.shard})")
            tensors[name] = tensor
            shard_of[name] = number
    if weight_map is not None:
        _check_index(weight_map, shards, shard_of, twice, index)
    tensors = _decode(tensors, block, url)
    return _Stored(tensors, {name: shard_of[name] for name in tensors}, _places(files))


def _places(files: Sequence[_File]) -> tuple[tuple[str, str], ...]:
    return tuple((file.url, file.found.version) for file in files)


def _moved(stored: _Stored, files: Sequence[_File]) -> Mapping[str, TensorRef]:
    """The same tensors in these files."""
    places = _places(files)
    if places == stored.places:
        return stored.tensors
    to = {url: place for (url, _), place in zip(stored.places, places, strict=True)}

    def moved(ref: TensorRef) -> TensorRef:
        (segment,) = ref.segments
        url, version = to[segment.url]
        there = Segment(url, segment.offset, segment.nbytes, version)
        decode = ref.decode
        if decode is not None:
            decode = BlockScale(moved(decode.scale), decode.rows, decode.columns)
        return TensorRef(ref.name, ref.dtype, ref.shape, (there,), decode)

    return {name: moved(ref) for name, ref in stored.tensors.items()}


def _references(header: Header, url: str, version: str) -> Iterator[tuple[str, TensorRef]]:
    for name, tensor in header.tensors.items():
        segment = Segment(url, tensor.offset, tensor.nbytes, version)
        yield name, TensorRef(name, tensor.dtype, tensor.shape, (segment,))


def _read_small(url: str, store: Store, name: str, versions: dict[str, str]) -> bytes:
    """The bytes of a small file in the folder; its version goes to ``versions``."""
    place = store.join(url, name)
    found = store.stat(place)
    if found is None:
        raise CheckpointError(f"{place}: a link to a file that is gone. Download it again.")
    versions[name] = found.version
    return store.read(place)


def _read_config(url: str, store: Store, versions: dict[str, str]) -> dict[str, object]:
    try:
        config = json.loads(_read_small(url, store, CONFIG, versions))
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(
            f"{store.join(url, CONFIG)} is not JSON: {problem}. Download it again, or correct it."
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{store.join(url, CONFIG)} is not a JSON object. Download it again, or correct it."
        )
    return config


# --- which shards ---------------------------------------------------------------------------------

_CONVERT = (
    "Only safetensors are read. Load it with transformers, write it with `save_pretrained`,\n"
    "  and give that folder"
)
_KINDS: tuple[tuple[str, str], ...] = (
    (
        r"adapter_.*",
        "a LoRA adapter, which is not supported yet.\n  Merge it into its base model first (peft: "
        "`merge_and_unload`, then `save_pretrained`)",
    ),
    (
        r"global_step.*/|zero_to_fp32\.py|.*zero_pp_rank_.*",
        "a DeepSpeed checkpoint, which is not supported yet.\n  Convert it first: "
        "`python zero_to_fp32.py . OUT --safe_serialization`",
    ),
    (r".*\.distcp", f"a torch.distributed checkpoint, which is not supported yet.\n  {_CONVERT}"),
    (r".*\.gguf", f"a GGUF file, which is not supported yet.\n  {_CONVERT}"),
    (
        r".*\.(bin|pth|pt|ckpt)|pytorch_model.*\.index\.json",
        f"weights as torch.save writes them, which are not supported yet.\n  {_CONVERT}",
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
_TRAINING_STATE = re.compile(
    r"(training_args|trainer_state|scheduler|scaler)\..*|(optimizer|rng_state).*"
    r"|(all|train|eval|predict)_results\.json"
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
    for pattern, kind in _KINDS:
        matching = [
            name
            for name in names
            if re.fullmatch(pattern, name) and not _TRAINING_STATE.fullmatch(name)
        ]
        if matching:
            raise CheckpointError(
                f"{url}: no safetensors checkpoint. It holds {few(matching)}: {kind}."
            )
    held = f"It holds {few(names)}" if names else "It is empty"
    raise CheckpointError(
        f"{url}: no checkpoint in this folder. {held}.\n"
        f"  Give the folder that holds {INDEX} or {SINGLE}."
    )


def _refuse_missing_shards(shards: Sequence[str], names: Sequence[str], index: str) -> None:
    if not shards:
        raise CheckpointError(f"{index}: names no tensor. Download the index again.")
    foreign = [shard for shard in shards if not shard.endswith(SAFETENSORS)]
    if foreign:
        raise CheckpointError(
            f"{index}: names shards that are no {SAFETENSORS} files: {few(foreign)}.\n  {_CONVERT}."
        )
    missing = sorted(set(shards).difference(names))
    if missing:
        raise CheckpointError(
            f"{index}: shards missing ({len(missing)} of {len(shards)}): {few(missing)}.\n"
            "  The download or copy is not complete; run it again."
        )


def _check_index(
    weight_map: Mapping[str, str],
    shards: Sequence[str],
    shard_of: Mapping[str, int],
    twice: Sequence[str],
    index: str,
) -> None:
    """Refuse an index and shards that do not name the same tensors in the same places."""
    number_of = {shard: number for number, shard in enumerate(shards)}
    absent = [
        f"{name!r} ({shard})"
        for name, shard in weight_map.items()
        if shard_of.get(name) != number_of[shard]
    ]
    unnamed = [
        f"{name!r} ({shards[number]})"
        for name, number in shard_of.items()
        if name not in weight_map
    ]
    problems = [
        f"tensors {what} ({len(found):,}): {few(found)}"
        for found, what in (
            (twice, "in two shards"),
            (absent if not twice else [], "that are not in the shard that the index names"),
            (unnamed, "in a shard but not in the index"),
        )
        if found
    ]
    if problems:
        listed = ";\n  ".join(problems)
        raise CheckpointError(
            f"{index}: does not fit its shards:\n  {listed}.\n"
            "  They belong to different checkpoints, or one was changed. Download all of it again."
        )


def few(names: Iterable[str], count: int = 3) -> str:
    """The first ``count`` names and the number of the others, for messages."""
    listed = list(names)
    others = f" and {len(listed) - count:,} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + others


def _not_found(url: str, store: Store) -> str:
    if scheme_of(url) in ("http", "https"):  # nothing tells what is near it
        inside = "" if url.endswith(SAFETENSORS) else f", no {INDEX} and no {SINGLE} in it"
        return f"{url}: no such folder or file{inside}. Check the address."
    folder, _, name = url.rstrip("/").rpartition("/")
    parent = folder or ("/" if url.startswith("/") else ".")
    if store.is_folder(parent):
        names = [found.rstrip("/") for found in store.names(parent)]
        near = difflib.get_close_matches(name, names, n=3)
        if near:
            return f"{url}: no such folder or file. Near it there is: {', '.join(near)}."
        where = "here" if parent == "." else f"in {parent}"
        return f"{url}: no such folder or file {where}. Check the path."
    message = f"{url}: no such folder or file; {parent} does not exist either. Check the path."
    return message


# --- quantised checkpoints ------------------------------------------------------------------------

SCALE_SUFFIX = "_scale_inv"
_DEFAULT_BLOCK = (128, 128)
_DEQUANTISE = (
    "Merging needs the values themselves. Dequantise it first (load it with transformers,\n"
    "  `model.dequantize()`, `save_pretrained`), or take the checkpoint that it was made from"
)
_PACKED = (  # suffix of a companion, suffix of the tensor that is packed if both exist, method
    (".qzeros", ".qweight", "GPTQ or AWQ"),
    (".scales", ".qweight", "GPTQ or AWQ"),
    (".scales", ".weight", "MLX"),
    ("_scales", "_blocks", "mxfp4"),
    (".weight_packed", ".weight_packed", "compressed-tensors"),
    (".bitsandbytes__nf4", ".bitsandbytes__nf4", "bitsandbytes, 4 bits"),
    (".bitsandbytes__fp4", ".bitsandbytes__fp4", "bitsandbytes, 4 bits"),
    (".SCB", ".weight", "bitsandbytes, 8 bits"),
    (".W_q", ".W_q", "HQQ"),
    ("._scale", "._data", "quanto"),
    (".weight_scale", ".weight", "8 or 4 bits with a scale per tensor, channel or group"),
    (".scale_weight", ".weight", "fp8 with a scale per tensor"),
)
_COMPANIONS = tuple({companion for companion, _, _ in _PACKED})


def _block_size(config: Mapping[str, object], place: str) -> tuple[int, int] | None:
    """Rows and columns of a block of the fp8 that ``config`` declares; None for plain tensors.

    Raises:
        CheckpointError: for every other way of quantising.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            declared = part.get(key)
            if isinstance(declared, dict) and declared:
                return _block_size_of(declared, place)
            if declared:
                raise CheckpointError(f"{place}: {key} is not an object. Correct it.")
    return None


def _block_size_of(declared: Mapping[str, object], place: str) -> tuple[int, int]:
    method = declared.get("quant_method") or declared.get("quant_algo")
    if method is None:
        loaded = declared.get("load_in_4bit") or declared.get("load_in_8bit")
        method = "bitsandbytes" if loaded else "an unnamed method"
    if method != "fp8":
        raise CheckpointError(f"{place}: the tensors are quantised by {method}.\n  {_DEQUANTISE}.")
    block = declared.get("weight_block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
        or declared.get("activation_scheme", "dynamic") != "dynamic"
    ):
        raise CheckpointError(
            f"{place}: the tensors are quantised by fp8 with weight_block_size {block!r} and\n"
            f"  activation_scheme {declared.get('activation_scheme')!r}; only blocks of\n"
            f"  [rows, columns] with 'dynamic' are read. {_DEQUANTISE}."
        )
    return block[0], block[1]


def _decode(
    tensors: dict[str, TensorRef], block: tuple[int, int] | None, url: str
) -> dict[str, TensorRef]:
    """The tensors, each block-scaled fp8 weight joined to its scales, which disappear.

    Args:
        tensors: as the headers have them.
        block: rows and columns of a block as ``config.json`` declares them; None where it does not.
        url: the checkpoint, as messages name it.

    Raises:
        CheckpointError: for scales that do not fit, and for packed tensors.
    """
    _refuse_packed(tensors, url)
    scales = {name for name in tensors if name.endswith(SCALE_SUFFIX)}
    if block is None and not scales:
        return tensors
    problems = []
    joined: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        if name in scales:
            weight = tensors.get(name.removesuffix(SCALE_SUFFIX))
            if weight is None or not weight.dtype.is_fp8:
                problems.append(f"scales {name!r} without an fp8 tensor that they belong to")
        elif tensor.dtype.is_fp8:
            found = _scaled(tensor, tensors.get(name + SCALE_SUFFIX), block or _DEFAULT_BLOCK)
            if isinstance(found, str):
                problems.append(found)
            else:
                joined[name] = found
        else:
            joined[name] = tensor
    if problems:
        known = "" if block else f" (no quantization_config: blocks of {_DEFAULT_BLOCK} tried)"
        raise CheckpointError(
            f"{url}: block-scaled fp8 that does not fit together{known}:\n  "
            + ";\n  ".join(problems[:3])
            + (f";\n  and {len(problems) - 3:,} more" if len(problems) > 3 else "")
            + ".\n  Download the checkpoint again, or dequantise it first."
        )
    return joined


def _scaled(tensor: TensorRef, scale: TensorRef | None, block: tuple[int, int]) -> TensorRef | str:
    """An fp8 tensor with its block scales, or why they do not fit."""
    if scale is None:
        return f"fp8 tensor {tensor.name!r} without scales {tensor.name + SCALE_SUFFIX!r}"
    if len(tensor.shape) != 2:
        return f"fp8 tensor {tensor.name!r} of shape {list(tensor.shape)} is not a matrix"
    needed = tuple(-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
    if scale.shape != needed:
        return (
            f"scales {scale.name!r} of shape {list(scale.shape)}: {list(tensor.shape)} in blocks "
            f"of {list(block)} needs {list(needed)}"
        )
    if scale.dtype not in (DType.F32, DType.BF16):
        return f"scales {scale.name!r} are {scale.dtype.value}; F32 or BF16 are read"
    # Not ``replace``, which takes several times as long: there are 45,000 in a large checkpoint.
    decode = BlockScale(scale, *block)
    return TensorRef(tensor.name, tensor.dtype, tensor.shape, tensor.segments, decode)


def _refuse_packed(tensors: Mapping[str, TensorRef], url: str) -> None:
    """Refuse tensors whose names tell that the stored elements are not the values."""
    for name in tensors:
        if not name.endswith(_COMPANIONS):
            continue
        for companion, packed, method in _PACKED:
            weight = tensors.get(name.removesuffix(companion) + packed)
            if name.endswith(companion) and weight is not None and _is_packed(weight.dtype):
                raise CheckpointError(
                    f"{url}: the tensors are quantised ({method}): {weight.name!r} is "
                    f"{weight.dtype.value}, with {name!r}.\n  {_DEQUANTISE}."
                )


def _is_packed(dtype: DType) -> bool:
    return not dtype.is_float or dtype.is_fp8


# --- the other files of a folder ------------------------------------------------------------------

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth|pt|ckpt|gguf|h5|msgpack|onnx|onnx_data|distcp|npz|index\.json)"
    r"|consolidated\..*"
)
_COPIED = re.compile(
    r".*\.(json|model|txt|jinja|py|tiktoken|spm|bpe|codes)|tokenizer\..*|(LICENSE|NOTICE).*"
)
_NOT_COPIED = frozenset(
    {
        INDEX,
        "quantize_config.json",
        "quant_config.json",
        "hf_quant_config.json",
        "adapter_config.json",
        "shardmerge.json",  # how that checkpoint was made; a copy would be untrue
    }
)
_NOT_ENTERED = frozenset({"original/", "runs/", "logs/", "wandb/", "__pycache__/", "lost+found/"})


def _beside(
    url: str, store: Store, names: Sequence[str], shards: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files that a copy of the checkpoint needs, and the names of weights that are not read."""
    files = [name for name in names if _is_copied(name) and name != CONFIG]
    ignored = [name for name in names if _is_weights(name) and name not in shards | {INDEX}]
    ignored += [name for name in names if name == "original/"]
    for folder in names:
        if not folder.endswith("/") or folder in _NOT_ENTERED or folder.startswith("."):
            continue
        inner = store.names(store.join(url, folder))
        if any(map(_is_weights, inner)):
            ignored.append(folder)  # such as another format's folder, or a training checkpoint
        else:
            files += [folder + name for name in inner if _is_copied(name)]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        sizes = pool.map(lambda name: store.stat(store.join(url, name)), files)
        small = [name for name, found in zip(files, sizes, strict=True) if _is_small(found)]
    return tuple(sorted(small)), tuple(sorted(ignored))


def _is_small(found: Stat | None) -> bool:
    return found is not None and found.size <= MAX_COPIED_BYTES


def _is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None and _TRAINING_STATE.fullmatch(name) is None


def _is_copied(name: str) -> bool:
    return (
        _COPIED.fullmatch(name) is not None
        and _WEIGHTS.fullmatch(name) is None
        and _TRAINING_STATE.fullmatch(name) is None
        and name not in _NOT_COPIED
        and not name.startswith(".")
        and not name.endswith("/")
    )
