"""A folder of files that hold whole tensors, with or without an index of them.

An index and files that do not name the same tensors in the same places are refused.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from shardmerge.errors import CheckpointError
from shardmerge.header import parse_index
from shardmerge.sources.folder import AT_A_TIME, CONFIG, beside, few, read_config, read_small
from shardmerge.sources.quantised import block_size, decode
from shardmerge.sources.tensor import BlockScale, Checkpoint, Segment, TensorRef
from shardmerge.stores.api import Store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that was opened.

    Args:
        place: its URL.
        version: of its bytes.
        tensors: makes its tensors, in the order of their bytes.
        text: all that they follow from but place and version; None where that is not at hand.
    """

    place: str
    version: str
    tensors: Callable[[], Mapping[str, TensorRef]]
    text: bytes | None = None


ReadShard = Callable[[str, Store], Shard]
"""Opens the file at a URL."""


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


@dataclass(frozen=True, slots=True)
class _Stored:
    """The tensors of a folder, and the addresses and versions of its shards."""

    tensors: Mapping[str, TensorRef]
    shard_of: Mapping[str, int]
    places: tuple[tuple[str, str], ...]


def open_shards(
    url: str,
    store: Store,
    read: ReadShard,
    *,
    names: Sequence[str],
    shard: str | None,
    index: str,
    suffix: str,
    twins: Twins | None = None,
) -> Checkpoint:
    """The checkpoint in a folder.

    Args:
        names: of all that is in the folder.
        shard: the only one; None where the index names them.
        index: name of the index.
        suffix: of the shards.
        twins: shared by checkpoints of one family.
    """
    versions: dict[str, str] = {}
    weight_map: Mapping[str, str] | None = None
    text, place = b"", store.join(url, index)
    twins = twins or Twins()
    if shard is None:
        text = read_small(url, store, index, versions)
        weight_map = twins.once([text], lambda: parse_index(text, place)[0])
        shards = sorted(set(weight_map.values()))
        _refuse_missing_shards(shards, names, suffix, place)
    else:
        shards = [shard]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        files = list(pool.map(lambda name: read(store.join(url, name), store), shards))
    versions |= {name: file.version for name, file in zip(shards, files, strict=True)}
    config = read_config(url, store, versions) if CONFIG in names else {}
    block = block_size(config, store.join(url, CONFIG))

    def make() -> _Stored:
        return _stored(url, shards, files, weight_map, block, place)

    texts = [file.text for file in files if file.text is not None]
    if len(texts) == len(files):
        stored = twins.once([text, repr((block, shards)).encode(), *texts], make)
    else:
        stored = make()
    beside_it, ignored = beside(url, store, names, frozenset({*shards, index}))
    return Checkpoint(
        url=url,
        tensors=_moved(stored, files),
        shard_of=stored.shard_of,
        shards=tuple(shards),
        config=config,
        files=beside_it,
        ignored=ignored,
        versions=versions,
    )


def _stored(
    url: str,
    shards: Sequence[str],
    files: Sequence[Shard],
    weight_map: Mapping[str, str] | None,
    block: tuple[int, int] | None,
    index: str,
) -> _Stored:
    """The tensors of all shards; refused where these do not fit together."""
    tensors: dict[str, TensorRef] = {}
    shard_of: dict[str, int] = {}
    twice: list[str] = []
    for number, file in enumerate(files):
        for name, tensor in file.tensors().items():
            if name in tensors:
                twice.append(f"{name!r} ({shards[shard_of[name]]}, {shards[number]})")
            tensors[name] = tensor
            shard_of[name] = number
    if weight_map is not None:
        _check_index(weight_map, shards, shard_of, twice, index)
    tensors = decode(tensors, block, url)
    return _Stored(tensors, {name: shard_of[name] for name in tensors}, _places(files))


def _places(files: Sequence[Shard]) -> tuple[tuple[str, str], ...]:
    return tuple((file.place, file.version) for file in files)


def _moved(stored: _Stored, files: Sequence[Shard]) -> Mapping[str, TensorRef]:
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
        if isinstance(decode, BlockScale):
            decode = BlockScale(moved(decode.scale), decode.rows, decode.columns)
        return TensorRef(ref.name, ref.dtype, ref.shape, (there,), decode)

    return {name: moved(ref) for name, ref in stored.tensors.items()}


def _refuse_missing_shards(
    shards: Sequence[str], names: Sequence[str], suffix: str, index: str
) -> None:
    if not shards:
        raise CheckpointError(f"{index}: names no tensor. Download the index again.")
    foreign = [shard for shard in shards if not shard.endswith(suffix)]
    if foreign:
        raise CheckpointError(
            f"{index}: names shards that are no {suffix} files: {few(foreign)}.\n"
            "  Only one kind is read at a time. Download the index again."
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
