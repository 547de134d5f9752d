"""Arguments in, events out. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge import cli_estimate, methods
from shardmerge.arguments import parser, settings_of
from shardmerge.console import running, stoppable, tell_published, where_of
from shardmerge.errors import ShardmergeError, Stopped, UsageError, VerifyError
from shardmerge.progress import Display, JsonLines, Text, counted, size
from shardmerge.stores import Stores

if TYPE_CHECKING:
    from shardmerge.continual import State


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status."""
    _have_streams()
    options = parser().parse_args(arguments)
    # A tensor's or a file's name may hold what the terminal's encoding does not have.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)  # on stderr
    try:
        status = _run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output has left (``| head``); there is nobody to tell.
        return 1
    except OSError as problem:
        # Else not of an output stream, so no mistake of the user's.
        if problem.filename is not None or isinstance(problem, ConnectionError):
            raise
        print(f"done, but the result could not be written to stdout: {problem}", file=sys.stderr)
        return 1
    finally:
        _let_go()


def _have_streams() -> None:
    """A stream that was closed before the start takes everything, and keeps nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  it lives as long as we


def _run(options: argparse.Namespace) -> int:
    try:
        return COMMANDS[options.command](options)
    except ShardmergeError as problem:
        _tell(problem, options)
        return problem.exit_code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return Stopped.exit_code


def _tell(problem: ShardmergeError, options: argparse.Namespace) -> None:
    """An error on stderr: in words, or as one more event where stderr is JSON lines."""
    kind = type(problem).__name__
    if options.command in TOLD_IN_EVENTS and options.json:
        error = {"event": "error", "kind": kind, "message": str(problem)}
        print(json.dumps(error), file=sys.stderr)
    else:
        print(f"{kind}: {problem}", file=sys.stderr)


def _let_go() -> None:
    """Throw away what can no longer be written; else Python itself fails on it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- commands -----------------------------------------------------------------------------------


def _merge(options: argparse.Namespace) -> int:
    from shardmerge.merge import merge

    with running(options) as (display, stop):
        published = merge(
            options.recipe,
            options.out,
            executor=options.executor,
            address=options.address,
            memory_bytes=options.memory,
            threads=options.threads,
            device=options.device,
            gpus=options.gpus,
            overwrite=options.overwrite,
            fresh=options.fresh,
            progress=display,
            stop=stop,
            settings=settings_of(options),
        )
    return tell_published(published, as_json=options.json)


def _plan(options: argparse.Namespace) -> int:
    from shardmerge.describe import describe_plan, plan_text
    from shardmerge.prepare import Where, prepare

    where = Where(
        executor="slurm-array" if options.save else options.executor,
        memory_bytes=options.memory,
        threads=options.threads,
        device=options.device,
    )
    ready = prepare(options.recipe, options.out, where, settings=settings_of(options))
    if options.save:
        from shardmerge.slices import save_order

        if options.out == "OUT":
            raise UsageError("--save needs the place of the new checkpoint: plan RECIPE OUT --save")
        save_order(options.save, ready, options.recipe, options.threads)
    facts = describe_plan(ready.plan, ready.first.plan if ready.first else None)
    print(json.dumps(facts) if options.json else plan_text(facts))
    return 0


def _worker(options: argparse.Namespace) -> int:
    from shardmerge.slices import load_order, work_slice

    index, count = options.slice
    order = load_order(options.plan)
    _go_to(order.folder)
    display: Display = JsonLines() if options.json else Text()
    with stoppable(tell=not options.json) as stop:
        try:
            done = work_slice(order, index, count, progress=display, stop=stop)
        finally:
            display.close()
    if options.json:
        print(json.dumps(dataclasses.asdict(done)))
    elif done.already:
        print(f"slice {index}/{count}: the checkpoint is already published")
    else:
        print(f"slice {index}/{count}: {counted(done.parts, 'part')}, {size(done.nbytes)} written")
    return 0


def _publish(options: argparse.Namespace) -> int:
    from shardmerge.slices import load_order, publish_slices

    order = load_order(options.plan)
    _go_to(order.folder)
    with stoppable(tell=not options.json) as stop:
        published = publish_slices(order, stop=stop)
    return tell_published(published, as_json=options.json)


def _go_to(folder: str) -> None:
    """Make relative paths of a plan mean what they meant when it was made."""
    try:
        os.chdir(folder)
    except OSError as problem:
        raise UsageError(
            f"the plan was made in {folder}, which is not here: {problem.strerror}"
        ) from problem


def _verify(options: argparse.Namespace) -> int:
    from shardmerge.verify import verify

    report = verify(options.checkpoint, Stores(settings_of(options)))
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    if report.problems:
        raise VerifyError(
            f"{options.checkpoint}: {counted(len(report.problems), 'problem')}\n"
            + "\n".join(f"  {problem}" for problem in report.problems)
        )
    if not options.json:
        checked = "every checksum" if report.checksums else "structure only: no provenance record"
        print(
            f"{options.checkpoint}: good ({checked}); {counted(report.tensors, 'tensor')}, "
            f"{size(report.bytes)} in {counted(report.shards, 'shard')}"
        )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from shardmerge.describe import describe_checkpoint, describe_tensor
    from shardmerge.sources import open_checkpoint

    checkpoint = open_checkpoint(options.checkpoint, None, Stores(settings_of(options)))
    for tensor in checkpoint.tensors.values():
        facts = describe_tensor(checkpoint, tensor)
        if options.json:
            print(json.dumps(facts))
        else:
            shape = "x".join(map(str, tensor.shape)) or "scalar"
            print(f"{tensor.name}  {facts['dtype']}  {shape}  {size(tensor.nbytes)}")
    if not options.json:
        print(describe_checkpoint(checkpoint))
    return 0


def _diff(options: argparse.Namespace) -> int:
    from shardmerge.diff import diff

    for found in diff(options.a, options.b, Stores(settings_of(options))):
        if options.json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            print(found.line())
    return 0


def _report(options: argparse.Namespace) -> int:
    from shardmerge.report import read_records, report_of, report_text

    report = report_of(read_records(options.checkpoint, Stores(settings_of(options))))
    print(json.dumps(dataclasses.asdict(report)) if options.json else report_text(report))
    return 0


def _clean(options: argparse.Namespace) -> int:
    from shardmerge.outputs import open_output

    output = open_output(options.out, Stores(settings_of(options)))
    found = output.leftovers()
    if found and not options.dry_run:
        with output.locked():
            found = output.leftovers()  # a run may have ended meanwhile
            output.forget()
            output.tidy()
    for left in found:
        print(left)
    if not found:
        print(f"{options.out}: no unfinished run has left anything")
    elif not options.dry_run:
        print(f"{options.out}: removed; nothing of an unfinished run is left")
    return 0


def _methods(options: argparse.Namespace) -> int:
    for name in methods.names():
        info = methods.get(name)
        title = info.page.splitlines()[0]
        if options.json:
            known = [parameter.key for parameter in info.parameters]
            print(json.dumps({"method": name, "title": title, "parameters": known}))
        else:
            print(f"{name:<16} {title}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from shardmerge.describe import method_page

    print(method_page(methods.get(options.method)))
    return 0


# --- continual merging --------------------------------------------------------------------------


def _state(options: argparse.Namespace, stop: threading.Event | None = None) -> State:
    from shardmerge.continual import State

    return State(options.state, settings_of(options), stop)


def _continual_init(options: argparse.Namespace) -> int:
    rules = ""
    if options.rules is not None:
        try:
            rules = Path(options.rules).read_text()
        except (OSError, UnicodeDecodeError) as problem:
            raise UsageError(f"cannot read {options.rules}: {problem}") from None
    record = _state(options).init(
        options.base,
        method=options.method,
        settings=options.set,
        rules=rules,
        keep=options.keep,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(record)))
    else:
        print(f"{options.state}: begun; {record.method} on {record.base.model}")
    return 0


def _continual_add(options: argparse.Namespace) -> int:
    where = where_of(options)
    with running(options) as (display, stop):
        state = _state(options, stop)
        if options.plan:
            ready = state.plan_add(options.model, where)
        else:
            step = state.add(
                options.model,
                where,
                name=options.name,
                keep=options.keep,
                base=options.base,
                progress=display,
            )
    if options.plan:
        from shardmerge.describe import describe_plan, plan_text

        facts = describe_plan(ready.plan)
        facts["disk_bytes"] = ready.plan.output_bytes + sum(state.kept_bytes().values())
        print(json.dumps(facts) if options.json else plan_text(facts))
    elif options.json:
        print(json.dumps(dataclasses.asdict(step)))
    else:
        print(
            f"{options.state}: added {step.model.name} as step {step.number}; task vector norm "
            f"{step.norm:.6g}, scaled by {step.scale:.6g}"
        )
    return 0


def _continual_status(options: argparse.Namespace) -> int:
    from shardmerge.describe import describe_state, state_text

    state = _state(options)
    facts = describe_state(state.url, state.record(), state.kept_bytes())
    print(json.dumps(facts) if options.json else state_text(facts))
    return 0


def _continual_publish(options: argparse.Namespace) -> int:
    where = where_of(options)
    with running(options) as (display, stop):
        published = _state(options, stop).publish(
            options.out,
            where,
            dtype=options.dtype,
            base=options.base,
            overwrite=options.overwrite,
            fresh=options.fresh,
            progress=display,
        )
    return tell_published(published, as_json=options.json)


def _continual_undo(options: argparse.Namespace) -> int:
    model = _state(options).undo()
    if options.json:
        print(json.dumps(dataclasses.asdict(model)))
    else:
        print(f"{options.state}: {model.name} is no longer in it")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "merge": _merge,
    "plan": _plan,
    "continual init": _continual_init,
    "continual add": _continual_add,
    "continual status": _continual_status,
    "continual publish": _continual_publish,
    "continual undo": _continual_undo,
    "worker": _worker,
    "publish": _publish,
    "verify": _verify,
    "inspect": _inspect,
    "diff": _diff,
    "report": _report,
    "clean": _clean,
    "methods": _methods,
    "explain": _explain,
    "fisher": cli_estimate.fisher,
    "gram": cli_estimate.gram,
    "extract-lora": cli_estimate.extract_lora,
}
TOLD_IN_EVENTS = (
    "merge",
    "worker",
    "continual add",
    "continual publish",
    "fisher",
    "gram",
    "extract-lora",
)
"""Commands whose stderr is JSON lines with ``--json``."""
