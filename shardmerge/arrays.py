"""Merge arrays in memory: what the examples on the methods' pages and their tests run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shardmerge.kernels.compile import OUTPUT_BIT, Form
from shardmerge.kernels.language import HISTOGRAM_BINS
from shardmerge.kernels.linalg import on_cpu
from shardmerge.kernels.trace import Inputs, Kernels, numbers_of
from shardmerge.methods.api import Array, Decision, Kind, Method, Pass, Wide, info_of, levels_of
from shardmerge.methods.scaled import Scaled
from shardmerge.numerics import (
    CANONICAL_BLOCK,
    DType,
    ExactSums,
    philox_key,
    to_floats,
    to_stored,
)
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
    shape = arrays[0].shape
    merged, _ = merge_raw(method, inputs, flat, output=DType.F32, seed=seed, shape=shape)
    return merged.view(np.float32).reshape(shape).tolist()


def merge_raw(
    method: Method,
    inputs: Inputs,
    arrays: Sequence[Raw],
    *,
    output: DType,
    seed: int = 0,
    tensor: str = "tensor",
    tile: int = 64 * CANONICAL_BLOCK,
    shape: tuple[int, ...] = (),
) -> tuple[npt.NDArray[np.uint8], int]:
    """Merge stored arrays; gives the bytes of the result and which inputs hold NaN or infinity.

    Args:
        inputs: dtypes of ``arrays``, which lie in the order of ``inputs.dtypes``.
        tile: elements that a kernel is run on at a time, a multiple of the canonical block.
        shape: of the tensor, for methods that see matrices as a whole. Their further checkpoints
            hold square matrices.
    """
    info = info_of(method)
    if info.adds:
        return _added(method, inputs, arrays, output, shape, tile)
    if info.matrix_pass is not None and inputs.extras and method.whole("tensor", shape):
        return _whole(method, inputs, arrays, output, shape)
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


def _whole(
    method: Method,
    inputs: Inputs,
    arrays: Sequence[Raw],
    output: DType,
    shape: tuple[int, ...],
) -> tuple[npt.NDArray[np.uint8], int]:
    """The merge of every matrix of a tensor."""
    values = [to_floats(a.view(np.uint8), d) for a, d in zip(arrays, inputs.dtypes, strict=True)]
    flags = sum(int(not np.isfinite(value).all()) << k for k, value in enumerate(values))
    first = 0 if inputs.base is None else 1
    count, extras = math.prod(shape[:-2]), first + len(inputs.models)
    sides = [math.isqrt(value.size // count) for value in values[extras:]]
    blocks = [value.reshape(count, *shape[-2:]) for value in values[:extras]]
    blocks += [v.reshape(count, side, side) for v, side in zip(values[extras:], sides, strict=True)]
    step = info_of(method).matrix_pass
    assert step is not None
    found = []
    for number in range(count):
        base, own = blocks[0][number] if first else None, [block[number] for block in blocks]
        rest, beside = iter(own[extras:]), {}
        for kind, kinds in inputs.extras:
            beside[kind] = [next(rest) for _ in kinds]
        found.append(step.function(method, _Whole(base, own[first:extras], beside))[0])
    result = to_stored(np.stack(found), output)
    finite = np.isfinite(to_floats(result, output)).all()
    return result, flags | (0 if finite else 1 << OUTPUT_BIT)


def _added(
    method: Method,
    inputs: Inputs,
    arrays: Sequence[Raw],
    output: DType,
    shape: tuple[int, ...],
    tile: int,
) -> tuple[npt.NDArray[np.uint8], int]:
    """The base model and the scaled sum of task vectors: two passes, as in two runs.

    Where the order is drawn, it is that of seed 0.
    """
    order = method.order(len(inputs.models), 0)
    dtypes = [inputs.dtypes[0], *(inputs.models[place] for place in order)]
    arrays = [arrays[0], *(arrays[1 + place] for place in order)]
    values = [to_floats(a.view(np.uint8), d) for a, d in zip(arrays, dtypes, strict=True)]
    flags = sum(int(not np.isfinite(value).all()) << k for k, value in enumerate(values))
    total, squared = _summed(method, dtypes, arrays, values, shape, tile)
    norms = [math.sqrt(value) for value in squared]
    scale = method.scale(norms[:-1], norms[-1])
    finish = info_of(Scaled())
    kernel = _KERNELS.get(
        Scaled(), finish.merge_pass, Inputs(dtypes[0], (DType.F32,)), {"scale": (scale,)}, output
    )
    result = np.zeros(total.size * output.itemsize, dtype=np.uint8)
    bits = kernel(
        count=total.size,
        first=0,
        inputs=[arrays[0].ctypes.data, total.ctypes.data],
        parameters=numbers_of(Scaled(), finish.merge_pass, {"scale": (scale,)}),
        keys=_keys(0, 1, ""),
        output=result,
    )
    return result, flags | (1 << OUTPUT_BIT if bits else 0)


def _summed(
    method: Method,
    dtypes: Sequence[DType],
    arrays: Sequence[Raw],
    values: Sequence[Array],
    shape: tuple[int, ...],
    tile: int,
) -> tuple[npt.NDArray[np.float32], tuple[float, ...]]:
    """The sum of task vectors, and the sums of squares."""
    info, count = info_of(method), arrays[0].size
    if info.matrix_pass is not None and method.whole("tensor", shape):
        blocks = [value.reshape(-1, *shape[-2:]) for value in values]
        found = [
            info.matrix_pass.function(method, _Whole(blocks[0][i], [b[i] for b in blocks[1:]], {}))
            for i in range(len(blocks[0]))
        ]
        squared = zip(*(sums for _, sums in found), strict=True)
        return np.concatenate([total.reshape(-1) for total, _ in found]), tuple(map(sum, squared))
    inputs = Inputs(dtypes[0], tuple(dtypes[1:]))
    merge = _KERNELS.get(method, info.merge_pass, inputs, {}, DType.F32)
    assert info.sum_pass is not None
    sums = _KERNELS.get(method, info.sum_pass, inputs, {}, DType.F32)
    total, exact = np.zeros(count, dtype=np.float32), ExactSums(sums.width)
    for start in range(0, count, tile):
        parts = np.zeros((-(-min(tile, count - start) // CANONICAL_BLOCK), sums.width))
        addresses = [array[start:].ctypes.data for array in (*arrays, total)]
        for kernel, into, step in (
            (merge, total[start:], info.merge_pass),
            (sums, parts, info.sum_pass),
        ):
            kernel(
                count=min(tile, count - start),
                first=start,
                inputs=addresses,
                parameters=numbers_of(method, step, {}),
                keys=_keys(0, 1, ""),
                output=into,
            )
        exact.add(parts)
    return total, exact.rounded()


class _Whole:
    """A matrix of every input, in memory; see ``Matrices``."""

    def __init__(
        self, base: Array | None, models: Sequence[Array], extras: Mapping[str, Sequence[Array]]
    ) -> None:
        self._base = base
        self._models = models
        self._extras = extras

    @property
    def models(self) -> int:
        """How many models there are."""
        return len(self._models)

    def model(self, model: int) -> Wide:
        """The values of a model."""
        return self._models[model].astype(np.float64)

    def delta(self, model: int) -> Array:
        """The task vector of a model."""
        assert self._base is not None
        return (self._models[model] - self._base).astype(np.float32)

    def extra(self, kind: str) -> Array | None:
        """None: a sum begins here."""
        return None

    def wide_extra(self, kind: str, model: int) -> Wide:
        """The matrix of a model's further checkpoint."""
        return self._extras[kind][model].astype(np.float64)

    def unfit(self, kind: str, why: str, model: int | None = None) -> ValueError:
        """What to raise for values that the method cannot use."""
        return ValueError(f"{kind}{'' if model is None else f' {model}'}: {why}")

    def linear(self, function: Callable[..., Any], *matrices: Array) -> Array:
        """By numpy."""
        return on_cpu(function, *matrices)


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
