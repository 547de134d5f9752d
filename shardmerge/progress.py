"""How a run shows itself: a bar on a terminal, lines in a log, or JSON lines. Always on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from shardmerge.plan import Task
from shardmerge.work import Done

_BAR_EVERY_S = 0.2
_LINE_EVERY_S = 10.0
_BAR_WIDTH = 24


def size(nbytes: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: ``1:02:03``."""
    whole = int(seconds + 0.5)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Meter:
    """Counts what is done and guesses when the rest will be.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._shown = float("-inf")
        self.tasks = self.tasks_done = 0
        self.all_bytes = self.done_bytes = self._before_bytes = 0
        self.written_bytes = self.write_bytes = 0

    def start(
        self,
        *,
        tasks: int,
        tasks_done: int,
        all_bytes: int,
        done_bytes: int,
        write_bytes: int,
        written_bytes: int,
    ) -> None:
        """What there is to do (bytes read and written), and what an earlier run has done of it."""
        self._began = self._clock()
        self.tasks, self.tasks_done = tasks, tasks_done
        self.all_bytes, self.done_bytes, self._before_bytes = all_bytes, done_bytes, done_bytes
        self.write_bytes, self.written_bytes = write_bytes, written_bytes

    def task(self, done: Done, task: Task) -> None:
        """One task ended."""
        self.tasks_done += 1
        self.done_bytes += task.read_bytes + task.write_bytes
        self.written_bytes += sum(receipt.nbytes for receipt in done.receipts)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._began

    @property
    def rate(self) -> float:
        """Bytes read and written per second, of this run."""
        return (self.done_bytes - self._before_bytes) / max(self.seconds, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at this rate; None before there is one."""
        if self.rate <= 0:
            return None
        return (self.all_bytes - self.done_bytes) / self.rate

    def due(self, every_s: float) -> bool:
        """Whether it is time to show something again; the last task always is."""
        now = self._clock()
        if now - self._shown < every_s and self.tasks_done < self.tasks:
            return False
        self._shown = now
        return True


class Display(Protocol):
    """Shows a run."""

    def start(
        self,
        *,
        tasks: int,
        tasks_done: int,
        all_bytes: int,
        done_bytes: int,
        write_bytes: int,
        written_bytes: int,
    ) -> None:
        """The run begins."""

    def task(self, done: Done, task: Task) -> None:
        """One task ended."""

    def close(self) -> None:
        """The run ended, well or not."""


class Text(Meter):
    """A bar that is drawn over itself on a terminal, a line now and then elsewhere."""

    def __init__(
        self, stream: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self._stream = stream
        self._terminal = stream.isatty()

    def task(self, done: Done, task: Task) -> None:
        """Count, and show if it is time."""
        super().task(done, task)
        if self.due(_BAR_EVERY_S if self._terminal else _LINE_EVERY_S):
            text = self.line()
            self._stream.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
            self._stream.flush()

    def line(self) -> str:
        """The state in one line."""
        share = self.done_bytes / self.all_bytes if self.all_bytes else 1.0
        filled = int(_BAR_WIDTH * min(share, 1.0))
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        left = "" if self.left_s is None else f", {duration(self.left_s)} left"
        return (
            f"[{bar}] {self.tasks_done}/{self.tasks} tasks, "
            f"{size(self.written_bytes)} of {size(self.write_bytes)} written, "
            f"{size(self.rate)}/s{left}"
        )

    def close(self) -> None:
        """Leave the bar behind on a line of its own."""
        if self._terminal and self.tasks_done:
            self._stream.write("\n")
            self._stream.flush()


class JsonLines(Meter):
    """One JSON object per event."""

    def __init__(
        self, stream: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self._stream = stream

    def start(self, **counts: int) -> None:
        """The run begins."""
        super().start(**counts)
        self._event("start", **counts)

    def task(self, done: Done, task: Task) -> None:
        """One task ended."""
        super().task(done, task)
        self._event(
            "task",
            number=done.task,
            kind=type(task).__name__.removesuffix("Task").lower(),
            read_bytes=done.read_bytes,
            written_bytes=sum(receipt.nbytes for receipt in done.receipts),
            read_s=round(done.seconds.read, 6),
            kernel_s=round(done.seconds.kernel, 6),
            write_s=round(done.seconds.write, 6),
            tasks_done=self.tasks_done,
            tasks=self.tasks,
            left_s=None if self.left_s is None else round(self.left_s, 1),
        )

    def close(self) -> None:
        """Nothing is left open."""

    def _event(self, event: str, **fields: object) -> None:
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")
        self._stream.flush()


class Quiet(Meter):
    """Counts, and shows nothing."""

    def close(self) -> None:
        """Nothing is left open."""
