"""The merging pass of one output tensor that its method sees as whole matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shardmerge.decode import value_dtype
from shardmerge.kernels.linalg import linear_on
from shardmerge.layout import Piece
from shardmerge.matrices import block_numel, block_shape, matrices_in
from shardmerge.memory import CONVERTED, inputs_of, tensor_numel
from shardmerge.methods.api import Array, info_of
from shardmerge.numerics import DType, to_floats
from shardmerge.outputs.api import PartWriter
from shardmerge.runs import Context
from shardmerge.window import Missing, Window


class MatrixRun:
    """Reads matrix after matrix of every input, and writes the results.

    A matrix may be written to several parts: the last result is kept.
    """

    keeps = True

    def __init__(self, context: Context, number: int) -> None:
        self.number = number
        self._context = context
        self._tensor = context.plan.tensors[number]
        if self._tensor.dtype is not DType.F32:
            raise AssertionError(f"{self._tensor.name}: matrices are written as float32")
        self._numel = block_numel(self._tensor.shape)
        self._block = -1
        self._result = np.empty((0, 0), dtype=np.float32)
        self._found: frozenset[tuple[int, int]] = frozenset()
        self._of_block: list[tuple[float, ...]] = []
        self._sums: list[npt.NDArray[np.float64]] = []

    def merge(self, piece: Piece, sink: PartWriter) -> set[tuple[int, int]]:
        """Compute and write a piece; gives which inputs hold NaN or infinity."""
        found: set[tuple[int, int]] = set()
        for block in range(piece.start // self._numel, -(-piece.stop // self._numel)):
            if block != self._block:
                self._compute(block)
            found |= self._found
            first = block * self._numel
            start, stop = max(piece.start, first), min(piece.stop, first + self._numel)
            began = time.perf_counter()
            sink.write(self._result.reshape(-1)[start - first : stop - first].data.cast("B"))
            self._context.seconds.write += time.perf_counter() - began
            if stop == first + self._numel and self._of_block:
                self._sums.append(np.array(self._of_block))
        return found

    def take_sums(self) -> list[npt.NDArray[np.float64]]:
        """The sums of the matrices that ended since the last call, each [matrices, values]."""
        sums, self._sums = self._sums, []
        return sums

    def _compute(self, block: int) -> None:
        """The result of one block, and its sums."""
        tensor, shape = self._tensor, block_shape(self._tensor.shape)
        step = info_of(tensor.method).matrix_pass
        assert step is not None
        self._result = np.empty((0, 0), dtype=np.float32)  # given back before the next is made
        found: set[tuple[int, int]] = set()
        result, self._of_block = np.empty(shape, dtype=np.float32), []
        for rows, columns in matrices_in(tensor.shape, tensor.split):
            with self._context.arena.borrowed(), self._context.computing:
                matrices = _Matrices(self._context, self.number, block, (rows, columns))
                began = time.perf_counter()
                result[rows, columns], sums = step.function(tensor.method, matrices)
                self._context.seconds.kernel += time.perf_counter() - began - matrices.waited_s
            self._of_block.append(sums)
            found |= {(self.number, which) for which in matrices.non_finite}
        if not found and not np.isfinite(result).all():
            found = {(self.number, -1)}
        self._block, self._result, self._found = block, result, frozenset(found)


class _Matrices:
    """One matrix of every input, read when it is asked for.

    Attributes:
        non_finite: numbers of the inputs that hold NaN or infinity.
        waited_s: seconds of reading.
    """

    def __init__(
        self, context: Context, number: int, block: int, place: tuple[slice, slice]
    ) -> None:
        self._context = context
        self._tensor = context.plan.tensors[number]
        self._numel = tensor_numel(self._tensor)
        rows, columns = block_shape(self._tensor.shape)
        self._rows = range(rows)[place[0]]
        self._columns = place[1]
        self._width = columns
        self._start = block * block_numel(self._tensor.shape) + self._rows.start * columns
        self._refs = inputs_of(self._tensor)
        self._base: Window | None = None
        self.non_finite: set[int] = set()
        self.waited_s = 0.0

    @property
    def models(self) -> int:
        """How many models there are."""
        return len(self._tensor.models)

    def delta(self, model: int) -> Array:
        """The task vector of a model; shape [rows, columns]."""
        if self._base is None:
            self._base = self._window(0)
        with self._context.arena.borrowed():
            values = self._empty()
            chunks = zip(
                self._chunks(1 + model, self._window(1 + model)),
                self._chunks(0, self._base),
                strict=True,
            )
            for (rows, chunk), (_, base) in chunks:
                values[rows] = chunk - base  # in float64 if one of them is
        return values

    def extra(self, kind: str) -> Array | None:
        """The first matrix of this kind; None where there is none."""
        refs = dict(self._tensor.extras).get(kind, ())
        if not refs:
            return None
        number = self._refs.index(refs[0])
        values = self._empty()
        with self._context.arena.borrowed():
            for rows, chunk in self._chunks(number, self._window(number)):
                values[rows] = chunk
        return values

    def linear(self, function: Callable[..., Any], *matrices: Array) -> Array:
        """Where the plan's kernels run."""
        return linear_on(self._context.plan.device)(function, *matrices)

    def _window(self, number: int) -> Window:
        """The stored rows of an input."""
        count = len(self._rows) * self._width
        window = Window(
            [self._refs[number]], self._context.arena, tile=count, resident=False, numel=self._numel
        )
        self._fetch(window.missing(self._start, self._start + count, [0]))
        return window

    def _empty(self) -> Array:
        width = len(range(self._width)[self._columns])
        return np.empty((len(self._rows), width), dtype=np.float32)

    def _chunks(self, number: int, window: Window) -> Iterator[tuple[slice, Array]]:
        """The values of some rows of an input at a time."""
        dtype = value_dtype(self._refs[number])
        step = max(1, CONVERTED // self._width)
        for first in range(0, len(self._rows), step):
            last = min(len(self._rows), first + step)
            start = self._start + first * self._width
            stored = window.view(0, start, start + (last - first) * self._width)
            chunk = to_floats(stored, dtype).reshape(last - first, self._width)[:, self._columns]
            if not np.isfinite(chunk).all():
                self.non_finite.add(number)
            yield slice(first, last), chunk

    def _fetch(self, missing: Sequence[Missing]) -> None:
        """Read while another worker computes."""
        began = time.perf_counter()
        self._context.computing.release()
        try:
            self._context.fetch(missing)
        finally:
            self._context.computing.acquire()
            self.waited_s += time.perf_counter() - began
