"""Which matrices a tensor holds, for methods that see matrices as a whole. Pure.

A tensor of two dimensions is one block; one of three is as many blocks as it is long, one after the
other (experts). A block is one matrix, or several side by side where a rule splits it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise

from shardmerge.recipe_parts import Split


def block_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of each block."""
    rows, columns = shape[-2:]
    return rows, columns


def block_numel(shape: tuple[int, ...]) -> int:
    """Elements of each block, which lie one after the other."""
    return math.prod(shape[-2:])


def split_problem(shape: tuple[int, ...], split: Split) -> str:
    """Why a tensor cannot be split so; empty where it can."""
    if len(shape) not in (2, 3):
        return f"only matrices can be split; its shape is {list(shape)}"
    length = block_shape(shape)[split.axis == "columns"]
    if isinstance(split.sizes, int):
        if length % split.sizes:
            return f"its {length} {split.axis} are not {split.sizes} times as many"
    elif sum(split.sizes) != length:
        return f"it has {length} {split.axis}, not {sum(split.sizes)}"
    return ""


def matrices_in(shape: tuple[int, ...], split: Split | None) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each matrix of a block."""
    everything = slice(None)
    if split is None:
        yield everything, everything
        return
    length = block_shape(shape)[split.axis == "columns"]
    sizes = split.sizes
    if isinstance(sizes, int):
        sizes = (length // sizes,) * sizes
    for start, stop in pairwise(accumulate(sizes, initial=0)):
        part = slice(start, stop)
        yield (part, everything) if split.axis == "rows" else (everything, part)


def matrix_shapes(shape: tuple[int, ...], split: Split | None) -> list[tuple[int, int]]:
    """Shape of each matrix of a block."""
    rows, columns = block_shape(shape)
    return [
        (len(range(*r.indices(rows))), len(range(*c.indices(columns))))
        for r, c in matrices_in(shape, split)
    ]
