"""Where whole matrices are decomposed: by numpy on the CPUs, or by PyTorch on a CUDA device.

Code for whole matrices is written once, for a namespace of arrays (``xp``) that is one of them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shardmerge.errors import DeviceError
from shardmerge.kernels.blas import one_thread
from shardmerge.kernels.device import CUDA

Matrix = npt.NDArray[np.floating[Any]]


class Linear(Protocol):
    """Runs a function of matrices."""

    def __call__(self, function: Callable[..., Any], *matrices: Matrix) -> Matrix:
        """``function(*matrices, xp=namespace)``, its arguments and result moved as needed."""


def on_cpu(function: Callable[..., Any], *matrices: Matrix) -> Matrix:
    """By numpy, with one thread."""
    with one_thread():
        result: Matrix = function(*matrices, xp=np)
    return result


class OnTorch:
    """By PyTorch.

    Args:
        place: PyTorch's name of the device.
    """

    def __init__(self, place: str) -> None:
        import torch

        self._torch = torch
        self._place = place
        self._alone = threading.Lock()

    def __call__(self, function: Callable[..., Any], *matrices: Matrix) -> Matrix:
        """Copy matrices there, and the result back."""
        try:
            with self._alone:  # one matrix keeps the device busy, and its memory is not planned
                moved = [
                    self._torch.from_numpy(np.ascontiguousarray(matrix)).to(self._place)
                    for matrix in matrices
                ]
                result: Matrix = function(*moved, xp=self._torch).cpu().numpy()
        except self._torch.OutOfMemoryError as problem:
            shape = "x".join(map(str, matrices[0].shape))
            raise DeviceError(
                f"the memory of the CUDA device does not suffice for a matrix of {shape}: "
                f"{str(problem).splitlines()[0]}\n  Give --device cpu."
            ) from None
        return result


@functools.cache
def linear_on(device: str) -> Linear:
    """For the matrices of a plan on ``device``."""
    return OnTorch("cuda") if device == CUDA else on_cpu


def lacking() -> str | None:
    """What is missing for decompositions on a CUDA device; None where nothing is."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"
