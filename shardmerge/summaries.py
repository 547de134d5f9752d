"""What measuring passes give, added up in any order to the same bits, and settled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardmerge.methods.api import Counts, Decision, Method, Pass
from shardmerge.numerics import combine_blocks

Sums = tuple[float, ...]
Summary = Counts | Sums


@dataclass(frozen=True, slots=True)
class BlockSums:
    """Float64 sums of consecutive canonical blocks of one tensor.

    Args:
        tensor: its number.
        first: number of the first block.
        sums: shape [blocks, values].
    """

    tensor: int
    first: int
    sums: npt.NDArray[np.float64]


Partial = Counts | tuple[BlockSums, ...]
"""The summary of one task: counts, or sums per block."""


def combine(partials: Iterable[Partial]) -> Summary:
    """The summary of all tasks of one pass.

    Counts are integers. Sums are rounded once per tensor and once more over the tensors, whatever
    the tasks were: both add up to the same bits in any order.
    """
    counts: Counts | None = None
    blocks: dict[int, list[BlockSums]] = {}
    for partial in partials:
        if isinstance(partial, tuple):
            for part in partial:
                blocks.setdefault(part.tensor, []).append(part)
        else:
            counts = partial if counts is None else counts + partial
    if counts is not None:
        return counts
    totals = [
        combine_blocks(np.concatenate([part.sums for part in sorted(parts, key=_first)]))
        for parts in blocks.values()
    ]
    return combine_blocks(np.array(totals)) if len(totals) > 1 else totals[0]


def _first(part: BlockSums) -> int:
    return part.first


def settle(
    method: Method,
    step: Pass,
    summaries: Mapping[str, Summary],
    decisions: Mapping[str, Decision | None],
) -> Decision:
    """The decision of a settling pass from the results that it names."""
    given = [summaries[need] if need in summaries else decisions[need] for need in step.needs]
    decision: Decision = step.function(method, *given)
    return tuple(float(number) for number in decision)
