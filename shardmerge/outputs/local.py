"""A folder of this machine, or of what is mounted on it, as the place of the output.

Shards are written under temporary names in a folder of their own inside OUT, at their final size,
and get their names when everything is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import socket
import threading
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from shardmerge.errors import LockedError, OutputError
from shardmerge.layout import Part, Shard
from shardmerge.outputs.api import LEDGER, LOCK, STAGING, PartKey, Receipt, Survey
from shardmerge.stores.api import in_name_order

_SPARE_BYTES = 16 * 2**20
"""Disk kept free for the ledger and the small files."""
_SPARE_FILES = 64
"""Files kept free, likewise."""
LEDGER_FILE = f"{LEDGER}.jsonl"


class LocalOutput:
    """A folder, which need not exist yet."""

    part_bytes: int | None = None
    buffers_parts = False
    whole_shards = True
    """On a shared file system, machines write whole pages, their neighbours' old bytes among them.
    """

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self.folder = folder
        self._staging = folder / STAGING

    # --- what readers see -----------------------------------------------------------------------

    def names(self, folder: str = "") -> list[str]:
        """Names directly in OUT, or in a folder in it, in name order; folders end with ``/``."""
        place = self.folder / folder
        if not place.is_dir():
            return []
        return in_name_order(path.name + "/" * path.is_dir() for path in place.iterdir())

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str, nbytes: int | None = None) -> bytes:
        """The first bytes of a file, or all."""
        with _writing(self.folder / name), (self.folder / name).open("rb") as file:
            return file.read(-1 if nbytes is None else nbytes)

    def write(self, name: str, content: bytes) -> None:
        """Make a small file, whole or not at all."""
        path = self.folder / name
        part = path.with_name(f".{path.name}.part")
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
            _sync_folder(path.parent)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are gone already are no error."""
        with _writing(self.folder):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            _sync_folder(self.folder)

    def clear(self) -> None:
        """Remove the folder."""
        with _writing(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
                _sync_folder(self.folder.parent)

    # --- the unfinished run ---------------------------------------------------------------------

    def is_unfinished(self) -> bool:
        """Whether a journal is there."""
        return (self._staging / LEDGER_FILE).exists()

    def locked(self, slice: str = "") -> contextlib.AbstractContextManager[None]:
        """The right to write; the system gives it back when the process ends."""
        return _locked(self._staging / (f"{LOCK}-{slice}" if slice else LOCK))

    def check_lock(self) -> None:
        """Nobody can take it while this process lives."""

    def forget(self) -> None:
        """Remove everything unfinished but the lock."""
        # The ledger first: it must not outlive what it says is written.
        paths = sorted(self._staging.iterdir(), key=lambda path: path.name != LEDGER_FILE)
        with _writing(self._staging):
            for path in paths:
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def journal(self, slice: str = "") -> LocalJournal:
        """The journal, made if it is not there."""
        return LocalJournal(self._staging / (f"{LEDGER}-{slice}.jsonl" if slice else LEDGER_FILE))

    def slices(self) -> list[str]:
        """Names of the slices that have a journal."""
        found = self._staging.glob(f"{LEDGER}-*.jsonl")
        return sorted(path.stem.removeprefix(f"{LEDGER}-") for path in found)

    def survey(
        self,
        shards: Sequence[Shard],
        receipts: Mapping[PartKey, Receipt],
        handles: Mapping[int, str],
        *,
        cleared: bool,
    ) -> Survey:
        """What is there of shards: staged files of their size, or their names."""
        sealed: set[int] = set()
        still: dict[int, str] = {}
        for number, shard in enumerate(shards):
            staged = self._staged(shard)
            if _has_size(staged, shard.nbytes):
                if number in handles:
                    still[number] = handles[number]
            elif cleared and not staged.exists() and (self.folder / shard.name).exists():
                sealed.add(number)
        # A file that was made again is as large as the one that somebody removed, and empty.
        lost = frozenset(
            key
            for key, receipt in receipts.items()
            if key[0] not in sealed and receipt.tag != still.get(key[0])
        )
        return Survey(frozenset(sealed), lost, still)

    def prove(self, shards: Sequence[Shard], sealed: frozenset[int]) -> None:
        """Refuse a disk that cannot hold the output, before anything is read."""
        needed = _SPARE_BYTES
        for number, shard in enumerate(shards):
            if number not in sealed:
                needed += shard.nbytes - _occupied(self._staged(shard))
        room = os.statvfs(self.folder)
        if room.f_bavail * room.f_frsize < needed:
            raise OutputError(
                f"{self.url} has {room.f_bavail * room.f_frsize:,} bytes free; the output needs "
                f"{needed:,} more.\n  Free some, or give another place."
            )
        if room.f_files > 0 and room.f_favail < len(shards) + _SPARE_FILES:
            raise OutputError(
                f"{self.url} has room for {room.f_favail} more files; that is too few."
            )

    def begin(self, shards: Sequence[Shard], numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Make every shard at its final size, so that a full disk is found before any read.

        The handle only tells one making from another.
        """
        for number in numbers:
            path = self._staged(shards[number])
            with _writing(path):
                file = _open(path, create=True)
                try:
                    _allocate(file, shards[number].nbytes)
                finally:
                    os.close(file)
            yield number, uuid.uuid4().hex
        with _writing(self._staging):
            _sync_folder(self._staging)
            _sync_folder(self.folder)

    def writer(self, shards: Sequence[Shard], handles: Mapping[int, str]) -> LocalWriter:
        """A writer of shards that were begun."""
        paths = {number: self._staged(shards[number]) for number in handles}
        return LocalWriter(paths, handles)

    def seal(
        self,
        shards: Sequence[Shard],
        receipts: Mapping[PartKey, Receipt],
        handles: Mapping[int, str],
    ) -> None:
        """Give shards their names; those that have them already stay."""
        with _writing(self.folder):
            for shard in shards:
                source, target = self._staged(shard), self.folder / shard.name
                if _has_size(source, shard.nbytes):
                    source.rename(target)
                elif not _has_size(target, shard.nbytes):
                    raise OutputError(
                        f"{source} is gone. Someone removed it while the run was being published;\n"
                        "  run the same command again: what is lost is done again."
                    )
            _sync_folder(self.folder)

    def tidy(self) -> None:
        """Remove everything unfinished."""
        # While the ledger is there, a crash here is finished by the next run; the lock is last, so
        # that no other run begins in a folder that is being removed.
        order = (LEDGER_FILE, LOCK)
        with _writing(self._staging):
            found = [path for path in self._staging.iterdir() if path.name not in order]
            for path in [*found, *(self._staging / name for name in order)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            try:
                self._staging.rmdir()
            except OSError as problem:
                if problem.errno != errno.ENOTEMPTY:  # else another run has just begun there
                    raise
            _sync_folder(self.folder)

    def leftovers(self) -> list[str]:
        """What an unfinished run has left."""
        if not self._staging.is_dir():
            return []
        return [str(self._staging), *map(str, sorted(self._staging.iterdir()))]

    def _staged(self, shard: Shard) -> Path:
        return self._staging / f"{shard.name}.part"


class LocalJournal:
    """A file of lines."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        with _writing(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o666)
            _sync_folder(path.parent)

    def lines(self) -> list[str]:
        """All whole lines; one that was torn by a crash is cut off."""
        with _writing(self._path):
            text = self._path.read_bytes()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                os.ftruncate(self._file, whole)
        return text[:whole].decode().splitlines()

    def append(self, lines: Sequence[str]) -> None:
        """Add lines."""
        text = "".join(f"{line}\n" for line in lines).encode()
        before = os.fstat(self._file).st_size
        try:
            while text:
                text = text[os.write(self._file, text) :]
            os.fsync(self._file)
        except OSError as problem:
            # Half a line must not stand before the next one; reading cuts off only the last.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise write_failed(self._path, problem) from problem

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class LocalWriter:
    """Output shards at their final size; parts go to their place by ``pwrite``."""

    def __init__(self, paths: Mapping[int, Path], handles: Mapping[int, str]) -> None:
        self._paths = dict(paths)
        self._handles = dict(handles)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[LocalWriter], tuple[dict[int, Path], dict[int, str]]]:
        """A worker process opens its own files."""
        return (LocalWriter, (self._paths, self._handles))

    def part(self, part: Part) -> LocalPart:
        """A writer of one part."""
        number = part.shard
        return LocalPart(self._open(number), part, self._paths[number], self._handles[number])

    def sync(self, shards: Iterable[int]) -> None:
        """Make every byte durable that was written to these shards before this call."""
        for number in sorted(shards):
            with _writing(self._paths[number]):
                os.fdatasync(self._open(number))

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def _open(self, number: int) -> int:
        with self._lock:
            if number not in self._files:
                with _writing(self._paths[number]):
                    # Only ``begin`` makes a file: one made here would be taken for the shard.
                    self._files[number] = _open(self._paths[number], create=False)
            return self._files[number]


class LocalPart:
    """Writes one part as its bytes come."""

    def __init__(self, file: int, part: Part, path: Path, handle: str) -> None:
        self._file = file
        self._part = part
        self._path = path
        self._handle = handle
        self._position = part.start
        self._crc32 = 0

    def write(self, data: memoryview | bytes) -> None:
        """Write the next bytes."""
        view = memoryview(data)
        self._crc32 = zlib.crc32(view, self._crc32)
        with _writing(self._path):
            while view:
                written = os.pwrite(self._file, view, self._position)
                self._position += written
                view = view[written:]

    def finish(self, non_finite: Sequence[tuple[int, int]]) -> Receipt:
        """The proof, once every byte is written; durable after ``sync``."""
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
            tag=self._handle,
            non_finite=tuple(non_finite),
        )


# --- files ----------------------------------------------------------------------------------------


def _open(path: Path, *, create: bool) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    return os.open(path, flags, 0o666)


def _has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


def _occupied(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0


def _allocate(file: int, nbytes: int) -> None:
    """Give a file its size and, where the file system can, its room on the disk."""
    os.ftruncate(file, nbytes)
    # Not posix_fallocate: where a file system cannot reserve, that writes every block instead.
    if nbytes and _fallocate()(file, 0, 0, nbytes) != 0:
        number = ctypes.get_errno()
        # The size is set, and a full disk is found when writing.
        if number not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number))


@cache
def _fallocate() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = _take_lock(path)
    try:
        yield
    finally:
        os.close(file)


def _take_lock(path: Path) -> int:
    while True:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(file, 200).decode(errors="replace") or "another process"
                os.close(file)
                raise LockedError(
                    f"{path.parent.parent} is being written by {owner}.\n"
                    "  Wait for it, or stop it and run this command again to go on from there."
                ) from None
            except BaseException:
                os.close(file)
                raise
            if _same_file(file, path):
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return file
            os.close(file)  # the run that held it has published and removed the folder


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise write_failed(Path(str(problem.filename or path)), problem) from problem


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
