"""How much memory tiles, tensors and workers take. Pure.

What is computed here is a promise: a worker takes all its buffers from a block of that size.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

from shardmerge.decode import decoder_bytes, is_coded, kind_of, value_dtype
from shardmerge.errors import MemoryBudgetError
from shardmerge.kernels.device import CUDA
from shardmerge.kernels.trace import Inputs
from shardmerge.match import OutputTensor
from shardmerge.matrices import block_numel, block_shape, matrix_shapes
from shardmerge.methods.api import HISTOGRAM_BINS, Pass, info_of
from shardmerge.numerics import CANONICAL_BLOCK
from shardmerge.sources.tensor import TensorRef
from shardmerge.stores.api import is_remote

FOOTPRINT_BYTES = 224 * 2**20
"""What a process holds before the first tile: the interpreter, numpy, the compiler, the plan."""
TILE_ELEMENTS = 4 * CANONICAL_BLOCK
"""Elements of a tile where memory allows: its inputs stay in the caches while they are used."""
REMOTE_TILE_ELEMENTS = 64 * CANONICAL_BLOCK
"""The same for inputs that are asked for over a network: a request should bring some megabytes."""
CUDA_TILE_ELEMENTS = 64 * CANONICAL_BLOCK
"""The same for a CUDA device: shorter copies do not reach the rate of the bus."""
CUDA_FOOTPRINT_BYTES = 512 * 2**20
"""What a process holds more for a CUDA device: the driver's library, its compiler and buffers."""
LOCAL_WORKERS = 2
"""Workers for each CPU, so that some read and write while others compute."""
REMOTE_WORKERS = 4
"""The same where they wait for a network."""
CONVERTED = 16 * CANONICAL_BLOCK
"""Elements of a matrix that are converted at a time."""
COMFORTABLE_BYTES = 64 * 2**20
"""Memory of a worker below which fewer workers are better than smaller tiles."""
CUDA_COMFORTABLE_BYTES = 256 * 2**20
"""The same for a CUDA device."""


# --- inputs of a tensor --------------------------------------------------------------------------


def inputs_of(tensor: OutputTensor) -> tuple[TensorRef, ...]:
    """The tensors that an output tensor is computed from, in the order of a kernel's inputs."""
    base = () if tensor.base is None else (tensor.base,)
    return (*base, *tensor.models, *(ref for _, extra in tensor.extras for ref in extra))


def kernel_inputs(tensor: OutputTensor) -> Inputs:
    """The dtypes of a tensor's inputs."""
    return Inputs(
        base=None if tensor.base is None else value_dtype(tensor.base),
        models=tuple(value_dtype(ref) for ref in tensor.models),
        extras=tuple(
            (kind, tuple(value_dtype(ref) for ref in refs)) for kind, refs in tensor.extras
        ),
        wide=tensor.wide,
    )


def refs_read(tensor: OutputTensor, step: Pass) -> tuple[TensorRef, ...]:
    """The inputs that a measuring pass reads."""
    groups = {
        "base": () if tensor.base is None else (tensor.base,),
        "models": tensor.models,
        **dict(tensor.extras),
    }
    return tuple(ref for name in step.reads for ref in groups[name])


def tensor_numel(tensor: OutputTensor) -> int:
    """Number of elements."""
    return math.prod(tensor.shape)


def alike(tensors: Sequence[OutputTensor]) -> list[int]:
    """For each tensor, the number of the first that takes as much memory and reads as much.

    They are few, as layers repeat: 45,000 tensors of DeepSeek-V3 are of 20 kinds.
    """
    first: dict[object, int] = {}
    return [first.setdefault(_kind(tensor), number) for number, tensor in enumerate(tensors)]


def _kind(tensor: OutputTensor) -> object:
    """Equal for tensors that differ in names and addresses alone.

    Methods and dtypes by identity, which takes a tenth of the time and only makes more kinds.
    """
    refs = inputs_of(tensor)
    decoded = [ref.decode for ref in refs if ref.decode is not None]
    return (
        (tensor.shape, id(tensor.dtype), id(tensor.method), tensor.wide),
        (tensor.whole, tensor.split, tuple([refs[0].shape for _, refs in tensor.extras])),
        (tensor.base is None, len(tensor.models), is_far(tensor)),
        tuple([(id(ref.dtype), ref.decode is None) for ref in refs]),
        tuple([kind_of(decode) for decode in decoded]),
    )


# --- tiles and workers ---------------------------------------------------------------------------


def element_bytes(refs: Sequence[TensorRef]) -> int:
    """Memory for one element of each tensor as a kernel reads it."""
    return sum(value_dtype(ref).itemsize for ref in refs)


def footprint_bytes(device: str) -> int:
    """What a process holds before the first tile."""
    return FOOTPRINT_BYTES + (CUDA_FOOTPRINT_BYTES if device == CUDA else 0)


def tile_elements(tensor: OutputTensor, budget_bytes: int, device: str) -> int:
    """Elements of a tile: whole canonical blocks, as many as the budget and the caches allow."""
    per_element = element_bytes(inputs_of(tensor)) + _coded_bytes(tensor) + tensor.dtype.itemsize
    most = _most_elements(tensor, device)
    room = budget_bytes - _summary_bytes(tensor) - _decoder_bytes(tensor, most)
    blocks = room // (per_element * CANONICAL_BLOCK)
    return max(1, min(blocks, most // CANONICAL_BLOCK)) * CANONICAL_BLOCK


def _most_elements(tensor: OutputTensor, device: str) -> int:
    if device == CUDA:
        return CUDA_TILE_ELEMENTS
    return REMOTE_TILE_ELEMENTS if is_far(tensor) else TILE_ELEMENTS


def is_far(tensor: OutputTensor) -> bool:
    """Whether some input is asked for over a network."""
    return any(_is_remote(ref.segments[0].url) for ref in inputs_of(tensor) if ref.segments)


_is_remote = functools.lru_cache(maxsize=4096)(is_remote)


def _coded_bytes(tensor: OutputTensor) -> int:
    """Per element, room for the stored bytes of inputs that are decoded."""
    return sum(ref.dtype.itemsize for ref in inputs_of(tensor) if is_coded(ref))


def _decoder_bytes(tensor: OutputTensor, elements: int) -> int:
    """Room for scales and factors, each in a buffer of its own."""
    return sum(decoder_bytes(ref, elements) + 64 for ref in inputs_of(tensor) if ref.decode)


def _summary_bytes(tensor: OutputTensor) -> int:
    """Room for the counts of one measuring pass: u32 while counting, int64 of piece and task."""
    return 0 if tensor.method is None else len(tensor.models) * HISTOGRAM_BINS * (4 + 8 + 8)


def tile_bytes(tensor: OutputTensor, elements: int) -> int:
    """Memory for a tile of so many elements, its result and a summary."""
    elements = min(elements, math.ceil(tensor_numel(tensor) / CANONICAL_BLOCK) * CANONICAL_BLOCK)
    per_element = element_bytes(inputs_of(tensor)) + _coded_bytes(tensor) + tensor.dtype.itemsize
    return elements * per_element + _summary_bytes(tensor) + _decoder_bytes(tensor, elements)


def resident_bytes(tensor: OutputTensor, device: str) -> int:
    """Memory to keep all inputs of a tensor, and a tile of its result."""
    numel = tensor_numel(tensor)
    most = min(numel, _most_elements(tensor, device))
    tile = most * (tensor.dtype.itemsize + _coded_bytes(tensor)) + _decoder_bytes(tensor, most)
    return (
        numel * element_bytes(inputs_of(tensor))
        + tile
        + _summary_bytes(tensor)
        + 64 * (3 * len(inputs_of(tensor)) + 1)
    )


# --- whole matrices ------------------------------------------------------------------------------


def matrix_bytes(tensor: OutputTensor) -> int:
    """Memory for the largest matrix of a tensor whose method sees it as a whole.

    The base model's stored elements stay, where there is one; one more input is read at a time, and
    the result of a block stays until it is written.
    """
    info = info_of(tensor.method)
    step = info.matrix_pass
    assert step is not None and step.workspace is not None
    columns = block_shape(tensor.shape)[1]
    shapes = matrix_shapes(tensor.shape, tensor.split)
    rows = max(rows for rows, _ in shapes)
    numels = [
        rows * columns if ref.shape == tensor.shape else block_numel(ref.shape)
        for ref in inputs_of(tensor)
    ]
    stored = list(map(stored_bytes, inputs_of(tensor), numels))
    kept = stored.pop(0) if tensor.base else 0
    sides = [block_shape(refs[0].shape)[0] for kind, refs in tensor.extras if kind in info.extras]
    return (
        kept
        + max(stored)
        + max(step.workspace(*shape, *sides) for shape in shapes)
        + block_numel(tensor.shape) * tensor.dtype.itemsize
        + min(max(numels), CONVERTED) * 16
    )


def stored_bytes(ref: TensorRef, elements: int) -> int:
    """Room for so many elements of one input, decoded where they have to be."""
    coded = elements * ref.dtype.itemsize if is_coded(ref) else 0
    return elements * value_dtype(ref).itemsize + coded + decoder_bytes(ref, elements) + 4 * 64


def least_bytes(tensor: OutputTensor) -> int:
    """The least memory in which a tensor can be merged: its smallest tile, or a matrix."""
    return matrix_bytes(tensor) if tensor.whole else tile_bytes(tensor, CANONICAL_BLOCK)


def share_memory(
    tensors: Sequence[OutputTensor],
    memory_bytes: int,
    wanted: int,
    buffer_bytes: int,
    device: str,
) -> tuple[int, int]:
    """Number of workers and the memory of each for its tiles."""
    footprint = footprint_bytes(device)
    comfortable = CUDA_COMFORTABLE_BYTES if device == CUDA else COMFORTABLE_BYTES
    least = max(map(least_bytes, tensors), default=0)
    for workers in range(wanted, 0, -1):
        share = (memory_bytes - footprint) // workers - buffer_bytes
        if share >= max(least, comfortable) or (workers == 1 and share >= least):
            return workers, share
    worst = max(tensors, key=least_bytes)
    needed = footprint + least + buffer_bytes
    if worst.whole:
        raise _matrix_too_large(worst, memory_bytes, footprint + buffer_bytes)
    buffered = f", and {_mib(buffer_bytes)} for a part that is sent" if buffer_bytes else ""
    raise MemoryBudgetError(
        f"{worst.name} needs {_mib(least)} for its smallest tile{buffered}; "
        f"the budget is {_mib(memory_bytes)}, of which the program itself takes "
        f"{_mib(footprint)}.\n"
        f"  A tile holds {CANONICAL_BLOCK:,} elements of {len(inputs_of(worst))} tensors and the "
        f"result.\n  Give --memory {math.ceil(needed / 2**20)}MiB or more."
    )


def _matrix_too_large(tensor: OutputTensor, memory_bytes: int, beside: int) -> MemoryBudgetError:
    rows, columns = max(matrix_shapes(tensor.shape, tensor.split), key=math.prod)
    info, needed = info_of(tensor.method), matrix_bytes(tensor)
    sides = [f"{kind} of {_by(refs[0])}" for kind, refs in tensor.extras if kind in info.extras]
    beside_it = f", with a {' and a '.join(sides)} each," if sides else ","
    other, last = "linear, parameters: {weight: 1.0}", "."
    if info.adds:
        other = "task_arithmetic"
        last = ";\n  in a state of continual merging: parameters: {project: never}."
    return MemoryBudgetError(
        f"{info.name} on {tensor.name} needs {_mib(needed)}; the budget is {_mib(memory_bytes)}, "
        f"of which {_mib(beside)} are taken for the program itself.\n"
        f"  It sees whole matrices: {rows} x {columns}{beside_it} which are decomposed in "
        "float64.\n"
        f"  Give --memory {math.ceil((needed + beside) / 2**20)}MiB or more, or another method for "
        f'these tensors by a rule: {{tensors: "{_glob(tensor.name)}", merge_method: {other}}}{last}'
    )


def _by(ref: TensorRef) -> str:
    return " x ".join(map(str, block_shape(ref.shape)))


def _glob(name: str) -> str:
    """A pattern for a tensor and its like in other layers."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
