"""A static web server that answers ranges rightly, or wrongly in the ways web servers do."""

from __future__ import annotations

import base64
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that was answered.

    Attributes:
        server: which port of the server it came to: ``front`` or ``back``.
        path: as sent, with the query.
        headers: by lower-case name.
        status: of the answer.
    """

    server: str
    method: str
    path: str
    headers: Mapping[str, str]
    status: int


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD alike, by ``answer``; keeps connections open."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Port

    def do_GET(self) -> None:
        self.server.owner.answer(self, self.server.name)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def header(self, name: str) -> str | None:
        """A header of the request; None where there is none."""
        return self.headers.get(name)

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        """Send the head of an answer and log the request."""
        told = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.server.name, self.command, self.path, told, status)
        self.server.owner.requests.append(seen)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_body(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with a few bytes; a HEAD gets their number only."""
        self.send_head(status, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(
        self, path: Path, etag: str, headers: Mapping[str, str], *, ranges: bool = True
    ) -> None:
        """Answer with a file, or with the range of it that was asked for.

        Args:
            etag: a strong one, in quotes.
            ranges: whether ranges are known; else the whole file is sent.
        """
        size = path.stat().st_size
        told = {"ETag": etag, "Accept-Ranges": "bytes" if ranges else "none", **headers}
        wanted = self.header("If-Match")
        if wanted is not None and wanted != "*" and etag not in re.split(r"\s*,\s*", wanted):
            self.send_body(412, headers=told)
            return
        span = _span(self.header("Range") or "", size) if ranges else None
        start, stop = span or (0, size)
        if span is not None and start >= stop:
            self.send_body(416, headers={**told, "Content-Range": f"bytes */{size}"})
            return
        if span is not None:
            told["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.send_head(200 if span is None else 206, stop - start, told)
        if self.command != "HEAD" and stop > start:
            with path.open("rb") as file:
                self.connection.sendfile(file, start, stop - start)


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """First byte and end of a range; empty if there is none; None for what may be ignored."""
    match = RANGE.fullmatch(asked)
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    start = int(match[1])
    if match[2] and int(match[2]) < start:
        return None
    return start, min(int(match[2]) + 1, size) if match[2] else size


class Port(ThreadingHTTPServer):
    """One port of a site."""

    request_queue_size = 128

    def __init__(self, owner: Site, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.owner = owner
        self.name = name
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none; everything else is told as usual."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Site:
    """Two ports, ``front`` and ``back``, and a log of the requests to both.

    Attributes:
        url: of the front.
        requests: what was answered, in order.
    """

    def __init__(self) -> None:
        self.requests: list[Seen] = []
        self.front = Port(self, "front")
        self.back = Port(self, "back")
        self.url = self.front.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for port in (self.front, self.back):
            port.shutdown()
            port.server_close()

    def answer(self, handler: Handler, port: str) -> None:
        """Answer a GET or HEAD that came to a port."""
        raise NotImplementedError


class WebServer(Site):
    """Serves the files of a folder.

    The switches are attributes too, and may be changed between requests.

    Attributes:
        redirect: the front answers 302 to the same path of the back.
        no_ranges: ranges are ignored: 200 and the whole file.
        auth: ``user:password`` that the front asks for, else 401; the back never asks.
    """

    def __init__(
        self,
        root: Path,
        *,
        redirect: bool = False,
        no_ranges: bool = False,
        auth: str | None = None,
    ) -> None:
        self.root = root.resolve()
        self.redirect = redirect
        self.no_ranges = no_ranges
        self.auth = auth
        super().__init__()

    def answer(self, handler: Handler, port: str) -> None:
        if port == "front" and self.auth is not None:
            wanted = "Basic " + base64.b64encode(self.auth.encode()).decode()
            if handler.header("Authorization") != wanted:
                handler.send_body(401, headers={"WWW-Authenticate": 'Basic realm="files"'})
                return
        if port == "front" and self.redirect:
            handler.send_body(302, headers={"Location": self.back.url + handler.path})
            return
        path = (self.root / unquote(urlsplit(handler.path).path).lstrip("/")).resolve()
        if not (path.is_relative_to(self.root) and path.is_file()):
            handler.send_body(404)
            return
        told = path.stat()
        etag = f'"{told.st_mtime_ns:x}-{told.st_size:x}"'
        handler.send_file(path, etag, {}, ranges=not self.no_ranges)
