"""Zip archives by ranges: which bytes of a file are which entry. Nothing is ever decompressed.

An archive may be a whole file or a window of one: ``torch.distributed`` puts many into each file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shardmerge.errors import CheckpointError
from shardmerge.sources.tensor import Segment
from shardmerge.stores.api import Range, Store

MAX_DIRECTORY_BYTES = 256 << 20
_END = struct.Struct("<4s4H2LH")
_END_MARK = b"PK\x05\x06"
_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR_MARK = b"PK\x06\x07"
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_MARK = b"PK\x06\x06"
_ENTRY = struct.Struct("<4s6H3L5H2L")
_ENTRY_MARK = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3L2H")
LOCAL_MARK = b"PK\x03\x04"
_LARGE, _MANY = 0xFFFFFFFF, 0xFFFF
_LARGE_EXTRA = 1
_DAMAGED = "It is cut off or damaged. Copy or download it again"


@dataclass(slots=True)
class Window:
    """Bytes ``[start, start + size)`` of one version of an object, read piece by piece.

    Pieces that were fetched stay, so that a few large reads serve many small ones.
    """

    url: str
    start: int
    size: int
    version: str | None
    store: Store
    what: str
    pieces: list[tuple[int, bytearray]] = field(default_factory=list)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of the window; CheckpointError for those that lie beyond it."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.what}: it needs {nbytes:,} bytes from byte {offset:,} on, and has "
                f"{self.size:,}.\n  {_DAMAGED}."
            )
        held = self.held(offset, nbytes)
        if held is None:
            fetch([(self, offset, nbytes)])
            held = bytes(self.pieces[-1][1])
        return held

    def held(self, offset: int, nbytes: int) -> bytes | None:
        """The same, if a piece has them."""
        for begin, piece in self.pieces:
            if begin <= offset and offset + nbytes <= begin + len(piece):
                return bytes(memoryview(piece)[offset - begin : offset - begin + nbytes])
        return None

    def segment(self, offset: int, nbytes: int) -> Segment:
        """Bytes of the window as a place in the object."""
        return Segment(self.url, self.start + offset, nbytes, self.version)


def fetch(wanted: Iterable[tuple[Window, int, int]]) -> None:
    """Get pieces of windows of one store, ``(window, offset, nbytes)``, by one call."""
    ranges: list[Range] = []
    store: Store | None = None
    for window, offset, nbytes in wanted:
        piece = bytearray(nbytes)
        window.pieces.append((offset, piece))
        ranges.append(Range(window.url, window.start + offset, memoryview(piece), window.version))
        store = window.store
    if store is not None:
        store.read_ranges(ranges)


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored entry: where its local header lies in the window, and how many bytes it has."""

    name: str
    header: int
    nbytes: int


def read_directory(window: Window, tail_bytes: int) -> dict[str, Entry]:
    """The entries of the archive that fills the window, by name, in the order of the directory.

    Args:
        tail_bytes: read at first: mostly all that is needed.

    Raises:
        CheckpointError: for anything that is no whole archive, or has compressed entries.
    """
    tail_bytes = min(tail_bytes, window.size)
    tail = window.read(window.size - tail_bytes, tail_bytes)
    at = tail.rfind(_END_MARK)
    if at < 0 or at + _END.size > len(tail):
        raise CheckpointError(
            f"{window.what}: {window.size:,} bytes that do not end as torch's files do.\n"
            f"  {_DAMAGED}."
        )
    end = window.size - tail_bytes + at
    _, _, _, _, count, nbytes, start, comment = _END.unpack_from(tail, at)
    if end + _END.size + comment != window.size:
        raise _damaged(window, "bytes follow its end")
    large = end >= _LOCATOR.size and window.read(end - _LOCATOR.size, 4) == _LOCATOR_MARK
    if large or count == _MANY or _LARGE in (nbytes, start):
        count, nbytes, start, end = _large_end(window, end)
    if start + nbytes != end or nbytes > MAX_DIRECTORY_BYTES:
        raise _damaged(window, f"its directory of {nbytes:,} bytes is not where it should be")
    entries = _entries(window, window.read(start, nbytes), count)
    for entry in entries:
        if entry.header + _LOCAL.size + entry.nbytes > start:
            raise _damaged(window, f"entry {entry.name!a} reaches into its directory")
    found = {entry.name: entry for entry in entries}
    if len(found) != len(entries):
        raise _damaged(window, "two entries have the same name")
    return found


def _large_end(window: Window, end: int) -> tuple[int, int, int, int]:
    """Count, bytes and place of the directory of an archive of more than 4 GiB, and its end."""
    mark, _, at, _ = _LOCATOR.unpack(window.read(end - _LOCATOR.size, _LOCATOR.size))
    if mark != _LOCATOR_MARK:
        raise _damaged(window, "it lacks the end of a large archive")
    found = _END64.unpack(window.read(at, _END64.size))
    if found[0] != _END64_MARK:
        raise _damaged(window, "it lacks the end of a large archive")
    count, nbytes, start = found[7:]
    return count, nbytes, start, at


def _entries(window: Window, directory: bytes, count: int) -> list[Entry]:
    found: list[Entry] = []
    at = 0
    while at < len(directory):
        if at + _ENTRY.size > len(directory):
            raise _damaged(window, "its directory ends inside of an entry")
        fields = _ENTRY.unpack_from(directory, at)
        mark, flags, method = fields[0], fields[3], fields[4]
        packed, nbytes, name_bytes, extra_bytes, comment_bytes = fields[8:13]
        header = fields[16]
        name_at = at + _ENTRY.size
        extra_at = name_at + name_bytes
        at = extra_at + extra_bytes + comment_bytes
        if mark != _ENTRY_MARK or at > len(directory):
            raise _damaged(window, f"entry {len(found):,} of its directory is broken")
        name = directory[name_at:extra_at].decode(errors="replace")
        nbytes, packed, header = _large(
            directory[extra_at : extra_at + extra_bytes], nbytes, packed, header
        )
        if method != 0 or packed != nbytes or flags & 1:
            raise CheckpointError(
                f"{window.what}: entry {name!a} is compressed or encrypted: its elements "
                "cannot be read in place.\n"
                "  torch.save does neither. Unpack the archive and zip it with `zip -0`, or save "
                "it again."
            )
        found.append(Entry(name, header, nbytes))
    if len(found) != count:
        raise _damaged(window, f"its directory has {len(found):,} entries of {count:,}")
    return found


def _large(extra: bytes, *values: int) -> list[int]:
    """Sizes and offset of an entry; those that do not fit 32 bits stand in an extra field."""
    found = list(values)
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        if kind == _LARGE_EXTRA:
            body = extra[at + 4 : at + 4 + nbytes]
            for i, value in enumerate(values):
                if value == _LARGE and len(body) >= 8:
                    found[i], body = int.from_bytes(body[:8], "little"), body[8:]
        at += 4 + nbytes
    return found


def locate(window: Window, entries: Sequence[Entry]) -> list[int]:
    """Where in the window the bytes of each entry begin: told only by its local header.

    Raises:
        CheckpointError: for a header that is not the one of the directory.
    """
    sizes = [_LOCAL.size + len(entry.name.encode()) for entry in entries]
    held = [window.held(entry.header, n) for entry, n in zip(entries, sizes, strict=True)]
    # Not kept in the window: it would be searched for each of thousands of entries.
    aside = Window(window.url, window.start, window.size, window.version, window.store, window.what)
    fetch(
        (aside, entry.header, size)
        for entry, size, header in zip(entries, sizes, held, strict=True)
        if header is None
    )
    fetched = iter(aside.pieces)
    headers = [bytes(next(fetched)[1]) if header is None else header for header in held]
    return [
        _data_start(window, entry, header) for entry, header in zip(entries, headers, strict=True)
    ]


def _data_start(window: Window, entry: Entry, header: bytes) -> int:
    mark, *_, name_bytes, extra_bytes = _LOCAL.unpack_from(header)
    if mark != LOCAL_MARK or header[_LOCAL.size :] != entry.name.encode():
        raise _damaged(window, f"entry {entry.name!a} is not where its directory says")
    start = entry.header + len(header) + int(extra_bytes)
    if name_bytes != len(header) - _LOCAL.size or start + entry.nbytes > window.size:
        raise _damaged(window, f"entry {entry.name!a} reaches beyond its end")
    return start


def _damaged(window: Window, why: str) -> CheckpointError:
    return CheckpointError(f"{window.what}: {why}.\n  {_DAMAGED}.")
