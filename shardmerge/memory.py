"""How much memory tiles, tensors and workers take. Pure.

What is computed here is a promise: a worker takes all its buffers from a block of that size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from shardmerge.decode import scale_bytes
from shardmerge.errors import MemoryBudgetError
from shardmerge.kernels.device import CUDA
from shardmerge.kernels.trace import Inputs
from shardmerge.match import OutputTensor
from shardmerge.methods.api import HISTOGRAM_BINS, Pass
from shardmerge.numerics import CANONICAL_BLOCK, DType
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
COMFORTABLE_BYTES = 64 * 2**20
"""Memory of a worker below which fewer workers are better than smaller tiles."""
CUDA_COMFORTABLE_BYTES = 256 * 2**20
"""The same for a CUDA device."""


# --- inputs of a tensor --------------------------------------------------------------------------


def inputs_of(tensor: OutputTensor) -> tuple[TensorRef, ...]:
    """The tensors that an output tensor is computed from, in the order of a kernel's inputs."""
    base = () if tensor.base is None else (tensor.base,)
    return (*base, *tensor.models, *(ref for _, extra in tensor.extras for ref in extra))


def value_dtype(ref: TensorRef) -> DType:
    """The dtype in which a kernel reads a tensor: fp8 is decoded to float32 before."""
    return DType.F32 if ref.dtype.is_fp8 else ref.dtype


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


# --- tiles and workers ---------------------------------------------------------------------------


def element_bytes(refs: Sequence[TensorRef]) -> int:
    """Memory for one element of each tensor as a kernel reads it."""
    return sum(value_dtype(ref).itemsize for ref in refs)


def footprint_bytes(device: str) -> int:
    """What a process holds before the first tile."""
    return FOOTPRINT_BYTES + (CUDA_FOOTPRINT_BYTES if device == CUDA else 0)


def tile_elements(tensor: OutputTensor, budget_bytes: int, device: str) -> int:
    """Elements of a tile: whole canonical blocks, as many as the budget and the caches allow."""
    per_element = element_bytes(inputs_of(tensor)) + _decode_bytes(tensor) + tensor.dtype.itemsize
    most = _most_elements(tensor, device)
    room = budget_bytes - _summary_bytes(tensor) - _scale_bytes(tensor, most)
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


def _decode_bytes(tensor: OutputTensor) -> int:
    """Per element, room for the stored bytes of inputs that are decoded."""
    return sum(ref.dtype.is_fp8 for ref in inputs_of(tensor))


def _scale_bytes(tensor: OutputTensor, elements: int) -> int:
    """Room for the block scales of a tile, each in a buffer of its own."""
    return sum(scale_bytes(ref, elements) + 64 for ref in inputs_of(tensor) if ref.decode)


def _summary_bytes(tensor: OutputTensor) -> int:
    """Room for the counts of one measuring pass: u32 while counting, int64 of piece and task."""
    return 0 if tensor.method is None else len(tensor.models) * HISTOGRAM_BINS * (4 + 8 + 8)


def tile_bytes(tensor: OutputTensor, elements: int) -> int:
    """Memory for a tile of so many elements, its result and a summary."""
    elements = min(elements, math.ceil(tensor_numel(tensor) / CANONICAL_BLOCK) * CANONICAL_BLOCK)
    per_element = element_bytes(inputs_of(tensor)) + _decode_bytes(tensor) + tensor.dtype.itemsize
    return elements * per_element + _summary_bytes(tensor) + _scale_bytes(tensor, elements)


def resident_bytes(tensor: OutputTensor, device: str) -> int:
    """Memory to keep all inputs of a tensor, and a tile of its result."""
    numel = tensor_numel(tensor)
    most = min(numel, _most_elements(tensor, device))
    tile = most * (tensor.dtype.itemsize + _decode_bytes(tensor)) + _scale_bytes(tensor, most)
    return (
        numel * element_bytes(inputs_of(tensor))
        + tile
        + _summary_bytes(tensor)
        + 64 * (3 * len(inputs_of(tensor)) + 1)
    )


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
    least = max((tile_bytes(tensor, CANONICAL_BLOCK) for tensor in tensors), default=0)
    for workers in range(wanted, 0, -1):
        share = (memory_bytes - footprint) // workers - buffer_bytes
        if share >= max(least, comfortable) or (workers == 1 and share >= least):
            return workers, share
    worst = max(tensors, key=lambda tensor: tile_bytes(tensor, CANONICAL_BLOCK))
    needed = footprint + least + buffer_bytes
    buffered = f", and {_mib(buffer_bytes)} for a part that is sent" if buffer_bytes else ""
    raise MemoryBudgetError(
        f"{worst.name} needs {_mib(least)} for its smallest tile{buffered}; "
        f"the budget is {_mib(memory_bytes)}, of which the program itself takes "
        f"{_mib(footprint)}.\n"
        f"  A tile holds {CANONICAL_BLOCK:,} elements of {len(inputs_of(worst))} tensors and the "
        f"result.\n  Give --memory {math.ceil(needed / 2**20)}MiB or more."
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
