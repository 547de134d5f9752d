"""A Hugging Face Hub with as much of its interface as huggingface_hub needs to read models."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.web import Handler, Site

LFS_SUFFIXES = (".safetensors", ".bin")
POINTER_BYTES = 134
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True, slots=True)
class File:
    """A file of a commit.

    Attributes:
        blob: the id that git gives it.
        sha256: of a file that is stored outside of git; else None.
    """

    path: Path
    size: int
    blob: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return f'"{self.sha256 or self.blob}"'

    @property
    def lfs(self) -> dict[str, object] | None:
        if self.sha256 is None:
            return None
        return {"size": self.size, "sha256": self.sha256, "pointerSize": POINTER_BYTES}


class _RefusedError(Exception):
    """An error answer: status, code and message for people."""


class Hub(Site):
    """Serves models from folders; weights come from a CDN on the other port.

    Leaving the ``with`` block fails if the CDN was ever sent a token, as the real one would see it.

    Attributes:
        url: what ``HF_ENDPOINT`` is set to.
        token: opens gated and private models.
        requests: what was asked for; ``server`` is ``front`` for the Hub, ``back`` for the CDN.
        leaked_tokens: Authorization headers that came to the CDN.
        expire_after: how many requests a CDN address answers before it is refused; None for ever.
    """

    def __init__(
        self,
        models: Mapping[str, Mapping[str, Path]],
        *,
        token: str = "hf_secret",
        gated: Collection[str] = (),
        private: Collection[str] = (),
        lists_gated: bool = True,
        expire_after: int | None = None,
    ) -> None:
        """Serve models.

        Args:
            models: folder of each revision of each model, ``{"org/name": {"main": folder}}``.
            token: the only one that is known.
            gated: models whose files need the token.
            private: models that seem not to exist without the token.
            lists_gated: whether the files of a gated model are listed for everybody, as the real
                Hub does.
        """
        self.token = token
        self.gated = gated
        self.private = private
        self.lists_gated = lists_gated
        self.expire_after = expire_after
        self.leaked_tokens: list[str] = []
        self._revisions: dict[tuple[str, str], str] = {}
        self._commits: dict[tuple[str, str], dict[str, File]] = {}
        self._stored: dict[str, File] = {}
        self._uses: Counter[int] = Counter()
        self._signed = 0
        self._expired = 0
        self._lock = threading.Lock()
        for model, revisions in models.items():
            for revision, folder in revisions.items():
                self.push(model, revision, folder)
        super().__init__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        assert error is not None or not self.leaked_tokens, "a token was sent to the CDN"

    def push(self, model: str, revision: str, folder: Path) -> str:
        """Make a folder the new commit of a revision; older commits stay readable by their sha.

        Returns:
            The sha of the commit, which follows from the names and the bytes of the files.
        """
        files = {
            path.relative_to(folder).as_posix(): _file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        names = "".join(f"{name} {file.blob}\n" for name, file in files.items())
        sha = hashlib.sha1(f"{model}\n{names}".encode()).hexdigest()
        self._revisions[model, revision] = sha
        self._commits[model, sha] = files
        self._stored |= {file.sha256: file for file in files.values() if file.sha256}
        return sha

    def commit(self, model: str, revision: str = "main") -> str:
        """The sha of a revision."""
        return self._revisions[model, revision]

    def expire(self) -> None:
        """Have every CDN address that was given out refused from now on."""
        with self._lock:
            self._expired = self._signed

    def answer(self, handler: Handler, port: str) -> None:
        url = urlsplit(handler.path)
        if port == "back":
            self._serve_stored(handler, url.path.strip("/"), parse_qs(url.query))
            return
        try:
            if match := API.fullmatch(url.path):
                self._serve_listing(handler, match, "blobs" in parse_qs(url.query))
            elif match := RESOLVE.fullmatch(url.path):
                self._serve_resolve(handler, match)
            else:
                handler.send_body(404)
        except _RefusedError as refused:
            status, code, message = refused.args
            told = {"X-Error-Code": code, "X-Error-Message": message}
            body = json.dumps({"error": message}).encode()
            handler.send_body(status, body, {"Content-Type": "application/json", **told})

    def _serve_listing(self, handler: Handler, match: re.Match[str], blobs: bool) -> None:
        model, kind, revision = match.groups()
        gated = model in self.gated and not self.lists_gated
        sha, files = self._opened(handler, model, revision or "main", gated)
        if kind == "tree":
            told: object = [_tree_item(name, file) for name, file in files.items()]
        else:
            told = {
                "id": model,
                "modelId": model,
                "sha": sha,
                "private": model in self.private,
                "gated": "manual" if model in self.gated else False,
                "siblings": [_sibling(name, file, blobs) for name, file in files.items()],
            }
        handler.send_body(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _serve_resolve(self, handler: Handler, match: re.Match[str]) -> None:
        model, revision, name = match.groups()
        sha, files = self._opened(handler, model, revision, model in self.gated)
        file = files.get(unquote(name))
        if file is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        told = {"X-Repo-Commit": sha}
        if file.sha256 is None:
            handler.send_file(file.path, file.etag, told, ranges=False)
            return
        told |= {
            "X-Linked-ETag": file.etag,
            "X-Linked-Size": str(file.size),
            "ETag": f'"{file.blob}"',
            "Location": self._address(file.sha256),
        }
        handler.send_body(302, f"Found. Redirecting to {told['Location']}".encode(), told)

    def _opened(
        self, handler: Handler, model: str, revision: str, gated: bool
    ) -> tuple[str, dict[str, File]]:
        """Sha and files of a commit, if the request may see it."""
        told = handler.header("Authorization")
        known = told == f"Bearer {self.token}"
        if told is not None and not known:
            raise _RefusedError(401, "", "Invalid credentials in Authorization header")
        exists = any(name == model for name, _ in self._revisions)
        if not exists or (model in self.private and not known):
            raise _RefusedError(404 if known else 401, "RepoNotFound", "Repository not found")
        if gated and not known:
            raise _RefusedError(403, "GatedRepo", f"Access to model {model} is restricted")
        revision = unquote(revision)
        sha = self._revisions.get((model, revision), revision)
        if (model, sha) not in self._commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self._commits[model, sha]

    def _address(self, sha256: str) -> str:
        with self._lock:
            self._signed += 1
            signature = self._signed
        return f"{self.back.url}/{sha256}?Expires=1767225600&Signature={signature}"

    def _serve_stored(self, handler: Handler, sha256: str, query: Mapping[str, list[str]]) -> None:
        token = handler.header("Authorization")
        if token is not None:
            self.leaked_tokens.append(token)
            handler.send_body(400, b"Only one auth mechanism allowed")
        elif not self._use(query.get("Signature", [""])[0]):
            handler.send_body(403, b"Request has expired")
        elif sha256 not in self._stored:
            handler.send_body(404)
        else:
            file = self._stored[sha256]
            handler.send_file(file.path, file.etag, {})

    def _use(self, signature: str) -> bool:
        """Count one use of a signature, if it is still good."""
        number = int(signature) if signature.isdecimal() else 0
        with self._lock:
            uses = self._uses[number]
            self._uses[number] += 1
            fresh = self._expired < number <= self._signed
            return fresh and (self.expire_after is None or uses < self.expire_after)


def _file(path: Path) -> File:
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    sha256 = hashlib.sha256(data).hexdigest() if path.name.endswith(LFS_SUFFIXES) else None
    return File(path, len(data), blob, sha256)


def _sibling(name: str, file: File, blobs: bool) -> dict[str, object]:
    if not blobs:
        return {"rfilename": name}
    lfs = {} if file.lfs is None else {"lfs": file.lfs}
    return {"rfilename": name, "size": file.size, "blobId": file.blob, **lfs}


def _tree_item(name: str, file: File) -> dict[str, object]:
    item = {"type": "file", "path": name, "size": file.size, "oid": file.blob}
    if file.sha256 is None:
        return item
    lfs = {"oid": file.sha256, "size": file.size, "pointerSize": POINTER_BYTES}
    return {**item, "lfs": lfs}
