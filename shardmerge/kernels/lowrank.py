"""The product of two thin matrices, added to a tile of a large one: compiled, in float64.

Each element is summed over the rank in order and rounded once, so no bit of it depends on where
tiles begin and end. Of factors in float32 and narrower every product is exact.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from shardmerge.kernels.compile import COMPILER, loop_over, machine_code

LANES = 32
"""Columns whose sums are held in registers."""

_I64, _F64, _F32 = ir.IntType(64), ir.DoubleType(), ir.FloatType()
_CALL = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_double,
)

Factor = npt.NDArray[np.floating]


def panels_shape(rank: int, columns: int) -> tuple[int, int, int]:
    """Shape of the right factor as it is kept: panels of ``LANES`` columns, each contiguous.

    Rows that lie thousands of bytes apart would share the same few places of a cache.
    """
    return -(-columns // LANES), rank, LANES


def fill_rows(panels: npt.NDArray[np.float64], first: int, rows: Factor) -> None:
    """Write rows of the right factor to its panels.

    Args:
        first: number of the first of them.
        rows: shape [count, columns].
    """
    count, columns = rows.shape
    whole, rest = divmod(columns, LANES)
    here = slice(first, first + count)
    blocks = rows[:, : whole * LANES].reshape(count, whole, LANES)
    panels[:whole, here] = blocks.swapaxes(0, 1)
    if rest:
        panels[whole, here, :rest] = rows[:, whole * LANES :]


def fill_columns(panels: npt.NDArray[np.float64], first: int, columns: Factor) -> None:
    """Write columns of the right factor to its panels.

    Args:
        first: number of the first of them, a multiple of ``LANES``.
        columns: shape [count, rank]: each is a row here.
    """
    count, rank = columns.shape
    whole, rest = divmod(count, LANES)
    panel = first // LANES
    blocks = columns[: whole * LANES].reshape(whole, LANES, rank)
    panels[panel : panel + whole] = blocks.swapaxes(1, 2)
    if rest:
        panels[panel + whole, :, :rest] = columns[whole * LANES :].T


def add_product(
    values: Factor,
    start: int,
    left: npt.NDArray[np.float64],
    panels: npt.NDArray[np.float64],
    columns: int,
    scale: float,
) -> None:
    """Add ``scale * left @ right`` to consecutive elements of a matrix.

    Args:
        values: float32 or float64, shape [count]; overwritten.
        start: flat index of the first.
        left: shape [rows, rank], of the whole matrix; contiguous.
        panels: the right factor, shape ``panels_shape(rank, columns)``; contiguous.
    """
    kernel = _kernel(values.dtype == np.float64)
    rank = panels.shape[1]
    position, stop = start, start + len(values)
    while position < stop:
        row, column = divmod(position, columns)
        rows = 1 if column else max(1, (stop - position) // columns)
        width = min(columns - column, stop - position)
        kernel(
            values.ctypes.data + (position - start) * values.itemsize,
            left.ctypes.data + row * rank * left.itemsize,
            panels.ctypes.data,
            column,
            rows,
            width,
            rank,
            columns,
            scale,
        )
        position += rows * width


@functools.cache
def _kernel(wide: bool) -> Callable[..., None]:
    """The native function for values of float64, or of float32."""
    kind = _F64 if wide else _F32
    module = ir.Module("shardmerge")
    pointers = [kind.as_pointer(), _F64.as_pointer(), _F64.as_pointer()]
    signature = ir.FunctionType(ir.VoidType(), [*pointers, *[_I64] * 5, _F64])
    function = ir.Function(module, signature, "kernel")
    for argument in function.args[:3]:
        argument.add_attribute("noalias")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    lanes, first = ir.Constant(_I64, -LANES), function.args[3]
    stop = b.add(first, function.args[5])
    next_panel = b.and_(b.add(first, ir.Constant(_I64, LANES - 1)), lanes)
    head = b.select(b.icmp_signed("<", next_panel, stop), next_panel, stop)
    middle = b.add(head, b.and_(b.sub(stop, head), lanes))
    _columns(b, function, first, head, 1)
    _columns(b, function, head, middle, LANES)
    _columns(b, function, middle, stop, 1)
    b.ret_void()
    with COMPILER:
        engine = machine_code(module)
    call = _CALL(engine.get_function_address("kernel"))
    call.engine = engine  # type: ignore[attr-defined]  # it owns the code
    return call


def _columns(
    b: ir.IRBuilder, function: ir.Function, start: ir.Value, stop: ir.Value, lanes: int
) -> None:
    """Columns ``[start, stop)``, so many at a time, of every row: their factors stay in the cache.

    Rows of values are ``columns`` apart, and begin with column ``first``.
    """
    values, left, panels, first, rows, _, rank, columns, scale = function.args
    kind = values.type.pointee
    sums = ir.VectorType(_F64, lanes)
    with b.goto_entry_block():
        total = b.alloca(sums)

    def at(pointer: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
        return b.bitcast(b.gep(pointer, [index]), ir.VectorType(kind, lanes).as_pointer())

    def splat(value: ir.Value) -> ir.Value:
        one = b.insert_element(ir.Constant(sums, ir.Undefined), value, ir.Constant(_I64, 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
        return b.shuffle_vector(one, ir.Constant(sums, ir.Undefined), mask)

    def element(row: ir.Value, column: ir.Value) -> None:
        size, inside = ir.Constant(_I64, LANES), ir.Constant(_I64, LANES - 1)
        panel = b.mul(b.and_(column, ir.Constant(_I64, -LANES)), rank)
        here = b.add(panel, b.and_(column, inside))
        b.store(ir.Constant(sums, None), total)

        def term(k: ir.Value) -> None:
            factor = b.load(b.gep(left, [b.add(b.mul(row, rank), k)]))
            place = at(panels, b.add(here, b.mul(k, size)), _F64)
            product = b.fmul(splat(factor), b.load(place, align=8), flags=("contract",))
            b.store(b.fadd(b.load(total), product, flags=("contract",)), total)

        loop_over(b, ir.Constant(_I64, 0), rank, ir.Constant(_I64, 1), term)
        place = at(values, b.add(b.mul(row, columns), b.sub(column, first)), kind)
        stored = b.load(place, align=4)
        wide = stored if kind == _F64 else b.fpext(stored, sums)
        result = b.fadd(wide, b.fmul(splat(scale), b.load(total)))
        narrow = result if kind == _F64 else b.fptrunc(result, ir.VectorType(kind, lanes))
        b.store(narrow, place, align=4)

    def each_row(column: ir.Value) -> None:
        zero, one = ir.Constant(_I64, 0), ir.Constant(_I64, 1)
        loop_over(b, zero, rows, one, lambda row: element(row, column))

    loop_over(b, start, stop, ir.Constant(_I64, lanes), each_row)
