"""Models of the Hugging Face Hub: ``hf://org/name``, pinned to a commit when they are opened.

huggingface_hub knows caches, tokens and endpoints, and asks for lists of files. Ranges are read on
our own connections, from where the Hub sends us; such addresses expire, and are then asked for
again.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shardmerge.errors import CheckpointError, StoreError
from shardmerge.stores.api import Stat, in_name_order
from shardmerge.stores.http import (
    STALL_S,
    Http,
    RefusedError,
    followed,
    passing,
    range_headers,
    receive,
    same_server,
)
from shardmerge.stores.remote import RemoteStore, Request
from shardmerge.stores.retry import Patience, TransientError

_URL = re.compile(r"hf://([^/@]+/[^/@]+|[^/@]+)(?:@([^/]+))?(?:/(.*))?", re.DOTALL)
_NO_FILE = (404, 416)
_GIT_BYTES = 16 << 20
"""More than git itself may hold of a file on the Hub."""


@dataclass(frozen=True, slots=True)
class _File:
    size: int
    version: str


class HubStore(RemoteStore):
    """Files of the Hub; a folder is what has files below it.

    URLs hold the commit; those that do not mean the commit that is found when they are first used.
    """

    def __init__(self, patience: Patience, http: Http) -> None:
        super().__init__(patience)
        self._http = http
        self._listing = threading.Lock()
        self._files: dict[str, dict[str, _File]] = {}
        self._commits: dict[str, str] = {}
        self._addresses: dict[str, str] = {}

    @property
    def offline(self) -> bool:
        """Whether only the local cache may be asked (``HF_HUB_OFFLINE``)."""
        return bool(constants.HF_HUB_OFFLINE)

    def cached(self, url: str, revision: str | None) -> str | None:
        """The folder of a model in the local cache, perhaps not whole; None where there is none.

        Raises:
            StoreError: offline, for a model that is not in the cache.
        """
        model, own, folder = _parts(url)
        try:
            found = huggingface_hub.snapshot_download(
                model, revision=revision or own, local_files_only=True
            )
        except (LocalEntryNotFoundError, HFValidationError, ValueError):
            if self.offline:
                raise StoreError(
                    f"{url}: it is not in the local cache ({constants.HF_HUB_CACHE}), or not "
                    "whole, and HF_HUB_OFFLINE is set.\n"
                    "  Download it where there is a network, or unset it."
                ) from None
            return None
        return f"{found}/{folder}" if folder else str(found)

    def pinned(self, url: str, revision: str | None, *, sure: bool = True) -> str:
        """The same place at the commit that its revision is now.

        Args:
            sure: whether it is said to be a model of the Hub; else nothing is waited for.

        Raises:
            StoreError: for a model that does not exist or that may not be read.
        """
        model, own, folder = _parts(url)
        wanted = revision or own
        patience = self.patience if sure else Patience(0)
        info = self._ask(url, model, wanted, patience)
        place = f"hf://{model}@{info.sha}"
        with self._listing:
            self._files[place] = {
                item.rfilename: _File(int(item.size or 0), str(item.blob_id or info.sha))
                for item in info.siblings or ()
            }
        return f"{place}/{folder}" if folder else place

    def stat(self, url: str) -> Stat | None:
        """Size and version of the file at ``url``; None where there is none (or a folder)."""
        place, path = self._place(url)
        found = self._files[place].get(path)
        return None if found is None else Stat(found.size, found.version)

    def is_folder(self, url: str) -> bool:
        """Whether there are files below ``url``."""
        place, path = self._place(url)
        return any(name.startswith(f"{path}/" if path else "") for name in self._files[place])

    def names(self, url: str) -> list[str]:
        """Names directly in the folder ``url``, in name order; folders end with ``/``."""
        place, path = self._place(url)
        prefix = f"{path}/" if path else ""
        inside = [name[len(prefix) :] for name in self._files[place] if name.startswith(prefix)]
        if not inside:
            raise StoreError(f"{url}: there is no such folder. Check the name.")
        return in_name_order({name.partition("/")[0] + "/" * ("/" in name) for name in inside})

    def _place(self, url: str) -> tuple[str, str]:
        """The model at a commit, whose files are known from here on, and the path in it."""
        model, revision, path = _parts(url)
        named = f"hf://{model}@{revision}" if revision else f"hf://{model}"
        with self._listing:
            place = named if named in self._files else self._commits.get(named)
        if place is None:  # not opened, or by another process
            pinned = self.pinned(named, None)
            with self._listing:
                place = self._commits.setdefault(named, pinned)
        return place, path

    def _address(self, url: str) -> str:
        """Where the Hub says that a file is."""
        place, path = self._place(url)
        model, commit, _ = _parts(place)
        return huggingface_hub.hf_hub_url(model, path, revision=commit)

    def read(self, url: str) -> bytes:
        """All bytes of a small file, which the Hub may hold where no ranges are answered."""
        found = self.stat(url)
        if found is None:
            raise StoreError(f"{url}: there is no such file. Check the name.")

        def attempt() -> bytes:
            try:
                with followed(self._http, "GET", self._address(url), _token()) as response:
                    data = response.read()
            except RefusedError as problem:
                raise self._refused(url, problem) from None
            if len(data) != found.size:
                raise TransientError(f"{len(data)} bytes instead of {found.size}")
            return data

        return self.patience.run(attempt, f"reading {url}")

    def _get(self, request: Request) -> None:
        # The version is the commit's, and the address names the commit.
        asked = Request(request.url, None, request.start, request.stop, request.into)
        headers = range_headers(asked)
        known = self._addresses.get(request.url)
        if known is not None:
            try:
                with self._http.answer("GET", known, headers) as response:
                    return receive(response, asked)
            except RefusedError:  # it has expired
                self._addresses.pop(request.url, None)
        address = self._address(request.url)
        try:
            with followed(self._http, "GET", address, {**headers, **_token()}) as response:
                if not same_server(response.url, address):
                    self._addresses[request.url] = response.url
                self._receive(response, asked)
        except RefusedError as problem:
            raise self._refused(request.url, problem) from None

    def _receive(self, response: HTTPResponse, asked: Request) -> None:
        """As ``receive``; but files that lie in git itself come whole, whatever was asked for."""
        found = self.stat(asked.url)
        if response.status != 200 or found is None or found.size > _GIT_BYTES:
            receive(response, asked)
            return
        data = response.read()
        if len(data) != found.size:
            raise TransientError(f"{len(data)} bytes instead of {found.size}")
        if asked.stop > len(data):
            raise StoreError(f"{asked.url}: ends before byte {asked.stop:,}.")
        asked.fill(memoryview(data)[asked.start : asked.stop])

    def _ask(self, url: str, model: str, revision: str | None, patience: Patience) -> Any:
        def attempt() -> Any:
            try:
                return huggingface_hub.HfApi().model_info(
                    model, revision=revision, files_metadata=True, timeout=STALL_S
                )
            except GatedRepoError:
                raise StoreError(_gated(url)) from None
            except RepositoryNotFoundError:
                raise StoreError(
                    f"{url}: the Hub has no such model, or it is private.\n"
                    "  Check the name; for a private one, set HF_TOKEN or run `hf auth login`."
                ) from None
            except RevisionNotFoundError:
                raise StoreError(f"{url}: it has no revision {revision!r}.") from None
            except (HFValidationError, OfflineModeIsEnabled) as problem:
                raise StoreError(f"{url}: {problem}") from None
            except HfHubHTTPError as problem:
                status = problem.response.status_code
                if status in (401, 403):
                    raise StoreError(_gated(url)) from None
                if status in (429,) or status >= 500:
                    raise TransientError(f"the Hub answers {status}") from None
                raise StoreError(f"{url}: the Hub answers {status}: {problem}") from None
            except (errors.HTTPError, OSError) as problem:  # type: ignore[attr-defined]
                raise TransientError(str(problem), reached=False) from None

        return patience.run(attempt, f"looking up {url}")

    def _refused(self, url: str, problem: RefusedError) -> Exception:
        if problem.status in (401, 403):
            return StoreError(_gated(url))
        if problem.status in _NO_FILE:
            return StoreError(f"{url}: the Hub does not have these bytes ({problem}).")
        return passing(problem) or StoreError(f"{url}: the Hub answers {problem}.")


def _parts(url: str) -> tuple[str, str | None, str]:
    """Model, revision and path that a URL names."""
    match = _URL.fullmatch(url)
    if match is None:
        raise CheckpointError(f"{url}: not a model of the Hub. Write hf://org/name@revision.")
    return match[1], match[2], (match[3] or "").strip("/")


def _token() -> dict[str, str]:
    token = huggingface_hub.get_token()
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _gated(url: str) -> str:
    return (
        f"{url}: the Hub denies access.\n"
        "  If the model is gated, accept its licence on its page; then set HF_TOKEN to a token "
        "that may read it, or run `hf auth login`."
    )
