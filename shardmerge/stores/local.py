"""Files of this machine, and of whatever is mounted on it. URLs are paths or ``file://`` URLs."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from shardmerge.errors import StoreError
from shardmerge.stores.api import Range, Stat, changed

MAX_OPEN = 128
"""Files kept open: five models of 160 shards each would come near the usual limit of 1,024."""

_FILE_SCHEME = "file://"


class LocalStore:
    """A store of local files; any number of threads can read at once.

    Files stay open between reads; the least recently used one is closed when there are too many. A
    read that follows a ``stat`` sees the file that ``stat`` saw, or a newer one.

    Args:
        max_open: files open at the same time. A thread that needs one more waits for a read to end.
    """

    def __init__(self, *, max_open: int = MAX_OPEN) -> None:
        self._files = _OpenFiles(max_open)

    def __reduce__(self) -> tuple[type[LocalStore], tuple[()]]:
        """A worker process opens its own files."""
        return (LocalStore, ())

    def stat(self, url: str) -> Stat | None:
        """Size and version of the file at ``url``; None where there is no ordinary file."""
        path = _path(url)
        try:
            found = Path(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            self._files.forget(path)
            return None
        except (OSError, ValueError) as problem:
            raise StoreError(_failed(url, "cannot be looked up", problem)) from problem
        if not stat.S_ISREG(found.st_mode):
            return None
        version = _version(found)
        self._files.forget(path, unless=version)
        return Stat(found.st_size, version)

    def is_folder(self, url: str) -> bool:
        """Whether ``url`` names an existing folder."""
        try:
            return stat.S_ISDIR(Path(_path(url)).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError) as problem:
            raise StoreError(_failed(url, "cannot be looked up", problem)) from problem

    def names(self, url: str) -> list[str]:
        """Names directly in the folder ``url``, in name order; folders end with ``/``."""
        try:
            with os.scandir(_path(url)) as entries:
                found = sorted((entry.name, entry.is_dir()) for entry in entries)
        except (OSError, ValueError) as problem:
            raise StoreError(_failed(url, "cannot be listed", problem)) from problem
        return [name + "/" if is_folder else name for name, is_folder in found]

    def join(self, url: str, name: str) -> str:
        """The URL of ``name`` in the folder ``url``: absolute, for workers that run elsewhere."""
        if url.startswith(_FILE_SCHEME):
            return url + ("" if url.endswith("/") else "/") + quote(name)
        return str(Path(_path(url)).absolute() / name)

    def read_ranges(self, ranges: Sequence[Range]) -> None:
        """Fill every buffer.

        Raises:
            StoreError: for a file that ends before a buffer is full, and for a failure.
            SourceChangedError: for a file of another version.
        """
        for item in ranges:
            if item.into.nbytes:  # an empty view cannot be cast
                self._read(item, item.into.cast("B"))

    def _read(self, item: Range, view: memoryview) -> None:
        if item.offset < 0:  # preadv takes -1 for the current position
            raise StoreError(f"{item.url}: no byte {item.offset:,}: an offset is at least 0.")
        path, done = _path(item.url), 0
        try:
            with self._files.opened(path) as file:
                if item.version not in (None, file.version):
                    raise changed(item.url)
                while done < len(view):
                    count = os.preadv(file.descriptor, [view[done:]], item.offset + done)
                    if count == 0:
                        break
                    done += count
        except (OSError, ValueError, OverflowError) as problem:
            self._files.forget(path)  # a stale handle of a network mount heals by opening it again
            at = f"cannot be read at byte {item.offset + done:,}"
            raise StoreError(_failed(item.url, at, problem)) from problem
        if done < len(view):
            raise StoreError(
                f"{item.url}: wanted {len(view):,} bytes from byte {item.offset:,} on, but it ends "
                f"after {done:,} of them.\n"
                "  It is cut off, or became shorter. Copy or download it again."
            )

    def read(self, url: str) -> bytes:
        """All bytes of a small file."""
        found = self.stat(url)
        if found is None:
            raise StoreError(f"{url}: no such file. Check the path.")
        data = bytearray(found.size)
        self.read_ranges([Range(url, 0, memoryview(data), found.version)])
        return bytes(data)

    def close(self) -> None:
        """Close the files that no thread is reading; the store can be used again."""
        self._files.close()


@dataclass(slots=True)
class _OpenFile:
    descriptor: int
    version: str
    readers: int = 1


class _OpenFiles:
    """Descriptors by path, the least recently used first; none is closed while it is read."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._by_path: OrderedDict[str, _OpenFile] = OrderedDict()
        self._count = (
            0  # open ones: those in the map, those forgotten but still read, those on their way
        )

    @contextmanager
    def opened(self, path: str) -> Iterator[_OpenFile]:
        file = self._take(path)
        try:
            yield file
        finally:
            with self._changed:
                file.readers -= 1
                if file.readers == 0:
                    if self._by_path.get(path) is not file:
                        self._close(file)
                    self._changed.notify_all()

    def forget(self, path: str, *, unless: str | None = None) -> None:
        """Make the next read of ``path`` open it again, unless its version is ``unless``."""
        with self._changed:
            file = self._by_path.get(path)
            if file is not None and file.version != unless:
                del self._by_path[path]
                if file.readers == 0:
                    self._close(file)

    def close(self) -> None:
        with self._changed:
            for path in list(self._by_path):
                self.forget(path)

    def __del__(self) -> None:
        """Nobody reads any more."""
        for file in self._by_path.values():
            os.close(file.descriptor)

    def _take(self, path: str) -> _OpenFile:
        with self._changed:
            while True:
                file = self._by_path.get(path)
                if file is not None:
                    file.readers += 1
                    self._by_path.move_to_end(path)
                    return file
                if self._count < self._limit or self._close_idle():
                    break
                self._changed.wait()
            self._count += 1
        return self._open(path)

    def _open(self, path: str) -> _OpenFile:
        """Open ``path``, without the lock: it takes long on a remote mount."""
        descriptor = None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            file = _OpenFile(descriptor, _version(os.fstat(descriptor)))
        except BaseException:
            with self._changed:
                if descriptor is not None:
                    os.close(descriptor)
                self._count -= 1
                self._changed.notify_all()
            raise
        with self._changed:
            # Two threads may have opened the same path: the first one stays in the map, the other
            # is closed by its reader.
            self._by_path.setdefault(path, file)
        return file

    def _close_idle(self) -> bool:
        for path, file in self._by_path.items():
            if file.readers == 0:
                del self._by_path[path]
                self._close(file)
                return True
        return False

    def _close(self, file: _OpenFile) -> None:
        os.close(file.descriptor)
        self._count -= 1
        self._changed.notify_all()


def _path(url: str) -> str:
    """The path that ``url`` names."""
    if url.startswith(_FILE_SCHEME):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise StoreError(
                f"{url}: names the host {parts.netloc!r}, but file:// URLs are only read on this\n"
                "  machine. Write three slashes: file:///folder/name."
            )
        return unquote(url[len(_FILE_SCHEME) + len(parts.netloc) :])
    if not url:
        raise StoreError("an empty path names no file. Give the path of a folder or file.")
    if url == "~" or url.startswith("~/"):
        try:
            return str(Path(url).expanduser())
        except RuntimeError as problem:
            raise StoreError(f"{url}: {problem} Write the path out.") from problem
    return url


def _version(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"


def _failed(url: str, what: str, problem: Exception) -> str:
    why = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return f"{url}: {what}: {why}. Check the path, its permissions and the mount."
