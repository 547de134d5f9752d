"""HTTP and HTTPS: requests on kept connections, and ranges of which every answer is checked.

Servers, proxies and client libraries have been seen to answer a range with fewer bytes, with the
whole object, or with bytes of another version, and none of that as an error. So status, place,
length and version of every answer are compared with what was asked for, here and nowhere else.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import os
import re
import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping, MutableMapping
from email.message import Message
from functools import cache
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from shardmerge.errors import StoreError
from shardmerge.stores.api import Stat, changed
from shardmerge.stores.remote import RemoteStore, Request
from shardmerge.stores.retry import Patience, TransientError

STALL_S = 30.0
"""Seconds without a byte after which a connection is given up."""
_ERROR_BYTES = 64 << 10
_MOST_REDIRECTS = 5
_SLICE_BYTES = 256 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_NO_HEAD = (400, 403, 405, 501)
"""How a server refuses HEAD that answers GET: a signature may hold for GET alone."""
_IN_URLS = "%/:=&?~#+!$,;'@()*[]|"
"""Characters of a path and query that are sent as they are."""
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
_STALE = (
    http.client.RemoteDisconnected,
    http.client.BadStatusLine,
    BrokenPipeError,
    ConnectionResetError,
)
"""How a kept connection ends that the server has closed meanwhile."""

Headers = Mapping[str, str] | Message


class DeniedError(StoreError):
    """An object that exists or not, and that may not be read."""


class RefusedError(Exception):
    """An answer that is an error.

    Args:
        body: its first bytes, which say why.
    """

    def __init__(self, status: int, reason: str, headers: Headers, body: bytes) -> None:
        super().__init__(f"{status} {reason}".strip())
        self.status = status
        self.headers = headers
        self.body = body


def shown(url: str) -> str:
    """A URL for messages: without user, password, query (which may be a signature)."""
    try:
        parts = urlsplit(url)
    except ValueError:  # it cannot be, and nobody asks it
        return url.rpartition("@")[2].partition("?")[0]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


class Http:
    """Connections to any servers; each thread keeps its own."""

    def __init__(self, stall_s: float = STALL_S) -> None:
        self._stall_s = stall_s
        self._local = threading.local()

    @contextlib.contextmanager
    def answer(
        self, method: str, url: str, headers: Headers, body: memoryview | bytes | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, its body to be read inside ``with``.

        Raises:
            TransientError: for a connection that fails, whenever it does.
            StoreError: for a URL that cannot be, or a server that is not trusted.
            RefusedError: for a status of 300 and more.
        """
        server = _server(url)
        kept = self._connections.pop(server, None)
        try:
            connection, response = self._exchange(server, kept, method, url, headers, body)
            try:
                if response.status >= 300:
                    text = response.read(_ERROR_BYTES)
                    raise RefusedError(response.status, response.reason, response.headers, text)
                yield response
            finally:
                if response.isclosed() and not response.will_close:
                    self._connections[server] = connection
                else:
                    connection.close()
        except ssl.SSLCertVerificationError as problem:
            raise StoreError(
                f"{shown(url)}: the server's certificate is not trusted: {problem.verify_message}."
                "\n  Set SSL_CERT_FILE or AWS_CA_BUNDLE to the file of your authority."
            ) from None
        except http.client.InvalidURL as problem:
            raise StoreError(f"{shown(url)}: no such address can be: {problem}.") from None
        except (OSError, http.client.HTTPException) as problem:
            raise TransientError(
                _words(problem), reached=not _unreached(problem), wrong=_speaks_no_tls(problem)
            ) from None

    def _exchange(
        self,
        server: tuple[str, str],
        kept: http.client.HTTPConnection | None,
        method: str,
        url: str,
        headers: Headers,
        body: memoryview | bytes | None,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request on a kept connection, else (if the server has closed it) on a new one."""
        for connection in (kept, None):
            if connection is None and kept is not None:
                kept.close()
            used = connection or _connect(server, self._stall_s)
            try:
                if used.sock is None:
                    _open(used)
                told = {**headers, **_proxy_login(urlsplit(url), "http")}
                slices = None if body is None else _slices(body)
                used.request(method, _path(url), body=slices, headers=told)
                return used, used.getresponse()
            except _STALE:
                used.close()
                if connection is None:
                    raise
            except BaseException:
                used.close()
                raise
        raise AssertionError("the second connection is always new")

    @property
    def _connections(self) -> dict[tuple[str, str], http.client.HTTPConnection]:
        # A forked process must not speak on its parent's connections.
        if getattr(self._local, "owner", None) != os.getpid():
            self._local.owner = os.getpid()
            self._local.connections = {}
        connections: dict[tuple[str, str], http.client.HTTPConnection] = self._local.connections
        return connections


def _slices(body: memoryview | bytes) -> Iterator[memoryview]:
    """The body in pieces: a connection's patience is for each, not for all of a slow upload."""
    view = memoryview(body)
    for start in range(0, len(view), _SLICE_BYTES):
        yield view[start : start + _SLICE_BYTES]


def _server(url: str) -> tuple[str, str]:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        named = False
    if not named:
        raise StoreError(f"{shown(url)}: no server. Write it as https://host/path.")
    return parts.scheme, parts.netloc.rpartition("@")[2]


def same_server(url: str, other: str) -> bool:
    """Whether both URLs are of one server, which may be told the same credentials."""
    return _server(url) == _server(other)


def _path(url: str) -> str:
    parts = urlsplit(url)
    asked = ("", "", quote(parts.path or "/", _IN_URLS), quote(parts.query, _IN_URLS), "")
    if parts.scheme == "http" and _proxy(parts) is not None:
        asked = (parts.scheme, _server(url)[1], *asked[2:])
    return urlunsplit(asked)


def _open(connection: http.client.HTTPConnection) -> None:
    try:
        connection.connect()
    except TimeoutError:  # unlike one of an answer: there may be no server at all
        raise ConnectionError(errno.EHOSTUNREACH, "no connection came about in time") from None


def _connect(server: tuple[str, str], stall_s: float) -> http.client.HTTPConnection:
    """A connection that is not open yet, through the proxy of the environment, if any."""
    scheme, host = server
    proxy = _proxy(urlsplit(f"{scheme}://{host}"))
    place = host if proxy is None else proxy
    if scheme == "http":
        return http.client.HTTPConnection(place, timeout=stall_s)
    connection = http.client.HTTPSConnection(place, timeout=stall_s, context=_trust())
    if proxy is not None:
        login = _proxy_login(urlsplit(f"{scheme}://{host}"), "https")
        connection.set_tunnel(host, headers=login)
    return connection


def _proxy(parts: SplitResult) -> str | None:
    proxy = _proxy_url(parts)
    return None if proxy is None else urlsplit(proxy).netloc.rpartition("@")[2]


def _proxy_url(parts: SplitResult) -> str | None:
    """The proxy of the environment, with its login, unless ``NO_PROXY`` has the server."""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _proxy_login(parts: SplitResult, scheme: str) -> dict[str, str]:
    """What a proxy is told of who asks: with each request, or once for a tunnel (``https``)."""
    proxy = _proxy_url(parts) if parts.scheme == scheme else None
    login = {} if proxy is None else _login(proxy)
    return {f"Proxy-{name}": text for name, text in login.items()}


@cache
def _trust() -> ssl.SSLContext:
    bundle = os.environ.get("AWS_CA_BUNDLE") or None
    try:
        return ssl.create_default_context(cafile=bundle)
    except OSError as problem:
        raise StoreError(
            f"AWS_CA_BUNDLE is {bundle!r}, which holds no certificates: {problem}.\n"
            "  Set it to the file of your authority, or unset it."
        ) from None


def _unreached(problem: Exception) -> bool:
    """Whether no server was there at all: no address, nobody listening."""
    return isinstance(problem, OSError) and not isinstance(
        problem, ConnectionResetError | BrokenPipeError | TimeoutError | ssl.SSLError
    )


def _speaks_no_tls(problem: Exception) -> bool:
    """Whether an answer is none of TLS; a connection that merely ends may be better next time."""
    return isinstance(problem, ssl.SSLError) and not isinstance(problem, ssl.SSLEOFError)


def _words(problem: Exception) -> str:
    if isinstance(problem, TimeoutError):
        return "the server did not answer in time"
    if isinstance(problem, http.client.RemoteDisconnected):
        return "the server closed the connection without an answer"
    return (problem.strerror if isinstance(problem, OSError) else None) or (
        f"{type(problem).__name__}: {problem}"
    )


# --- checked ranges -----------------------------------------------------------------------------


def range_headers(request: Request) -> dict[str, str]:
    """The headers that ask for a range of a pinned version."""
    headers = {"Range": f"bytes={request.start}-{request.stop - 1}", "Accept-Encoding": "identity"}
    if request.version and request.version.startswith('"'):  # a strong ETag
        headers["If-Match"] = request.version
    return headers


def receive(response: http.client.HTTPResponse, request: Request) -> None:
    """Read the body of an answer to ``range_headers`` to its places, or find out what is wrong.

    Raises:
        TransientError: for an answer that is not what was asked for.
        SourceChangedError: for another version of the object.
    """
    asked = f"bytes {request.start}-{request.stop - 1}"
    if response.status != 206:
        raise _wrong(f"status {response.status} instead of 206 for a range ({asked})")
    place = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(place)
    if match is None or (int(match[1]), int(match[2]) + 1) != (request.start, request.stop):
        raise _wrong(f"Content-Range {place!r} instead of {asked!r}")
    if response.length is not None and response.length != request.stop - request.start:
        raise _wrong(f"{response.length} bytes announced for {asked!r}")
    size = None if match[3] == "*" else int(match[3])
    found = version_of(response.headers, size)
    if request.version is not None and found is not None and found != request.version:
        raise changed(shown(request.url))
    for target in request.into:
        if isinstance(target, int):
            target = memoryview(bytearray(target))
        _fill(response, target)


def _fill(response: http.client.HTTPResponse, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = response.readinto(target[done:])
        if not count:
            raise TransientError("the answer ended before its last byte")
        done += count


def _wrong(what: str) -> TransientError:
    return TransientError(f"the server answered {what}", wrong=True)


def version_of(headers: Headers, size: int | None) -> str | None:
    """The version that an answer tells of its object: the ETag, else date and size."""
    tag = headers.get("ETag")
    if tag:
        return tag
    date = headers.get("Last-Modified")
    return None if size is None else f"{date or 'no date'}, {size} bytes"


def passing(problem: RefusedError) -> TransientError | None:
    """A refusal as a failure that may pass; None for one that will not."""
    if problem.status not in _TRANSIENT:
        return None
    wait = problem.headers.get("Retry-After", "")
    return TransientError(str(problem), wait_s=min(float(wait), 60.0) if wait.isdecimal() else 0.0)


# --- the store of http:// and https:// ----------------------------------------------------------

_KNOWN = (
    "model.safetensors.index.json",
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Names that are looked for in a folder: HTTP knows no folders, so nothing lists them."""


class HttpStore(RemoteStore):
    """Files of web servers that answer ranges. Folders are known by what is found in them.

    Args:
        secrets: URLs as they were given, by what is shown of them; ``public`` adds to it.
    """

    def __init__(
        self, patience: Patience, http: Http, secrets: MutableMapping[str, str] | None = None
    ) -> None:
        super().__init__(patience)
        self._http = http
        self._secrets = {} if secrets is None else secrets

    def public(self, url: str) -> str:
        """The URL without login and query. Requests to it, and to what is below, still have them.

        Raises:
            StoreError: for URLs that are told apart by these alone.
        """
        _server(url)
        bare = shown(url)
        if self._secrets.setdefault(bare, url) != url:
            raise StoreError(
                f"{bare}: named twice, with another login or query.\n"
                "  Write it the same both times; if these are two checkpoints, download one."
            )
        return bare

    def stat(self, url: str) -> Stat | None:
        """Size and version of the object at ``url``; None where there is none."""
        return self.patience.run(lambda: self._stat(url), f"looking up {shown(url)}")

    def is_folder(self, url: str) -> bool:
        """Whether a checkpoint is found in ``url``."""
        if urlsplit(url).path.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt")):
            return False  # a signature for one file is none for what is below it
        return any(self._holds(url, name) for name in _KNOWN[:2])

    def names(self, url: str) -> list[str]:
        """The names that a checkpoint may have and that exist; shards are in its index."""
        found = [name for name in _KNOWN if self._holds(url, name)]
        if _KNOWN[0] in found:
            shards = re.findall(rb'"([^"/\\]+\.safetensors)"', self.read(self.join(url, _KNOWN[0])))
            found += sorted({shard.decode(errors="replace") for shard in shards})
        return sorted(set(found))

    def _holds(self, url: str, name: str) -> bool:
        # Buckets behind a web address deny what does not exist; a shard that is denied is told.
        with contextlib.suppress(DeniedError):
            return self.stat(self.join(url, name)) is not None
        return False

    def join(self, url: str, name: str) -> str:
        """The URL of ``name`` in the folder ``url``; a query stays at the end."""
        parts = urlsplit(url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))

    def _stat(self, url: str) -> Stat | None:
        try:
            try:
                return self._told(url, "HEAD", {"Accept-Encoding": "identity"})
            except RefusedError as problem:
                if problem.status not in _NO_HEAD:
                    raise
            return self._told(url, "GET", range_headers(Request(url, None, 0, 1, ())))
        except RefusedError as problem:
            if problem.status in (404, 410):
                return None
            raise self._explained(url, problem) from None

    def _told(self, url: str, method: str, headers: Headers) -> Stat:
        with self._answer(method, url, headers) as response:
            size = response.headers.get("Content-Length", "")
            if response.status == 206:
                size = response.headers.get("Content-Range", "").rpartition("/")[2]
            if not size.isdecimal():
                raise StoreError(f"{shown(url)}: the server does not tell its size.")
            response.read(1)  # the end of an answer to HEAD, or to GET of one byte
            return Stat(int(size), version_of(response.headers, int(size)) or "")

    def _get(self, request: Request) -> None:
        try:
            with self._answer("GET", request.url, range_headers(request)) as response:
                receive(response, request)
        except RefusedError as problem:
            raise self._explained(request.url, problem) from None

    @contextlib.contextmanager
    def _answer(
        self, method: str, url: str, headers: Headers
    ) -> Iterator[http.client.HTTPResponse]:
        whole = self._whole(url)
        with followed(self._http, method, whole, {**headers, **_login(whole)}) as response:
            yield response

    def _whole(self, url: str) -> str:
        """A URL with the login and query that ``public`` took off it, or off a folder above it."""
        _server(url)
        place = url
        while place and place not in self._secrets:
            place = place.rpartition("/")[0]
        if not place:
            return url
        given = urlsplit(self._secrets[place])
        return urlunsplit(urlsplit(url)._replace(netloc=given.netloc, query=given.query))

    def _explained(self, url: str, problem: RefusedError) -> Exception:
        if problem.status in (412, 416):
            return changed(shown(url))
        kind = DeniedError if problem.status in (401, 403) else StoreError
        return passing(problem) or kind(
            f"{shown(url)}: the server answers {problem}. Check the address and who may read it."
        )


@contextlib.contextmanager
def followed(
    http_: Http, method: str, url: str, headers: Headers
) -> Iterator[http.client.HTTPResponse]:
    """The answer behind redirects, with its ``url``; who asks is not told to other hosts."""
    for _ in range(_MOST_REDIRECTS):
        try:
            with http_.answer(method, url, headers) as response:
                response.url = url
                yield response
                return
        except RefusedError as problem:
            place = problem.headers.get("Location")
            if problem.status not in (301, 302, 303, 307, 308) or not place:
                raise
            target = urljoin(url, place)
            if urlsplit(target).scheme not in ("http", "https"):
                raise StoreError(f"{shown(url)}: redirected to {shown(target)}.") from None
            if not same_server(target, url):
                headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
            url = target
    raise StoreError(f"{shown(url)}: redirected too often.")


def _login(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    text = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}
