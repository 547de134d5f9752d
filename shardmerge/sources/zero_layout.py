"""Where each parameter lies in the flat partitions of DeepSpeed's ranks. Pure.

ZeRO-1 and ZeRO-2 join the parameters of a group to one vector and cut it at equal places, wherever
a parameter then ends. ZeRO-3 cuts every parameter into as many pieces as there are ranks, the last
ones filled up, and joins the pieces of each rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.errors import CheckpointError
from shardmerge.numerics import DType
from shardmerge.sources.tensor import Segment, TensorRef, ranges
from shardmerge.sources.torch_file import reference

Shapes = Mapping[str, tuple[int, ...]]

_OTHER = (
    "It is not laid out as it was when this was written, or damaged. Convert it with the\n"
    "  zero_to_fp32.py that DeepSpeed put beside it, and report this"
)


@dataclass(frozen=True, slots=True)
class Partition:
    """What one rank holds.

    Args:
        what: its file, as messages name it.
        groups: its part of each group of parameters, as a flat tensor.
        fragments: where it says itself that parameters begin in them, and of how many elements;
            one map for each group, or none at all.
    """

    what: str
    groups: tuple[TensorRef, ...]
    fragments: tuple[Mapping[str, tuple[int, int]], ...] = ()


def joined(
    ranks: Sequence[Partition],
    groups: Sequence[Shapes],
    paddings: Sequence[Sequence[int]] | None,
    what: str,
) -> Iterator[TensorRef]:
    """The parameters of ZeRO-1 and ZeRO-2: consecutive in the vectors of all ranks together.

    Args:
        ranks: in order.
        groups: names and shapes of the parameters of each group, in order.
        paddings: elements that follow each parameter and belong to none; None for no such.
        what: the checkpoint, as messages name it.

    Raises:
        CheckpointError: for numbers that do not fit.
    """
    for rank in ranks:
        if len(rank.groups) != len(groups):
            raise CheckpointError(
                f"{rank.what}: it has {len(rank.groups)} groups of parameters, and the model "
                f"states list {len(groups)}.\n  {_OTHER}."
            )
    for number, shapes in enumerate(groups):
        parts = [rank.groups[number] for rank in ranks]
        vector = reference(
            f"group {number}",
            parts[0].dtype,
            (sum(part.numel for part in parts),),
            [segment for part in parts for segment in part.segments],
        )
        gaps = _gaps(paddings, number, len(shapes), what)
        begin = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            end = begin + math.prod(shape)
            if end > vector.numel:
                break
            _check_fragments(name, begin, end, number, ranks)
            yield _slice(vector, begin, end, name, shape)
            begin = end + gap
        needed = sum(math.prod(shape) for shape in shapes.values()) + sum(gaps)
        _check_sum(needed, vector.numel, 2 * len(ranks), f"group {number} of parameters", what)


def _gaps(
    paddings: Sequence[Sequence[int]] | None, group: int, count: int, what: str
) -> Sequence[int]:
    """Elements after each parameter of a group that belong to none."""
    if paddings is None:
        return [0] * count
    if group < len(paddings) and len(paddings[group]) == count:
        return paddings[group]
    raise CheckpointError(
        f"{what}: its param_alignment_paddings do not fit the {count} parameters of group "
        f"{group}.\n  {_OTHER}."
    )


def _check_fragments(
    name: str, begin: int, end: int, group: int, ranks: Sequence[Partition]
) -> None:
    """Refuse a layout that a rank's own map of its partition contradicts."""
    first = 0
    for rank in ranks:
        last = first + rank.groups[group].numel
        if rank.fragments:
            held = (max(begin, first) - first, max(0, min(end, last) - max(begin, first)))
            told = rank.fragments[group].get(name, (held[0], 0))
            if told[1] != held[1] or (held[1] and told != held):
                raise CheckpointError(
                    f"{rank.what}: it says that {told[1]:,} elements of {name!r} begin at "
                    f"{told[0]:,};\n  by the shapes of all parameters it is {held[1]:,} at "
                    f"{held[0]:,}. {_OTHER}."
                )
        first = last


def _check_sum(needed: int, found: int, unit: int, which: str, what: str) -> None:
    """Vectors are filled up to a multiple of some elements; more or fewer are a mistake."""
    if needed > found or -(-needed // unit) != -(-found // unit):
        raise CheckpointError(
            f"{what}: {which} needs {needed:,} elements, and all ranks together have {found:,}.\n"
            "  Files of several checkpoints lie together, or one is damaged. Copy it again."
        )


def pieces_of(numel: int, ranks: int) -> Iterator[int]:
    """Elements of a parameter that each rank of ZeRO-3 holds, without those that fill up."""
    piece = -(-numel // ranks)
    for rank in range(ranks):
        yield max(0, min(piece, numel - rank * piece))


def gathered(ranks: Sequence[Partition], groups: Sequence[Shapes]) -> Iterator[TensorRef]:
    """The parameters of ZeRO-3: a piece from each rank, at the same place in all of them.

    Raises:
        CheckpointError: for numbers that do not fit.
    """
    shapes = {name: shape for group in groups for name, shape in group.items()}
    needed = sum(-(-math.prod(shape) // len(ranks)) for shape in shapes.values())
    flats = []
    for rank in ranks:
        count = sum(group.numel for group in rank.groups)
        if count != needed or not rank.groups:
            raise CheckpointError(
                f"{rank.what}: a rank's pieces of all parameters should be {needed:,} elements, "
                f"and are {count:,}.\n"
                "  Files of several checkpoints lie together, or one is damaged. Copy it again."
            )
        segments = [segment for group in rank.groups for segment in group.segments]
        flats.append(reference("flat", rank.groups[0].dtype, (count,), segments))
    begin = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        found = [
            segment
            for flat, count in zip(flats, pieces_of(numel, len(ranks)), strict=True)
            for segment in ranges(flat, begin, begin + count)
        ]
        yield reference(name, flats[0].dtype, shape, found or [_nothing(flats[0])])
        begin += -(-numel // len(ranks))


def frozen(
    name: str, shape: tuple[int, ...], fragments: Sequence[TensorRef], what: str
) -> TensorRef:
    """A parameter that is not trained, of the fragments that the ranks hold.

    Raises:
        CheckpointError: for fragments of other sizes.
    """
    numel = math.prod(shape)
    piece = -(-numel // len(fragments))
    found: list[Segment] = []
    for fragment, count in zip(fragments, pieces_of(numel, len(fragments)), strict=True):
        if fragment.numel != piece or fragment.dtype is not fragments[0].dtype:
            raise CheckpointError(
                f"{what}: the frozen parameter {name!r} of shape {list(shape)} lies in "
                f"{len(fragments)} fragments of {piece:,} elements; one has {fragment.numel:,} "
                f"({fragment.dtype.value}).\n  {_OTHER}."
            )
        found += ranges(fragment, 0, count)
    return reference(name, fragments[0].dtype, shape, found or [_nothing(fragments[0])])


def _slice(vector: TensorRef, begin: int, end: int, name: str, shape: tuple[int, ...]) -> TensorRef:
    found = ranges(vector, begin, end)
    return reference(name, vector.dtype, shape, found or [_nothing(vector)])


def _nothing(of: TensorRef) -> Segment:
    """The place of a tensor without elements."""
    first = of.segments[0]
    return Segment(first.url, first.offset, 0, first.version)


def check_dtype(partition: Partition) -> None:
    """Refuse flat groups that are not float32."""
    for group in partition.groups:
        if group.dtype is not DType.F32:
            raise CheckpointError(
                f"{partition.what}: {group.name} is {group.dtype.torch_name}; only float32 "
                f"is read.\n  {_OTHER}."
            )
