"""Whole matrices of two checkpoints, read by ranges: what one changes of the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shardmerge.decode import value_dtype
from shardmerge.errors import NonFiniteError
from shardmerge.kernels.factors import Array
from shardmerge.memory import CONVERTED, stored_bytes
from shardmerge.numerics import DType, to_floats
from shardmerge.sources.tensor import LowRank, TensorRef
from shardmerge.stores import Stores
from shardmerge.window import Arena, Window

_FLOATS = 24
"""Bytes for an element of both tensors while they are converted and checked, at most."""


def read_delta(model: TensorRef, base: TensorRef, stores: Stores) -> Array:
    """``model - base``; float32, or float64 if one of them is.

    Args:
        model: a matrix of a floating dtype; ``base``, too, of its shape.
    Raises:
        NonFiniteError: NaN or infinity in one of them.
        StoreError: for what cannot be read.
    """
    wide = DType.F64 in (model.dtype, base.dtype)
    delta: Array = np.empty(model.shape, dtype=np.float64 if wide else np.float32)
    flat = delta.reshape(-1)
    for start, (ours, theirs) in _chunks((model, base), stores):
        np.subtract(ours, theirs, out=flat[start : start + len(ours)], casting="same_kind")
    return delta


def read_values(tensor: TensorRef, stores: Stores) -> Array:
    """A whole tensor; float32, or float64 if it is.

    Raises:
        NonFiniteError: NaN or infinity in it.
    """
    wide = tensor.dtype is DType.F64
    values: Array = np.empty(tensor.shape, dtype=np.float64 if wide else np.float32)
    for start, (chunk,) in _chunks((tensor,), stores):
        values.reshape(-1)[start : start + len(chunk)] = chunk
    return values


def is_adapted(tensor: TensorRef) -> bool:
    """Whether the product of an adapter's factors is added to what is stored."""
    return isinstance(tensor.decode, LowRank)


def delta_norms(model: TensorRef, base: TensorRef, stores: Stores) -> tuple[float, float]:
    """The L2 norms of ``model - base`` and of ``base``, in float64.

    Raises:
        NonFiniteError: NaN or infinity in one of them.
    """
    squares = np.zeros(2)
    for _, (ours, theirs) in _chunks((model, base), stores):
        both = np.subtract(ours, theirs, dtype=np.float64), theirs.astype(np.float64)
        squares += [np.einsum("i,i", values, values) for values in both]
    delta, norm = np.sqrt(squares)
    return float(delta), float(norm)


def _chunks(refs: tuple[TensorRef, ...], stores: Stores) -> Iterator[tuple[int, tuple[Array, ...]]]:
    """Some consecutive elements of each tensor at a time, and the number of the first."""
    numel = refs[0].numel
    step = min(numel, CONVERTED)
    arena = Arena(sum(stored_bytes(ref, step) for ref in refs))
    window = Window(refs, arena, tile=step, resident=False, numel=numel)
    for start in range(0, numel, CONVERTED):
        stop = min(numel, start + CONVERTED)
        missing = window.missing(start, stop, range(len(refs)))
        stores.read([item for each in missing for item in each.ranges()])
        for each in missing:
            each.arrived()
        yield start, tuple(_values(window, n, ref, start, stop) for n, ref in enumerate(refs))


def _values(window: Window, number: int, ref: TensorRef, start: int, stop: int) -> Array:
    values = to_floats(window.view(number, start, stop), value_dtype(ref))
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"NaN or infinity in {ref.name} of {ref.segments[0].url}; nothing was published.\n"
            "  Mend it, or leave the tensor out with --exclude."
        )
    return values


def delta_bytes(model: TensorRef, base: TensorRef) -> tuple[int, int]:
    """Memory of what ``read_delta`` gives, and of what it takes meanwhile beside that."""
    itemsize = 8 if DType.F64 in (model.dtype, base.dtype) else 4
    elements = min(model.numel, CONVERTED)
    chunks = sum(stored_bytes(ref, elements) for ref in (model, base))
    return model.numel * itemsize, chunks + elements * _FLOATS
