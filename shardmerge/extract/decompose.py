"""Matrices of two models to factors: several at a time, each with one thread of linear algebra."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from shardmerge.errors import MemoryBudgetError, NonFiniteError, Stopped
from shardmerge.extract.choice import Layer, Wanted
from shardmerge.extract.deltas import delta_bytes, read_delta
from shardmerge.extract.finished import Matrix
from shardmerge.kernels.blas import one_thread
from shardmerge.kernels.factors import Float64, factorise, residual, workspace_bytes
from shardmerge.memory import FOOTPRINT_BYTES
from shardmerge.numerics import to_floats, to_stored
from shardmerge.progress import size
from shardmerge.stores import Stores

STOPPED = "stopped; run the same command again to go on from here."


def workers_for(layers: Sequence[Layer], wanted: Wanted, memory_bytes: int, most: int) -> int:
    """How many matrices are decomposed at a time, at most ``most``.

    Raises:
        MemoryBudgetError: for a matrix that does not fit.
    """
    largest = max(layers, key=lambda layer: needed_bytes(layer, wanted), default=None)
    if largest is None:
        return 1
    needed = needed_bytes(largest, wanted)
    if needed > memory_bytes - FOOTPRINT_BYTES:
        shape = " x ".join(map(str, largest.model.shape))
        raise MemoryBudgetError(
            f"{largest.model.name} ({shape}) needs {size(needed)} to be decomposed; the budget is "
            f"{size(memory_bytes)},\n  of which {size(FOOTPRINT_BYTES)} are taken for the program "
            "itself. The difference is held as a whole, with\n  five float64 matrices of its "
            "shorter side.\n"
            f"  Give --memory {math.ceil((needed + FOOTPRINT_BYTES) / 2**20)}MiB or more, or leave "
            "it out with --exclude."
        )
    return max(1, min(most, (memory_bytes - FOOTPRINT_BYTES) // needed))


def needed_bytes(layer: Layer, wanted: Wanted) -> int:
    """Upper bound of the memory that a matrix takes."""
    held, meanwhile = delta_bytes(layer.model, layer.base)
    rows, columns = layer.model.shape
    rank = min(wanted.rank or wanted.most or rows, rows, columns)
    return held + max(meanwhile, workspace_bytes(rows, columns, rank))


def decompose(
    layers: Sequence[Layer],
    wanted: Wanted,
    stores: Stores,
    *,
    workers: int,
    stop: threading.Event,
) -> Iterator[tuple[Layer, Matrix, bytes]]:
    """What becomes of each layer, and the bytes of its factors; as they end, not in order.

    Raises:
        NonFiniteError: NaN or infinity in a matrix, or in its factors as they are stored.
        Stopped: ``stop`` was set; all that had begun was given.
    """
    left = iter(layers)
    flying: set[Future[tuple[Layer, Matrix, bytes]]] = set()
    with one_thread(), ThreadPoolExecutor(workers, thread_name_prefix="decompose") as pool:
        while True:
            while len(flying) < workers and not stop.is_set():
                layer = next(left, None)
                if layer is None:
                    break
                flying.add(pool.submit(_decomposed, layer, wanted, stores))
            if not flying:
                break
            done, flying = wait(flying, return_when=FIRST_COMPLETED)
            for each in done:
                yield each.result()
    if next(left, None) is not None:
        raise Stopped(STOPPED)


def _decomposed(layer: Layer, wanted: Wanted, stores: Stores) -> tuple[Layer, Matrix, bytes]:
    delta = read_delta(layer.model, layer.base, stores)
    if layer.transposed:
        delta = delta.T
    name, rows, columns = layer.model.name, delta.shape[0], delta.shape[1]
    if not delta.any():
        return layer, Matrix(name, layer.module, (rows, columns), 0, 0.0, 0.0), b""
    factors = factorise(delta, lambda squares: rank_for(squares, wanted))
    stored = [to_stored(factor, wanted.dtype) for factor in (factors.left, factors.right)]
    left, right = (
        to_floats(found, wanted.dtype).reshape(factor.shape)
        for found, factor in zip(stored, (factors.left, factors.right), strict=True)
    )
    rank = factors.left.shape[1]
    del factors
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise NonFiniteError(
            f"{name}: its factors do not fit {wanted.dtype.torch_name}, whose largest value is "
            "too small; nothing was published.\n  Give --dtype float32."
        )
    lost, norm = residual(delta, left, right)
    matrix = Matrix(name, layer.module, (rows, columns), rank, norm, lost / norm)
    return layer, matrix, b"".join(found.tobytes() for found in stored)


def rank_for(squares: Float64, wanted: Wanted) -> int:
    """The rank that is wanted of a matrix with these squares of singular values, descending."""
    if wanted.energy is None:
        return min(wanted.rank or 1, len(squares))
    sums = np.cumsum(squares)
    least = int(np.searchsorted(sums, wanted.energy * sums[-1])) + 1
    return min(least, len(squares), wanted.most or len(squares))
