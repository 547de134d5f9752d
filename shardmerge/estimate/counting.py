"""Shows how many examples are done: a line now and then, or JSON lines. Always on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from typing import TextIO

from shardmerge.progress import counted, duration

LINE_EVERY_S = 10.0


class Telling(StrEnum):
    """How progress is told."""

    LINES = "lines"
    JSON = "json"
    QUIET = "quiet"


class Counter:
    """Counts examples and guesses when the rest will be done.

    Args:
        stream: stderr by default, as it is when the run begins.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        telling: Telling,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._telling = telling
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._began = self._shown = clock()
        self._before = self._done = self._total = 0

    def start(self, *, total: int, done: int) -> None:
        """What there is to do, and what an earlier run has done of it."""
        self._began = self._shown = self._clock()
        self._total, self._done, self._before = total, done, done
        if self._telling is Telling.JSON:
            self._event("start", examples=total, examples_done=done)
        elif done:
            self._say(f"{counted(done, 'example')} of {total:,} are done already")

    def done(self, done: int) -> None:
        """So many are done now."""
        self._done = done
        left_s = self._left_s()
        if self._telling is Telling.JSON:
            known = None if left_s is None else round(left_s, 1)
            self._event("example", examples=self._total, examples_done=done, left_s=known)
        elif self._clock() - self._shown >= LINE_EVERY_S or done == self._total:
            self._shown = self._clock()
            left = "" if left_s is None else f", {duration(left_s)} left"
            self._say(f"{done:,}/{self._total:,} examples{left}")

    def _left_s(self) -> float | None:
        passed = self._clock() - self._began
        if self._done <= self._before:
            return None
        return passed / (self._done - self._before) * (self._total - self._done)

    def _event(self, event: str, **fields: object) -> None:
        self._write(json.dumps({"event": event, **fields}))

    def _say(self, text: str) -> None:
        if self._telling is Telling.LINES:
            self._write(text)

    def _write(self, line: str) -> None:
        # A reader that has left is no reason to stop.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(f"{line}\n")
            self._stream.flush()
