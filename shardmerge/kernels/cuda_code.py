"""Kernels for CUDA devices: the same expressions as PTX, each thread a function of its number.

Arithmetic is what ``emit`` writes for the CPU: no contraction, no reassociation, subnormals kept.
Totals are added in the CPU's order and counts are integers, so both give the CPU's bits.

The body of a kernel is written once. A thread's number and the number of threads come from special
registers on a device; where a kernel is tried without one they are two more arguments.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llvmlite.binding as binding
from llvmlite import ir

from shardmerge.kernels.compile import (
    COMPILER,
    LANES,
    OUTPUT,
    Form,
    flagged,
    inputs_of,
    loop_over,
    random_models_of,
)
from shardmerge.kernels.emit import Emitter
from shardmerge.kernels.language import HISTOGRAM_BINS, Expr, Histograms, Totals
from shardmerge.numerics import CANONICAL_BLOCK, DType

GROUP = 4
"""Consecutive elements that a thread computes together: one draw gives four random numbers."""

COPIES = 32
"""Copies of a histogram that threads add to, so that few of them wait for one place."""

AHEAD = 16
"""Values that a lane reads at a time: its additions wait for each other, its reads need not."""

MAIN, LANE_SUMS, ROW_SUMS, FOLD = "kernel", "lane_sums", "row_sums", "fold"
"""Entry points: over elements; of totals: over lanes, over rows; of histograms: over copies."""

ARCHITECTURES = (70, 75, 80, 86, 89, 90)
"""Compute capabilities, times ten, that PTX is written for; newer devices run that of the last."""

_TRIPLE = "nvptx64-nvidia-cuda"
_DEVICE_SCOPE = 'syncscope("device") monotonic'

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_F64 = ir.DoubleType()
_ARGUMENTS: tuple[tuple[str, ir.Type], ...] = (
    ("count", _I64),  # elements
    ("first", _I64),  # flat index of the first
    ("inputs", _I8.as_pointer()),  # input after input, each with room for ``stride`` elements
    ("stride", _I64),
    ("parameters", _F64.as_pointer()),
    ("keys", _I32.as_pointer()),  # random keys, two words each
    ("output", _I8.as_pointer()),
    ("flags", _I64.as_pointer()),
)
ARGUMENTS = tuple(name for name, _ in _ARGUMENTS)
"""What every entry point takes, 64 bits each, in this order."""


class Numbering(enum.Enum):
    """Where a thread's number and the number of threads come from."""

    REGISTERS = "special registers of a device"
    ARGUMENTS = "two more arguments"


@dataclass(frozen=True, slots=True)
class Program:
    """A pass, ready to be written for a device.

    Args:
        form: what it gives.
        width: number of totals or histograms; 1 for a map.
        inputs: numbers of the tensors that it reads.
        itemsizes: bytes of an element of each of those.
        output_itemsize: bytes of an element that a map writes; else 0.
        write: writes its entry points.
    """

    form: Form
    width: int
    inputs: tuple[int, ...]
    itemsizes: tuple[int, ...]
    output_itemsize: int
    write: Callable[[Numbering], ir.Module]

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the entry points."""
        return {
            Form.MAP: (MAIN,),
            Form.TOTALS: (MAIN, LANE_SUMS, ROW_SUMS),
            Form.HISTOGRAMS: (MAIN, FOLD),
        }[self.form]


def to_ptx(program: Program, architecture: int) -> str:
    """The PTX of a program for one of ``ARCHITECTURES``."""
    text = str(program.write(Numbering.REGISTERS))
    with COMPILER:
        for start in (
            binding.initialize_all_targets,
            binding.initialize_all_asmprinters,
        ):
            start()
        target = binding.Target.from_triple(_TRIPLE)
        machine = target.create_target_machine(cpu=f"sm_{architecture}", opt=3)
        module = binding.parse_assembly(text)
        module.triple = _TRIPLE
        module.data_layout = str(machine.target_data)
        options = binding.create_pipeline_tuning_options(speed_level=3)
        passes = binding.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        ptx: str = machine.emit_assembly(module)
    return ptx


def map_program(result: Expr, dtypes: Sequence[DType], output: DType) -> Program:
    """Writes ``result``, rounded once to ``output``, for every element; ors into ``flags``."""
    inputs = inputs_of([result])

    def write(numbering: Numbering) -> ir.Module:
        module = ir.Module("shardmerge")
        frame = _Frame(module, MAIN, numbering)
        _write_map(frame, _Reads.of([result], dtypes), result, output)
        return module

    sizes = tuple(dtypes[number].itemsize for number in inputs)
    return Program(Form.MAP, 1, inputs, sizes, output.itemsize, write)


def totals_program(totals: Totals, dtypes: Sequence[DType]) -> Program:
    """Float64 values of every element, then sums per canonical block and lane, then of lanes."""
    inputs, width = inputs_of(totals.values), len(totals.values)

    def write(numbering: Numbering) -> ir.Module:
        module = ir.Module("shardmerge")
        _write_values(_Frame(module, MAIN, numbering), _Reads.of(totals.values, dtypes), totals)
        _write_lane_sums(_Frame(module, LANE_SUMS, numbering), width)
        _write_row_sums(_Frame(module, ROW_SUMS, numbering))
        return module

    sizes = tuple(dtypes[number].itemsize for number in inputs)
    return Program(Form.TOTALS, width, inputs, sizes, 0, write)


def histograms_program(histograms: Histograms, dtypes: Sequence[DType]) -> Program:
    """Adds to u32 counts of shape [copies, keys, 65536], which a second entry point adds up."""
    results = [*histograms.keys, *(histograms.only or ())]
    inputs, width = inputs_of(results), len(histograms.keys)

    def write(numbering: Numbering) -> ir.Module:
        module = ir.Module("shardmerge")
        _write_counts(_Frame(module, MAIN, numbering), _Reads.of(results, dtypes), histograms)
        _write_fold(_Frame(module, FOLD, numbering), width)
        return module

    sizes = tuple(dtypes[number].itemsize for number in inputs)
    return Program(Form.HISTOGRAMS, width, inputs, sizes, 0, write)


# --- the frame of an entry point -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reads:
    """The inputs of a pass: for each that it reads, bytes per element of those before it."""

    dtypes: tuple[DType, ...]
    before: dict[int, int]
    random_models: int

    @classmethod
    def of(cls, results: Sequence[Expr], dtypes: Sequence[DType]) -> _Reads:
        before, total = {}, 0
        for number in inputs_of(results):
            before[number] = total
            total += dtypes[number].itemsize
        return cls(tuple(dtypes), before, random_models_of(results))


class _Frame:
    """One entry point: its arguments, its thread's number, and loops shared among threads."""

    def __init__(self, module: ir.Module, name: str, numbering: Numbering) -> None:
        numbers = [_I64, _I64] if numbering is Numbering.ARGUMENTS else []
        types = [kind for _, kind in _ARGUMENTS]
        signature = ir.FunctionType(ir.VoidType(), [*types, *numbers])
        self.module = module
        self.function = ir.Function(module, signature, name)
        self._arguments = dict(zip(ARGUMENTS, self.function.args, strict=False))
        for pointer in ("inputs", "parameters", "keys", "output", "flags"):
            self._arguments[pointer].add_attribute("noalias")
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        if numbering is Numbering.ARGUMENTS:
            self.thread, self.threads = self.function.args[len(ARGUMENTS) :]
        else:
            self.function.calling_convention = "ptx_kernel"
            size = self._register("ntid.x")
            mine = self.b.mul(self._register("ctaid.x"), size)
            self.thread = self.b.add(mine, self._register("tid.x"))
            self.threads = self.b.mul(self._register("nctaid.x"), size)

    def __getitem__(self, name: str) -> ir.Value:
        """An argument."""
        return self._arguments[name]

    def _register(self, name: str) -> ir.Value:
        full = f"llvm.nvvm.read.ptx.sreg.{name}"
        if full not in self.module.globals:
            ir.Function(self.module, ir.FunctionType(_I32, []), full)
        return self.b.zext(self.b.call(self.module.globals[full], []), _I64)

    def each(self, start: ir.Value, stop: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """``body`` for this thread's share of ``range(start, stop)``."""
        loop_over(self.b, self.b.add(start, self.thread), stop, self.threads, body)

    def elements(self, reads: _Reads, body: Callable[[Emitter, ir.Value], None]) -> None:
        """``body`` for this thread's share of the elements: by ``GROUP``, then one by one."""
        b = self.b
        whole = b.and_(self["count"], ir.Constant(_I64, -GROUP))
        group = ir.Constant(_I64, GROUP)
        inputs = self._inputs(reads)
        loop_over(
            b,
            b.mul(self.thread, group),
            whole,
            b.mul(self.threads, group),
            lambda index: body(self._emitter(reads, inputs, GROUP, index), index),
        )
        self.each(
            whole,
            self["count"],
            lambda index: body(self._emitter(reads, inputs, 1, index), index),
        )
        for function in self.module.functions:
            function.attributes.discard("noinline")  # a call passes random words by memory

    def _inputs(self, reads: _Reads) -> list[tuple[ir.Value, DType]]:
        found = []
        for number, dtype in enumerate(reads.dtypes):
            before = ir.Constant(_I64, reads.before.get(number, 0))
            start = self.b.mul(self["stride"], before)
            found.append((self.b.gep(self["inputs"], [start]), dtype))
        return found

    def _emitter(
        self, reads: _Reads, inputs: Sequence[tuple[ir.Value, DType]], lanes: int, index: ir.Value
    ) -> Emitter:
        return Emitter(
            self.b,
            lanes=lanes,
            index=index,
            first=self["first"],
            inputs=inputs,
            parameters=self["parameters"],
            keys=self["keys"],
            random_models=reads.random_models,
            aligned=lanes,
        )

    def lane_of(self, emit: Emitter, value: ir.Value, lane: int) -> ir.Value:
        """One element of a value."""
        if emit.lanes == 1:
            return value
        return self.b.extract_element(value, ir.Constant(_I32, lane))


# --- maps ----------------------------------------------------------------------------------------


def _write_map(frame: _Frame, reads: _Reads, result: Expr, output: DType) -> None:
    b = frame.b
    vector, packed = ir.VectorType(_I8, GROUP), ir.IntType(8 * GROUP)
    bad = {number: b.alloca(vector) for number in (*reads.before, OUTPUT)}
    for place in bad.values():
        b.store(ir.Constant(vector, [0] * GROUP), place)

    def body(emit: Emitter, _: ir.Value) -> None:
        value = emit.emit(result)
        found = {OUTPUT: emit.store(value, frame["output"], output)}
        found |= {number: emit.non_finite(number) for number in reads.before}
        for number, condition in found.items():
            if emit.lanes == 1:
                condition = b.insert_element(
                    ir.Constant(ir.VectorType(ir.IntType(1), GROUP), [0] * GROUP),
                    condition,
                    ir.Constant(_I32, 0),
                )
            b.store(b.or_(b.load(bad[number]), b.zext(condition, vector)), bad[number])

    frame.elements(reads, body)
    total = ir.Constant(_I64, 0)
    for number, place in bad.items():
        seen = b.icmp_unsigned("!=", b.bitcast(b.load(place), packed), ir.Constant(packed, 0))
        total = flagged(b, total, seen, number)
    with b.if_then(b.icmp_unsigned("!=", total, ir.Constant(_I64, 0)), likely=False):
        b.atomic_rmw("or", frame["flags"], total, _DEVICE_SCOPE)
    b.ret_void()


# --- totals --------------------------------------------------------------------------------------


def _write_values(frame: _Frame, reads: _Reads, totals: Totals) -> None:
    """Column after column, each with room for ``stride`` elements."""
    b = frame.b
    output = b.bitcast(frame["output"], _F64.as_pointer())

    def body(emit: Emitter, index: ir.Value) -> None:
        for column, value in enumerate(totals.values):
            place = b.add(b.mul(frame["stride"], ir.Constant(_I64, column)), index)
            pointer = b.bitcast(b.gep(output, [place]), emit.type_of(_F64).as_pointer())
            b.store(emit.widened(value), pointer, align=8 * emit.lanes)

    frame.elements(reads, body)
    b.ret_void()


def _write_lane_sums(frame: _Frame, width: int) -> None:
    """Lane j of a block adds elements j, j + 32, ...: shape [blocks, width, 32]."""
    b = frame.b
    values = b.bitcast(frame["inputs"], _F64.as_pointer())
    sums = b.bitcast(frame["output"], _F64.as_pointer())
    block, lanes, columns = (ir.Constant(_I64, n) for n in (CANONICAL_BLOCK, LANES, width))
    blocks = b.udiv(b.add(frame["count"], ir.Constant(_I64, CANONICAL_BLOCK - 1)), block)
    total = b.alloca(_F64)

    def body(item: ir.Value) -> None:
        row, lane = b.udiv(item, lanes), b.urem(item, lanes)
        start = b.mul(b.udiv(row, columns), block)
        end = b.add(start, block)
        end = b.select(b.icmp_signed("<", end, frame["count"]), end, frame["count"])
        column = b.gep(values, [b.mul(b.urem(row, columns), frame["stride"])])
        b.store(ir.Constant(_F64, 0.0), total)

        def add(index: ir.Value, count: int) -> None:
            steps = [ir.Constant(_I64, n * LANES) for n in range(count)]
            read = [b.load(b.gep(column, [b.add(index, step)])) for step in steps]
            for value in read:
                b.store(b.fadd(b.load(total), value), total)

        stride = ir.Constant(_I64, AHEAD * LANES)
        whole = b.sub(b.sub(end, start), b.urem(b.sub(end, start), stride))
        middle = b.add(start, whole)
        loop_over(b, b.add(start, lane), middle, stride, lambda index: add(index, AHEAD))
        loop_over(b, b.add(middle, lane), end, lanes, lambda index: add(index, 1))
        b.store(b.load(total), b.gep(sums, [item]))

    frame.each(ir.Constant(_I64, 0), b.mul(blocks, b.mul(columns, lanes)), body)
    b.ret_void()


def _write_row_sums(frame: _Frame) -> None:
    """The lanes of each of ``count`` rows, added from first to last."""
    b = frame.b
    lanes = b.bitcast(frame["inputs"], _F64.as_pointer())
    sums = b.bitcast(frame["output"], _F64.as_pointer())

    def body(row: ir.Value) -> None:
        start = b.mul(row, ir.Constant(_I64, LANES))
        total = b.load(b.gep(lanes, [start]))
        for lane in range(1, LANES):
            place = b.gep(lanes, [b.add(start, ir.Constant(_I64, lane))])
            total = b.fadd(total, b.load(place))
        b.store(total, b.gep(sums, [row]))

    frame.each(ir.Constant(_I64, 0), frame["count"], body)
    b.ret_void()


# --- histograms ----------------------------------------------------------------------------------


def _write_counts(frame: _Frame, reads: _Reads, histograms: Histograms) -> None:
    b = frame.b
    only = histograms.only or (None,) * len(histograms.keys)
    size = len(histograms.keys) * HISTOGRAM_BINS
    copy = b.mul(b.urem(frame.thread, ir.Constant(_I64, COPIES)), ir.Constant(_I64, size))
    counts = b.gep(b.bitcast(frame["output"], _I32.as_pointer()), [copy])

    def count(key: ir.Value, offset: int) -> None:
        place = b.add(b.zext(key, _I64), ir.Constant(_I64, offset))
        b.atomic_rmw("add", b.gep(counts, [place]), ir.Constant(_I32, 1), _DEVICE_SCOPE)

    def body(emit: Emitter, _: ir.Value) -> None:
        for number, (key, condition) in enumerate(zip(histograms.keys, only, strict=True)):
            keys, offset = emit.emit(key), number * HISTOGRAM_BINS
            where = None if condition is None else emit.emit(condition)
            for lane in range(emit.lanes):
                mine = frame.lane_of(emit, keys, lane)
                if where is None:
                    count(mine, offset)
                else:
                    with b.if_then(frame.lane_of(emit, where, lane), likely=False):
                        count(mine, offset)

    frame.elements(reads, body)
    b.ret_void()


def _write_fold(frame: _Frame, width: int) -> None:
    """Adds up the copies of each of ``width * 65536`` counts."""
    b = frame.b
    copies = b.bitcast(frame["inputs"], _I32.as_pointer())
    counts = b.bitcast(frame["output"], _I32.as_pointer())
    size = width * HISTOGRAM_BINS

    def body(item: ir.Value) -> None:
        total = ir.Constant(_I32, 0)
        for copy in range(COPIES):
            place = b.gep(copies, [b.add(item, ir.Constant(_I64, copy * size))])
            total = b.add(total, b.load(place))
        b.store(total, b.gep(counts, [item]))

    frame.each(ir.Constant(_I64, 0), ir.Constant(_I64, size), body)
    b.ret_void()
