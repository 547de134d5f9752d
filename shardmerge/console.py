"""What commands share: how a run is shown, stopped and told of."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from shardmerge.progress import Display, JsonLines, Quiet, Text, counted, size

if TYPE_CHECKING:
    from shardmerge.prepare import Where
    from shardmerge.publish import Published


@contextlib.contextmanager
def running(options: argparse.Namespace) -> Iterator[tuple[Display, threading.Event]]:
    """What shows a run as the options ask for it, and the event that stops it."""
    display: Display = JsonLines() if options.json else Quiet() if options.quiet else Text()
    # What a library prints goes to stderr too: stdout is for results.
    with stoppable(tell=not options.json) as stop, contextlib.redirect_stdout(sys.stderr):
        try:
            yield display, stop
        finally:
            display.close()


@contextlib.contextmanager
def stoppable(*, tell: bool) -> Iterator[threading.Event]:
    """An event that Ctrl-C (or SIGTERM, SIGUSR1) sets; a second one stops at once."""
    stop = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if number != signal.SIGUSR1:  # batch systems may repeat theirs
            signal.signal(number, signal.SIG_DFL)
        stop.set()
        if tell:
            # Not by print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping; again to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is a batch system's
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def where_of(options: argparse.Namespace) -> Where:
    """Where tasks run, as the options say; refused where they do not go together."""
    from shardmerge.prepare import Where

    where = Where(
        executor=options.executor,
        address=options.address,
        device=options.device,
        gpus=options.gpus,
        memory_bytes=options.memory,
        threads=options.threads,
    )
    where.check()
    return where


def tell_published(published: Published, *, as_json: bool, done: str = "merged") -> int:
    """Say what was published, on stdout, and its notes on stderr; gives the exit status.

    Args:
        done: what was done to make it.
    """
    if as_json:
        print(json.dumps(dataclasses.asdict(published)))
        return 0
    for note in published.notes:
        print(f"note: {note}", file=sys.stderr)
    done = f"was already {done}" if published.already else done
    print(
        f"{published.out}: {done}; {counted(published.tensors, 'tensor')}, "
        f"{size(published.nbytes)} in {counted(len(published.shards), 'shard')}"
    )
    if published.requests:
        gib = published.requested_bytes / 2**30
        print(
            f"{counted(published.requests, 'request')} for {size(published.requested_bytes)}: "
            f"{published.requests / gib:,.0f} per GiB",
            file=sys.stderr,
        )
    return 0
