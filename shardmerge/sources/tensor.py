"""Tensor references: where a tensor's bytes lie, and how they become elements.

Whatever a recipe names as a model, it ends as a map from names to these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from shardmerge.numerics import DType
from shardmerge.stores.api import Range


@dataclass(frozen=True, slots=True)
class Segment:
    """``nbytes`` bytes from ``offset`` of the object at ``url``: consecutive elements.

    ``version`` is the object's when its header was read; bytes of another one are refused.
    """

    url: str
    offset: int
    nbytes: int
    version: str | None = None


@dataclass(frozen=True, slots=True)
class BlockScale:
    """Block-scaled fp8: element [i, j] is ``stored[i, j] * scale[i // rows, j // columns]``.

    ``scale`` is a float32 or bfloat16 matrix of shape [ceil(m / rows), ceil(n / columns)].
    Reference: DeepSeek-V3 technical report. 2024. arXiv:2412.19437, section 3.3.
    """

    scale: TensorRef
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix of low rank that is added: the value is ``stored + scale * left @ right``.

    Args:
        left: shape [rows, rank]; or [rank, rows], where ``transposed``.
        right: shape [rank, columns]; or [columns, rank], where ``transposed``.
    Reference: Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022.
        arXiv:2106.09685, equation 3.
    """

    left: TensorRef
    right: TensorRef
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        """Columns of the left factor and rows of the right one."""
        return self.left.shape[0 if self.transposed else 1]


Decode = BlockScale | LowRank


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of a checkpoint.

    Args:
        name: its name in the checkpoint.
        dtype: of the stored elements.
        shape: of the tensor; ``()`` for a scalar.
        segments: the stored bytes in flat (row-major) element order; no segment cuts an element.
        decode: how stored elements become values; None when they are the values.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    decode: Decode | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def all_segments(self) -> tuple[Segment, ...]:
        """``segments``, and those of what decodes them."""
        if self.decode is None:
            return self.segments
        if isinstance(self.decode, BlockScale):
            return (*self.segments, *self.decode.scale.segments)
        return (*self.segments, *self.decode.left.segments, *self.decode.right.segments)

    @property
    def nbytes(self) -> int:
        """Stored bytes, those of scales and factors not counted."""
        return self.numel * self.dtype.itemsize


def ranges(tensor: TensorRef, start: int, stop: int) -> list[Segment]:
    """The byte ranges that hold elements ``[start, stop)`` of ``tensor``, in order. Pure."""
    itemsize = tensor.dtype.itemsize
    lo, hi = start * itemsize, stop * itemsize
    found, position = [], 0
    for segment in tensor.segments:
        first, last = max(lo, position), min(hi, position + segment.nbytes)
        if first < last:
            offset = segment.offset + first - position
            found.append(Segment(segment.url, offset, last - first, segment.version))
        position += segment.nbytes
    return found


def reads(tensor: TensorRef, start: int, stop: int, into: memoryview) -> list[Range]:
    """What to read so that ``into`` holds the stored bytes of elements ``[start, stop)``. Pure."""
    found, position = [], 0
    for part in ranges(tensor, start, stop):
        view = into[position : position + part.nbytes]
        found.append(Range(part.url, part.offset, view, part.version))
        position += part.nbytes
    return found


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as a map from names to tensors; none of their bytes are in memory.

    Args:
        url: a folder or file, pinned to a commit where the place has commits.
        tensors: by name, in the order of the shards and of the bytes in them.
        shard_of: for each tensor, the number of its shard, from 0, in the order of ``shards``; of
            the first one, where it lies in several.
        shards: file names of the shards, in name order; with the folder, where they lie in one.
        config: parsed ``config.json``, or an empty map where there is none.
        files: names of the other files that a copy of this checkpoint needs (tokenizer, generation
            config, chat template, processor, custom code, ...), in name order; never weights.
        ignored: names in the folder that hold weights and are not read (``consolidated.*``, ...).
        versions: for each shard, index and config that was read, a text that changes with it.
        cut: whether files hold pieces of tensors, so that an output cannot have the same shards.
        adapter: the files whose tensors are added to these; they lie in a folder of their own.
        notes: what was taken for granted, in words.
    """

    url: str
    tensors: Mapping[str, TensorRef]
    shard_of: Mapping[str, int]
    shards: tuple[str, ...]
    config: Mapping[str, object] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    adapter: Checkpoint | None = None
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Checkpoint, ...]:
        """Itself, and the adapter: whatever lies in one folder."""
        return (self,) if self.adapter is None else (self, self.adapter)

    @property
    def all_versions(self) -> dict[str, str]:
        """``versions``, and those of the adapter's files as ``adapter/<name>``."""
        if self.adapter is None:
            return dict(self.versions)
        adapter = {f"adapter/{name}": text for name, text in self.adapter.versions.items()}
        return {**self.versions, **adapter}
