"""Bytes to their place in an output shard. Knows no tensors.

Shards are written under temporary names in a folder of their own inside OUT, at their final size,
and get their names when everything is there. A part that was written is proved by a receipt; it is
durable, and may enter the ledger, after ``sync``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardmerge.errors import OutputError
from shardmerge.layout import Part, Shard

STAGING = ".shardmerge"
"""Folder in OUT of everything that is not published yet: shards, ledger, lock."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a part was written.

    Args:
        crc32: of the part's bytes.
        non_finite: (tensor number, input number) of inputs that hold NaN or infinity in it; input
            -1 is the result of finite inputs.
    """

    shard: int
    number: int
    nbytes: int
    crc32: int
    non_finite: tuple[tuple[int, int], ...] = ()


class PartWriter:
    """Writes one part from its first byte to its last."""

    def __init__(self, file: int, part: Part, path: Path) -> None:
        self._file = file
        self._part = part
        self._path = path
        self._position = part.start
        self._crc32 = 0

    def write(self, data: memoryview | bytes) -> None:
        """Write the next bytes."""
        view = memoryview(data)
        self._crc32 = zlib.crc32(view, self._crc32)
        while view:
            try:
                written = os.pwrite(self._file, view, self._position)
            except OSError as problem:
                raise write_failed(self._path, problem) from problem
            self._position += written
            view = view[written:]

    def receipt(self, non_finite: Sequence[tuple[int, int]]) -> Receipt:
        """The proof, once every byte is written."""
        if self._position != self._part.stop:
            raise AssertionError(
                f"part {self._part.number} of {self._path.name}: {self._position} bytes written "
                f"up to, {self._part.stop} planned"
            )
        return Receipt(
            shard=self._part.shard,
            number=self._part.number,
            nbytes=self._part.nbytes,
            crc32=self._crc32,
            non_finite=tuple(non_finite),
        )


class ShardWriter:
    """Output shards of one run, in a local folder."""

    def __init__(self, out: Path, shards: Sequence[Shard]) -> None:
        self._paths = [staged(out, shard) for shard in shards]
        self._sizes = [shard.nbytes for shard in shards]
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def reserve(self, done: set[int]) -> None:
        """Create every shard at its final size, so that a full disk is found before the first read.

        Args:
            done: shards that already have their final name.
        """
        for number, path in enumerate(self._paths):
            if number in done:
                continue
            try:
                file = self._open(number)
                _allocate(file, self._sizes[number])
            except OSError as problem:
                raise write_failed(path, problem) from problem

    def part(self, part: Part) -> PartWriter:
        """A writer of one part."""
        with self._lock:
            file = self._open(part.shard)
        return PartWriter(file, part, self._paths[part.shard])

    def sync(self, shards: Iterable[int]) -> None:
        """Make every byte durable that was written to these shards before this call."""
        for number in sorted(shards):
            try:
                os.fdatasync(self._files[number])
            except OSError as problem:
                raise write_failed(self._paths[number], problem) from problem

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def _open(self, number: int) -> int:
        if number not in self._files:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._files[number] = os.open(self._paths[number], flags, 0o666)
        return self._files[number]


def staged(out: Path, shard: Shard) -> Path:
    """Where a shard is written before it is published."""
    return out / STAGING / f"{shard.name}.part"


def _allocate(file: int, nbytes: int) -> None:
    os.ftruncate(file, nbytes)
    if nbytes == 0:
        return
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as problem:
        # Some file systems cannot reserve; the size is set, and a full disk is found when writing.
        if problem.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


@contextlib.contextmanager
def opened(writer: ShardWriter) -> Iterator[ShardWriter]:
    """The writer, closed at the end."""
    try:
        yield writer
    finally:
        writer.close()


def write_failed(path: Path, problem: OSError) -> OutputError:
    """What to tell a user about a failed write."""
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = os.statvfs(path.parent)
            room = f" ({free.f_bavail * free.f_frsize:,} bytes and {free.f_favail:,} files free)"
        except OSError:
            room = ""
        return OutputError(
            f"no space left at {path.parent}{room}. Free some and run the same command again; "
            "what was written is kept."
        )
    reason = problem.strerror or str(problem)
    return OutputError(
        f"cannot write {path}: {reason}. Mend that and run the same command again; "
        "what was written is kept."
    )
