"""Where kernels run: this machine's CPUs, or a CUDA device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shardmerge.errors import DeviceError, UsageError
from shardmerge.kernels.compile import Kernel, compile_histograms, compile_map, compile_totals
from shardmerge.kernels.language import Expr, Histograms, Totals
from shardmerge.numerics import DType

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
DEVICES = (AUTO, CPU, CUDA)
"""What a user may ask for."""


class Device(Protocol):
    """Compiles passes."""

    @property
    def name(self) -> str:
        """``cpu`` or ``cuda``."""

    def compile_map(self, result: Expr, dtypes: Sequence[DType], output: DType) -> Kernel:
        """A kernel that writes ``result``, rounded once to ``output``, for every element."""

    def compile_totals(self, totals: Totals, dtypes: Sequence[DType]) -> Kernel:
        """A kernel that writes, for each canonical block, the float64 sum of each value."""

    def compile_histograms(self, histograms: Histograms, dtypes: Sequence[DType]) -> Kernel:
        """A kernel that adds to u32 counts of shape [keys, 65536]."""

    def pin(self, memory: npt.NDArray[np.uint8]) -> None:
        """Kernels will read from and write to ``memory``, as long as it lives."""


class Cpu:
    """The CPUs of this machine."""

    name = CPU

    def compile_map(self, result: Expr, dtypes: Sequence[DType], output: DType) -> Kernel:
        """A kernel that writes ``result``, rounded once to ``output``, for every element."""
        return compile_map(result, dtypes, output)

    def compile_totals(self, totals: Totals, dtypes: Sequence[DType]) -> Kernel:
        """A kernel that writes, for each canonical block, the float64 sum of each value."""
        return compile_totals(totals, dtypes)

    def compile_histograms(self, histograms: Histograms, dtypes: Sequence[DType]) -> Kernel:
        """A kernel that adds to u32 counts of shape [keys, 65536]."""
        return compile_histograms(histograms, dtypes)

    def pin(self, memory: npt.NDArray[np.uint8]) -> None:
        """Nothing has to be done."""


def choose_device(wanted: str, *, here: bool = True) -> str:
    """The device that ``wanted`` (one of ``DEVICES``) means.

    Args:
        here: whether kernels run on this machine. On others, ``auto`` is the CPU, and whether there
            is a CUDA device is found out there.
    Raises:
        UsageError: CUDA is asked for, and something that it needs is not there.
    """
    if wanted not in DEVICES:
        raise UsageError(f"unknown device '{wanted}'; there are {', '.join(DEVICES)}")
    if wanted == CPU or (wanted == AUTO and not here):
        return CPU
    if not here:
        return CUDA
    from shardmerge.kernels.cuda_driver import lacking

    missing = lacking()
    if missing is None:
        return CUDA
    if wanted == CUDA:
        raise UsageError(f"--device cuda: {missing}.\n  Give --device cpu, or leave it out.")
    return CPU


def open_device(name: str) -> Device:
    """The device of a plan."""
    return _cuda() if name == CUDA else Cpu()


@functools.cache
def _cuda() -> Device:
    """One for the process: what it holds is used again by the next merge."""
    from shardmerge.kernels.cuda import Cuda
    from shardmerge.kernels.cuda_driver import NvidiaDriver, lacking

    if missing := lacking():
        raise DeviceError(f"this merge was planned for a CUDA device, but here {missing}.")
    return Cuda(NvidiaDriver())
