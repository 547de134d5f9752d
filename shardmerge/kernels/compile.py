"""Compiled kernels: one native loop per pass, made in memory in tens of milliseconds.

Three forms: a map writes one value per element, totals add float64 values over canonical blocks,
histograms count keys. All run without the interpreter lock and touch only the buffers given.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import llvmlite.binding as binding
import numpy as np
import numpy.typing as npt
from llvmlite import ir

from shardmerge.kernels.emit import Emitter
from shardmerge.kernels.language import HISTOGRAM_BINS, Expr, Histograms, Totals
from shardmerge.numerics import CANONICAL_BLOCK, DType

LANES = 32
"""Elements per vector; also the number of partial sums that a float64 total is made of."""

KERNEL_DTYPES = (DType.BF16, DType.F16, DType.F32, DType.F64)
"""What a kernel reads and writes; other dtypes are decoded to float32 before it runs."""

LAST_INPUT_BIT = 62
"""Bit of a map's answer that inputs from number 62 on share; input k below it has bit k."""

OUTPUT_BIT = 63
"""Bit of a map's answer: the output holds NaN or infinity."""

OUTPUT = -1
"""The output, in the place of an input's number."""

_I1, _I8, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_F64 = ir.DoubleType()
_POINTER = _I8.as_pointer()
_SIGNATURE = ir.FunctionType(
    _I64,
    [
        _I64,  # number of elements
        _I64,  # flat index of the first
        _POINTER.as_pointer(),  # inputs
        _F64.as_pointer(),  # parameters
        _I32.as_pointer(),  # random keys, two words each
        _POINTER,  # output
    ],
)
_CALL = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
)

Array = npt.NDArray[np.generic]


class Form(enum.Enum):
    """What a kernel gives."""

    MAP = "map"
    TOTALS = "totals"
    HISTOGRAMS = "histograms"


class Kernel(Protocol):
    """A compiled pass, for whatever runs it."""

    @property
    def form(self) -> Form:
        """What it gives."""

    @property
    def width(self) -> int:
        """Number of totals or histograms; 1 for a map."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Numbers of the task's tensors that it reads; the others may have any address."""

    def __call__(
        self,
        *,
        count: int,
        first: int,
        inputs: Sequence[int],
        parameters: npt.NDArray[np.float64],
        keys: npt.NDArray[np.uint32],
        output: Array,
    ) -> int:
        """Run over ``count`` elements.

        Args:
            count: number of elements.
            first: flat index of the first element in its tensor.
            inputs: for every tensor of the task, the address of its first element.
            parameters: float64 values of the pass.
            keys: shape [models, 2], Philox keys as words.
            output: values, totals or counts.
        Returns:
            for a map, which inputs (and output: ``OUTPUT_BIT``) hold NaN or infinity; else 0.
        """


class NativeKernel:
    """A pass compiled for this processor.

    Args:
        engine: owner of the machine code.
    """

    def __init__(
        self, form: Form, width: int, inputs: tuple[int, ...], engine: binding.ExecutionEngine
    ) -> None:
        self.form = form
        self.width = width
        self.inputs = inputs
        self._engine = engine
        self._call = _CALL(engine.get_function_address("kernel"))

    def __call__(
        self,
        *,
        count: int,
        first: int,
        inputs: Sequence[int],
        parameters: npt.NDArray[np.float64],
        keys: npt.NDArray[np.uint32],
        output: Array,
    ) -> int:
        """Run over ``count`` elements; see ``Kernel``."""
        addresses = (ctypes.c_void_p * max(1, len(inputs)))(*inputs)
        bits = self._call(
            count,
            first,
            ctypes.addressof(addresses),
            parameters.ctypes.data,
            keys.ctypes.data,
            output.ctypes.data,
        )
        return int(bits) & (2**64 - 1)


class _Loop:
    """The function's frame: a loop over vectors, then one over the elements that are left."""

    def __init__(self, results: Sequence[Expr], dtypes: Sequence[DType]) -> None:
        self.random_models = random_models_of(results)
        self.module = ir.Module("shardmerge")
        self.function = ir.Function(self.module, _SIGNATURE, "kernel")
        self.count, self.first, inputs, self.parameters, self.keys, self.output = self.function.args
        for argument in (inputs, self.parameters, self.keys, self.output):
            argument.add_attribute("noalias")
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.inputs = [
            (self.b.load(self.b.gep(inputs, [ir.Constant(_I64, number)])), dtype)
            for number, dtype in enumerate(dtypes)
        ]

    def over(
        self, start: ir.Value, stop: ir.Value, step: int, body: Callable[[ir.Value], None]
    ) -> None:
        """``for index in range(start, stop, step): body(index)``."""
        loop_over(self.b, start, stop, ir.Constant(_I64, step), body)

    def elements(
        self, start: ir.Value, stop: ir.Value, body: Callable[[Emitter, ir.Value], None]
    ) -> None:
        """``body`` for every element of ``[start, stop)``: by ``LANES``, then one by one."""
        b = self.b
        whole = b.and_(b.sub(stop, start), ir.Constant(_I64, -LANES))
        middle = b.add(start, whole)
        self.over(start, middle, LANES, lambda index: body(self.emitter(LANES, index), index))
        self.over(middle, stop, 1, lambda index: body(self.emitter(1, index), index))

    def emitter(self, lanes: int, index: ir.Value) -> Emitter:
        return Emitter(
            self.b,
            lanes=lanes,
            index=index,
            first=self.first,
            inputs=self.inputs,
            parameters=self.parameters,
            keys=self.keys,
            random_models=self.random_models,
        )

    def compiled(self, form: Form, width: int, inputs: tuple[int, ...]) -> NativeKernel:
        with COMPILER:
            return NativeKernel(form, width, inputs, machine_code(self.module))


COMPILER = threading.Lock()
"""Held while compiling: LLVM's global state is not safe to use from two threads."""


def machine_code(written: ir.Module) -> binding.ExecutionEngine:
    """A module for this processor; to be called while holding ``COMPILER``."""
    module = binding.parse_assembly(str(written))
    module.triple = _target().triple
    machine = _target().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
    )
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def loop_over(
    b: ir.IRBuilder,
    start: ir.Value,
    stop: ir.Value,
    step: ir.Value,
    body: Callable[[ir.Value], None],
) -> None:
    """Write ``for index in range(start, stop, step): body(index)``."""
    before = b.block
    head = b.append_basic_block("head")
    inside = b.append_basic_block("body")
    after = b.append_basic_block("after")
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(_I64)
    index.add_incoming(start, before)
    b.cbranch(b.icmp_signed("<", index, stop), inside, after)
    b.position_at_end(inside)
    body(index)
    index.add_incoming(b.add(index, step), b.block)
    b.branch(head)
    b.position_at_end(after)


def _target() -> binding.Target:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple()


def _leaves(results: Sequence[Expr], op: str) -> Iterator[Expr]:
    """Every leaf of kind ``op`` that ``results`` are made of."""
    seen: set[int] = set()
    stack = list(results)
    while stack:
        x = stack.pop()
        if id(x) not in seen:
            seen.add(id(x))
            stack.extend(x.args)
            if x.op == op:
                yield x


def inputs_of(results: Sequence[Expr]) -> tuple[int, ...]:
    """Numbers of the inputs that ``results`` read, in increasing order."""
    return tuple(sorted({int(x.value) for x in _leaves(results, "input")}))


def random_models_of(results: Sequence[Expr]) -> int:
    """Number of models whose random numbers ``results`` may read: those up to the last."""
    return max((int(x.value) + 1 for x in _leaves(results, "random")), default=0)


def compile_map(result: Expr, dtypes: Sequence[DType], output: DType) -> Kernel:
    """A kernel that writes ``result``, rounded once to ``output``, for every element.

    Args:
        dtypes: of every tensor of the task, each one of ``KERNEL_DTYPES``.
    """
    loop, inputs = _Loop([result], dtypes), inputs_of([result])
    b = loop.b
    flags = b.alloca(_I64)
    b.store(ir.Constant(_I64, 0), flags)
    vector = ir.VectorType(_I8, LANES)
    # One accumulator per input keeps the loop free of branches; they become registers.
    bad = {number: b.alloca(vector) for number in (*inputs, OUTPUT)}
    for place in bad.values():
        b.store(ir.Constant(vector, [0] * LANES), place)

    def body(emit: Emitter, index: ir.Value) -> None:
        value = emit.emit(result)
        found = {OUTPUT: emit.store(value, loop.output, output)}
        found |= {number: emit.non_finite(number) for number in inputs}
        for number, condition in found.items():
            if emit.lanes == LANES:
                seen = b.or_(b.load(bad[number]), b.zext(condition, vector))
                b.store(seen, bad[number])
            else:
                b.store(flagged(b, b.load(flags), condition, number), flags)

    loop.elements(ir.Constant(_I64, 0), loop.count, body)
    total = b.load(flags)
    for number, place in bad.items():
        packed = b.bitcast(b.load(place), ir.IntType(8 * LANES))
        some = b.icmp_unsigned("!=", packed, ir.Constant(ir.IntType(8 * LANES), 0))
        total = flagged(b, total, some, number)
    b.ret(total)
    return loop.compiled(Form.MAP, 1, inputs)


def flagged(b: ir.IRBuilder, flags: ir.Value, condition: ir.Value, number: int) -> ir.Value:
    """``flags`` with the bit of an input (or the output) set where ``condition`` holds."""
    bit = OUTPUT_BIT if number == OUTPUT else min(number, LAST_INPUT_BIT)
    signed = (1 << bit) - (1 << 64 if bit == 63 else 0)
    return b.or_(flags, b.select(condition, ir.Constant(_I64, signed), ir.Constant(_I64, 0)))


def compile_totals(totals: Totals, dtypes: Sequence[DType]) -> Kernel:
    """A kernel that writes, for each canonical block, the float64 sum of each value.

    The output has shape [blocks, values]; the first element must begin a canonical block. Within a
    block, lane j adds the elements j, j + 32, ...; then the lanes are added from first to last.
    """
    loop, inputs = _Loop(totals.values, dtypes), inputs_of(totals.values)
    b = loop.b
    vector = ir.VectorType(_F64, LANES)
    sums = [b.alloca(vector) for _ in totals.values]
    output = b.bitcast(loop.output, _F64.as_pointer())
    block_size = ir.Constant(_I64, CANONICAL_BLOCK)

    def add(emit: Emitter, index: ir.Value) -> None:
        for place, value in zip(sums, totals.values, strict=True):
            x = emit.widened(value)
            if emit.lanes == LANES:
                b.store(b.fadd(b.load(place), x), place)
            else:
                lane = b.trunc(b.and_(index, ir.Constant(_I64, LANES - 1)), _I32)
                old = b.load(place)
                new = b.fadd(b.extract_element(old, lane), x)
                b.store(b.insert_element(old, new, lane), place)

    def block(start: ir.Value) -> None:
        for place in sums:
            b.store(ir.Constant(vector, [0.0] * LANES), place)
        end = b.add(start, block_size)
        end = b.select(b.icmp_signed("<", end, loop.count), end, loop.count)
        loop.elements(start, end, add)
        row = b.mul(b.udiv(start, block_size), ir.Constant(_I64, len(sums)))
        for column, place in enumerate(sums):
            lanes = b.load(place)
            total = b.extract_element(lanes, ir.Constant(_I32, 0))
            for lane in range(1, LANES):
                total = b.fadd(total, b.extract_element(lanes, ir.Constant(_I32, lane)))
            b.store(total, b.gep(output, [b.add(row, ir.Constant(_I64, column))]))

    loop.over(ir.Constant(_I64, 0), loop.count, CANONICAL_BLOCK, block)
    b.ret(ir.Constant(_I64, 0))
    return loop.compiled(Form.TOTALS, len(sums), inputs)


def compile_histograms(histograms: Histograms, dtypes: Sequence[DType]) -> Kernel:
    """A kernel that adds to u32 counts of shape [keys, 65536], of at most 2**32 - 1 elements."""
    only = histograms.only or (None,) * len(histograms.keys)
    results = [*histograms.keys, *(histograms.only or ())]
    loop, inputs = _Loop(results, dtypes), inputs_of(results)
    b = loop.b
    output = b.bitcast(loop.output, _I32.as_pointer())
    spilled = b.alloca(ir.VectorType(_I32, LANES))
    lanes = b.bitcast(spilled, _I32.as_pointer())

    def count(key: ir.Value, offset: int) -> None:
        place = b.add(b.zext(key, _I64), ir.Constant(_I64, offset))
        place = b.gep(output, [place])
        b.store(b.add(b.load(place), ir.Constant(_I32, 1)), place)

    def count_all(keys: ir.Value, offset: int) -> None:
        _spill(b, keys, spilled)
        for lane in range(LANES):
            count(b.load(b.gep(lanes, [ir.Constant(_I32, lane)])), offset)

    def count_some(keys: ir.Value, condition: ir.Value, offset: int) -> None:
        """Mostly none of a vector is counted: one test, then one step for each that is."""
        bits = b.bitcast(condition, _I32)
        with b.if_then(_some(b, bits), likely=False):
            _spill(b, keys, spilled)
            before, step = b.block, b.append_basic_block("step")
            after = b.append_basic_block("counted")
            b.branch(step)
            b.position_at_end(step)
            left = b.phi(_I32)
            left.add_incoming(bits, before)
            lane = b.cttz(left, ir.Constant(_I1, 1))
            count(b.load(b.gep(lanes, [lane])), offset)
            rest = b.and_(left, b.sub(left, ir.Constant(_I32, 1)))
            left.add_incoming(rest, b.block)
            b.cbranch(_some(b, rest), step, after)
            b.position_at_end(after)

    def body(emit: Emitter, _: ir.Value) -> None:
        for number, (key, condition) in enumerate(zip(histograms.keys, only, strict=True)):
            keys, offset = emit.emit(key), number * HISTOGRAM_BINS
            where = None if condition is None else emit.emit(condition)
            if emit.lanes == 1:
                with contextlib.nullcontext() if where is None else b.if_then(where):
                    count(keys, offset)
            elif where is None:
                count_all(keys, offset)
            else:
                count_some(keys, where, offset)

    loop.elements(ir.Constant(_I64, 0), loop.count, body)
    b.ret(ir.Constant(_I64, 0))
    return loop.compiled(Form.HISTOGRAMS, len(histograms.keys), inputs)


def _some(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    return b.icmp_unsigned("!=", bits, ir.Constant(_I32, 0))


def _spill(b: ir.IRBuilder, keys: ir.Value, place: ir.Value) -> None:
    """Write keys to memory, where the compiler has to read them again one by one.

    Taken out of a vector register, some arrive before others, and processors begin an increment
    before one of the same place that precedes it: all that follows is then done again. Measured on
    AMD Zen 4: 6 ns per key, against 0.6 ns.
    """
    b.store(keys, place)
    signature = ir.FunctionType(ir.VoidType(), [place.type])
    b.call(ir.InlineAsm(signature, "", "r,~{memory}", side_effect=True), [place])
