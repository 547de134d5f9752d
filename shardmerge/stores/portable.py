"""Every other scheme that fsspec knows (``gs://``, ``az://``, ``memory://``, ...), by its drivers.

They copy, and they differ in what they check. So what came is counted here, and after each range
the object is asked for its version: one more small request, for bytes that can be trusted.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from shardmerge.errors import StoreError
from shardmerge.stores.api import Stat, changed, in_name_order
from shardmerge.stores.remote import RemoteStore, Request
from shardmerge.stores.retry import Patience, TransientError

_VERSIONS = ("ETag", "etag", "generation", "content_settings", "md5Hash", "mtime", "created")
"""What drivers tell that changes with an object; the first that is there counts."""
_AT_A_TIME = 4
"""Requests whose answers are in memory of their own, beside the buffers that they go to."""
_BUGS = (AttributeError, NotImplementedError, TypeError)


class PortableStore(RemoteStore):
    """Objects behind an fsspec driver."""

    def __init__(self, scheme: str, patience: Patience) -> None:
        super().__init__(patience)
        self._copying = threading.BoundedSemaphore(_AT_A_TIME)
        try:
            kind = fsspec.get_filesystem_class(scheme)
        except ImportError as problem:
            raise StoreError(
                f"{scheme}://: {problem}. Install it beside shardmerge, and run again."
            ) from None
        except ValueError:
            raise StoreError(
                f"{scheme}://: no such kind of place is known. There are local paths, s3://, "
                "hf://, http(s)://, and what fsspec has drivers for (gs://, az://, ...)."
            ) from None
        try:
            self._files: Any = kind()
        except Exception as problem:  # of any kind: no credentials, no account, no host
            raise StoreError(
                f"{scheme}://: its driver cannot be used as it is: {problem}.\n"
                "  Set what it needs in its own variables or in ~/.config/fsspec."
            ) from None

    def stat(self, url: str) -> Stat | None:
        """Size and version of the object at ``url``; None where there is none (or a folder)."""
        found = self._info(url)
        if found is None or found.get("type") == "directory":
            return None
        version = next((f"{key} {found[key]}" for key in _VERSIONS if found.get(key)), "")
        return Stat(int(found["size"]), f"{found['size']} {version}")

    def is_folder(self, url: str) -> bool:
        """Whether there is something below ``url``."""
        found = self._info(url)
        return found is not None and found.get("type") == "directory"

    def names(self, url: str) -> list[str]:
        """Names directly in the folder ``url``, in name order; folders end with ``/``."""
        if not self.is_folder(url):
            raise StoreError(f"{url}: there is no such folder. Check the name.")
        listed = self._try(url, "listing", lambda: self._files.ls(_path(url), detail=True))
        found = []
        for item in listed:
            name = str(item["name"]).rstrip("/").rpartition("/")[2]
            found.append(f"{name}/" if item.get("type") == "directory" else name)
        return in_name_order(found)

    def _info(self, url: str) -> dict[str, Any] | None:
        try:
            info: dict[str, Any] = self._try(url, "looking up", lambda: self._fresh(_path(url)))
        except FileNotFoundError:
            return None
        return info

    def _fresh(self, path: str) -> Any:
        self._files.invalidate_cache(path)
        return self._files.info(path)

    def _try(self, url: str, doing: str, call: Callable[[], Any]) -> Any:
        def attempt() -> Any:
            with _translated(url):
                return call()

        return self.patience.run(attempt, f"{doing} {url}")

    def _get(self, request: Request) -> None:
        url = request.url
        try:
            with self._copying, _translated(url):  # what a driver gives, it has allocated
                data = self._files.cat_file(_path(url), start=request.start, end=request.stop)
        except FileNotFoundError:
            raise StoreError(f"{url}: there is no such object. Check the name.") from None
        if request.version is not None:
            found = self.stat(url)
            if found is None or found.version != request.version:
                raise changed(url)
        if len(data) != request.stop - request.start:
            raise StoreError(
                f"{url}: {len(data):,} bytes instead of {request.stop - request.start:,} from "
                f"byte {request.start:,} on.\n  It is cut off, or became shorter."
            )
        request.fill(memoryview(data))


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """A driver's failures as ours; what is not there stays a ``FileNotFoundError``."""
    try:
        yield
    except (FileNotFoundError, *_BUGS):
        raise
    except PermissionError as problem:
        raise StoreError(
            f"{url}: access denied: {_words(problem)}. Check the credentials."
        ) from None
    except Exception as problem:  # drivers let their clients' own ones through
        raise TransientError(_words(problem)) from None


def _words(problem: Exception) -> str:
    """A driver's failure, without the queries of URLs, which may be signatures."""
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1", f"{type(problem).__name__}: {problem}")


def _path(url: str) -> str:
    return url.partition("://")[2]
