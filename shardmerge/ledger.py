"""Which parts are written and what was decided: durable, append-only, bound to one plan.

The file holds one JSON value per line: first what the output depends on, then receipts, decisions
and how far publishing came. A line is written once and never changed; a last line that was torn by
a crash is cut off, and its part is done again.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from shardmerge.errors import LedgerMismatchError, LockedError
from shardmerge.methods.api import Decision
from shardmerge.shards import Receipt, write_failed

LEDGER = "ledger.jsonl"
LOCK = "lock"


def fingerprint(identity: Mapping[str, str]) -> str:
    """A short text that differs whenever anything the output depends on does."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Lock:
    """The right to write to one OUT; the system gives it back when the process ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._file = -1

    def __enter__(self) -> Lock:
        while True:
            try:
                self._path.parent.mkdir(exist_ok=True)
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(self._file, 200).decode(errors="replace") or "another process"
                os.close(self._file)
                raise LockedError(
                    f"{self._path.parent.parent} is being written by {owner}.\n"
                    "  Wait for it, or stop it and run this command again to go on from there."
                ) from None
            except OSError as problem:
                raise write_failed(self._path, problem) from problem
            if self._still_there():
                break
            os.close(self._file)  # the run that held it has published and removed the folder
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return self

    def _still_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._file)


class Ledger:
    """The ledger of one run. Every ``record`` is durable when it returns.

    Attributes:
        receipts: of the parts that are written, by (shard, part).
        decisions: by key.
        events: how far publishing came, and the files that each event is about.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self._path = path
        self.receipts: dict[tuple[int, int], Receipt] = {}
        self.decisions: dict[str, Decision] = {}
        self.events: dict[str, tuple[str, ...]] = {}
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self._load(identity)
            except BaseException:
                self.close()
                raise
        except OSError as problem:
            raise write_failed(path, problem) from problem

    @property
    def is_new(self) -> bool:
        """Whether nothing was done yet."""
        return not (self.receipts or self.decisions or self.events)

    def _load(self, identity: Mapping[str, str]) -> None:
        text = self._path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.ftruncate(self._file, whole)
        lines = text[:whole].splitlines()
        if not lines:
            self._append([{"identity": dict(identity)}])
            return
        try:
            records = [json.loads(line) for line in lines]
            before = {str(key): str(value) for key, value in records[0]["identity"].items()}
            for record in records[1:]:
                self._take(record)
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise LedgerMismatchError(
                f"{self._path} is damaged ({type(problem).__name__}: {problem}). "
                "Start over with --fresh."
            ) from None
        if before != dict(identity):
            raise LedgerMismatchError(self._difference(before, identity))

    def _take(self, record: Mapping[str, object]) -> None:
        match record:
            case {"part": [int(shard), int(number)], "bytes": int(n), "crc32": int(crc), **rest}:
                found = rest.get("non_finite", [])
                pairs = tuple((int(t), int(k)) for t, k in found)  # type: ignore[attr-defined]
                self.receipts[shard, number] = Receipt(shard, number, n, crc, pairs)
            case {"decision": str(key), "values": list(values)}:
                self.decisions[key] = tuple(float(value) for value in values)
            case {"event": str(event), **rest}:
                self.events[event] = tuple(map(str, rest.get("names", ())))  # type: ignore[call-overload]
            case {"gone": list(shards)}:
                self._drop({int(shard) for shard in shards})
            case _:
                raise ValueError(f"a line that this version does not know: {record}")

    def _difference(self, before: Mapping[str, str], now: Mapping[str, str]) -> str:
        lines = []
        for key in sorted({*before, *now}):
            old, new = before.get(key), now.get(key)
            if old != new:
                lines.append(f"  {key} changed:")
                lines += [f"    {line}" for line in _changes(old, new)]
        return "\n".join(
            [
                f"{self._path.parent} holds an unfinished run of another recipe or of changed "
                "sources:",
                *lines,
                "  Undo the change to go on from there, or start over with --fresh.",
            ]
        )

    def record(
        self, receipts: Sequence[Receipt] = (), decisions: Mapping[str, Decision] | None = None
    ) -> None:
        """Write receipts of parts that are durable themselves, and decisions."""
        records: list[Mapping[str, object]] = []
        for receipt in receipts:
            record: dict[str, object] = {
                "part": [receipt.shard, receipt.number],
                "bytes": receipt.nbytes,
                "crc32": receipt.crc32,
            }
            if receipt.non_finite:
                record["non_finite"] = [list(pair) for pair in receipt.non_finite]
            records.append(record)
        for key, values in (decisions or {}).items():
            records.append({"decision": key, "values": list(values)})
        if records:
            self._append(records)
        self.receipts.update({(item.shard, item.number): item for item in receipts})
        self.decisions.update(decisions or {})

    def mark(self, event: str, names: Sequence[str] = ()) -> None:
        """Record how far publishing came, and which files that is about."""
        if self.events.get(event) != tuple(names):
            self._append([{"event": event, "names": list(names)}])
            self.events[event] = tuple(names)

    def forget_shards(self, shards: set[int]) -> None:
        """Drop the receipts of shards whose bytes are gone; their parts are done again."""
        gone = shards & {shard for shard, _ in self.receipts}
        if gone:
            # On record: their files are made again, and would look like those that were written.
            self._append([{"gone": sorted(gone)}])
            self._drop(gone)

    def _drop(self, shards: set[int]) -> None:
        self.receipts = {key: value for key, value in self.receipts.items() if key[0] not in shards}

    def _append(self, records: Sequence[Mapping[str, object]]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        before = os.fstat(self._file).st_size
        try:
            while text:
                text = text[os.write(self._file, text) :]
            os.fsync(self._file)
        except OSError as problem:
            # Half a line must not stand before the next one; reading cuts off only the last.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise write_failed(self._path, problem) from problem

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _changes(old: str | None, new: str | None) -> list[str]:
    """The lines that differ, the first few."""
    if old is None or new is None:
        return ["it was not there before" if old is None else "it is not there any more"]
    lines = [
        line
        for line in difflib.ndiff(old.splitlines(), new.splitlines())
        if line.startswith(("- ", "+ "))
    ]
    return lines[:6] + ([f"... {len(lines) - 6} more"] if len(lines) > 6 else [])
