"""Commands that compute something new from models: Fisher information, Gram matrices, adapters."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import threading
from typing import TYPE_CHECKING, Any

from shardmerge.arguments import settings_of
from shardmerge.console import running, stoppable, tell_published, where_of
from shardmerge.errors import UsageError
from shardmerge.kernels.device import AUTO, CPU
from shardmerge.numerics import DTYPE_BY_TORCH_NAME

if TYPE_CHECKING:
    from shardmerge.estimate.counting import Counter
    from shardmerge.estimate.sums import Runner
    from shardmerge.publish import Published


def fisher(options: argparse.Namespace) -> int:
    """``shardmerge fisher``, from data or from what stands in for it."""
    _refuse_idle(options)
    if options.source is None:
        with stoppable(tell=not options.json) as stop, contextlib.redirect_stdout(sys.stderr):
            estimated = _fisher_from_data(options, stop)
        if estimated is None:
            return 0
        return tell_published(estimated, as_json=options.json, done="estimated")
    return tell_published(_fisher_without(options), as_json=options.json, done="computed")


def _refuse_idle(options: argparse.Namespace) -> None:
    """Refuse options that have no effect on what is asked for."""
    here, other = ("--from", "--data") if options.data is None else ("--data", "--from")
    defaults = options.only[other]
    idle = [name for name, default in defaults.items() if getattr(options, name) != default]
    if idle:
        raise UsageError(
            f"--{idle[0].replace('_', '-')} is for 'fisher {other}', and has no effect with "
            f"{here}; leave it out."
        )


def _fisher_from_data(options: argparse.Namespace, stop: threading.Event) -> Published | None:
    """What was published; None in every process but the first."""
    from shardmerge.estimate.fisher import FisherQuestion, estimate_fisher

    runner = _runner(options)
    return estimate_fisher(
        options.model,
        options.out,
        FisherQuestion(**_examples(options), label_field=options.label_field, exact=options.exact),
        runner,
        counter=_counter(options, runner.rank),
        stop=stop,
        settings=settings_of(options),
        work=options.work,
        overwrite=options.overwrite,
        fresh=options.fresh,
    )


def _examples(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a ``Question``."""
    return {
        "data": options.data,
        "text_fields": options.text_field or ("text",),
        "task": options.task,
        "samples": options.samples,
        "max_length": options.max_length,
        "seed": options.seed,
    }


def _runner(options: argparse.Namespace) -> Runner:
    from shardmerge.estimate.sums import OneDevice

    device = CPU if options.device == AUTO else options.device
    if options.deepspeed is None:
        return OneDevice(device)
    from shardmerge.estimate.fisher_zero3 import Zero3

    return Zero3(device)


def _counter(options: argparse.Namespace, rank: int = 0) -> Counter:
    from shardmerge.estimate.counting import Counter, Telling

    if rank or options.quiet:
        return Counter(Telling.QUIET)
    return Counter(Telling.JSON if options.json else Telling.LINES)


def _fisher_without(options: argparse.Namespace) -> Published:
    from shardmerge.estimate.stand_ins import To, fisher_from_adam, fisher_from_task_vector

    if (options.source == "task-vector") != (options.base is not None):
        raise UsageError(
            "--from task-vector is the squared difference from --base BASE; --from adam needs none."
        )
    where = where_of(options)
    with running(options) as (display, stop):
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


def gram(options: argparse.Namespace) -> int:
    """``shardmerge gram``."""
    from shardmerge.estimate.examples import Question
    from shardmerge.estimate.gram import collect_gram

    with stoppable(tell=not options.json) as stop, contextlib.redirect_stdout(sys.stderr):
        collected = collect_gram(
            options.model,
            options.out,
            Question(**_examples(options)),
            device=options.device,
            memory_bytes=options.memory,
            counter=_counter(options),
            stop=stop,
            settings=settings_of(options),
            overwrite=options.overwrite,
            fresh=options.fresh,
        )
    return tell_published(collected, as_json=options.json, done="collected")


def extract_lora(options: argparse.Namespace) -> int:
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
