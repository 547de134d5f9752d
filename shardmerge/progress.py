"""How a run shows itself: a bar on a terminal, lines in a log, or JSON lines. Always on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from shardmerge.plan import Task
from shardmerge.work import Done

_BAR_EVERY_S = 0.2
_LINE_EVERY_S = 10.0
_BAR_WIDTH = 24
_COLUMNS = 80  # of a terminal that does not say how wide it is


def size(nbytes: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    if abs(nbytes) < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        nbytes /= 1024
        if abs(nbytes) < 1023.95 or unit == "TiB":  # what would round to 1024.0 is 1.0 of the next
            break
    return f"{nbytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: ``1:02:03``."""
    whole = int(seconds + 0.5)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(number: int, noun: str) -> str:
    """A number of things for people: ``1 shard``, ``2,000 tensors``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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

    def step(self, read_bytes: int) -> None:
        """One step ended, of a run that is no plan's tasks."""
        self.tasks_done += 1
        self.done_bytes += read_bytes

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

    def step(self, read_bytes: int) -> None:
        """One step ended, of a run that is no plan's tasks."""

    def close(self) -> None:
        """The run ended, well or not."""


class _Writing(Meter):
    """A meter that writes what it counts.

    Args:
        stream: stderr by default, as it is when the run begins.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self._stream = sys.stderr if stream is None else stream

    def _write(self, text: str) -> None:
        # A reader that has left, or a closed terminal, is no reason to end a merge.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


class Text(_Writing):
    """A bar that is drawn over itself on a terminal, a line now and then elsewhere."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stream, clock)
        self._terminal = self._stream.isatty()
        self._drawn = False
        self._behind = False

    def task(self, done: Done, task: Task) -> None:
        """Count, and show if it is time."""
        super().task(done, task)
        self._show_if_due()

    def step(self, read_bytes: int) -> None:
        """Count, and show if it is time."""
        super().step(read_bytes)
        self._show_if_due()

    def _show_if_due(self) -> None:
        self._behind = True
        if self.due(_BAR_EVERY_S if self._terminal else _LINE_EVERY_S):
            self._show()

    def _show(self) -> None:
        self._behind = False
        if self._terminal:
            self._write(f"\r\x1b[K{self.line(_columns(self._stream))}")
            self._drawn = True
        else:
            self._write(f"{self.line()}\n")

    def line(self, columns: int | None = None) -> str:
        """The state in one line; on a terminal it must not wrap, or it could not be drawn over."""
        left = "" if self.left_s is None else f", {duration(self.left_s)} left"
        written = f"{size(self.written_bytes)} of {size(self.write_bytes)} written, "
        words = (
            f"{self.tasks_done}/{self.tasks} tasks, {written if self.write_bytes else ''}"
            f"{size(self.rate)}/s{left}"
        )
        if columns is None:
            return f"{self._bar(_BAR_WIDTH)} {words}"
        room = columns - len(words) - len("[] ") - 1
        return (f"{self._bar(min(room, _BAR_WIDTH))} {words}" if room > 0 else words)[: columns - 1]

    def _bar(self, width: int) -> str:
        share = self.done_bytes / self.all_bytes if self.all_bytes else 1.0
        filled = int(width * min(share, 1.0))
        return f"[{'#' * filled}{'.' * (width - filled)}]"

    def close(self) -> None:
        """Show how far the run came, and leave the bar on a line of its own."""
        if self._behind:
            self._show()
        if self._drawn:
            self._write("\n")


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


class JsonLines(_Writing):
    """One JSON object per event."""

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

    def step(self, read_bytes: int) -> None:
        """One step ended, of a run that is no plan's tasks."""
        super().step(read_bytes)
        left_s = None if self.left_s is None else round(self.left_s, 1)
        done, tasks = self.tasks_done, self.tasks
        self._event("step", read_bytes=read_bytes, tasks_done=done, tasks=tasks, left_s=left_s)

    def close(self) -> None:
        """Nothing is left open."""

    def _event(self, event: str, **fields: object) -> None:
        self._write(json.dumps({"event": event, **fields}) + "\n")


class Quiet(Meter):
    """Counts, and shows nothing."""

    def close(self) -> None:
        """Nothing is left open."""
