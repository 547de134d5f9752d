"""Which parts are written and what was decided: durable, append-only, bound to one plan.

A journal holds one JSON value per line: first what the output depends on, then handles of
unfinished shards, receipts, decisions, what became of each task, and how far publishing came. A
line is never changed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

from shardmerge.errors import LedgerMismatchError
from shardmerge.methods.api import Decision
from shardmerge.outputs.api import Journal, PartKey, Receipt
from shardmerge.records import TaskRecord, row_of


def fingerprint(identity: Mapping[str, str]) -> str:
    """A short text that differs whenever anything the output depends on does."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Ledger:
    """The ledger of one run. Every ``record`` is durable when it returns.

    Attributes:
        receipts: of the parts that are written.
        decisions: by key.
        tasks: what became of those that ended, in that order; some ended more than once.
        handles: of unfinished shards, by number.
        events: how far publishing came, and the files that each event is about.
    """

    def __init__(self, journal: Journal, identity: Mapping[str, str]) -> None:
        self._journal = journal
        self.receipts: dict[PartKey, Receipt] = {}
        self.decisions: dict[str, Decision] = {}
        self.tasks: list[TaskRecord] = []
        self.handles: dict[int, str] = {}
        self.events: dict[str, tuple[str, ...]] = {}
        try:
            self._load(identity)
        except BaseException:
            self.close()
            raise

    @property
    def is_new(self) -> bool:
        """Whether nothing was done yet."""
        return not (self.receipts or self.decisions or self.events)

    def _load(self, identity: Mapping[str, str]) -> None:
        try:
            lines = self._journal.lines()
            if not lines:
                self._append([{"identity": dict(identity)}])
                return
            records = [json.loads(line) for line in lines]
            before = {str(key): str(value) for key, value in records[0]["identity"].items()}
            for record in records[1:]:
                self._take(record)
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise LedgerMismatchError(
                f"{self._journal.name} is damaged ({type(problem).__name__}: {problem}). "
                "Start over with --fresh."
            ) from None
        if before != dict(identity):
            raise LedgerMismatchError(self._difference(before, identity))

    def _take(self, record: Mapping[str, object]) -> None:
        match record:
            case {"part": [int(shard), int(number)], "bytes": int(n), "crc32": int(crc), **rest}:
                found = rest.get("non_finite", [])
                pairs = tuple((int(t), int(k)) for t, k in found)  # type: ignore[attr-defined]
                tag = str(rest.get("tag", ""))
                found = rest.get("sums", [])
                sums = tuple(tuple(map(float, each)) for each in found)  # type: ignore[attr-defined]
                self.receipts[shard, number] = Receipt(shard, number, n, crc, tag, pairs, sums)
            case {"decision": str(key), "values": list(values)}:
                self.decisions[key] = tuple(float(value) for value in values)
            case {"ran": dict(values)}:
                self.tasks.append(TaskRecord(**values))
            case {"shard": int(shard), "handle": str(handle)}:
                self.handles[shard] = handle
            case {"event": str(event), **rest}:
                self.events[event] = tuple(map(str, rest.get("names", ())))  # type: ignore[call-overload]
            case {"lost": list(parts)}:
                for shard, number in parts:
                    self.receipts.pop((int(shard), int(number)), None)
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
                f"{self._journal.name} is of an unfinished run of another recipe or of changed "
                "sources:",
                *lines,
                "  Undo the change to go on from there, or start over with --fresh.",
            ]
        )

    def record(
        self,
        receipts: Sequence[Receipt] = (),
        decisions: Mapping[str, Decision] | None = None,
        tasks: Sequence[TaskRecord] = (),
    ) -> None:
        """Write receipts of parts that are durable themselves, decisions, and tasks that ended."""
        records: list[Mapping[str, object]] = []
        for receipt in receipts:
            record: dict[str, object] = {
                "part": [receipt.shard, receipt.number],
                "bytes": receipt.nbytes,
                "crc32": receipt.crc32,
            }
            if receipt.tag:
                record["tag"] = receipt.tag
            if receipt.non_finite:
                record["non_finite"] = [list(pair) for pair in receipt.non_finite]
            if receipt.sums:
                record["sums"] = list(receipt.sums)
            records.append(record)
        for key, values in (decisions or {}).items():
            records.append({"decision": key, "values": list(values)})
        records += [{"ran": row_of(task)} for task in tasks]
        if records:
            self._append(records)
        self.receipts.update({item.key: item for item in receipts})
        self.decisions.update(decisions or {})
        self.tasks += tasks

    def mark(self, event: str, names: Sequence[str] = ()) -> None:
        """Record how far publishing came, and which files that is about."""
        if self.events.get(event) != tuple(names):
            self._append([{"event": event, "names": list(names)}])
            self.events[event] = tuple(names)

    def begin(self, handles: Iterable[tuple[int, str]]) -> None:
        """Write how unfinished shards can be gone on with, before anything is written to them."""
        new = {number: handle for number, handle in handles if handle}
        if new:
            self._append([{"shard": number, "handle": handle} for number, handle in new.items()])
            self.handles.update(new)

    def forget(self, parts: Iterable[PartKey]) -> None:
        """Drop receipts of parts whose bytes are gone; they are done again."""
        gone = sorted(set(parts) & self.receipts.keys())
        if gone:
            # On record: a shard that is made again would look like the one that was written.
            self._append([{"lost": [list(part) for part in gone]}])
            for part in gone:
                del self.receipts[part]

    def close(self) -> None:
        """Give back what the journal has open."""
        self._journal.close()

    def _append(self, records: Sequence[Mapping[str, object]]) -> None:
        self._journal.append([json.dumps(record) for record in records])


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
