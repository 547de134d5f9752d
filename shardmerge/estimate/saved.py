"""Sums over examples that are saved now and then, so that a run which was stopped goes on.

One generation is a file of each process, ``sums-<examples>-<process>.safetensors``; ``sums.json``
is written last and says which generation counts. A process that is killed at any time leaves a
whole generation behind: the new one or the one before.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shardmerge.errors import LedgerMismatchError, OutputError
from shardmerge.header import parse_header, write_header
from shardmerge.ledger import fingerprint
from shardmerge.numerics import DType

SAVE_EVERY_S = 60.0
"""At most so much work is lost, unless saving itself takes long."""
SAVING_SHARE = 10
"""Saving may take one part of so many of the time."""
_STATE = "sums.json"

Array = npt.NDArray[np.float32]


class Saved:
    """The saved sums of one run.

    Args:
        folder: of all processes; made when something is saved.
        identity: what the sums depend on; those of another identity are refused.
        process: this process, of ``processes`` that each save their own part.
        meet: waits for all processes.
        clock: seconds.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        *,
        process: int = 0,
        processes: int = 1,
        meet: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._fingerprint = fingerprint({**identity, "processes": str(processes)})
        self._process = process
        self._meet = meet
        self._clock = clock
        self._next = clock() + SAVE_EVERY_S

    def load(self) -> tuple[int, dict[str, Array]]:
        """How many examples are in the sums that are saved, and the sums; 0 and none, if none are.

        Raises:
            LedgerMismatchError: for sums of another run.
            OutputError: for a folder that cannot be read.
        """
        try:
            state = json.loads((self._folder / _STATE).read_text())
            if state["fingerprint"] != self._fingerprint:
                raise LedgerMismatchError(
                    f"{self._folder} holds sums of another run: its model, data, options or number "
                    "of processes differ.\n  Repeat that command, or give --fresh to forget it."
                )
            return state["examples"], _read(self._path(state["examples"]))
        except FileNotFoundError:
            return 0, {}
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise OutputError(
                f"cannot read the sums in {self._folder}: {problem}. Give --fresh to start over."
            ) from None

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return self._clock() >= self._next

    def save(self, examples: int, sums: Iterable[tuple[str, Array]]) -> None:
        """Replace what is saved, durably and at once.

        Raises:
            OutputError: for a folder that cannot be written.
        """
        began = self._clock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(self._path(examples), dict(sums))
            self._meet()
            if self._process == 0:
                state = {"fingerprint": self._fingerprint, "examples": examples}
                _replace(self._folder / _STATE, [json.dumps(state).encode()])
            self._meet()
            for path in self._folder.glob(f"sums-*-{self._process}.safetensors*"):
                if path != self._path(examples):
                    path.unlink()
        except OSError as problem:
            raise OutputError(
                f"cannot save sums in {self._folder}: {problem.strerror}. The last ones that were "
                "saved are still there."
            ) from problem
        now = self._clock()
        self._next = now + max(SAVE_EVERY_S, SAVING_SHARE * (now - began))

    def forget(self) -> None:
        """Remove what is saved, the file that says what counts first."""
        for path in sorted(self._folder.glob("sums*"), key=lambda path: path.name != _STATE):
            path.unlink(missing_ok=True)

    def _path(self, examples: int) -> Path:
        return self._folder / f"sums-{examples:09d}-{self._process}.safetensors"


def _write(path: Path, sums: Mapping[str, Array]) -> None:
    header = write_header([(name, DType.F32, value.shape) for name, value in sums.items()])
    _replace(path, [header, *(np.ascontiguousarray(value).data for value in sums.values())])


def _replace(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """Make a file, whole or not at all; durable."""
    made = path.with_name(f"{path.name}.new")
    with made.open("wb") as file:
        for piece in content:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> dict[str, Array]:
    with path.open("rb") as file:
        size = path.stat().st_size
        length = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        header = parse_header(file.read(min(length, size)), size, str(path))
        found = {}
        for name, tensor in header.tensors.items():
            file.seek(tensor.offset)
            values = np.empty(tensor.shape, dtype=np.float32)
            file.readinto(values.reshape(-1).view(np.uint8).data)
            found[name] = values
    return found
