"""Ranges over HTTP: joined, checked, borne; web servers as places of checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.errors import SourceChangedError, Stopped, StoreError
from shardmerge.merge import merge
from shardmerge.stores import Range, Settings, Stores, remote, retry
from shardmerge.stores import http as web
from shardmerge.stores.http import Http, HttpStore, RefusedError, passing, range_headers, receive
from shardmerge.stores.portable import PortableStore
from shardmerge.stores.remote import Request, joined
from shardmerge.stores.retry import Patience, TransientError, pause_s
from shardmerge.verify import verify
from tests.servers.proxy import FaultProxy, Script
from tests.servers.web import WebServer
from tests.support import (
    HALVES,
    StopsWhenPlanned,
    recipe_of,
    shrink,
    tree,
    write_checkpoint,
    write_recipe,
)

# --- ranges are joined ----------------------------------------------------------------------------

MOST, GAP = 50, 7


@st.composite
def wanted(draw: st.DrawFn) -> list[Range]:
    item = st.tuples(
        st.sampled_from("ab"),
        st.sampled_from([None, "1", "2"]),
        st.integers(0, 300),
        st.integers(0, 160),
    )
    return [
        Range(url, offset, memoryview(bytearray(count)), version)
        for url, version, offset, count in draw(st.lists(item, max_size=12))
    ]


def content(url: str, version: str | None, offset: int) -> int:
    return hash((url, version, offset)) % 251 + 1  # never 0, which is what was not filled


@given(ranges=wanted())
def test_every_byte_is_asked_for_and_none_in_vain(ranges):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "REQUEST_BYTES", MOST)
        patch.setattr(remote, "GAP_BYTES", GAP)
        requests = list(joined(ranges))
    for request in requests:
        position, gaps = request.start, []
        for target in request.into:
            if isinstance(target, int):
                gaps.append(target)
                position += target
                continue
            for place in range(len(target)):
                assert target[place] == 0, "delivered twice"
                target[place] = content(request.url, request.version, position + place)
            position += len(target)
        assert position == request.stop
        assert 0 < request.stop - request.start <= MOST
        assert all(0 < gap <= GAP for gap in gaps)
        assert not isinstance(request.into[0], int) and not isinstance(request.into[-1], int)
    for item in ranges:
        assert list(item.into) == [
            content(item.url, item.version, item.offset + place) for place in range(len(item.into))
        ]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, GAP)), min_size=1, max_size=10),
    order=st.randoms(use_true_random=False),
)
def test_neighbours_are_asked_for_together_in_any_order(sizes, order):
    ranges, offset = [], 3
    for count, gap in sizes:
        ranges.append(Range("a", offset, memoryview(bytearray(count))))
        offset += count + gap
    order.shuffle(ranges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "GAP_BYTES", GAP)
        assert len(list(joined(ranges))) == 1
        patch.setattr(remote, "REQUEST_BYTES", MOST)
        requests = list(joined(ranges))
    for one, next_ in itertools.pairwise(requests):
        first = next_.into[0]
        assert not isinstance(first, int)
        assert next_.start + len(first) - one.start > MOST, "would have fitted"


@pytest.mark.parametrize(("gap", "requests"), [(GAP - 1, 1), (GAP, 1), (GAP + 1, 2)])
def test_a_gap_is_read_up_to_its_limit(monkeypatch, gap, requests):
    monkeypatch.setattr(remote, "GAP_BYTES", GAP)
    ranges = [Range("a", offset, memoryview(bytearray(5))) for offset in (0, 5 + gap)]
    assert len(list(joined(ranges))) == requests


# --- patience -------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while something waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, minutes: float = 10) -> None:
        self.now = 100.0
        self.waits: list[float] = []
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(Patience, "wait", lambda _, seconds: self.wait(seconds))
        self.patience = Patience(minutes)
        self.stopped = False

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return self.stopped

    def run(self, *outcomes: Any, lasts_s: float = 0.0) -> Any:
        """One try for each outcome; the last is repeated for ever."""
        tries = iter(outcomes)
        last = [None]

        def attempt() -> Any:
            last[0] = next(tries, last[0])
            self.now += lasts_s
            if isinstance(last[0], Exception):
                raise last[0]
            return last[0]

        return self.patience.run(attempt, "reading x")


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_failures_that_pass_are_borne(clock):
    trouble = TransientError("503 Slow Down")
    assert clock.run(*[trouble] * 7, "data") == "data"
    assert clock.patience.retries == len(clock.waits) == 7


def test_patience_ends_before_its_limit_is_passed(clock):
    with pytest.raises(StoreError, match=r"(?s)reading x: failed \d+ times.*503.*--patience MIN"):
        clock.run(TransientError("503"), lasts_s=1.0)
    assert 570 < clock.now - 100 <= 601
    assert all(wait <= 20 for wait in clock.waits)


def test_no_patience_is_one_try(clock):
    clock.patience.minutes = 0
    with pytest.raises(StoreError, match="failed 1 times in 0 s"):
        clock.run(TransientError("503"))
    assert clock.waits == []


def test_a_server_that_never_answered_is_given_up_soon(clock):
    gone = TransientError("Connection refused", reached=False)
    with pytest.raises(StoreError, match=r"(?s)No server has answered at all: check its address"):
        clock.run(gone)
    assert clock.now - 100 <= 30
    assert clock.run("data") == "data"
    began = clock.now
    with pytest.raises(StoreError, match="--patience"):
        clock.run(gone)  # it was there before, and may be restarted
    assert clock.now - began > 500


def test_wrong_answers_are_borne_a_few_times(clock):
    wrong = TransientError("the server answered status 200", wrong=True)
    assert clock.run(wrong, wrong, wrong, wrong, "data") == "data"
    with pytest.raises(StoreError, match=r"(?s)failed 5 times.*is there a proxy in between\?"):
        clock.run(wrong)
    with pytest.raises(StoreError, match=r"failed 9 times"):
        clock.run(*[wrong, TransientError("503")] * 4, wrong)


def test_a_stop_ends_the_wait(clock):
    clock.stopped = True
    with pytest.raises(Stopped, match="stopped while reading x failed: 503"):
        clock.run(TransientError("503"))
    assert len(clock.waits) == 1
    assert clock.run("data") == "data"  # what succeeds is not stopped


def test_other_failures_are_not_repeated(clock):
    for problem in (StoreError("no"), SourceChangedError("changed"), ValueError("a bug")):
        with pytest.raises(type(problem)):
            clock.run(problem)
    assert clock.waits == []


def test_the_servers_wish_is_the_least_wait(clock):
    clock.run(TransientError("429", wait_s=50), "data")
    assert clock.waits == [50]


@pytest.mark.parametrize(
    ("told", "wait_s"), [("7", 7), ("600", 60), ("Fri, 31 Dec 1999", 0), ("²", 0), (None, 0)]
)
def test_retry_after_is_understood(told, wait_s):
    headers = {} if told is None else {"Retry-After": told}
    found = passing(RefusedError(503, "Slow Down", headers, b""))
    assert found is not None and found.wait_s == wait_s and found.reached and not found.wrong
    assert passing(RefusedError(404, "Not Found", headers, b"")) is None


def test_long_trouble_is_told_once(clock, caplog):
    clock.run(*[TransientError("503 Slow Down")] * 12, "data")
    told = [record.getMessage() for record in caplog.records]
    assert told == ["reading x: 503 Slow Down; trying again for 10 minutes"]


@given(st.integers(1, 10_000))
def test_pauses_are_bounded(tries):
    longest = min(20.0, 0.2 * 2 ** min(tries - 1, 20))
    assert longest / 4 <= pause_s(tries) <= longest


# --- answers are checked --------------------------------------------------------------------------

DATA = bytes(range(251)) * 400


class Scripted:
    """A server that sends what it is told to, one answer for each request.

    Attributes:
        heads: of the requests, as sent.
        connections: that were opened.
    """

    def __init__(self, *answers: bytes | None) -> None:
        self._answers = iter(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"http://{self.host}"
        self.heads: list[str] = []
        self.connections = 0

    def __enter__(self) -> Scripted:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                with contextlib.suppress(OSError), connection:
                    self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        """Answer until the client leaves, or the script says to hang up (None)."""
        with connection.makefile("rb") as file:
            while True:
                lines = iter(file.readline, b"\r\n")
                head = b"".join(line for line in lines if line).decode() if file.peek(1) else ""
                if not head:
                    return
                self.heads.append(head)
                answer = next(self._answers)
                if answer is None:
                    return
                connection.sendall(answer)


def ranged(
    body: bytes, *headers: str, place: str = "bytes 2-5/10", status: str = "206 Partial Content"
) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Range: {place}", *headers]
    if not any(line.startswith(("Content-Length", "Transfer-Encoding")) for line in lines):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(http: Http, url: str, version: str | None = None) -> bytes:
    """Bytes 2 to 5, of which the second is not wanted."""
    data = bytearray(4)
    view = memoryview(data)
    request = Request(url, version, 2, 6, (view[:1], 1, view[2:]))
    with http.answer("GET", url, range_headers(request)) as response:
        receive(response, request)
    return bytes(data)


def test_a_good_answer_fills_what_is_wanted():
    chunked = b"4\r\ncdef\r\n0\r\n\r\n"
    with Scripted(ranged(b"cdef"), ranged(chunked, "Transfer-Encoding: chunked")) as server:
        http = Http()
        assert get(http, server.url) == b"c\0ef"
        assert get(http, server.url) == b"c\0ef"
        assert server.connections == 1
        assert "Range: bytes=2-5\r\n" in server.heads[0]
        assert "If-Match" not in server.heads[0]


@pytest.mark.parametrize(
    ("answer", "reason", "wrong"),
    [
        (ranged(b"cdef", status="200 OK"), "status 200 instead of 206", True),
        (ranged(b"cd", place="bytes 2-3/10"), "Content-Range 'bytes 2-3/10'", True),
        (ranged(b"abcd", place="bytes 0-3/10"), "Content-Range 'bytes 0-3/10'", True),
        (ranged(b"cdef", place="bytes 1-5/10"), "Content-Range 'bytes 1-5/10'", True),
        (ranged(b"cdef", place="bytes 2-5"), "Content-Range 'bytes 2-5'", True),
        (ranged(b"cdef", place="none"), "Content-Range 'none'", True),
        (ranged(b"cd"), "2 bytes announced", True),
        (ranged(b"cd", "Content-Length: 4"), "ended before its last byte", False),
        (ranged(b"2\r\ncd\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), "ended before", False),
        (ranged(b"4\r\ncd", "Transfer-Encoding: chunked"), "IncompleteRead|ended", False),
        (b"nonsense\r\n\r\n", "BadStatusLine", False),
        (None, "closed the connection without an answer", False),
    ],
)
def test_a_bad_answer_is_found_out(answer, reason, wrong):
    with Scripted(answer, None) as server:

        def hang_up() -> None:
            server._answers = iter(())

        with pytest.raises(TransientError, match=reason) as error:
            get(Http(stall_s=0.5), server.url + "/x") if answer is None else _once(server, answer)
        hang_up()
    assert error.value.wrong == wrong and error.value.reached


def _once(server: Scripted, answer: bytes) -> bytes:
    """One request; the server hangs up behind its answer."""
    real = server._serve

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    server._serve = serve  # type: ignore[method-assign]
    try:
        return get(Http(stall_s=0.5), server.url)
    finally:
        server._serve = real  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("version", "headers", "place", "same"),
    [
        ('"a"', ['ETag: "a"'], "bytes 2-5/10", True),
        ('"a"', ['ETag: "b"'], "bytes 2-5/10", False),
        ('W/"a"', ['ETag: W/"a"'], "bytes 2-5/10", True),
        ('W/"a"', ['ETag: W/"b"'], "bytes 2-5/10", False),
        ("Monday, 10 bytes", ["Last-Modified: Monday"], "bytes 2-5/10", True),
        ("Monday, 10 bytes", ["Last-Modified: Tuesday"], "bytes 2-5/10", False),
        ("Monday, 10 bytes", ["Last-Modified: Monday"], "bytes 2-5/11", False),
        ("no date, 10 bytes", [], "bytes 2-5/10", True),
        ("no date, 10 bytes", [], "bytes 2-5/*", True),
    ],
)
def test_another_version_is_never_given(version, headers, place, same):
    with Scripted(ranged(b"cdef", *headers, place=place)) as server:
        if same:
            assert get(Http(), server.url, version) == b"c\0ef"
        else:
            with pytest.raises(SourceChangedError, match=r"changed while it was being read"):
                get(Http(), server.url, version)
        assert ("If-Match" in server.heads[0]) == version.startswith('"')


def test_a_kept_connection_that_was_closed_is_no_failure():
    with Scripted(ranged(b"cdef"), None, ranged(b"cdef"), None, None) as server:
        http, patience = Http(), Patience(0)
        for _ in range(2):
            assert patience.run(lambda: get(http, server.url), "reading") == b"c\0ef"
        assert patience.retries == 0 and server.connections == 2
        with pytest.raises(TransientError, match="closed the connection"):
            get(http, server.url)  # once; a new connection that is closed is one
        assert server.connections == 3


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "served"
    found.mkdir()
    (found / "x").write_bytes(DATA)
    return found


@contextlib.contextmanager
def faulty(folder: Path, script: Script, **options: Any) -> Iterator[tuple[str, FaultProxy]]:
    with WebServer(folder) as server, FaultProxy(server.url, script, **options) as proxy:
        yield f"{proxy.url}/x", proxy


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 0.05)


@pytest.mark.parametrize(
    "fault", ["503", "429", "reset", "trunc", "short", "full200", "stall", "lost", "drop"]
)
def test_ranges_are_right_whatever_happens_to_them(folder, quick, fault):
    def script(number: int, asked: Any) -> str | None:
        return fault if asked.tries < 2 and asked.method == "GET" else None

    with faulty(folder, script, stall_s=0.6) as (url, proxy):
        store = HttpStore(Patience(1), Http(stall_s=0.2))
        buffers = [bytearray(20_000) for _ in range(3)]
        ranges = [
            Range(url, offset, memoryview(buffer), store.stat(url).version)  # type: ignore[union-attr]
            for offset, buffer in zip((5, 30_000, 80_000), buffers, strict=True)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote, "GAP_BYTES", 0)
            store.read_ranges(ranges)
        for item, buffer in zip(ranges, buffers, strict=True):
            assert buffer == DATA[item.offset : item.offset + len(buffer)]
        assert proxy.counts() == {fault: 6}
        assert (store.requests, store.read_bytes) == (3, 60_000)
        # A drop in a kept connection is asked for again at once, and not counted.
        assert store.patience.retries <= 6


def test_the_first_error_is_told_when_no_buffer_is_written_any_more(folder, quick):
    with faulty(folder, lambda number, asked: None) as (url, _):
        store = HttpStore(Patience(1), Http())
        there, beyond = bytearray(1000), bytearray(1000)
        with pytest.raises(StoreError, match="x"):
            store.read_ranges(
                [
                    Range(url, 0, memoryview(there)),
                    Range(url, len(DATA) + 100_000, memoryview(beyond)),
                ]
            )
        assert there == DATA[:1000] and beyond == bytes(1000)
        with pytest.raises(StoreError, match=r"no byte -1"):
            store.read_ranges([Range(url, -1, memoryview(there))])


# --- addresses, proxies, certificates -------------------------------------------------------------


def test_a_name_that_nobody_has_is_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TransientError, match="refused") as error:
        get(Http(), f"http://127.0.0.1:{port}/x")
    assert not error.value.reached


def test_a_connection_that_does_not_come_about_reaches_nobody():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        place = full.getsockname()
        others = [socket.socket() for _ in range(3)]
        for other in others:
            other.setblocking(False)
            other.connect_ex(place)
        with pytest.raises(TransientError, match="no connection came about") as error:
            get(Http(stall_s=0.3), f"http://127.0.0.1:{place[1]}/x")
        assert not error.value.reached
        for other in others:
            other.close()


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///x", "https://user:secret@host:port/x", "http://[::1/x", "http://h:99999/"],
)
def test_an_address_that_cannot_be_is_a_store_error(url):
    store = Stores(Settings(0.001))
    for call in (store.public, store.open(url).stat):
        with pytest.raises(StoreError) as error:
            call(url)
        assert "secret" not in str(error.value)


def test_any_name_can_be_asked_for(folder):
    store = HttpStore(Patience(0), Http())
    with WebServer(folder) as server:
        for name in ("a b", "é 日", "a%20b", "c#d?e", "a+b&c=d"):
            (folder / name).write_bytes(name.encode())
            assert store.read(store.join(server.url, name)) == name.encode()
        assert store.read(f"{server.url}/a b") == b"a b"  # as a user may write it
        assert store.read(f"{server.url}/é 日") == "é 日".encode()


def test_requests_go_through_the_proxy_of_the_environment(folder, monkeypatch):
    with Scripted(ranged(b"cdef"), ranged(b"cdef")) as proxy, WebServer(folder) as server:
        monkeypatch.setenv("http_proxy", f"http://user:pa%3Ass@{proxy.host}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert get(Http(), "http://nowhere.example:81/a?b=c") == b"c\0ef"
        (head,) = proxy.heads
        assert head.startswith("GET http://nowhere.example:81/a?b=c HTTP/1.1\r\n")
        assert "Host: nowhere.example:81\r\n" in head
        assert "Proxy-Authorization: Basic dXNlcjpwYTpzcw==\r\n" in head
        for hosts in ("127.0.0.1", f"else.example,{server.url[7:]}", "*"):
            monkeypatch.setenv("no_proxy", hosts)
            assert get(Http(), f"{server.url}/x") == b"\2\0\4\5"
        assert len(proxy.heads) == 1
        assert all("proxy-authorization" not in seen.headers for seen in server.requests)


def test_tls_goes_through_a_tunnel(monkeypatch):
    with Scripted(b"HTTP/1.1 407 Who are you\r\n\r\n") as proxy:
        monkeypatch.setenv("https_proxy", f"user:secret@{proxy.host}")
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(TransientError, match="Tunnel connection failed: 407"):
            get(Http(stall_s=1), "https://nowhere.example/x")
        assert proxy.heads[0].startswith("CONNECT nowhere.example:443 HTTP/1.")
        assert "Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=\r\n" in proxy.heads[0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "
        "/CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout key -out cert"
    )
    subprocess.run(
        command.split(),
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


def test_a_certificate_is_trusted_by_settings_only(folder, certificate, monkeypatch):
    monkeypatch.setattr(web, "_trust", web._trust.__wrapped__)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    with WebServer(folder) as server:
        server.front.socket = context.wrap_socket(server.front.socket, server_side=True)
        url = server.url.replace("http:", "https:") + "/x"
        stores = Stores()
        began = stores.patience.retries
        with pytest.raises(StoreError, match=r"(?s)not trusted.*Set SSL_CERT_FILE or AWS_CA_BUND"):
            stores.open(url).stat(url)
        assert stores.patience.retries == began
        for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"):
            with monkeypatch.context() as patch:
                patch.delenv("AWS_CA_BUNDLE", raising=False)
                patch.setenv(name, str(certificate / "cert"))
                assert Stores().open(url).read(url) == DATA
        for bundle in (folder / "none", folder / "x"):
            monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
            with pytest.raises(StoreError, match=r"AWS_CA_BUNDLE is .*holds no certificates"):
                Stores().open(url).stat(url)


def test_a_server_without_tls_is_not_asked_for_long(folder, quick):
    with WebServer(folder) as server:
        url = server.url.replace("http:", "https:") + "/x"
        with pytest.raises(StoreError, match=r"(?s)failed 5 times.*cannot be used like this"):
            Stores().open(url).stat(url)


# --- a web server as a place of checkpoints -------------------------------------------------------


class Models:
    """Two models served from a folder, and what a merge of them gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed, name in enumerate(("a", "b")):
            write_checkpoint(
                folder / name, HALVES, seed=seed, shards=seed + 1, files={"tokenizer.json": "{}"}
            )
        self.quiet = self.merged(str(folder), folder.parent / "quiet")

    def merged(self, place: str, out: Path, query: str = "", **options: Any) -> dict[str, bytes]:
        models: dict[Any, dict[str, object]] = {
            f"{place}/{name}{query}": {"weight": 0.4} for name in ("a", "b")
        }
        recipe = write_recipe(
            out.parent / f"{out.name}.yml", recipe_of("linear", None, models, dtype="bfloat16")
        )
        merge(recipe, str(out), threads=1, **options)
        return {name: data for name, data in tree(out).items() if name not in NAMING}


NAMING = ("README.md", "shardmerge.json", "shardmerge_recipe.yml")
"""Files that name the sources."""


@pytest.fixture
def models(tmp_path, monkeypatch, quick):
    shrink(monkeypatch.setattr)
    (tmp_path / "models").mkdir()
    return Models(tmp_path / "models")


def everything(*folders: Path) -> bytes:
    return b"".join(data for folder in folders for data in tree(folder).values())


@pytest.mark.parametrize("redirect", [False, True])
def test_a_merge_from_a_web_server(models, tmp_path, redirect):
    with WebServer(models.folder, redirect=redirect) as server:
        found = models.merged(server.url, tmp_path / "out")
        assert found == models.quiet and "tokenizer.json" in found
        assert {seen.server for seen in server.requests if seen.status < 300} == {
            "back" if redirect else "front"
        }
        assert verify(f"{server.url}/a").problems == ()
    assert verify(str(tmp_path / "out")).problems == ()


def test_a_login_is_used_and_never_shown(models, tmp_path, capfd, caplog):
    caplog.set_level(0)
    with WebServer(models.folder, auth="me@home:pass/word", redirect=True) as server:
        place = server.url.replace("//", "//me%40home:pass%2Fword@")
        assert models.merged(place, tmp_path / "out") == models.quiet
        for seen in server.requests:
            assert ("authorization" in seen.headers) == (seen.server == "front"), "told to another"
        assert verify(f"{place}/a").problems == ()
        said = [caplog.text, *capfd.readouterr()]
        server.auth = "me@home:other"
        with pytest.raises(StoreError, match="401 Unauthorized") as error:
            models.merged(place, tmp_path / "other")
        said.append(str(error.value))
        (models.folder / "a" / "model.safetensors").unlink()
        server.auth = "me@home:pass/word"
        with pytest.raises(Exception, match="no such folder or file") as error:
            models.merged(place, tmp_path / "other")
        said.append(str(error.value))
    written = everything(tmp_path / "out") + "".join(said).encode()
    for secret in (b"pass%2Fword", b"pass/word", b"me%40home"):
        assert secret not in written


def test_a_signature_stays_on_every_request_and_appears_nowhere(models, tmp_path, caplog):
    single = [models.folder / "a" / "model.safetensors", models.folder / "c.safetensors"]
    shutil.copy(single[0], single[1])
    query = "?sig=se/cret&x=1%2F2"

    def recipe(place: str, query: str = "") -> str:
        urls: dict[Any, dict[str, object]] = {
            f"{place}/{path.relative_to(models.folder)}{query}": {"weight": 0.5} for path in single
        }
        return write_recipe(tmp_path / "r.yml", recipe_of("linear", None, urls, dtype="bfloat16"))

    merge(recipe(str(models.folder)), str(tmp_path / "local"), threads=1)
    with WebServer(models.folder) as server:
        heads = server.answer

        def answer(handler: Any, port: str) -> None:
            """As S3 does for a signed GET: nothing else is allowed."""
            if handler.command != "GET" or not handler.path.endswith(query):
                handler.send_body(403)
                return
            heads(handler, port)

        server.answer = answer  # type: ignore[method-assign]
        planned = StopsWhenPlanned()
        with pytest.raises(Stopped):
            merge(
                recipe(server.url, query),
                str(tmp_path / "out"),
                threads=1,
                stop=planned.stop,
                progress=planned,
            )
        written = everything(tmp_path / "out")
        assert b"c.safetensors" in written
        merge(recipe(server.url, query), str(tmp_path / "out"), threads=1)
        data = bytearray(single[1].read_bytes())
        data[-2:] = b"\xff\xff"  # NaN
        single[1].write_bytes(data)
        with pytest.raises(Exception, match="NaN") as error:
            merge(recipe(server.url, query), str(tmp_path / "nan"), threads=1)
    written += everything(tmp_path / "out", tmp_path / "nan")
    written += (str(error.value) + caplog.text).encode()
    assert b"sig=" not in written and b"cret" not in written
    name = "model.safetensors"
    assert tree(tmp_path / "out")[name] == tree(tmp_path / "local")[name]


def test_the_same_address_with_another_login_is_refused():
    stores = Stores()
    assert stores.public("https://me:secret@h/a?x=1") == "https://h/a"
    assert stores.public("https://me:secret@h/a?x=1") == "https://h/a"
    with pytest.raises(StoreError, match="https://h/a: named twice"):
        stores.public("https://h/a?x=2")
    assert stores.public("/local/a?b") == "/local/a?b"


def test_secrets_go_to_other_processes_and_to_what_is_below(folder):
    with WebServer(folder, auth="me:secret") as server:
        stores = Stores()
        place = stores.public(server.url.replace("//", "//me:secret@") + "?sig=1")
        other = pickle.loads(pickle.dumps(stores)).open(place)
        assert other.read(other.join(place, "x")) == DATA
        assert all(seen.path == "/x?sig=1" for seen in server.requests)
        with pytest.raises(StoreError, match="401"):
            Stores().open(place).read(f"{place}/x")


def test_a_server_without_ranges_is_refused(models, tmp_path):
    with (
        WebServer(models.folder, no_ranges=True) as server,
        pytest.raises(StoreError, match=r"(?s)status 200 instead of 206.*cannot be used like this"),
    ):
        models.merged(server.url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_is_refused(models, tmp_path):
    shard = models.folder / "a" / "model.safetensors"
    with WebServer(models.folder) as server:
        serve, ranges = server.answer, []

        def answer(handler: Any, port: str) -> None:
            if handler.command == "GET" and handler.path == "/a/model.safetensors":
                ranges.append(handler.path)
                if len(ranges) == 2:  # behind the header
                    shard.write_bytes(shard.read_bytes())  # the same bytes, of another date
            serve(handler, port)

        server.answer = answer  # type: ignore[method-assign]
        with pytest.raises(SourceChangedError, match=r"a/model\.safetensors changed while it was"):
            models.merged(server.url, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


# --- drivers of fsspec ----------------------------------------------------------------------------


class Driver(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """As strict as some are: ``info`` takes a path alone, and failures are its client's own."""

    protocol = "strict"
    cachable = False
    trouble: Callable[[], None] = staticmethod(lambda: None)

    def info(self, path: str) -> dict[str, object]:  # type: ignore[override]
        return {"name": path, "size": 3, "type": "file", "etag": "1"}

    def cat_file(self, path: str, start: int = 0, end: int = 3) -> bytes:  # type: ignore[override]
        Driver.trouble()
        return b"abc"[start:end]


class OwnError(Exception):
    pass


def test_a_strict_driver_is_enough_and_its_failures_are_borne(monkeypatch, quick):
    fsspec.register_implementation("strict", Driver, clobber=True)
    troubles = [OwnError("once")]

    def trouble() -> None:
        if troubles:
            raise troubles.pop()

    monkeypatch.setattr(Driver, "trouble", staticmethod(trouble))
    store = Stores(Settings(0.01)).open("strict://a")
    assert isinstance(store, PortableStore)
    assert store.read("strict://a/b") == b"abc"
    assert store.patience.retries == 1
    troubles += [OwnError("no")] * 1000
    with pytest.raises(StoreError, match="OwnError: no"):
        store.read("strict://a/b")


def test_a_driver_that_needs_more_says_so():
    class Needs(Driver):
        def __init__(self, host: str) -> None:
            super().__init__()

    fsspec.register_implementation("needs", Needs, clobber=True)
    with pytest.raises(StoreError, match=r"needs://: its driver cannot be used as it is: .*host"):
        Stores().open("needs://a")


# --- settings -------------------------------------------------------------------------------------


def test_settings_of_a_bucket_count_more_and_later_ones_too():
    settings = Settings(
        1, (("b", "region", "x"), ("", "region", "y"), ("", "anonymous", "true"), ("", "acl", "z"))
    )
    assert settings.for_bucket("b").region == "x"
    assert settings.for_bucket("c").region == "y"
    assert settings.for_bucket("b").anonymous is True
    assert pickle.loads(pickle.dumps(Stores(settings))).settings == settings
