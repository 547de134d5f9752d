"""A CUDA driver without a device: its memory is the host's, its threads are calls in a loop.

Copies and kernels are kept until something waits for their stream, so a buffer that is used again
too early, or a missing wait, gives wrong bytes. Kernels are the same code as on a device, compiled
for the CPU, with a thread's number as an argument.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

import llvmlite.binding as binding
import numpy as np
import numpy.typing as npt

from shardmerge.errors import DeviceError
from shardmerge.kernels.compile import COMPILER
from shardmerge.kernels.cuda_code import ARGUMENTS, Numbering, Program

Bytes = npt.NDArray[np.uint8]

THREADS = 7
"""Threads of every launch: few, and no divisor of anything."""
GARBAGE = 0xA5
PAGE = 4096

_ENGINES: dict[str, binding.ExecutionEngine] = {}
"""Machine code by IR: tests compile the same programs again and again."""


class EmulatedDriver:
    """What ``Driver`` says.

    Args:
        memory_bytes: of the device; more cannot be had.
        failing: the call of a kind that raises, by its number from 1.
        pins: whether host memory can be pinned.
    """

    def __init__(
        self,
        *,
        memory_bytes: int = 2**40,
        failing: Mapping[str, int] | None = None,
        pins: bool = True,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.copied_pinned = self.copied_bytes = 0
        self.allocated: dict[int, Bytes] = {}
        self.pinned: dict[int, int] = {}
        self.streams: dict[int, deque[tuple[int, Callable[[], None]]]] = {}
        self.modules: dict[int, binding.ExecutionEngine] = {}
        self._memory_bytes = memory_bytes
        self._failing = dict(failing or {})
        self._pins = pins
        self._lock = threading.RLock()
        self._entered: set[int] = set()
        self._numbers = iter(range(1, 2**62))
        self._recorded: dict[int, tuple[int, int]] = {}
        self._times: dict[int, float] = {}
        self._launchers: dict[int, Callable[..., None]] = {}
        self._host: dict[int, Bytes] = {}

    def _count(self, name: str) -> None:
        assert threading.get_ident() in self._entered, f"{name} before enter"
        self.calls[name] += 1
        if self.calls[name] == self._failing.get(name):
            raise DeviceError(f"the CUDA device failed: {name} gave CUDA_ERROR_UNKNOWN.")

    def enter(self) -> None:
        self._entered.add(threading.get_ident())

    def describe(self) -> str:
        return "emulated device"

    @property
    def used_bytes(self) -> int:
        return sum(memory.nbytes - 256 for memory in self.allocated.values())

    def memory(self) -> tuple[int, int]:
        return self._memory_bytes - self.used_bytes, self._memory_bytes

    # memory

    def alloc(self, nbytes: int) -> int | None:
        with self._lock:
            self._count("alloc")
            if self.used_bytes + nbytes > self._memory_bytes:
                return None
            memory = np.full(nbytes + 256, GARBAGE, dtype=np.uint8)
            address = -(-memory.ctypes.data // 256) * 256
            self.allocated[address] = memory
            return address

    def free(self, address: int) -> None:
        with self._lock:
            self._count("free")
            self._run_all()  # as cuMemFree, which waits for the device
            del self.allocated[address]

    def alloc_host(self, nbytes: int) -> Bytes:
        with self._lock:
            self._count("alloc_host")
            memory = np.full(nbytes, GARBAGE, dtype=np.uint8)
            self._host[memory.ctypes.data] = memory
            return memory

    def free_host(self, memory: Bytes) -> None:
        with self._lock:
            self._count("free_host")
            self._run_all()
            del self._host[memory.ctypes.data]

    def pin(self, address: int, nbytes: int) -> bool:
        with self._lock:
            self._count("pin")
            assert address % PAGE == 0 and nbytes % PAGE == 0 and nbytes > 0
            assert all(address + nbytes <= a or a + n <= address for a, n in self.pinned.items())
            if self._pins:
                self.pinned[address] = nbytes
            return self._pins

    def unpin(self, address: int) -> None:
        with self._lock:
            self._count("unpin")
            del self.pinned[address]

    # order

    def stream(self) -> int:
        with self._lock:
            self._count("stream")
            number = next(self._numbers)
            self.streams[number] = deque()
            return number

    def event(self) -> int:
        with self._lock:
            self._count("event")
            return next(self._numbers)

    def end(self, streams: Sequence[int], events: Sequence[int]) -> None:
        with self._lock:
            self._count("end")
            for stream in streams:
                self._run(stream)
                del self.streams[stream]
            for event in events:
                self._recorded.pop(event, None)

    def _give(self, stream: int, work: Callable[[], None]) -> int:
        number = next(self._numbers)
        self.streams[stream].append((number, work))
        return number

    def record(self, event: int, stream: int) -> None:
        with self._lock:
            self._count("record")

            def note() -> None:
                self._times[event] = time.perf_counter()

            self._recorded[event] = (stream, self._give(stream, note))

    def wait(self, stream: int, event: int) -> None:
        with self._lock:
            self._count("wait")
            other, number = self._recorded[event]
            self._give(stream, lambda: self._run(other, number))

    def synchronize(self, stream: int) -> None:
        with self._lock:
            self._count("synchronize")
            if self.calls["synchronize"] % 2:  # streams go on as they like: the last first
                for other in reversed(list(self.streams)):
                    self._run(other)
            self._run(stream)

    def _run(self, stream: int, last: int = 2**62) -> None:
        queue = self.streams[stream]
        while queue and queue[0][0] <= last:
            _, work = queue.popleft()
            work()

    def _run_all(self) -> None:
        for stream in list(self.streams):
            self._run(stream)

    def elapsed_ms(self, start: int, stop: int) -> float:
        with self._lock:
            self._count("elapsed_ms")
            return 1000 * (self._times[stop] - self._times[start])

    # work

    def _check(self, device: int, nbytes: int) -> None:
        inside = (
            start <= device and device + nbytes <= start + memory.nbytes - 256
            for start, memory in self.allocated.items()
        )
        assert any(inside), f"{nbytes} bytes at {device:#x} are not of one allocation"

    def _check_host(self, host: int, nbytes: int) -> None:
        """A copy lies in pinned memory or outside of it, never across an edge."""
        within = [
            a <= host and host + nbytes <= a + n
            for a, n in self.pinned.items()
            if host < a + n and a < host + nbytes
        ]
        assert all(within) and len(within) <= 1
        self.copied_bytes += nbytes
        self.copied_pinned += nbytes * len(within)

    def copy_in(self, device: int, host: int, nbytes: int, stream: int) -> None:
        with self._lock:
            self._count("copy_in")
            self._check(device, nbytes)
            self._check_host(host, nbytes)
            self._give(stream, lambda: ctypes.memmove(device, host, nbytes) and None)

    def copy_out(self, host: int, device: int, nbytes: int, stream: int) -> None:
        with self._lock:
            self._count("copy_out")
            self._check(device, nbytes)
            self._check_host(host, nbytes)
            self._give(stream, lambda: ctypes.memmove(host, device, nbytes) and None)

    def zero(self, device: int, nbytes: int, stream: int) -> None:
        with self._lock:
            self._count("zero")
            self._check(device, nbytes)
            self._give(stream, lambda: ctypes.memset(device, 0, nbytes) and None)

    # kernels

    def load(self, program: Program) -> tuple[int, Mapping[str, int]]:
        with self._lock:
            self._count("load")
            text = str(program.write(Numbering.ARGUMENTS))
            with COMPILER:
                if text not in _ENGINES:
                    _ENGINES[text] = _engine(text)
            engine, number = _ENGINES[text], next(self._numbers)
            self.modules[number] = engine
            kind = ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * (len(ARGUMENTS) + 2))
            functions = {}
            for entry in program.entries:
                functions[entry] = next(self._numbers)
                self._launchers[functions[entry]] = kind(engine.get_function_address(entry))
            return number, functions

    def unload(self, module: int) -> None:
        with self._lock:
            self._count("unload")
            del self.modules[module]

    def launch(self, function: int, items: int, arguments: Sequence[int], stream: int) -> None:
        with self._lock:
            self._count("launch")
            assert items > 0 and len(arguments) == len(ARGUMENTS)
            call, given = self._launchers[function], tuple(arguments)

            def work() -> None:
                for thread in reversed(range(THREADS)):
                    call(*given, thread, THREADS)

            self._give(stream, work)


def _engine(text: str) -> binding.ExecutionEngine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    module = binding.parse_assembly(text)
    module.triple = target.triple
    machine = target.create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=2,
    )
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(2))
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine
