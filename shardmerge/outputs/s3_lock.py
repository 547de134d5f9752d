"""The right to write to a prefix, as an object that its owner renews.

Object stores have no locks, and not all honour conditions, so an owner that is alive shows it: the
object changes every few seconds. One that does not change for a minute is taken over. An owner that
comes back then sees another name in it, and stops; what it wrote meanwhile are the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from shardmerge.errors import LockedError, ShardmergeError
from shardmerge.stores.s3 import Bucket, ConflictError, MissingError

log = logging.getLogger(__name__)

BEAT_S = 15.0
"""Seconds between two signs of life."""
STALE_S = 60.0
"""Seconds without one after which an owner is dead."""
_CONFIRM_S = 1.0
_POLL_S = 2.0


class S3Lock:
    """A lock object; ``held`` takes it."""

    def __init__(self, bucket: Bucket, key: str, out: str) -> None:
        self._bucket = bucket
        self._key = key
        self._out = out
        self._name = uuid.uuid4().hex
        self._lost = False
        self._ended = threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Take the lock, keep it, give it back.

        Raises:
            LockedError: another process has it.
        """
        self._take()
        self._ended.clear()
        beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        beating.start()
        try:
            yield
        finally:
            self._ended.set()
            beating.join()
            with contextlib.suppress(ShardmergeError):
                if self._owner().get("name") == self._name:
                    self._bucket.call("delete_object", Key=self._key)

    def check(self) -> None:
        """Ask whether the lock is still ours; LockedError where another process has taken over."""
        if self._lost or self._owner().get("name") != self._name:
            self._lost = True
            raise LockedError(
                f"{self._out}: another run has taken over; this one was silent for too long.\n"
                "  It goes on from what both have written. Nothing was published by this run."
            )

    def _take(self) -> None:
        owner = self._owner()
        if owner and not _is_dead(owner):
            self._wait_for(owner)
        honoured = False
        try:
            self._put(0, first=not owner)
            self._put(0, first=True)  # a server that honours conditions refuses this
        except ConflictError:
            honoured = True
        if owner or not honoured:
            time.sleep(_CONFIRM_S)  # others may take it over at the same time: the last one has it
        owner = self._owner()
        if owner.get("name") != self._name:
            raise self._refused(owner)

    def _wait_for(self, owner: Mapping[str, object]) -> None:
        """Give a silent owner the time to show that it lives."""
        log.warning("%s: waiting to see whether %s still runs", self._out, _who(owner))
        until = time.monotonic() + STALE_S
        while time.monotonic() < until:
            if self._bucket.patience.wait(min(_POLL_S, STALE_S / 4)):
                raise self._refused(owner)
            now = self._owner()
            if not now:
                return
            if now != owner:
                raise self._refused(now)

    def _refused(self, owner: Mapping[str, object]) -> LockedError:
        return LockedError(
            f"{self._out} is being written by {_who(owner)}.\n"
            "  Wait for it, or stop it and run this command again to go on from there."
        )

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(BEAT_S):
            number += 1
            try:
                if self._owner().get("name") != self._name:
                    self._lost = True
                    return
                self._put(number, first=False)
            except ShardmergeError as problem:
                log.warning("%s: the lock could not be renewed: %s", self._out, problem)

    def _put(self, beat: int, *, first: bool) -> None:
        body = {"name": self._name, "beat": beat, **_here()}
        condition = {"IfNoneMatch": "*"} if first else {}
        self._bucket.call("put_object", Key=self._key, Body=json.dumps(body).encode(), **condition)

    def _owner(self) -> dict[str, object]:
        try:
            found = json.loads(self._bucket.read_object(self._key))
        except MissingError:
            return {}
        except ValueError:
            return {"name": "?"}
        return found if isinstance(found, dict) else {"name": "?"}


def _here() -> dict[str, object]:
    """What tells this process from all others."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "space": _process_space(),
        "started": _started(os.getpid()),
    }


def _is_dead(owner: Mapping[str, object]) -> bool:
    """Whether an owner ran on this machine, among these processes, and does not any more."""
    process = owner.get("process")
    if owner.get("space") != _process_space() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False  # another user's, who lives
    started = _started(process)
    return started is not None and started != owner.get("started")


def _process_space() -> str:
    """Where process numbers mean the same: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _started(process: int) -> str | None:
    """When a process was started, in the kernel's ticks; None where there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]


def _who(owner: Mapping[str, object]) -> str:
    if "process" not in owner:
        return "another process"
    return f"process {owner['process']} on {owner.get('host')}"
