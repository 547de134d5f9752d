"""Merge arrays in memory: what the examples on the methods' pages and their tests run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shardmerge.kernels.compile import Form
from shardmerge.kernels.language import HISTOGRAM_BINS
from shardmerge.kernels.trace import Inputs, Kernels, numbers_of
from shardmerge.methods.api import Decision, Kind, Method, Pass, info_of, levels_of
from shardmerge.numerics import CANONICAL_BLOCK, DType, philox_key
from shardmerge.summaries import Partial, Summary, combine, settle

_KERNELS = Kernels()

Raw = npt.NDArray[np.generic]
"""A flat array of stored elements: float32 or float64, or uint16 that holds bfloat16 or float16."""


def merge_arrays(
    method: Method,
    *,
    base: npt.ArrayLike | None = None,
    models: Sequence[npt.ArrayLike],
    seed: int = 0,
    **extras: Sequence[npt.ArrayLike],
) -> object:
    """Merge arrays as one float32 tensor that is the whole model.

    Args:
        method: with its parameters.
        base: values of the base model, any shape.
        models: values of each model, of the same shape.
        extras: of each model, by kind (``fisher``).
    Returns:
        nested lists of floats, of the same shape.
    """
    first = [] if base is None else [base]
    everything = [*first, *models, *(array for extra in extras.values() for array in extra)]
    arrays = [np.asarray(array, dtype=np.float32, order="C") for array in everything]
    inputs = Inputs(
        base=None if base is None else DType.F32,
        models=(DType.F32,) * len(models),
        extras=tuple((kind, (DType.F32,) * len(values)) for kind, values in extras.items()),
    )
    flat = [array.reshape(-1) for array in arrays]
    merged, _ = merge_raw(method, inputs, flat, output=DType.F32, seed=seed)
    return merged.view(np.float32).reshape(arrays[0].shape).tolist()


def merge_raw(
    method: Method,
    inputs: Inputs,
    arrays: Sequence[Raw],
    *,
    output: DType,
    seed: int = 0,
    tensor: str = "tensor",
    tile: int = 64 * CANONICAL_BLOCK,
) -> tuple[npt.NDArray[np.uint8], int]:
    """Merge stored arrays; gives the bytes of the result and which inputs hold NaN or infinity.

    Args:
        inputs: dtypes of ``arrays``, which lie in the order of ``inputs.dtypes``.
        tile: elements that a kernel is run on at a time, a multiple of the canonical block.
    """
    info = info_of(method)
    levels = levels_of(method)
    keys = _keys(seed, len(inputs.models), tensor)
    summaries: dict[str, Summary] = {}
    decisions: dict[str, Decision | None] = {}
    for step in info.passes[:-1]:
        if levels[step.name] is None:
            decisions[step.name] = None
        elif step.kind is Kind.MEASURE:
            parts = _measured(method, step, inputs, decisions, arrays, keys, tile)
            summaries[step.name] = combine(parts)
        else:
            decisions[step.name] = settle(method, step, summaries, decisions)
    step = info.merge_pass
    kernel = _KERNELS.get(method, step, inputs, decisions, output)
    count = arrays[0].size
    result = np.zeros(count * output.itemsize, dtype=np.uint8)
    flags = 0
    for start in range(0, count, tile):
        stop = min(count, start + tile)
        flags |= kernel(
            count=stop - start,
            first=start,
            inputs=[array[start:].ctypes.data for array in arrays],
            parameters=numbers_of(method, step, decisions),
            keys=keys,
            output=result[start * output.itemsize :],
        )
    return result, flags


def _measured(
    method: Method,
    step: Pass,
    inputs: Inputs,
    decisions: Mapping[str, Decision | None],
    arrays: Sequence[Raw],
    keys: npt.NDArray[np.uint32],
    tile: int,
) -> list[Partial]:
    kernel = _KERNELS.get(method, step, inputs, decisions)
    found: list[Partial] = []
    for start in range(0, max(1, arrays[0].size), tile):  # an empty tensor has a summary too
        count = min(tile, arrays[0].size - start)
        counts = np.zeros((kernel.width, HISTOGRAM_BINS), dtype=np.uint32)
        sums = np.zeros((-(-count // CANONICAL_BLOCK), kernel.width))
        kernel(
            count=count,
            first=start,
            inputs=[array[start:].ctypes.data for array in arrays],
            parameters=numbers_of(method, step, decisions),
            keys=keys,
            output=counts if kernel.form is Form.HISTOGRAMS else sums,
        )
        if kernel.form is Form.HISTOGRAMS:
            found.append(counts.astype(np.int64))
        else:
            found.append(sums)
    return found


def _keys(seed: int, models: int, tensor: str) -> npt.NDArray[np.uint32]:
    keys = [philox_key(seed, position, tensor) for position in range(models)]
    return np.array([[key & 0xFFFFFFFF, key >> 32] for key in keys], dtype=np.uint32)
