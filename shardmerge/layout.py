"""Where every element of the output goes: shards, their headers, and the parts they are written in.

The layout follows from names, shapes and dtypes alone. It does not depend on memory, threads or the
executor, so parts written by an earlier run are the parts of a later one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from shardmerge.header import write_header
from shardmerge.numerics import CANONICAL_BLOCK, DType

PART_BYTES = 64 * 2**20
"""Bytes of a part, about: a receipt and a request are cheap, and little is lost with one."""
LEAST_PART_BYTES = 5 * 2**20
"""S3's least for every part of an upload but the last."""
MOST_PARTS = 10_000
"""S3's limit for one upload, so for one shard."""
SINGLE_SHARD = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``[start, stop)`` of output tensor number ``tensor``."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes ``[start, stop)`` of a shard, written by one task; part 0 begins with the header."""

    shard: int
    number: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the part."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive parts that hold whole tensors, or whole matrices of one: a task's, at most."""

    parts: tuple[Part, ...]

    @property
    def tensors(self) -> tuple[int, ...]:
        """Numbers of the tensors in it, in order."""
        return tuple(
            number for number, _ in groupby(p.tensor for part in self.parts for p in part.pieces)
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file.

    Args:
        name: of the file.
        header: its first bytes, padded so that the tensors begin at a multiple of 4096.
        tensors: numbers of its tensors, in the order of their bytes.
        nbytes: size of the file.
        units: of all its parts, in order.
    """

    name: str
    header: bytes
    tensors: tuple[int, ...]
    nbytes: int
    units: tuple[Unit, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, in order."""
        return tuple(part for unit in self.units for part in unit.parts)


@dataclass(frozen=True, slots=True)
class Spec:
    """What the layout needs to know of an output tensor.

    Args:
        grain: elements that are computed together; a unit holds a multiple of them.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    grain: int = 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * self.dtype.itemsize


def lay_out(
    tensors: Sequence[Spec],
    shard_of: Sequence[int],
    shard_bytes: int | None,
    *,
    part_bytes: int | None = None,
) -> tuple[Shard, ...]:
    """The shards of the output.

    Args:
        tensors: in output order.
        shard_of: the shard of each tensor, used where ``shard_bytes`` is None.
        shard_bytes: the most bytes of tensors in a shard; one tensor may exceed it alone.
        part_bytes: of a part, about, where its place wishes for another size than usual.
    """
    groups = _by_number(shard_of) if shard_bytes is None else _by_size(tensors, shard_bytes)
    names = [SINGLE_SHARD]
    if len(groups) > 1:
        count = len(groups)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return tuple(
        _shard(number, name, group, tensors, part_bytes or PART_BYTES)
        for number, (name, group) in enumerate(zip(names, groups, strict=True))
    )


def _by_number(shard_of: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for tensor, shard in enumerate(shard_of):
        groups.setdefault(shard, []).append(tensor)
    return [groups[shard] for shard in sorted(groups)] or [[]]


def _by_size(tensors: Sequence[Spec], shard_bytes: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    filled = 0
    for number, tensor in enumerate(tensors):
        if groups[-1] and filled + tensor.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += tensor.nbytes
    return groups


def _shard(
    number: int, name: str, group: Sequence[int], tensors: Sequence[Spec], part_bytes: int
) -> Shard:
    # Larger elements first: every element is then aligned, as the format's own writer does it.
    order = sorted(group, key=lambda tensor: -tensors[tensor].dtype.itemsize)
    header = write_header([(t.name, t.dtype, t.shape) for t in (tensors[i] for i in order)])
    data_bytes = sum(tensors[tensor].nbytes for tensor in order)
    units, start, parts = [], 0, 0
    for pieces_of_parts in _units(
        [(i, tensors[i]) for i in order], _at_least(part_bytes, data_bytes)
    ):
        unit = []
        for pieces in pieces_of_parts:
            stop = start + sum(
                (p.stop - p.start) * tensors[p.tensor].dtype.itemsize for p in pieces
            )
            stop += len(header) if parts == 0 else 0
            unit.append(Part(number, parts, start, stop, tuple(pieces)))
            start, parts = stop, parts + 1
        units.append(Unit(tuple(unit)))
    return Shard(name, header, tuple(order), len(header) + data_bytes, tuple(units))


def _at_least(part_bytes: int, data_bytes: int) -> int:
    """Bytes of the parts of a shard: more than usual where there would be too many."""
    # At worst three parts hold little more than one: a few small tensors, and the halves of one
    # that was just too large.
    return max(part_bytes, math.ceil(data_bytes / (MOST_PARTS // 3 - 1)))


def _units(tensors: Sequence[tuple[int, Spec]], part_bytes: int) -> Iterator[list[list[Piece]]]:
    """For each unit, the pieces of each of its parts.

    Small tensors share a part; a large one has several to itself, with the few bytes before it that
    would make too small a part of their own.
    """
    batch: list[Piece] = []
    filled = 0
    for number, tensor in tensors:
        whole = Piece(number, 0, tensor.numel)
        if filled >= LEAST_PART_BYTES and filled + tensor.nbytes > part_bytes:
            yield [batch]
            batch, filled = [], 0
        if tensor.nbytes > part_bytes:
            for block in _blocks(whole, tensor, part_bytes):
                pieces = _cut(block, tensor.dtype.itemsize, part_bytes)
                yield [[*batch, pieces[0]], *([piece] for piece in pieces[1:])]
                batch, filled = [], 0
        else:
            batch.append(whole)
            filled += tensor.nbytes
    if batch or not tensors:
        yield [batch]


def _blocks(whole: Piece, tensor: Spec, part_bytes: int) -> list[Piece]:
    """Even pieces of about ``part_bytes`` that hold whole grains; all of it where that is 1."""
    if tensor.grain == 1:
        return [whole]
    grains = whole.stop // tensor.grain
    count = min(grains, math.ceil(tensor.nbytes / part_bytes))
    edges = [i * grains // count * tensor.grain for i in range(count + 1)]
    return [Piece(whole.tensor, start, stop) for start, stop in pairwise(edges)]


def _cut(whole: Piece, itemsize: int, part_bytes: int) -> list[Piece]:
    """Even pieces of at most about ``part_bytes``, cut between canonical blocks."""
    numel = whole.stop - whole.start
    most = numel * itemsize // (LEAST_PART_BYTES + CANONICAL_BLOCK * itemsize)
    count = max(1, min(math.ceil(numel * itemsize / part_bytes), most))
    blocks = math.ceil(numel / CANONICAL_BLOCK)
    edges = [whole.start + round(i * blocks / count) * CANONICAL_BLOCK for i in range(count)]
    return [Piece(whole.tensor, start, stop) for start, stop in pairwise([*edges, whole.stop])]
