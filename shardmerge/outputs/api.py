"""What the engine asks of a place that a checkpoint is published at.

A run writes parts of shards that no reader sees, keeps a journal of what is durable beside them,
and at the end gives the shards their names, one by one, the index last. Promises, which
``testing.OutputSuite`` checks for every output:

- a receipt that ``finish`` gave, and that ``sync`` was called for, survives any crash.
- before ``seal`` a shard is not seen; after it, it is whole.
- ``write`` leaves the old content or the new one, never a part.
- a journal's line that ``append`` returned for is read again; a torn one is not.
- two processes do not hold the lock of one output, as far as its place can tell: what makes two
  writers harmless is that both write the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from shardmerge.layout import Part, Shard

STAGING = ".shardmerge"
"""Folder in OUT of everything that is not published yet: journal, lock, local shards."""
LEDGER = "ledger"
"""What the names of the ledger's files begin with, in ``STAGING``."""
LOCK = "lock"
KEPT = f"{STAGING}/kept"
"""Folder in OUT of a sum of task vectors that the run makes first: a checkpoint of its own."""

PartKey = tuple[int, int]
"""A part: numbers of its shard, and of itself in it."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a part was written.

    Args:
        crc32: of the part's bytes.
        tag: what the place calls this part, or the making of its shard: tells receipts of bytes
            that are there from those of bytes that somebody has removed since.
        non_finite: (tensor number, input number) of inputs that hold NaN or infinity in it; input
            -1 is the result of finite inputs.
        sums: of the elements in it, where the method sums up while it merges; each is exact, as a
            few numbers that add up to it.
    """

    shard: int
    number: int
    nbytes: int
    crc32: int
    tag: str = ""
    non_finite: tuple[tuple[int, int], ...] = ()
    sums: tuple[tuple[float, ...], ...] = ()

    @property
    def key(self) -> PartKey:
        """The part."""
        return self.shard, self.number


class PartWriter(Protocol):
    """Writes one part from its first byte to its last."""

    def write(self, data: memoryview | bytes) -> None:
        """Take the next bytes; the buffer is the caller's again."""

    def finish(self, non_finite: Sequence[tuple[int, int]]) -> Receipt:
        """Write what is left, and prove that every byte is there."""


class ShardWriter(Protocol):
    """Writes the parts of unfinished shards; what workers get."""

    def part(self, part: Part) -> PartWriter:
        """A writer of one part."""

    def sync(self, shards: Iterable[int]) -> None:
        """Make every part of these shards durable that was finished before this call."""

    def close(self) -> None:
        """Give back files and connections."""


class Journal(Protocol):
    """Lines that are there when ``append`` returns, whatever happens then."""

    name: str
    """For messages."""

    def lines(self) -> list[str]:
        """All lines that were appended, in order."""

    def append(self, lines: Sequence[str]) -> None:
        """Add lines: durable, and all of them or none."""

    def close(self) -> None:
        """Give back what is open."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is left of an unfinished run.

    Args:
        sealed: shards that already have their names.
        lost: parts with a receipt whose bytes are not there any more.
        open: handles of the shards that can go on.
    """

    sealed: frozenset[int]
    lost: frozenset[PartKey]
    open: Mapping[int, str]


class Output(Protocol):
    """A place for one checkpoint.

    Attributes:
        url: of the folder.
        part_bytes: of the parts that are best written there, about; None: as usual.
        buffers_parts: whether a part is kept in memory until it is whole.
        whole_shards: whether only one machine at a time may write to a shard.
    """

    url: str
    part_bytes: int | None
    buffers_parts: bool
    whole_shards: bool

    # what readers see

    def names(self, folder: str = "") -> list[str]:
        """Names directly in OUT, or in a folder in it, in name order; folders end with ``/``."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def read(self, name: str, nbytes: int | None = None) -> bytes:
        """The first bytes of a file, or all; StoreError where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Make a small file, whole or not at all."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are gone already are no error. Durable."""

    def clear(self) -> None:
        """Remove everything that lies in OUT, unfinished or not."""

    # the unfinished run

    def is_unfinished(self) -> bool:
        """Whether a journal is there."""

    def locked(self, slice: str = "") -> AbstractContextManager[None]:
        """The right to write, or to write a slice; LockedError where another process has it."""

    def check_lock(self) -> None:
        """Ask whether the lock is still this process's; LockedError where it is another's."""

    def forget(self) -> None:
        """Remove everything unfinished but the lock."""

    def journal(self, slice: str = "") -> Journal:
        """The journal, or that of a slice, made if it is not there."""

    def slices(self) -> list[str]:
        """Names of the slices that have a journal."""

    def survey(
        self,
        shards: Sequence[Shard],
        receipts: Mapping[PartKey, Receipt],
        handles: Mapping[int, str],
        *,
        cleared: bool,
    ) -> Survey:
        """What is there of shards, and what is not.

        Args:
            handles: that ``begin`` gave, as far as known.
            cleared: whether nothing of an older checkpoint is left, so that a shard with its name
                is this run's.
        """

    def prove(self, shards: Sequence[Shard], sealed: frozenset[int]) -> None:
        """OutputError or StoreError where what is still to write cannot be: no right, no room."""

    def begin(self, shards: Sequence[Shard], numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Make room for these shards; gives each a handle that a later process can go on with."""

    def writer(self, shards: Sequence[Shard], handles: Mapping[int, str]) -> ShardWriter:
        """A writer of shards that were begun."""

    def seal(
        self,
        shards: Sequence[Shard],
        receipts: Mapping[PartKey, Receipt],
        handles: Mapping[int, str],
    ) -> None:
        """Give whole shards their names; those that have them already stay."""

    def tidy(self) -> None:
        """Remove everything unfinished, the lock last."""

    def leftovers(self) -> list[str]:
        """What an unfinished run has left, for a user to read."""
