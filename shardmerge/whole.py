"""The merging pass of one output tensor that its method sees as whole matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shardmerge.decode import value_dtype
from shardmerge.errors import CheckpointError
from shardmerge.kernels.linalg import linear_on
from shardmerge.layout import Piece
from shardmerge.matrices import block_numel, block_shape, matrices_in
from shardmerge.memory import CONVERTED, inputs_of
from shardmerge.methods.api import Array, Wide, info_of
from shardmerge.numerics import DType, to_floats, to_stored
from shardmerge.outputs.api import PartWriter
from shardmerge.runs import Context
from shardmerge.window import Missing, Window

_A = TypeVar("_A", bound=npt.NDArray[np.floating[Any]])


class MatrixRun:
    """Reads matrix after matrix of every input, and writes the results.

    A matrix may be written to several parts: the last result is kept.
    """

    keeps = True

    def __init__(self, context: Context, number: int) -> None:
        self.number = number
        self._context = context
        self._tensor = context.plan.tensors[number]
        self._numel = block_numel(self._tensor.shape)
        self._block = -1
        self._result = self._empty((0, 0))
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
            sink.write(self._result.reshape(-1)[start - first : stop - first].view(np.uint8).data)
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
        self._result = self._empty((0, 0))  # given back before the next is made
        found: set[tuple[int, int]] = set()
        result, self._of_block, finite = self._empty(shape), [], True
        for rows, columns in matrices_in(tensor.shape, tensor.split):
            # What is not finite is told by name; numpy need not warn of it.
            quiet = np.errstate(invalid="ignore", over="ignore")
            with self._context.arena.borrowed(), self._context.computing, quiet:
                matrices = _Matrices(self._context, self.number, block, (rows, columns))
                began = time.perf_counter()
                values, sums = step.function(tensor.method, matrices)
                finite &= _store(values, tensor.dtype, result[rows, columns])
                del values
                self._context.seconds.kernel += time.perf_counter() - began - matrices.waited_s
            self._of_block += [sums] if sums else []
            found |= {(self.number, which) for which in matrices.non_finite}
        if not found and not finite:
            found = {(self.number, -1)}
        self._block, self._result, self._found = block, result, frozenset(found)

    def _empty(self, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
        """Room for elements as they are stored."""
        dtype = self._tensor.dtype
        return np.empty(shape, dtype="uint16" if dtype is DType.BF16 else dtype.torch_name)


def _store(values: Array, dtype: DType, into: npt.NDArray[np.generic]) -> bool:
    """Round values once; gives whether all are finite then.

    Args:
        values: [rows, columns].
        into: the same elements as they are stored.
    """
    finite, step = True, max(1, CONVERTED // 4 // max(1, values.shape[1]))
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        stored = to_stored(values[rows], dtype)
        into[rows] = stored.view(into.dtype).reshape(into[rows].shape)
        finite &= bool(np.isfinite(to_floats(stored, dtype)).all())
    return finite


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix lies in its tensor: some columns of consecutive rows.

    Args:
        start: flat index of its first row's first element.
        rows: of it.
        width: columns of the tensor.
        columns: of them, its own.
    """

    start: int
    rows: int
    width: int
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, len(range(self.width)[self.columns])


class _Matrices:
    """One matrix of every input, read when it is asked for.

    Args:
        block: number of the block that it is in.
        place: its rows and columns in the block.
    Attributes:
        non_finite: numbers of the inputs that hold NaN or infinity.
        waited_s: seconds of reading.
    """

    def __init__(
        self, context: Context, number: int, block: int, place: tuple[slice, slice]
    ) -> None:
        self._context = context
        self._tensor = context.plan.tensors[number]
        self._block = block
        self._place = place
        self._refs = inputs_of(self._tensor)
        self._base: Window | None = None
        self.non_finite: set[int] = set()
        self.waited_s = 0.0

    @property
    def models(self) -> int:
        """How many models there are."""
        return len(self._tensor.models)

    def model(self, model: int) -> Wide:
        """The values of a model; float64 [rows, columns]."""
        number = model if self._tensor.base is None else 1 + model
        return self._read(number, np.empty(self._place_in(number).shape))

    def delta(self, model: int) -> Array:
        """The task vector of a model; float32 [rows, columns]."""
        if self._base is None:
            self._base = self._window(0)
        with self._context.arena.borrowed():
            values = np.empty(self._place_in(0).shape, dtype=np.float32)
            chunks = zip(
                self._chunks(1 + model, self._window(1 + model)),
                self._chunks(0, self._base),
                strict=True,
            )
            for (rows, chunk), (_, base) in chunks:
                values[rows] = chunk - base  # in float64 if one of them is
        return values

    def extra(self, kind: str) -> Array | None:
        """The first matrix of this kind, float32; None where there is none."""
        if not self._numbers(kind):
            return None
        number = self._numbers(kind)[0]
        return self._read(number, np.empty(self._place_in(number).shape, dtype=np.float32))

    def wide_extra(self, kind: str, model: int) -> Wide:
        """The matrix of a model's further checkpoint, float64."""
        number = self._numbers(kind)[model]
        return self._read(number, np.empty(self._place_in(number).shape))

    def unfit(self, kind: str, why: str, model: int | None = None) -> CheckpointError:
        """What to raise for values that the method cannot use."""
        numbers = self._numbers(kind)
        which = numbers if model is None else numbers[model : model + 1]
        where = " and ".join(self._refs[number].segments[0].url for number in which)
        return CheckpointError(
            f"{self._tensor.name}: {why}.\n  So the {kind} in {where} is none. Make it again, or "
            f"name another."
        )

    def linear(self, function: Callable[..., Any], *matrices: Array) -> Array:
        """Where the plan's kernels run."""
        return linear_on(self._context.plan.device)(function, *matrices)

    def _numbers(self, kind: str) -> range:
        """Numbers of the inputs that are further checkpoints of this kind."""
        first = len(self._refs) - sum(len(refs) for _, refs in self._tensor.extras)
        for own, refs in self._tensor.extras:
            if own == kind:
                return range(first, first + len(refs))
            first += len(refs)
        return range(0)

    def _place_in(self, number: int) -> _Place:
        """Where the matrix of an input lies: of one of another shape than the output's, all of a
        block.
        """
        shape = self._refs[number].shape
        rows, columns = self._place if shape == self._tensor.shape else (slice(None),) * 2
        height, width = block_shape(shape)
        span = range(height)[rows]
        start = self._block * height * width + span.start * width
        return _Place(start, len(span), width, columns)

    def _window(self, number: int) -> Window:
        """The stored rows of an input."""
        ref, place = self._refs[number], self._place_in(number)
        count = place.rows * place.width
        window = Window([ref], self._context.arena, tile=count, resident=False, numel=ref.numel)
        self._fetch(window.missing(place.start, place.start + count, [0]))
        return window

    def _read(self, number: int, values: _A) -> _A:
        """The values of an input, in the dtype of ``values``."""
        with self._context.arena.borrowed():
            for rows, chunk in self._chunks(number, self._window(number)):
                values[rows] = chunk
        return values

    def _chunks(self, number: int, window: Window) -> Iterator[tuple[slice, Array]]:
        """The values of some rows of an input at a time."""
        dtype, place = value_dtype(self._refs[number]), self._place_in(number)
        step = max(1, CONVERTED // place.width)
        for first in range(0, place.rows, step):
            last = min(place.rows, first + step)
            start = place.start + first * place.width
            stored = window.view(0, start, start + (last - first) * place.width)
            chunk = to_floats(stored, dtype).reshape(last - first, place.width)[:, place.columns]
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
