"""How a run shows itself: with a clock and a stream that the test holds."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable

import pytest

from shardmerge.outputs.api import Receipt
from shardmerge.plan import MeasureTask, MergeTask, Task
from shardmerge.progress import JsonLines, Meter, Quiet, Text, counted, duration, size
from shardmerge.work import Done
from tests.support import RAN

MIB = 2**20
DRAW = "\r\x1b[K"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    """The reader has closed its end."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def merge_task(number: int, read: int, write: int) -> MergeTask:
    return MergeTask(number, (), False, (), read, 0, write)


def done(task: Task) -> Done:
    receipts = (Receipt(0, task.number, task.write_bytes, 0),) if task.write_bytes else ()
    return Done(task.number, RAN, receipts, None, task.read_bytes)


def begin(meter: Meter, *, tasks: int = 10, tasks_done: int = 0, each: int = MIB) -> None:
    """A run of equal tasks that read ``3 * each`` bytes and write ``each``."""
    meter.start(
        tasks=tasks,
        tasks_done=tasks_done,
        all_bytes=4 * each * tasks,
        done_bytes=4 * each * tasks_done,
        write_bytes=each * tasks,
        written_bytes=each * tasks_done,
    )


def end_task(meter: Meter, number: int, *, each: int = MIB) -> None:
    task = merge_task(number, 3 * each, each)
    meter.task(done(task), task)


def run(meter: Meter, clock: Clock, *, step_s: float, tasks: int = 10, first: int = 0) -> None:
    begin(meter, tasks=tasks, tasks_done=first)
    for number in range(first, tasks):
        clock.now += step_s
        end_task(meter, number)


def terminal_of(make: Callable[..., Text], clock: Clock) -> tuple[Text, Terminal]:
    stream = Terminal()
    return make(stream, clock), stream


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 * 10**9, "4.7 GiB"),
        (1024**4, "1.0 TiB"),
        (5000 * 1024**4, "5000.0 TiB"),
        (0.4, "0 B"),
    ],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.9, "1:00:00"), (90_061, "25:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_of_things() -> None:
    found = [counted(number, "shard") for number in (0, 1, 2, 91_000)]
    assert found == ["0 shards", "1 shard", "2 shards", "91,000 shards"]


# --- rate and time left ---------------------------------------------------------------------------


def test_rate_and_time_left() -> None:
    clock = Clock()
    meter = Quiet(clock)
    begin(meter)
    assert meter.left_s is None  # nothing is known yet
    for number in range(4):
        clock.now += 2
        end_task(meter, number)
    assert meter.rate == pytest.approx(2 * MIB)  # 3 MiB read and 1 written every 2 seconds
    assert meter.left_s == pytest.approx(6 * 2)


def test_the_clock_starts_with_the_first_task_not_with_the_program() -> None:
    clock = Clock()
    meter = Quiet(clock)
    clock.now += 1000  # headers of 160 shards were read meanwhile
    run(meter, clock, step_s=1.0)
    assert meter.seconds == pytest.approx(10)


def test_a_run_that_goes_on_counts_what_was_done_but_not_for_its_speed() -> None:
    clock = Clock()
    meter = Quiet(clock)
    begin(meter, tasks=10, tasks_done=6)
    assert (meter.tasks_done, meter.done_bytes, meter.written_bytes) == (6, 24 * MIB, 6 * MIB)
    clock.now += 1
    end_task(meter, 6)
    assert meter.rate == pytest.approx(4 * MIB)
    assert meter.left_s == pytest.approx(3)
    assert meter.written_bytes == 7 * MIB


def test_a_clock_that_stands_still_divides_by_nothing() -> None:
    clock = Clock()
    meter = Quiet(clock)
    run(meter, clock, step_s=0.0)
    assert meter.rate > 0
    assert meter.left_s == 0


def test_measuring_tasks_count_by_what_they_read() -> None:
    clock = Clock()
    meter = Quiet(clock)
    begin(meter, tasks=2)
    clock.now += 1
    task = MeasureTask(0, 0, "coarse", (), (), 4 * MIB, 0)
    meter.task(done(task), task)
    assert (meter.tasks_done, meter.done_bytes, meter.written_bytes) == (1, 4 * MIB, 0)


# --- a terminal -----------------------------------------------------------------------------------


def test_a_bar_that_is_drawn_over_itself() -> None:
    clock = Clock()
    text, stream = terminal_of(Text, clock)
    run(text, clock, step_s=1.0)
    text.close()
    shown = stream.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n")
    drawn = shown.removeprefix(DRAW).rstrip("\n").split(DRAW)
    assert len(drawn) == 10
    assert drawn[4].endswith("5/10 tasks, 5.0 MiB of 10.0 MiB written, 4.0 MiB/s, 0:05 left")
    bars = [re.match(r"\[(#*)(\.*)\] ", line) for line in drawn]
    filled = [len(bar[1]) for bar in bars if bar]
    assert filled == sorted(filled) and filled[-1] > filled[0]
    assert bars[-1] and bars[-1][2] == ""  # full at the end


def test_quick_tasks_are_not_drawn_one_by_one_but_the_last_is() -> None:
    clock = Clock()
    text, stream = terminal_of(Text, clock)
    run(text, clock, step_s=0.01, tasks=95)
    drawn = stream.getvalue().split(DRAW)[1:]  # without waiting for the end: publishing takes time
    assert 5 <= len(drawn) <= 8  # one second, five times a second
    assert "95/95 tasks" in drawn[-1]


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 300])
def test_a_bar_never_wraps(columns: int) -> None:
    clock = Clock()
    text, _ = terminal_of(Text, clock)
    begin(text, tasks=123_456, each=10 * 2**30)
    clock.now += 7
    end_task(text, 0, each=10 * 2**30)
    line = text.line(columns)
    assert len(line) < columns
    assert line.startswith("[" if columns >= 100 else ("[", "1/"))
    if columns >= 100:
        assert line.endswith("left")


def test_a_wide_terminal_does_not_stretch_the_bar() -> None:
    clock = Clock()
    text, _ = terminal_of(Text, clock)
    begin(text)
    assert text.line(1000) == text.line()


def test_the_width_is_the_terminals_own() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 50, 0, 0))
    clock = Clock()
    with os.fdopen(theirs, "w") as stream:
        text = Text(stream, clock)
        run(text, clock, step_s=1.0)
        text.close()
        shown = ""
        while not shown.endswith("\n"):  # a terminal hands over its lines piece by piece
            shown += os.read(ours, 65_536).decode()
    os.close(ours)
    drawn = shown.rstrip("\r\n").split(DRAW)[1:]
    assert len(drawn) == 10
    assert max(map(len, drawn)) == 49


def test_a_run_without_a_task_leaves_no_empty_line() -> None:
    clock = Clock()
    text, stream = terminal_of(Text, clock)
    begin(text, tasks=10, tasks_done=10)  # only publishing was left to do
    text.close()
    assert stream.getvalue() == ""


# --- a log ----------------------------------------------------------------------------------------


def test_lines_now_and_then() -> None:
    clock = Clock()
    stream = io.StringIO()
    text = Text(stream, clock)
    run(text, clock, step_s=1.0, tasks=25)
    text.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    told = [re.search(r"\] (\d+)/25 tasks", line) for line in lines]
    assert [int(found[1]) for found in told if found] == [1, 11, 21, 25]


def test_what_came_after_the_last_line_is_told_at_the_end() -> None:
    """A run that is stopped, or fails, says how far it came."""
    clock = Clock()
    stream = io.StringIO()
    text = Text(stream, clock)
    begin(text)
    for number in range(3):
        clock.now += 1
        end_task(text, number)
    text.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("] ")[1].split(",")[0] for line in lines] == ["1/10 tasks", "3/10 tasks"]


def test_nothing_is_told_twice() -> None:
    clock = Clock()
    stream = io.StringIO()
    text = Text(stream, clock)
    run(text, clock, step_s=100.0, tasks=3)
    text.close()
    assert len(stream.getvalue().splitlines()) == 3


# --- JSON lines -----------------------------------------------------------------------------------


def test_events() -> None:
    clock = Clock()
    stream = io.StringIO()
    lines = JsonLines(stream, clock)
    run(lines, clock, step_s=0.5, tasks=4, first=1)
    lines.close()
    start, *tasks = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert start == {
        "event": "start",
        "tasks": 4,
        "tasks_done": 1,
        "all_bytes": 16 * MIB,
        "done_bytes": 4 * MIB,
        "write_bytes": 4 * MIB,
        "written_bytes": MIB,
    }
    assert [event["number"] for event in tasks] == [1, 2, 3]  # every task, however quick
    assert {event["event"] for event in tasks} == {"task"}
    assert tasks[-1] == {
        "event": "task",
        "number": 3,
        "kind": "merge",
        "read_bytes": 3 * MIB,
        "written_bytes": MIB,
        "read_s": 0.0,
        "kernel_s": 0.0,
        "write_s": 0.0,
        "tasks_done": 4,
        "tasks": 4,
        "left_s": 0.0,
    }


def test_every_event_is_there_at_once() -> None:
    """A program that reads along must not wait for a buffer to fill."""
    flushed: list[int] = []

    class Counting(io.StringIO):
        def flush(self) -> None:
            flushed.append(len(self.getvalue()))

    stream = Counting()
    lines = JsonLines(stream, Clock())
    begin(lines)
    end_task(lines, 0)
    assert len(flushed) == 2 and flushed[-1] == len(stream.getvalue())


# --- streams --------------------------------------------------------------------------------------


def test_stderr_is_the_one_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now = io.StringIO()
    monkeypatch.setattr(sys, "stderr", now)
    for display in (Text(), JsonLines()):
        begin(display)
        end_task(display, 0)
        display.close()
    assert "1/10 tasks" in now.getvalue() and '"event"' in now.getvalue()


@pytest.mark.parametrize("make", [Text, JsonLines])
def test_a_reader_that_left_does_not_end_the_run(make: type[Text] | type[JsonLines]) -> None:
    display = make(Gone(), Clock())
    run(display, Clock(), step_s=1.0)
    display.close()
    assert display.tasks_done == 10


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Quiet()
    run(quiet, Clock(), step_s=1.0)
    quiet.close()
    assert capsys.readouterr() == ("", "")


def test_steps_of_a_run_without_a_plan() -> None:
    clock = Clock()
    text, terminal = terminal_of(Text, clock)
    events = JsonLines(io.StringIO(), clock)
    for meter in (text, events):
        begin(meter, tasks=3, tasks_done=1)
        meter.write_bytes = 0
    clock.now += 2
    for meter in (text, events):
        meter.step(4 * MIB)
    assert "2/3 tasks, 2.0 MiB/s, 0:02 left" in terminal.getvalue()
    last = json.loads(events._stream.getvalue().splitlines()[-1])
    expected = {"event": "step", "read_bytes": 4 * MIB, "tasks_done": 2, "tasks": 3, "left_s": 2.0}
    assert last == expected
