"""Matrices that are decomposed, kept beside an output until all are: a killed run goes on there.

Each is one small file, written whole or not at all: a line of JSON, and the bytes of both factors.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from shardmerge.errors import OutputError, StoreError
from shardmerge.kernels.factors import Array
from shardmerge.numerics import DType, to_floats
from shardmerge.outputs import Output
from shardmerge.outputs.api import STAGING

FOLDER = f"{STAGING}/factors"
_LINE_BYTES = 4096
"""A record is not longer: a name has at most some hundred characters."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """What became of a matrix.

    Args:
        tensor: its name in the model.
        module: the layer's name in the model that transformers loads.
        shape: of the layer's matrix [out, in], however it is stored.
        rank: of the approximation; 0 where the matrix does not differ from the base model's.
        norm: Frobenius norm of the difference.
        relative_error: Frobenius norm of what the product of the written factors lacks of the
            difference, as a share of ``norm``.
    """

    tensor: str
    module: str
    shape: tuple[int, int]
    rank: int
    norm: float
    relative_error: float


class Finished:
    """The matrices of one run that are decomposed.

    Args:
        run: tells runs from each other whose factors differ.
        dtype: of the factors.
    """

    def __init__(self, output: Output, run: str, dtype: DType) -> None:
        self._output = output
        self._run = run
        self._dtype = dtype
        self._known: dict[str, tuple[Matrix, str, int]] = {}

    def load(self) -> dict[str, Matrix]:
        """What is there of this run, by name of the tensor."""
        for name in self._output.names(f"{FOLDER}/"):
            place = f"{FOLDER}/{name}"
            try:
                line = self._output.read(place, _LINE_BYTES).partition(b"\n")[0]
                record = json.loads(line)
                if record.pop("run") == self._run:
                    record["shape"] = tuple(record["shape"])
                    self._known[record["tensor"]] = (Matrix(**record), place, len(line) + 1)
            except (OutputError, StoreError, ValueError, KeyError, TypeError):
                continue  # of another version, or not a record: it is made again
        return {name: matrix for name, (matrix, _, _) in self._known.items()}

    def save(self, number: int, matrix: Matrix, stored: bytes) -> None:
        """Keep a matrix; ``stored``: the bytes of the left factor, then of the right one."""
        line = json.dumps({"run": self._run, **asdict(matrix)}).encode() + b"\n"
        place = f"{FOLDER}/{number:06d}"
        self._output.write(place, line + stored)
        self._known[matrix.tensor] = (matrix, place, len(line))

    def factors(self, tensor: str) -> tuple[Array, Array]:
        """Both factors as they are stored: float32 [out, rank] and [rank, in]."""
        matrix, place, begin = self._known[tensor]
        stored = np.frombuffer(self._output.read(place), dtype=np.uint8)[begin:].copy()
        values = to_floats(stored, self._dtype)
        rows, columns = matrix.shape
        left, right = np.split(values, [rows * matrix.rank])
        return left.reshape(rows, matrix.rank), right.reshape(matrix.rank, columns)
