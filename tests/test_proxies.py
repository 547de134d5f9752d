"""The servers that tests put between the engine and the world do what their scripts say."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.servers.hub import Hub
from tests.servers.proxy import APPLIES, REFUSALS, Asked, FaultProxy, Script, seeded, storm
from tests.servers.web import WebServer

DATA = bytes(range(256)) * 4096
PATH = "/bucket/a%2Fb~c%20d?partNumber=1&uploadId=x%3D"
COMPLETE = "/bucket/key?uploadId=x"
RANGE = {"Range": "bytes=1000-9999"}
ASKED = DATA[1000:10000]


class Upstream(ThreadingHTTPServer):
    """Remembers requests; answers PUT and POST, the range of a GET, and ``/chunked``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Answers that the proxy cuts short are no errors."""


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        told = self.headers.get("Range")
        if self.path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n")
            return
        start, stop = 0, len(DATA) if self.command in ("GET", "HEAD") else 0
        if told:
            start, last = (int(side) for side in told.removeprefix("bytes=").split("-"))
            stop = last + 1
        self.send_response(206 if told else 200)
        if told:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(DATA[start:stop])

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def client(url: str) -> closing[http.client.HTTPConnection]:
    address = urlsplit(url)
    assert address.hostname is not None
    return closing(http.client.HTTPConnection(address.hostname, address.port, timeout=20))


@contextmanager
def faulty(upstream: Upstream, fault: str) -> Iterator[http.client.HTTPConnection]:
    """A client of a proxy whose first request meets a fault."""
    with (
        FaultProxy(upstream.url, storm(0, 1, fault), stall_s=0.1) as proxy,
        client(proxy.url) as connection,
    ):
        yield connection
        assert proxy.counts()


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[http.client.HTTPResponse, bytes]:
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer, answer.read()


def test_a_request_arrives_as_it_was_sent(upstream: Upstream) -> None:
    with FaultProxy(upstream.url) as proxy, client(proxy.url) as connection:
        ask(connection, "PUT", PATH, DATA, {"Authorization": "AWS4 a=b"})
        answer, body = ask(connection, "GET", "/x", headers=RANGE)
        head, nothing = ask(connection, "HEAD", "/x")
        chunks = ask(connection, "GET", "/chunked")[1]
    method, path, headers, sent = upstream.seen[0]
    assert (method, path, sent) == ("PUT", PATH, DATA)
    assert headers["Host"] == urlsplit(proxy.url).netloc
    assert headers["Authorization"] == "AWS4 a=b"
    assert (answer.status, body) == (206, ASKED)
    assert (head.headers["Content-Length"], nothing) == (str(len(DATA)), b"")
    assert chunks == b"hello world"
    assert [item[3] for item in proxy.log] == [None] * 4


def test_the_proxy_tells_a_client_to_continue(upstream: Upstream) -> None:
    with FaultProxy(upstream.url, storm(1, 2, "503")) as proxy:
        address = urlsplit(proxy.url)
        with socket.create_connection((address.hostname, address.port)) as raw:
            head = (
                b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
            )
            raw.sendall(head)
            assert raw.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            raw.sendall(b"abc")
            assert raw.recv(1000).startswith(b"HTTP/1.1 200 ")
            raw.sendall(head)
            answer = b"".join(iter(lambda: raw.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert upstream.seen[0][3] == b"abc"
    assert "Expect" not in upstream.seen[0][2]
    assert len(upstream.seen) == 1


@pytest.mark.parametrize("fault", ["503", "500", "429", "expired"])
@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "DELETE"])
def test_a_refusal_leaves_the_connection_usable(
    upstream: Upstream, fault: str, method: str
) -> None:
    body = DATA if method == "PUT" else None
    with faulty(upstream, fault) as connection:
        answer, text = ask(connection, method, "/x", body)
        assert upstream.seen == []
        assert answer.status == int(REFUSALS[fault].status[:3])
        assert method == "HEAD" or f"<Code>{REFUSALS[fault].code}</Code>".encode() in text
        assert (answer.headers["Retry-After"] == "0") == (fault == "429")
        assert ask(connection, method, "/x", body)[0].status == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_reset(upstream: Upstream, method: str) -> None:
    body = DATA if method == "PUT" else None
    with faulty(upstream, "reset") as connection, pytest.raises(ConnectionResetError):
        ask(connection, method, "/x", body)
    assert [item[0] for item in upstream.seen] == ["GET"] * (method == "GET")


def test_a_reset_comes_after_half_of_the_body(upstream: Upstream) -> None:
    with faulty(upstream, "reset") as connection:
        connection.request("GET", "/x", headers=RANGE)
        answer = connection.getresponse()
        assert answer.read(len(ASKED) // 2) == ASKED[: len(ASKED) // 2]
        with pytest.raises(ConnectionResetError):
            answer.read(1)


@pytest.mark.parametrize(("fault", "count"), [("trunc", len(ASKED) // 2), ("stall", 1000)])
def test_a_body_that_ends_early(upstream: Upstream, fault: str, count: int) -> None:
    with faulty(upstream, fault) as connection:
        with pytest.raises(http.client.IncompleteRead) as cut:
            ask(connection, "GET", "/x", headers=RANGE)
        assert cut.value.partial == ASKED[:count]


def test_short(upstream: Upstream) -> None:
    with faulty(upstream, "short") as connection:
        answer, body = ask(connection, "GET", "/x", headers=RANGE)
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes 1000-5499/{len(DATA)}"
        assert body == DATA[1000:5500]
        assert ask(connection, "GET", "/x", headers=RANGE)[1] == ASKED


def test_full200(upstream: Upstream) -> None:
    with faulty(upstream, "full200") as connection:
        answer, body = ask(connection, "GET", "/x", headers=RANGE)
        assert (answer.status, body) == (200, DATA)


def test_lost(upstream: Upstream) -> None:
    with faulty(upstream, "lost") as connection:
        with pytest.raises(http.client.RemoteDisconnected):
            ask(connection, "PUT", "/x", DATA)
        assert upstream.seen[0][3] == DATA


def test_drop(upstream: Upstream) -> None:
    with faulty(upstream, "drop") as connection, pytest.raises(ConnectionError):
        ask(connection, "PUT", "/x", DATA)
    assert upstream.seen == []


def test_error200(upstream: Upstream) -> None:
    with faulty(upstream, "error200") as connection:
        answer, body = ask(connection, "POST", COMPLETE, b"<x/>")
        assert answer.status == 200
        assert b"<Error><Code>InternalError</Code>" in body
        assert upstream.seen == []


def test_nosuch(upstream: Upstream) -> None:
    with faulty(upstream, "nosuch") as connection:
        answer, body = ask(connection, "POST", COMPLETE, b"<x/>")
        assert answer.status == 404
        assert b"<Code>NoSuchUpload</Code>" in body
        assert upstream.seen[0][3] == b"<x/>"
        assert ask(connection, "POST", COMPLETE, b"<x/>")[0].status == 200


@pytest.mark.parametrize("fault", ["short", "full200", "trunc", "stall", "error200", "nosuch"])
def test_a_fault_that_does_not_apply_is_a_503(upstream: Upstream, fault: str) -> None:
    with FaultProxy(upstream.url, storm(0, 1, fault)) as proxy, client(proxy.url) as connection:
        assert ask(connection, "PUT", "/x", DATA)[0].status == 503
        assert proxy.counts() == {"503": 1}


def hits(script: Script, count: int) -> list[str | None]:
    asked = [Asked("GET", f"/{i % 5}", "", {}, i // 5) for i in range(count)]
    return [script(i, one) for i, one in enumerate(asked)]


def test_a_seeded_script_is_the_same_in_every_run() -> None:
    faults = tuple(APPLIES)
    first = hits(seeded(7, 0.2, faults), 1000)
    assert first == hits(seeded(7, 0.2, faults), 1000)
    assert first != hits(seeded(8, 0.2, faults), 1000)
    assert 150 < sum(fault is not None for fault in first) < 250
    assert set(first) == {None, *faults}


def test_a_seeded_script_never_hits_a_request_four_times_in_a_row() -> None:
    always = hits(seeded(7, 1.0, ("503",)), 40)
    assert always[::5] == ["503", "503", "503", None] * 2


def test_a_new_signature_does_not_make_another_request() -> None:
    one = Asked("PUT", "/k", "partNumber=2&uploadId=a&X-Amz-Signature=1", {})
    two = Asked("PUT", "/k", "partNumber=2&uploadId=b&X-Amz-Signature=2", {})
    assert one.identity == two.identity
    assert one.identity != Asked("PUT", "/k", "partNumber=3&uploadId=a", {}).identity


def test_a_throttled_body_is_whole(upstream: Upstream) -> None:
    with (
        FaultProxy(upstream.url, down_bytes_per_s=5e7, up_bytes_per_s=5e7) as proxy,
        client(proxy.url) as connection,
    ):
        ask(connection, "PUT", "/x", DATA)
        assert ask(connection, "GET", "/x")[1] == DATA
    assert upstream.seen[0][3] == DATA


def test_the_proxy_as_a_process(upstream: Upstream) -> None:
    command = [sys.executable, "-m", "tests.servers.proxy", upstream.url, "--down", "1e9"]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None
        try:
            with client(json.loads(process.stdout.readline())["url"]) as connection:
                assert ask(connection, "GET", "/x")[1] == DATA
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("asked", "status", "start", "stop"),
    [
        (None, 200, 0, 1000),
        ("bytes=0-0", 206, 0, 1),
        ("bytes=10-99999", 206, 10, 1000),
        ("bytes=990-", 206, 990, 1000),
        ("bytes=-3", 206, 997, 1000),
        ("bytes=5-4", 200, 0, 1000),
        ("bytes=1000-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
    ],
)
def test_web_ranges(tmp_path: Path, asked: str, status: int, start: int, stop: int) -> None:
    (tmp_path / "a b").write_bytes(DATA[:1000])
    headers = {} if asked is None else {"Range": asked}
    with WebServer(tmp_path) as server, client(server.url) as connection:
        answer, body = ask(connection, "GET", "/a%20b", headers=headers)
        head, nothing = ask(connection, "HEAD", "/a%20b", headers=headers)
    assert (answer.status, body) == (status, DATA[start:stop])
    told = {206: f"bytes {start}-{stop - 1}/1000", 416: "bytes */1000"}.get(status)
    assert answer.headers["Content-Range"] == told
    assert (head.status, head.headers["Content-Length"]) == (status, str(stop - start))
    assert nothing == b""


def test_web_versions(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with WebServer(tmp_path) as server, client(server.url) as connection:
        etag = ask(connection, "HEAD", "/a")[0].headers["ETag"]
        assert ask(connection, "GET", "/a", headers={"If-Match": etag})[0].status == 200
        (tmp_path / "a").write_bytes(b"abcd")
        assert ask(connection, "GET", "/a", headers={"If-Match": etag})[0].status == 412
        assert ask(connection, "GET", "/b")[0].status == 404
        assert ask(connection, "GET", "/../etc/passwd")[0].status == 404
    assert [seen.status for seen in server.requests] == [200, 200, 412, 404, 404]


def test_web_switches(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    right = {"Authorization": "Basic bWU6cHc="}
    with WebServer(tmp_path, redirect=True, auth="me:pw") as server:
        with client(server.url) as connection:
            assert ask(connection, "GET", "/a")[0].status == 401
            moved = ask(connection, "GET", "/a", headers=right)[0]
        assert moved.status == 302
        assert moved.headers["Location"] == f"{server.back.url}/a"
        server.no_ranges = True
        with client(server.back.url) as connection:
            answer, body = ask(connection, "GET", "/a", headers={"Range": "bytes=0-0"})
    assert (answer.status, body) == (200, b"abc")
    assert [seen.server for seen in server.requests] == ["front", "front", "back"]
    assert server.requests[1].headers["authorization"] == right["Authorization"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "sub" / "model.safetensors").write_bytes(DATA[:5000])
    return folder


def resolve(hub: Hub, name: str = "org/m", token: str | None = None) -> http.client.HTTPResponse:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with client(hub.url) as connection:
        return ask(
            connection, "GET", f"/{name}/resolve/main/sub/model.safetensors", headers=headers
        )[0]


def stored(address: str, headers: dict[str, str]) -> tuple[int, bytes]:
    url = urlsplit(address)
    with client(address) as connection:
        answer, body = ask(connection, "GET", f"{url.path}?{url.query}", headers=headers)
    return answer.status, body


def test_hub_sends_weights_from_elsewhere_until_the_address_expires(model: Path) -> None:
    with Hub({"org/m": {"main": model}}, expire_after=2) as hub:
        moved = resolve(hub)
        assert moved.status == 302
        assert moved.headers["X-Repo-Commit"] == hub.commit("org/m")
        assert moved.headers["X-Linked-Size"] == "5000"
        address = moved.headers["Location"]
        asked = {"Range": "bytes=10-19", "If-Match": moved.headers["X-Linked-ETag"]}
        assert [stored(address, asked) for _ in range(3)] == [
            (206, DATA[10:20]),
            (206, DATA[10:20]),
            (403, b"Request has expired"),
        ]
        second = resolve(hub).headers["Location"]
        assert stored(second, {})[0] == 200
        hub.expire()
        assert stored(second, {})[0] == 403


def test_hub_sends_small_files_whole(model: Path) -> None:
    with Hub({"org/m": {"main": model}}) as hub, client(hub.url) as connection:
        path = f"/org/m/resolve/{hub.commit('org/m')}/config.json"
        answer, body = ask(connection, "GET", path, headers={"Range": "bytes=0-0"})
    assert (answer.status, body) == (200, b"{}")


def test_hub_notices_a_leaked_token(model: Path) -> None:
    with pytest.raises(AssertionError, match="token"), Hub({"org/m": {"main": model}}) as hub:
        address = resolve(hub, token=hub.token).headers["Location"]
        assert stored(address, {"Authorization": f"Bearer {hub.token}"})[0] == 400
    assert hub.leaked_tokens == [f"Bearer {hub.token}"]


def test_hub_refuses(model: Path) -> None:
    models = {name: {"main": model} for name in ("org/open", "org/gated", "org/private")}
    with Hub(models, gated=["org/gated"], private=["org/private"]) as hub:
        told = {
            (name, token): (answer.status, answer.headers["X-Error-Code"])
            for name in (*models, "org/none")
            for token in (None, hub.token)
            for answer in [resolve(hub, name, token)]
        }
    assert told == {
        ("org/open", None): (302, None),
        ("org/open", hub.token): (302, None),
        ("org/gated", None): (403, "GatedRepo"),
        ("org/gated", hub.token): (302, None),
        ("org/private", None): (401, "RepoNotFound"),
        ("org/private", hub.token): (302, None),
        ("org/none", None): (401, "RepoNotFound"),
        ("org/none", hub.token): (404, "RepoNotFound"),
    }


def test_a_commit_stays_when_its_branch_moves(tmp_path: Path, model: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with Hub({"org/m": {"main": model}}) as hub, client(hub.url) as connection:
        old = hub.commit("org/m")
        assert hub.push("org/m", "main", other) != old
        assert ask(connection, "GET", "/org/m/resolve/main/config.json")[0].status == 404
        assert ask(connection, "GET", f"/org/m/resolve/{old}/config.json")[0].status == 200


LIBRARY = """
import json, sys
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

def refused(error, *args, **more):
    try:
        HfApi().model_info(*args, **more)
    except error:
        return True

info = HfApi().model_info("org/m", revision="refs/pr/1", files_metadata=True)
url = hf_hub_url("org/m", "sub/model.safetensors", revision=info.sha)
found = snapshot_download("org/m", revision=info.sha)
json.dump({
    "sha": info.sha,
    "files": {item.rfilename: [item.size, bool(item.lfs)] for item in info.siblings},
    "size": get_hf_file_metadata(url).size,
    "cached": snapshot_download("org/m", revision=info.sha, local_files_only=True) == found,
    "refused": [
        refused(RepositoryNotFoundError, "org/none"),
        refused(RevisionNotFoundError, "org/m", revision="none"),
        refused(GatedRepoError, "org/gated", token=False),
        refused(GatedRepoError, "org/gated"),
    ],
}, sys.stdout)
"""


def test_hub_is_one_for_the_library(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("huggingface_hub")
    models = {"org/m": {"refs/pr/1": model}, "org/gated": {"main": model}}
    with Hub(models, gated=["org/gated"], lists_gated=False) as hub:
        env = {
            **{name: text for name, text in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        done = subprocess.run([sys.executable, "-c", LIBRARY], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == {
        "sha": hub.commit("org/m", "refs/pr/1"),
        "files": {"config.json": [2, False], "sub/model.safetensors": [5000, True]},
        "size": 5000,
        "cached": True,
        "refused": [True, True, True, None],
    }
