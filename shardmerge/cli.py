"""Arguments in, events out. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from shardmerge import __version__, methods
from shardmerge.errors import ShardmergeError, Stopped, UsageError, VerifyError
from shardmerge.kernels.device import AUTO, DEVICES
from shardmerge.progress import Display, JsonLines, Quiet, Text, counted, size
from shardmerge.stores import Settings, Stores
from shardmerge.stores.settings import parse_s3

if TYPE_CHECKING:
    from shardmerge.publish import Published

EXIT_CODES = "exit status: 0 done, 1 failed, 2 bad usage or recipe, 3 stopped but resumable"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status."""
    _have_streams()
    options = _parser().parse_args(arguments)
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
        status: int = options.run(options)
        return status
    except ShardmergeError as problem:
        _tell(problem, options)
        return problem.exit_code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return Stopped.exit_code


def _tell(problem: ShardmergeError, options: argparse.Namespace) -> None:
    """An error on stderr: in words, or as one more event where stderr is JSON lines."""
    kind = type(problem).__name__
    if options.run in (_merge, _worker) and options.json:
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


# --- arguments ----------------------------------------------------------------------------------

_Commands = argparse._SubParsersAction  # argparse has no public name for it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardmerge",
        description="Merge model checkpoints, tile by tile, in constant memory.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"shardmerge {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_merge(commands)
    _add_plan(commands)
    _add_slices(commands)
    _add_looking(commands)
    _add_methods(commands)
    return parser


def _add_merge(commands: _Commands[argparse.ArgumentParser]) -> None:
    merge = commands.add_parser("merge", help="merge checkpoints into a new one", epilog=EXIT_CODES)
    merge.set_defaults(run=_merge)
    merge.add_argument("recipe", help="YAML recipe (mergekit's vocabulary)")
    merge.add_argument("out", help="folder of the new checkpoint, or s3://bucket/folder")
    _resources(merge)
    _places(merge)
    merge.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT (default: one is started here)",
    )
    merge.add_argument(
        "--gpus",
        type=_gpus,
        default=1.0,
        metavar="PART",
        help="of a GPU for each worker of a cluster with --device cuda; 0.5: two share one "
        "(default 1)",
    )
    merge.add_argument(
        "--overwrite", action="store_true", help="replace another checkpoint at OUT when done"
    )
    merge.add_argument("--fresh", action="store_true", help="forget an unfinished run at OUT")
    merge.add_argument(
        "--json", action="store_true", help="progress on stderr and the result as JSON lines"
    )
    merge.add_argument("--quiet", action="store_true", help="no progress")


def _add_plan(commands: _Commands[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser("plan", help="say what a merge would do; costs nothing")
    plan.set_defaults(run=_plan)
    plan.add_argument("recipe", help="YAML recipe")
    plan.add_argument("out", nargs="?", default="OUT", help="folder of the new checkpoint")
    _resources(plan)
    _places(plan)
    plan.add_argument("--json", action="store_true", help="as one JSON object")
    plan.add_argument(
        "--save", metavar="FILE", help="write what 'worker' and 'publish' go by (needs OUT)"
    )


def _add_slices(commands: _Commands[argparse.ArgumentParser]) -> None:
    worker = commands.add_parser(
        "worker", help="do a slice of a saved plan, as an array's element", epilog=EXIT_CODES
    )
    worker.set_defaults(run=_worker)
    worker.add_argument("--plan", required=True, metavar="FILE", help="of 'plan --save'")
    worker.add_argument(
        "--slice", type=_slice, required=True, metavar="I/N", help="slice I (from 0) of N"
    )
    worker.add_argument("--json", action="store_true", help="as JSON lines")

    publish = commands.add_parser(
        "publish", help="publish what all slices of a saved plan have written", epilog=EXIT_CODES
    )
    publish.set_defaults(run=_publish)
    publish.add_argument("--plan", required=True, metavar="FILE", help="of 'plan --save'")
    publish.add_argument("--json", action="store_true", help="as one JSON object")


def _add_looking(commands: _Commands[argparse.ArgumentParser]) -> None:
    verify = commands.add_parser("verify", help="check a published checkpoint, every byte")
    verify.set_defaults(run=_verify)
    verify.add_argument("checkpoint", help="its folder")
    _places(verify)
    verify.add_argument("--json", action="store_true", help="as one JSON object")

    inspect = commands.add_parser("inspect", help="list tensors, dtypes, shapes, sizes")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("checkpoint", help="folder or .safetensors file")
    _places(inspect)
    inspect.add_argument("--json", action="store_true", help="as JSON lines")

    diff = commands.add_parser("diff", help="compare two checkpoints tensor by tensor")
    diff.set_defaults(run=_diff)
    diff.add_argument("a", help="a checkpoint")
    diff.add_argument("b", help="another")
    _places(diff)
    diff.add_argument("--json", action="store_true", help="as JSON lines")

    report = commands.add_parser("report", help="say where the time of a merge went")
    report.set_defaults(run=_report)
    report.add_argument("checkpoint", help="folder that it was published at")
    _places(report)
    report.add_argument("--json", action="store_true", help="as one JSON object")

    clean = commands.add_parser("clean", help="remove what an abandoned run has left")
    clean.set_defaults(run=_clean)
    clean.add_argument("out", help="where it was to publish")
    _places(clean)
    clean.add_argument("--dry-run", action="store_true", help="only list it")


def _add_methods(commands: _Commands[argparse.ArgumentParser]) -> None:
    listing = commands.add_parser("methods", help="list merge methods")
    listing.set_defaults(run=_methods)
    listing.add_argument("--json", action="store_true", help="as JSON lines")

    explain = commands.add_parser("explain", help="the page of one merge method")
    explain.set_defaults(run=_explain)
    explain.add_argument("method", help="its name")


def _resources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor",
        choices=("local", "ray", "slurm-array"),
        default="local",
        help="where tasks run (default local)",
    )
    parser.add_argument(
        "--memory",
        type=_bytes,
        default=_bytes("4GiB"),
        metavar="SIZE",
        help="most anonymous memory of the process, or of each worker of a cluster (default 4GiB)",
    )
    parser.add_argument(
        "--threads",
        type=_count,
        metavar="N",
        help="kernels at a time (default: every CPU; on CUDA at most 4 are)",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=AUTO,
        help="where kernels run; auto: on CUDA where there is a device (default %(default)s)",
    )


def _places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--s3",
        action="append",
        default=[],
        metavar="[BUCKET:]NAME=VALUE",
        help="a setting of S3 (anonymous, profile, endpoint_url, storage_class, ...), repeatable",
    )
    parser.add_argument(
        "--patience",
        type=_minutes,
        default=Settings().patience_minutes,
        metavar="MINUTES",
        help="how long a failing server is asked again (default %(default)g)",
    )


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(options.patience, parse_s3(options.s3))


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate(("k", "m", "g", "t"), 1)}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate(("k", "m", "g", "t"), 1)}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write 4GiB, 512MiB or 2GB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _minutes(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of minutes; write 10 or 0.5")
    return float(text)


def _slice(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is no slice; of eight, they are 0/8 to 7/8")
    return int(found[1]), int(found[2])


def _gpus(text: str) -> float:
    found = float(text) if re.fullmatch(r"\d(\.\d{1,4})?", text) else 0.0
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no part of a GPU; write 1, 0.5 or 0.25")
    return found


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no count; write a number from 1 to 9999")
    return int(text)


# --- commands -----------------------------------------------------------------------------------


def _merge(options: argparse.Namespace) -> int:
    from shardmerge.merge import merge

    display: Display = JsonLines() if options.json else Quiet() if options.quiet else Text()
    # What a library prints goes to stderr too: stdout is for results.
    with _stoppable(tell=not options.json) as stop, contextlib.redirect_stdout(sys.stderr):
        try:
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
                settings=_settings(options),
            )
        finally:
            display.close()
    return _tell_published(published, as_json=options.json)


def _tell_published(published: Published, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(dataclasses.asdict(published)))
        return 0
    for note in published.notes:
        print(f"note: {note}", file=sys.stderr)
    done = "was already merged" if published.already else "merged"
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


@contextlib.contextmanager
def _stoppable(*, tell: bool) -> Iterator[threading.Event]:
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


def _plan(options: argparse.Namespace) -> int:
    from shardmerge.describe import describe_plan, plan_text
    from shardmerge.merge import prepare

    ready = prepare(
        options.recipe,
        options.out,
        executor="slurm-array" if options.save else options.executor,
        memory_bytes=options.memory,
        threads=options.threads,
        device=options.device,
        settings=_settings(options),
    )
    if options.save:
        from shardmerge.slices import save_order

        if options.out == "OUT":
            raise UsageError("--save needs the place of the new checkpoint: plan RECIPE OUT --save")
        save_order(options.save, ready, options.recipe, options.threads)
    facts = describe_plan(ready.plan)
    print(json.dumps(facts) if options.json else plan_text(facts))
    return 0


def _worker(options: argparse.Namespace) -> int:
    from shardmerge.slices import load_order, work_slice

    index, count = options.slice
    order = load_order(options.plan)
    _go_to(order.folder)
    display: Display = JsonLines() if options.json else Text()
    with _stoppable(tell=not options.json) as stop:
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
    with _stoppable(tell=not options.json) as stop:
        published = publish_slices(order, stop=stop)
    return _tell_published(published, as_json=options.json)


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

    report = verify(options.checkpoint, Stores(_settings(options)))
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

    checkpoint = open_checkpoint(options.checkpoint, None, Stores(_settings(options)))
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

    for found in diff(options.a, options.b, Stores(_settings(options))):
        if options.json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            print(found.line())
    return 0


def _report(options: argparse.Namespace) -> int:
    from shardmerge.report import read_records, report_of, report_text

    report = report_of(read_records(options.checkpoint, Stores(_settings(options))))
    print(json.dumps(dataclasses.asdict(report)) if options.json else report_text(report))
    return 0


def _clean(options: argparse.Namespace) -> int:
    from shardmerge.outputs import open_output

    output = open_output(options.out, Stores(_settings(options)))
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
