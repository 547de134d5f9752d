"""Whether a published checkpoint is whole, and still what its provenance record says.

The record is ``shardmerge.json`` beside the shards; it holds the size and the CRC-32 of each:
``{"shards": {"model.safetensors": {"bytes": 123, "crc32": "0a1b2c3d"}}, ...}``.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shardmerge.errors import CheckpointError, ShardmergeError, StoreError
from shardmerge.header import Header, is_plain_name, parse_index
from shardmerge.sources.folder import ADAPTER, INDEX, SAFETENSORS, SINGLE, few
from shardmerge.sources.hf import read_header
from shardmerge.stores import Range, Store, Stores

RECORD = "shardmerge.json"

_BUFFER_BYTES = 8 << 20
_MAX_THREADS = 8  # more only wait for the same disk; each has a buffer


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found.

    Args:
        problems: everything that is wrong; none when the checkpoint is good.
        shards: number of shards whose headers could be read.
        tensors: number of tensors in them.
        bytes: of all these shards, headers included.
        checksums: whether the shards' bytes were compared with a record, not only their structure.
    """

    problems: tuple[str, ...]
    shards: int
    tensors: int
    bytes: int
    checksums: bool

    @property
    def summary(self) -> str:
        """One line for people: what was looked at, and how closely."""
        how = "checksums compared" if self.checksums else "structure only: no checksums compared"
        found = f"{len(self.problems):,} problems" if self.problems else "no problem"
        return (
            f"{found} in {self.shards:,} shards, {self.tensors:,} tensors, {self.bytes:,} bytes "
            f"({how})"
        )


@dataclass(frozen=True, slots=True)
class _Record:
    """What the provenance record says of one file."""

    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class _Records:
    """What it says of all of them."""

    shards: Mapping[str, _Record]
    files: Mapping[str, _Record]


def verify(url: str, stores: Stores | None = None) -> VerifyReport:
    """Look at a published folder: index, headers, and every byte against the provenance record.

    Without a record only the structure is checked, and ``checksums`` is false.

    Raises:
        CheckpointError: for a path that is no folder. What is wrong inside is in the report.
        StoreError: for a folder that cannot be listed, or a scheme that is not supported.
    """
    stores = stores or Stores()
    url = stores.public(url)
    store = stores.open(url)
    if not store.is_folder(url):
        raise CheckpointError(f"{url}: no such folder. Give the folder that was published.")
    names = store.names(url)
    problems: list[str] = []
    listed, weight_map, total_size = _shards(url, store, names, problems)
    headers: dict[str, Header] = {}
    sizes: dict[str, int] = {}
    for shard in listed:
        try:
            headers[shard], found = read_header(store.join(url, shard), store)
            sizes[shard] = found.size
        except ShardmergeError as problem:
            problems.append(str(problem))
    problems += _structure(headers, weight_map, total_size, store.join(url, INDEX))
    record = _read_record(url, store, problems) if RECORD in names else None
    if record is not None:
        problems += _differences(record.shards, listed, store.join(url, RECORD))
        shards = {name: record.shards[name] for name in listed if name in record.shards}
        problems += _compare(url, store, {**shards, **record.files})
    return VerifyReport(
        problems=tuple(problems),
        shards=len(sizes),
        tensors=sum(len(header.tensors) for header in headers.values()),
        bytes=sum(sizes.values()),
        checksums=record is not None,
    )


# --- structure ------------------------------------------------------------------------------------


def _shards(
    url: str, store: Store, names: list[str], problems: list[str]
) -> tuple[list[str], Mapping[str, str] | None, object]:
    """The shards of the checkpoint; weight map and total size of its index, where it has one."""
    there = [name for name in names if name.endswith(SAFETENSORS)]
    if INDEX not in names:
        single = next((name for name in (SINGLE, ADAPTER) if name in names), None)
        if single is None:
            problems.append(f"{url}: neither {INDEX} nor {SINGLE}: not published yet, or removed.")
            return there, None, None
        listed, weight_map, total_size = [single], None, None
    else:
        try:
            weight_map, metadata = parse_index(
                store.read(store.join(url, INDEX)), store.join(url, INDEX)
            )
        except ShardmergeError as problem:
            problems.append(str(problem))
            return there, None, None
        listed, total_size = sorted(set(weight_map.values())), metadata.get("total_size")
    extra = sorted(set(there).difference(listed))
    if extra:
        problems.append(f"{url}: shards of no checkpoint ({len(extra)}): {few(extra)}.")
    return listed, weight_map, total_size


def _structure(
    headers: Mapping[str, Header],
    weight_map: Mapping[str, str] | None,
    total_size: object,
    index: str,
) -> Iterator[str]:
    """What the index and the headers say differently. Shards without a good header are left out."""
    if weight_map is None:
        return
    unnamed, misplaced = [], []
    for shard, header in headers.items():
        for name in header.tensors:
            if name not in weight_map:
                unnamed.append(f"{name!r} ({shard})")
            elif weight_map[name] != shard:
                misplaced.append(f"{name!r} ({shard}, by the index {weight_map[name]})")
    absent = [
        f"{name!r} ({shard})"
        for name, shard in weight_map.items()
        if shard in headers and name not in headers[shard].tensors
    ]
    for found, what in (
        (unnamed, "in a shard but not in the index"),
        (misplaced, "in another shard than the index says"),
        (absent, "in the index but not in their shard"),
    ):
        if found:
            yield f"{index}: tensors {what} ({len(found):,}): {few(found)}."
    stored = sum(tensor.nbytes for header in headers.values() for tensor in header.tensors.values())
    complete = len(headers) == len(set(weight_map.values()))
    if complete and total_size is not None and total_size != stored:
        yield f"{index}: total_size is {total_size}, but the tensors have {stored} bytes."


# --- checksums ------------------------------------------------------------------------------------


def _read_record(url: str, store: Store, problems: list[str]) -> _Records | None:
    place = store.join(url, RECORD)
    try:
        content = json.loads(store.read(place))
    except StoreError as problem:
        problems.append(str(problem))
        return None
    except (ValueError, RecursionError) as problem:
        problems.append(f"{place} is not JSON: {problem}.")
        return None
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        problems.append(f"{place}: has no object `shards`, which would hold the checksums.")
        return None
    files = content.get("files", {})  # an older record has none
    if not isinstance(files, dict):
        problems.append(f"{place}: `files` is not an object.")
        files = {}
    return _Records(_parse_entries(shards, place, problems), _parse_entries(files, place, problems))


def _parse_entries(
    entries: Mapping[str, object], place: str, problems: list[str]
) -> dict[str, _Record]:
    found: dict[str, _Record] = {}
    for name, entry in entries.items():
        parsed = _parse_entry(entry)
        if parsed is None or not all(map(is_plain_name, name.split("/", 1))):
            problems.append(f"{place}: the entry {ascii(name)[:120]} is damaged.")
        else:
            found[name] = parsed
    return found


def _parse_entry(entry: object) -> _Record | None:
    if not isinstance(entry, dict):
        return None
    nbytes, crc32 = entry.get("bytes"), entry.get("crc32")
    if type(nbytes) is not int or nbytes < 0 or not isinstance(crc32, str):
        return None
    return _Record(nbytes, int(crc32, 16)) if re.fullmatch(r"[0-9a-fA-F]{8}", crc32) else None


def _differences(record: Mapping[str, _Record], listed: list[str], place: str) -> Iterator[str]:
    missing = sorted(set(record).difference(listed))
    if missing:
        yield f"{place}: names shards of no checkpoint ({len(missing)}): {few(missing)}."
    extra = sorted(set(listed).difference(record))
    if extra:
        yield f"{place}: has no checksum of shards ({len(extra)}): {few(extra)}."


def _compare(url: str, store: Store, record: Mapping[str, _Record]) -> list[str]:
    """Size and CRC-32 of every shard against the record; several shards at a time."""
    if not record:
        return []
    threads = min(_MAX_THREADS, len(record), os.cpu_count() or 1)
    buffers = [memoryview(bytearray(_BUFFER_BYTES)) for _ in range(threads)]

    def compare(shard: str) -> str | None:
        buffer = buffers.pop()  # there is one for each thread
        try:
            return _compare_one(store.join(url, shard), store, record[shard], buffer)
        finally:
            buffers.append(buffer)

    with ThreadPoolExecutor(threads) as pool:
        return [problem for problem in pool.map(compare, record) if problem]


def _compare_one(place: str, store: Store, expected: _Record, buffer: memoryview) -> str | None:
    try:
        found = store.stat(place)
        if found is None:
            # A shard is reported with the headers.
            return None if place.endswith(SAFETENSORS) else f"{place}: is missing."
        if found.size != expected.nbytes:
            return f"{place}: has {found.size:,} bytes; {RECORD} says {expected.nbytes:,}."
        crc32 = 0
        for offset in range(0, found.size, len(buffer)):
            part = buffer[: min(len(buffer), found.size - offset)]
            store.read_ranges([Range(place, offset, part, found.version)])
            crc32 = zlib.crc32(part, crc32)
    except StoreError as problem:
        return str(problem)
    if crc32 != expected.crc32:
        return (
            f"{place}: its bytes have changed: CRC-32 {crc32:08x}; {RECORD} says "
            f"{expected.crc32:08x}."
        )
    return None
