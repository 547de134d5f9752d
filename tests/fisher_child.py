"""Runs of ``shardmerge fisher`` that end at a chosen point, each in a process of its own.

``python -m tests.fisher_child`` reads one JSON object per line, runs each in a fork of itself
(what they import is imported once) and answers each with its exit status; ``torchrun`` starts it
with one object as its only argument. Keys:

    arguments   of the command line
    replace     the number, from 0, of the file of sums at which the process kills itself:
    when        ``before`` it is there, ``torn`` in its middle, or ``after`` it is there
    publish     true: kills itself when everything is written, before it is published
    signal      sent to itself ...
    example     ... after so many examples

Sums are saved after every example.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shardmerge import cli, computed
from shardmerge.estimate import counting, saved

IMPORTED = (
    "shardmerge.cli_estimate",
    "transformers.conversion_mapping",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)
"""What a run imports late, which forks then have."""


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def torn(content: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """Half of what a file was to hold; then the process ends."""
    whole = b"".join(content)
    yield whole[: len(whole) // 2]
    die()


def arrange(order: dict[str, Any]) -> None:
    """Make what is asked for happen."""
    saved.SAVE_EVERY_S = 0.0
    saved.SAVING_SHARE = 0
    real, count = saved._replace, 0

    def replace(path: Path, content: Iterable[bytes | memoryview]) -> None:
        nonlocal count
        number, count = count, count + 1
        chosen = order["when"] if number == order.get("replace") else ""
        if chosen == "before":
            die()
        real(path, torn(content) if chosen == "torn" else content)
        if chosen == "after":
            die()

    saved._replace = replace
    if order.get("publish"):
        computed.publish = die
    done = counting.Counter.done

    def counted(self: counting.Counter, examples: int) -> None:
        if examples == order.get("example"):
            os.kill(os.getpid(), getattr(signal, order["signal"]))
        done(self, examples)

    counting.Counter.done = counted


def run(order: dict[str, Any]) -> int:
    arrange(order)
    return cli.main(order["arguments"])


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(run(json.loads(sys.argv[1])))
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        if not (process := os.fork()):
            status = 1
            os.dup2(2, 1)  # answers alone go there
            try:
                status = run(json.loads(line))
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
