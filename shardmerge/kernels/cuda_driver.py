"""What is asked of a CUDA driver, and NVIDIA's own, by the package ``cuda-bindings``.

Addresses and handles are integers. All copies and launches are asynchronous, in the order of their
stream; host memory that they use must live until the stream was waited for.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shardmerge.errors import DeviceError
from shardmerge.kernels.cuda_code import ARCHITECTURES, Program, to_ptx

Bytes = npt.NDArray[np.uint8]

_THREADS = 256
"""Threads of a block."""
_FEW_THREADS = 32
"""The same where there are too few for every multiprocessor to get a block."""
_BLOCKS = 16
"""Most blocks for each multiprocessor: enough to hide memory's delay; a thread takes many steps."""


class Driver(Protocol):
    """A CUDA device, as far as kernels need one. Safe to use from several threads."""

    def enter(self) -> None:
        """Make the device the calling thread's; before any other call of that thread."""

    def describe(self) -> str:
        """The device in a few words."""

    def memory(self) -> tuple[int, int]:
        """Bytes of the device's memory that are free, and all of them."""

    def alloc(self, nbytes: int) -> int | None:
        """The address of new memory, a multiple of 256; None where there is not enough."""

    def free(self, address: int) -> None:
        """Give it back."""

    def alloc_host(self, nbytes: int) -> Bytes:
        """New page-locked memory of the host."""

    def free_host(self, memory: Bytes) -> None:
        """Give it back."""

    def pin(self, address: int, nbytes: int) -> bool:
        """Page-lock whole pages of the host; gives whether that was possible."""

    def unpin(self, address: int) -> None:
        """Undo it."""

    def stream(self) -> int:
        """A new stream."""

    def event(self) -> int:
        """A new event."""

    def end(self, streams: Sequence[int], events: Sequence[int]) -> None:
        """Give streams and events back."""

    def record(self, event: int, stream: int) -> None:
        """Let ``event`` mark what ``stream`` was given so far."""

    def wait(self, stream: int, event: int) -> None:
        """Let what ``stream`` is given from now on wait for ``event``."""

    def synchronize(self, stream: int) -> None:
        """Return when all that ``stream`` was given is done."""

    def elapsed_ms(self, start: int, stop: int) -> float:
        """Time between two events that are done."""

    def copy_in(self, device: int, host: int, nbytes: int, stream: int) -> None:
        """Copy to the device."""

    def copy_out(self, host: int, device: int, nbytes: int, stream: int) -> None:
        """Copy from the device."""

    def zero(self, device: int, nbytes: int, stream: int) -> None:
        """Write zeros."""

    def load(self, program: Program) -> tuple[int, Mapping[str, int]]:
        """Compile a program: its module, and its functions by entry point."""

    def unload(self, module: int) -> None:
        """Give a module back."""

    def launch(self, function: int, items: int, arguments: Sequence[int], stream: int) -> None:
        """Run a function with about a thread for each item, at most as many as are worth it."""


def lacking() -> str | None:
    """What a run on CUDA lacks here; None where nothing is."""
    try:
        from cuda.bindings import driver as api
    except ImportError:
        return "the package cuda-bindings is not installed (pip install 'shardmerge[cuda]')"
    try:
        (status,) = api.cuInit(0)
    except RuntimeError:
        return "NVIDIA's driver library (libcuda.so.1) was not found"
    if status == api.CUresult.CUDA_ERROR_NO_DEVICE:
        return "the driver finds no CUDA device"
    if status != api.CUresult.CUDA_SUCCESS:
        return f"the CUDA driver cannot be used: {status.name}"
    status, count = api.cuDeviceGetCount()
    if status != api.CUresult.CUDA_SUCCESS or not count:
        return "the driver finds no CUDA device"
    capability = _capability(api, _check(api, "cuDeviceGet", 0))
    if capability < ARCHITECTURES[0]:
        return f"the CUDA device has compute capability {capability / 10}; 7.0 is the least"
    return None


def _check(api: ModuleType, name: str, *arguments: object) -> Any:
    """The result of a driver call. Raises ``DeviceError`` with the error's name."""
    status, *results = getattr(api, name)(*arguments)
    if status != api.CUresult.CUDA_SUCCESS:
        raise DeviceError(
            f"the CUDA device failed: {name} gave {status.name}.\n"
            "  What was merged so far is kept: the same command goes on from there. If it happens "
            "again, look at the device with nvidia-smi, or start over with --fresh --device cpu."
        )
    return results[0] if len(results) == 1 else results


def _capability(api: ModuleType, device: object) -> int:
    names = api.CUdevice_attribute
    major, minor = (
        int(_check(api, "cuDeviceGetAttribute", attribute, device))
        for attribute in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return 10 * major + minor


class NvidiaDriver:
    """The first device that the driver shows (``CUDA_VISIBLE_DEVICES`` chooses another)."""

    def __init__(self) -> None:
        from cuda.bindings import driver as api

        self._api: ModuleType = api
        self._local = threading.local()
        self._call("cuInit", 0)
        device = self._call("cuDeviceGet", 0)
        # A thread that waits for the device sleeps, and leaves its CPU to those that read.
        api.cuDevicePrimaryCtxSetFlags(device, api.CUctx_flags.CU_CTX_SCHED_BLOCKING_SYNC)
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self._device = device
        self._capability = _capability(api, device)
        processors = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        self._processors = int(self._call("cuDeviceGetAttribute", processors, device))

    def _call(self, name: str, *arguments: object) -> Any:
        return _check(self._api, name, *arguments)

    def enter(self) -> None:
        """Make the device the calling thread's."""
        if not getattr(self._local, "entered", False):
            self._call("cuCtxSetCurrent", self._context)
            self._local.entered = True

    def describe(self) -> str:
        """The device in a few words."""
        name = self._call("cuDeviceGetName", 256, self._device)
        version = int(self._call("cuDriverGetVersion"))
        text = bytes(name).split(b"\0")[0].decode(errors="replace")
        capability = f"{self._capability // 10}.{self._capability % 10}"
        driver = f"{version // 1000}.{version % 1000 // 10}"
        return f"{text}, compute capability {capability}, driver for CUDA {driver}"

    def memory(self) -> tuple[int, int]:
        """Bytes of the device's memory that are free, and all of them."""
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def alloc(self, nbytes: int) -> int | None:
        """The address of new memory; None where there is not enough."""
        status, address = self._api.cuMemAlloc(nbytes)
        if status == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return None
        if status != self._api.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"the CUDA device failed: cuMemAlloc gave {status.name}.")
        return int(address)

    def free(self, address: int) -> None:
        """Give it back."""
        self._call("cuMemFree", address)

    def alloc_host(self, nbytes: int) -> Bytes:
        """New page-locked memory of the host."""
        address = int(self._call("cuMemHostAlloc", nbytes, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def free_host(self, memory: Bytes) -> None:
        """Give it back."""
        self._call("cuMemFreeHost", memory.ctypes.data)

    def pin(self, address: int, nbytes: int) -> bool:
        """Page-lock whole pages of the host; gives whether that was possible."""
        (status,) = self._api.cuMemHostRegister(address, nbytes, 0)
        return bool(status == self._api.CUresult.CUDA_SUCCESS)

    def unpin(self, address: int) -> None:
        """Undo it."""
        self._call("cuMemHostUnregister", address)

    def stream(self) -> int:
        """A new stream."""
        flag = self._api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call("cuStreamCreate", flag))

    def event(self) -> int:
        """A new event."""
        return int(self._call("cuEventCreate", self._api.CUevent_flags.CU_EVENT_DEFAULT))

    def end(self, streams: Sequence[int], events: Sequence[int]) -> None:
        """Give streams and events back."""
        for event in events:
            self._call("cuEventDestroy", event)
        for stream in streams:
            self._call("cuStreamDestroy", stream)

    def record(self, event: int, stream: int) -> None:
        """Let ``event`` mark what ``stream`` was given so far."""
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Let what ``stream`` is given from now on wait for ``event``."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize(self, stream: int) -> None:
        """Return when all that ``stream`` was given is done."""
        self._call("cuStreamSynchronize", stream)

    def elapsed_ms(self, start: int, stop: int) -> float:
        """Time between two events that are done."""
        return float(self._call("cuEventElapsedTime", start, stop))

    def copy_in(self, device: int, host: int, nbytes: int, stream: int) -> None:
        """Copy to the device."""
        self._call("cuMemcpyHtoDAsync", device, host, nbytes, stream)

    def copy_out(self, host: int, device: int, nbytes: int, stream: int) -> None:
        """Copy from the device."""
        self._call("cuMemcpyDtoHAsync", host, device, nbytes, stream)

    def zero(self, device: int, nbytes: int, stream: int) -> None:
        """Write zeros."""
        self._call("cuMemsetD8Async", device, 0, nbytes, stream)

    def load(self, program: Program) -> tuple[int, Mapping[str, int]]:
        """Compile a program: its module, and its functions by entry point."""
        known = max(a for a in ARCHITECTURES if a <= self._capability)
        ptx = to_ptx(program, known).encode() + b"\0"
        module = self._call("cuModuleLoadData", ptx)
        return int(module), {
            entry: int(self._call("cuModuleGetFunction", module, entry.encode()))
            for entry in program.entries
        }

    def unload(self, module: int) -> None:
        """Give a module back."""
        self._call("cuModuleUnload", module)

    def launch(self, function: int, items: int, arguments: Sequence[int], stream: int) -> None:
        """Run a function with about a thread for each item, at most as many as are worth it."""
        size = _THREADS if items >= _THREADS * self._processors else _FEW_THREADS
        blocks = max(1, min(-(-items // size), _BLOCKS * self._processors))
        values = (ctypes.c_uint64 * len(arguments))(*arguments)
        start, each = ctypes.addressof(values), ctypes.sizeof(ctypes.c_uint64)
        places = (ctypes.c_void_p * len(arguments))(
            *(start + each * number for number in range(len(arguments)))
        )
        grid = (blocks, 1, 1, size, 1, 1)
        self._call("cuLaunchKernel", function, *grid, 0, stream, ctypes.addressof(places), 0)
