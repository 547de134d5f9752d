"""Commands that compute something new from models: adapters and Fisher information."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from shardmerge.arguments import settings_of
from shardmerge.errors import UsageError
from shardmerge.numerics import DTYPE_BY_TORCH_NAME
from shardmerge.progress import Display

if TYPE_CHECKING:
    from shardmerge.prepare import Where
    from shardmerge.publish import Published

Running = Callable[[argparse.Namespace], AbstractContextManager[tuple[Display, threading.Event]]]
"""Shows a run as the options ask for it, with the event that stops it."""


def extract_lora(options: argparse.Namespace, running: Running) -> int:
    """``shardmerge extract-lora``."""
    from shardmerge import extract
    from shardmerge.extract.report import summary, told_left_out

    wanted = extract.Wanted(
        rank=options.rank,
        energy=options.energy,
        most=options.max_rank,
        dtype=DTYPE_BY_TORCH_NAME[options.dtype],
        include=tuple(options.include) or ("*",),
        exclude=tuple(options.exclude),
        save=tuple(options.save_modules),
    )
    with running(options) as (display, stop):
        found = extract.extract_lora(
            options.model,
            options.out,
            base=options.base,
            wanted=wanted,
            memory_bytes=options.memory,
            threads=options.threads,
            overwrite=options.overwrite,
            fresh=options.fresh,
            progress=display,
            stop=stop,
            settings=settings_of(options),
        )
    if options.json:
        print(json.dumps(dataclasses.asdict(found)))
        return 0
    for line in told_left_out(found.left_out):
        print(line, file=sys.stderr)
    for line in summary(found):
        print(line)
    return 0


def fisher_from(
    options: argparse.Namespace, where: Where, display: Display, stop: threading.Event
) -> Published:
    """``shardmerge fisher --from``: what stands in for Fisher information without data."""
    from shardmerge.estimate.stand_ins import To, fisher_from_adam, fisher_from_task_vector

    if (options.source == "task-vector") != (options.base is not None):
        raise UsageError(
            "--from task-vector is the squared difference from --base BASE; --from adam needs none."
        )
    to = To(
        options.out,
        where,
        overwrite=options.overwrite,
        fresh=options.fresh,
        progress=display,
        stop=stop,
        settings=settings_of(options),
    )
    if options.source == "adam":
        return fisher_from_adam(options.model, to)
    return fisher_from_task_vector(options.model, to, base=options.base)
