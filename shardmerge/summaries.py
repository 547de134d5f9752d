"""What measuring passes give, added up in any order to the same bits, and settled."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np
import numpy.typing as npt

from shardmerge.methods.api import Counts, Decision, Method, Pass
from shardmerge.numerics import ExactSums

Sums = tuple[float, ...]
Summary = Counts | Sums


Partial = Counts | npt.NDArray[np.float64]
"""The summary of one task: counts, or float64 sums of canonical blocks, shape [blocks, values]."""


class Summing:
    """Adds up the summaries of the tasks of one pass, in memory that does not grow with them.

    Counts are integers. Sums are exact until the end, where they are rounded once: both give the
    same bits whatever the tasks were and in any order.
    """

    def __init__(self) -> None:
        self._counts: Counts | None = None
        self._sums: ExactSums | None = None

    def add(self, partial: Partial) -> None:
        """One more task. An array of counts belongs to the sum from now on."""
        if partial.dtype == np.float64:
            sums = cast(npt.NDArray[np.float64], partial)
            if self._sums is None:
                self._sums = ExactSums(sums.shape[1])
            self._sums.add(sums)
        elif self._counts is None:
            self._counts = cast(Counts, partial)
        else:
            self._counts += cast(Counts, partial)

    def dumped(self) -> bytes:
        """All that was added so far, for ``take`` of another process; few bytes where few are."""
        arrays: dict[str, npt.NDArray[np.int64]] = {}
        if self._counts is not None:
            arrays["counts"] = self._counts
        if self._sums is not None:
            arrays |= self._sums.state()
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **arrays)
        return file.getvalue()

    def take(self, dumped: bytes) -> None:
        """Add what another process has added up."""
        with np.load(io.BytesIO(dumped), allow_pickle=False) as arrays:
            if "counts" in arrays:
                self.add(arrays["counts"])
            elif arrays.files:
                state = dict(arrays)
                if self._sums is None:
                    self._sums = ExactSums(state["special"].shape[0])
                self._sums.add_state(state)

    def summary(self) -> Summary:
        """Of all that were added."""
        if self._sums is not None:
            return self._sums.rounded()
        assert self._counts is not None
        return self._counts


def combine(partials: Iterable[Partial]) -> Summary:
    """The summary of all tasks of one pass."""
    summing = Summing()
    for partial in partials:
        summing.add(partial)
    return summing.summary()


def settle(
    method: Method,
    step: Pass,
    summaries: Mapping[str, Summary],
    decisions: Mapping[str, Decision | None],
) -> Decision:
    """The decision of a settling pass from the results that it names."""
    given = [summaries[need] if need in summaries else decisions[need] for need in step.needs]
    decision: Decision = step.function(method, *given)
    return tuple(float(number) for number in decision)
