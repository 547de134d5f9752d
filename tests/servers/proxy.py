"""A proxy in front of an S3 server that loses, cuts, delays and falsifies by script.

The heads of requests pass through byte for byte, ``Host`` included, so that signatures stay valid
for a client that was told the proxy's address. ``python -m tests.servers.proxy UPSTREAM`` serves
without faults until killed, for benchmarks with a bounded bandwidth.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import re
import socket
import struct
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from urllib.parse import urlsplit

BLOCK_BYTES = 256 << 10
HEAD_BYTES = 64 << 10
STALL_BYTES = 1000
SLACK_S = 0.01
"""How far a throttled direction may fall behind its rate and still catch up."""
NAP_S = 0.001
"""Shorter sleeps are saved up."""
FLUSH_S = 1.0
"""How long a reset waits for the client to take what was sent before."""
STREAK = 3
"""How often in a row a seeded script hits the same request."""

Blocks = Iterator[memoryview]
Script = Callable[[int, "Asked"], "str | None"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a script is told of a request.

    Attributes:
        path: as sent, without the query.
        query: as sent, without ``?``.
        headers: by lower-case name.
        tries: how many requests with the same identity came before.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    tries: int = 0

    @property
    def identity(self) -> str:
        """Method, path, query and range: the same for every try, in this run and the next.

        Signatures and upload ids are left out, because they are new each time.
        """
        told = [
            item
            for item in self.query.split("&")
            if not item.lower().startswith(("x-amz-", "uploadid="))
        ]
        return f"{self.method} {self.path}?{'&'.join(told)} {self.headers.get('range', '')}"

    @property
    def of_upload(self) -> bool:
        """Whether it names an upload in parts."""
        return "uploadid=" in self.query.lower()


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer of the proxy's own."""

    status: str
    code: str
    headers: tuple[bytes, ...] = ()

    @property
    def body(self) -> bytes:
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{self.code}</Code><Message>scripted fault</Message></Error>"
        ).encode()


REFUSALS = {
    "503": Refusal("503 Service Unavailable", "SlowDown"),
    "500": Refusal("500 Internal Server Error", "InternalError"),
    "429": Refusal("429 Too Many Requests", "TooManyRequests", (b"Retry-After: 0",)),
    "expired": Refusal("403 Forbidden", "ExpiredToken"),
    "error200": Refusal("200 OK", "InternalError"),
}
"""Answered instead of forwarding."""
NO_SUCH_UPLOAD = Refusal("404 Not Found", "NoSuchUpload")

APPLIES: Mapping[str, Callable[[Asked], bool]] = {
    "503": lambda asked: True,
    "500": lambda asked: True,
    "429": lambda asked: True,
    "expired": lambda asked: True,
    "drop": lambda asked: True,
    "lost": lambda asked: True,
    "reset": lambda asked: True,
    "trunc": lambda asked: asked.method == "GET",
    "stall": lambda asked: asked.method == "GET",
    "short": lambda asked: asked.method == "GET" and "range" in asked.headers,
    "full200": lambda asked: asked.method == "GET" and "range" in asked.headers,
    "error200": lambda asked: asked.method == "POST" and asked.of_upload,
    "nosuch": lambda asked: asked.method in ("POST", "DELETE") and asked.of_upload,
}
"""The faults by name, and which requests they can hit; the others get a 503."""


def seeded(seed: int, share: float, faults: Sequence[str]) -> Script:
    """Hit each request with the probability ``share``, the same try in every run.

    What happens depends on the request and its number of tries, never on the order in which
    concurrent clients came. A request is never hit more than three times in a row.
    """
    streaks: Counter[str] = Counter()

    def script(number: int, asked: Asked) -> str | None:
        chance = random.Random(f"{seed} {asked.tries} {asked.identity}")
        if chance.random() >= share or streaks[asked.identity] >= STREAK:
            streaks[asked.identity] = 0
            return None
        streaks[asked.identity] += 1
        return chance.choice(faults)

    return script


def storm(first: int, last: int, fault: str) -> Script:
    """Hit every request whose number is at least ``first`` and less than ``last``."""

    def script(number: int, asked: Asked) -> str | None:
        return fault if first <= number < last else None

    return script


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a request or an answer, as sent."""

    start: bytes
    lines: tuple[bytes, ...]

    @classmethod
    def parse(cls, raw: bytes) -> Head:
        start, *lines = raw.split(b"\r\n")
        return cls(start, tuple(lines))

    @property
    def raw(self) -> bytes:
        return b"\r\n".join((self.start, *self.lines, b"", b""))

    @property
    def headers(self) -> dict[str, str]:
        pairs = (line.decode("latin-1").partition(":") for line in self.lines)
        return {name.strip().lower(): value.strip() for name, _, value in pairs}

    @property
    def length(self) -> int | None:
        """Content-Length, if it is told."""
        told = self.headers.get("content-length")
        return None if told is None else int(told)

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.start.split(None, 2)[1])

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def closes(self) -> bool:
        """Whether the connection ends after this message."""
        told = self.headers.get("connection", "").lower()
        return "close" in told or (b"HTTP/1.0" in self.start and "keep-alive" not in told)

    def without(self, *names: bytes) -> Head:
        """Leave out headers; names in lower case."""
        kept = (line for line in self.lines if line.partition(b":")[0].lower() not in names)
        return replace(self, lines=tuple(kept))

    def asked(self) -> Asked:
        """The request that this head is of."""
        method, target, _ = self.start.decode("latin-1").split(" ", 2)
        path, _, query = target.partition("?")
        return Asked(method, path, query, self.headers)


class Throttle:
    """Bytes per second for all connections of one direction together."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def meter(self, blocks: Blocks) -> Blocks:
        """The same blocks, no faster than the rate."""
        return blocks if self._rate is None else self._metered(blocks, self._rate)

    def _metered(self, blocks: Blocks, rate: float) -> Blocks:
        for block in blocks:
            with self._lock:
                now = time.monotonic()
                # Times are absolute, so that a sleep that took too long is made up for.
                self._free_at = max(self._free_at, now - SLACK_S) + len(block) / rate
                wait_s = self._free_at - now
            if wait_s > NAP_S:
                time.sleep(wait_s)
            yield block


class Wire:
    """One end of a connection; heads and bodies are read through one reused buffer."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._block = memoryview(bytearray(BLOCK_BYTES))
        self._early = b""  # what came along with a head

    def read_head(self) -> Head | None:
        """The next head; None if the other side ended before it."""
        raw = self._read_until(b"\r\n\r\n")
        return None if raw is None else Head.parse(raw)

    def body(self, head: Head) -> Blocks:
        """The bytes behind a head as they are on the wire, chunk sizes included."""
        if head.is_chunked:
            return self._chunked()
        return self.blocks(head.length or 0)

    def blocks(self, length: int) -> Blocks:
        """The next ``length`` bytes; each block is valid until the next.

        Raises:
            ConnectionError: the other side ended before.
        """
        while length:
            if self._early:
                block = memoryview(self._early)[:length]
                self._early = self._early[length:]
            else:
                # Whole blocks, because each costs the interpreter the same however small.
                count = self.socket.recv_into(
                    self._block, min(length, BLOCK_BYTES), socket.MSG_WAITALL
                )
                if not count:
                    raise ConnectionError("the body is cut short")
                block = self._block[:count]
            length -= len(block)
            yield block

    def rest(self) -> Blocks:
        """All bytes until the other side ends."""
        if self._early:
            yield memoryview(self._early)
            self._early = b""
        while count := self.socket.recv_into(self._block):
            yield self._block[:count]

    def send(self, blocks: Blocks) -> None:
        for block in blocks:
            self.socket.sendall(block)

    def is_stale(self) -> bool:
        """Whether the other side ended an idle connection."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def reset(self) -> None:
        """End the connection by a RST, after the other side took what was sent."""
        end = time.monotonic() + FLUSH_S
        # A RST throws away what the kernel has not sent yet.
        while time.monotonic() < end:
            unsent = fcntl.ioctl(self.socket, termios.TIOCOUTQ, b"\0\0\0\0")
            if not struct.unpack("i", unsent)[0]:
                break
            time.sleep(NAP_S)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _chunked(self) -> Blocks:
        while True:
            size = self._read_line()
            yield memoryview(size)
            count = int(size.partition(b";")[0], 16)
            if not count:
                break
            yield from self.blocks(count + 2)
        while (line := self._read_line()) != b"\r\n":  # trailers
            yield memoryview(line)
        yield memoryview(line)

    def _read_line(self) -> bytes:
        line = self._read_until(b"\r\n")
        if line is None:
            raise ConnectionError("the body is cut short")
        return line + b"\r\n"

    def _read_until(self, end: bytes) -> bytes | None:
        while end not in self._early:
            got = self.socket.recv(HEAD_BYTES)
            if not got:
                return None
            self._early += got
        found, _, self._early = self._early.partition(end)
        return found


def drain(blocks: Blocks) -> None:
    for _ in blocks:
        pass


class FaultProxy:
    """A threaded reverse proxy; as a context manager it listens on a free port of 127.0.0.1.

    Attributes:
        url: what a client uses instead of the upstream's endpoint.
        log: number, method, path and fault of each request, in the order of arrival. A fault that
            does not apply to its request is a ``503`` here as well.
    """

    def __init__(
        self,
        upstream: str,
        script: Script | None = None,
        *,
        down_bytes_per_s: float | None = None,
        up_bytes_per_s: float | None = None,
        stall_s: float = 30.0,
    ) -> None:
        """Prepare a proxy.

        Args:
            upstream: endpoint of the real server, ``http://host:port``.
            script: called once per request, one at a time, with its number from 0; returns the
                name of a fault or None.
            down_bytes_per_s: bound on the bodies of answers, all connections together.
            up_bytes_per_s: the same for the bodies of requests.
            stall_s: how long a stalled answer is silent before its connection is closed.
        """
        address = urlsplit(upstream)
        assert address.scheme == "http" and address.hostname
        self.upstream = (address.hostname, address.port or 80)
        self.script = script
        self.down = Throttle(down_bytes_per_s)
        self.up = Throttle(up_bytes_per_s)
        self.stall_s = stall_s
        self.stopping = threading.Event()
        self.url = ""
        self.log: list[tuple[int, str, str, str | None]] = []
        self._tries: Counter[str] = Counter()
        self._deciding = threading.Lock()
        self._open: set[socket.socket] = set()
        self._opening = threading.Lock()

    def __enter__(self) -> FaultProxy:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._opening:
            for connection in self._open:
                # Its thread closes it, when it sees the end.
                end(connection)

    def counts(self) -> dict[str, int]:
        """How often each fault happened."""
        with self._deciding:
            return dict(Counter(fault for *_, fault in self.log if fault))

    def decide(self, asked: Asked) -> str | None:
        """The fault of a request, which is written to the log."""
        with self._deciding:
            number = len(self.log)
            asked = replace(asked, tries=self._tries[asked.identity])
            self._tries[asked.identity] += 1
            fault = self.script(number, asked) if self.script else None
            if fault is not None and not APPLIES[fault](asked):
                fault = "503"
            self.log.append((number, asked.method, asked.path, fault))
            return fault

    def track(self, connection: socket.socket) -> None:
        """Have a connection ended when the proxy ends."""
        with self._opening:
            if self.stopping.is_set():
                connection.close()
                raise ConnectionError("the proxy ends")
            self._open.add(connection)

    def forget(self, connection: socket.socket) -> None:
        """Close a connection."""
        with self._opening:
            self._open.discard(connection)
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        visit = None
        try:
            self.track(connection)
            visit = Visit(self, connection)
            while visit.exchange():
                pass
        except OSError:
            pass  # either side ended, and so does the other
        finally:
            if visit is not None:
                visit.hang_up()
            self.forget(connection)


def end(connection: socket.socket) -> None:
    with suppress(OSError):  # the other side may have been faster
        connection.shutdown(socket.SHUT_RDWR)


class Visit:
    """One connection of a client, with one of its own to the server."""

    def __init__(self, proxy: FaultProxy, connection: socket.socket) -> None:
        self._proxy = proxy
        self._client = Wire(connection)
        self._server: Wire | None = None

    def exchange(self) -> bool:
        """Serve one request.

        Returns:
            Whether the connection stays open.
        """
        head = self._client.read_head()
        if head is None:
            return False
        asked = head.asked()
        fault = self._proxy.decide(asked)
        if fault == "drop":
            return False
        if fault in REFUSALS:
            return self._refuse(head, REFUSALS[fault])
        if fault == "reset" and asked.method != "GET":
            return self._reset_request(head)
        server, answer = self._ask(head.without(b"range") if fault == "full200" else head)
        if fault in ("lost", "nosuch"):
            drain(self._answered(head, server, answer))
            return fault == "nosuch" and self._say(head, NO_SUCH_UPLOAD)
        if fault in ("reset", "trunc", "stall"):
            return self._cut(fault, server, answer)
        if fault == "short" and answer.status == 206 and (answer.length or 0) > 1:
            return self._shorten(head, server, answer)
        self._client.socket.sendall(answer.raw)
        self._client.send(self._proxy.down.meter(self._answered(head, server, answer)))
        return not (head.closes or answer.closes)

    def hang_up(self) -> None:
        """End the connection to the server, where there is one."""
        if self._server is not None:
            self._proxy.forget(self._server.socket)
            self._server = None

    def _dial(self) -> Wire:
        if self._server is not None and self._server.is_stale():
            self.hang_up()
        if self._server is None:
            connection = socket.create_connection(self._proxy.upstream)
            self._proxy.track(connection)
            self._server = Wire(connection)
        return self._server

    def _request_body(self, head: Head) -> Blocks:
        if "100-continue" in head.headers.get("expect", "").lower():
            self._client.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._proxy.up.meter(self._client.body(head))

    def _ask(self, head: Head) -> tuple[Wire, Head]:
        """Forward a request.

        Returns:
            The connection to the server, behind the head of its answer; that head.
        """
        server = self._dial()
        # No client signs it, and the proxy has answered it.
        server.socket.sendall(head.without(b"expect").raw)
        body = self._request_body(head)
        for block in body:
            try:
                server.socket.sendall(block)
            except OSError:  # a server may refuse before it has read everything
                drain(body)
        answer = server.read_head()
        while answer is not None and answer.status < 200:
            answer = server.read_head()
        if answer is None:
            raise ConnectionError("the server ended the connection")
        return server, answer

    def _answered(self, head: Head, server: Wire, answer: Head) -> Blocks:
        if head.start.startswith(b"HEAD ") or answer.status in (204, 304):
            return iter(())
        if answer.length is None and not answer.is_chunked:
            return server.rest()
        return server.body(answer)

    def _refuse(self, head: Head, refusal: Refusal) -> bool:
        # A client that was not told to continue sends no body, and the connection is out of step.
        if "expect" in head.headers:
            head = replace(head, lines=(b"Connection: close",))
        else:
            drain(self._request_body(head))
        return self._say(head, refusal)

    def _say(self, head: Head, refusal: Refusal) -> bool:
        body = refusal.body
        lines = [
            b"HTTP/1.1 " + refusal.status.encode(),
            b"Content-Type: application/xml",
            b"Content-Length: %d" % len(body),
            b"Connection: close" if head.closes else b"Connection: keep-alive",
            *refusal.headers,
        ]
        shown = b"" if head.start.startswith(b"HEAD ") else body
        self._client.socket.sendall(b"\r\n".join([*lines, b"", shown]))
        return not head.closes

    def _reset_request(self, head: Head) -> bool:
        kept = (head.length or 0) // 2
        told = b"Content-Length: %d" % kept
        asked = head.without(b"content-length", b"transfer-encoding")
        drain(self._request_body(replace(asked, lines=(*asked.lines, told))))
        self._client.reset()
        return False

    def _cut(self, fault: str, server: Wire, answer: Head) -> bool:
        # Of an answer whose length is not told, nothing but the head is sent.
        half = (answer.length or 0) // 2
        self._client.socket.sendall(answer.raw)
        count = min(half, STALL_BYTES) if fault == "stall" else half
        self._client.send(self._proxy.down.meter(server.blocks(count)))
        if fault == "reset":
            self._client.reset()
        elif fault == "stall":
            self._proxy.stopping.wait(self._proxy.stall_s)
        return False

    def _shorten(self, head: Head, server: Wire, answer: Head) -> bool:
        told = re.fullmatch(r"bytes (\d+)-\d+/(.+)", answer.headers["content-range"])
        assert told is not None and answer.length is not None
        half = answer.length // 2
        start = int(told[1])
        kept = answer.without(b"content-range", b"content-length")
        lines = (
            b"Content-Range: bytes %d-%d/%s" % (start, start + half - 1, told[2].encode()),
            b"Content-Length: %d" % half,
        )
        self._client.socket.sendall(replace(kept, lines=kept.lines + lines).raw)
        self._client.send(self._proxy.down.meter(server.blocks(half)))
        self.hang_up()
        return not (head.closes or answer.closes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.servers.proxy")
    parser.add_argument("upstream", help="endpoint of the real server, http://host:port")
    parser.add_argument("--down", type=float, metavar="BYTES", help="bytes per second of answers")
    parser.add_argument("--up", type=float, metavar="BYTES", help="bytes per second of requests")
    told = parser.parse_args()
    with FaultProxy(told.upstream, down_bytes_per_s=told.down, up_bytes_per_s=told.up) as proxy:
        sys.stdout.write(json.dumps({"url": proxy.url}) + "\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
