"""The command line's grammar: commands, options, and what their values may be."""

from __future__ import annotations

import argparse
import re

from shardmerge import __version__
from shardmerge.estimate.examples import MAX_LENGTH, SAMPLES, Task
from shardmerge.kernels.device import AUTO, CPU, CUDA, DEVICES
from shardmerge.stores import Settings
from shardmerge.stores.settings import parse_s3

EXIT_CODES = "exit status: 0 done, 1 failed, 2 bad usage or recipe, 3 stopped but resumable"

_Commands = argparse._SubParsersAction  # argparse has no public name for it


def parser() -> argparse.ArgumentParser:
    """Of the whole command line; ``command`` of what it gives is the command's name."""
    made = argparse.ArgumentParser(
        prog="shardmerge",
        description="Merge model checkpoints, tile by tile, in constant memory.",
        epilog=EXIT_CODES,
    )
    made.add_argument("--version", action="version", version=f"shardmerge {__version__}")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    _add_merge(commands)
    _add_plan(commands)
    _add_continual(commands)
    _add_extract(commands)
    _add_slices(commands)
    _add_looking(commands)
    _add_methods(commands)
    _add_fisher(commands)
    _add_gram(commands)
    return made


def _add_merge(commands: _Commands[argparse.ArgumentParser]) -> None:
    merge = commands.add_parser("merge", help="merge checkpoints into a new one", epilog=EXIT_CODES)
    merge.set_defaults(command="merge")
    merge.add_argument("recipe", help="YAML recipe (mergekit's vocabulary)")
    merge.add_argument("out", help="folder of the new checkpoint, or s3://bucket/folder")
    _resources(merge)
    _places(merge)
    _cluster(merge)
    _replacing(merge)
    _telling(merge)


def _add_plan(commands: _Commands[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser("plan", help="say what a merge would do; costs nothing")
    plan.set_defaults(command="plan")
    plan.add_argument("recipe", help="YAML recipe")
    plan.add_argument("out", nargs="?", default="OUT", help="folder of the new checkpoint")
    _resources(plan)
    _places(plan)
    plan.add_argument("--json", action="store_true", help="as one JSON object")
    plan.add_argument(
        "--save", metavar="FILE", help="write what 'worker' and 'publish' go by (needs OUT)"
    )


def _add_continual(commands: _Commands[argparse.ArgumentParser]) -> None:
    continual = commands.add_parser("continual", help="add one model after the other to a state")
    steps = continual.add_subparsers(required=True, metavar="STEP")

    init = steps.add_parser("init", help="begin a state", epilog=EXIT_CODES)
    init.set_defaults(command="continual init")
    _state(init)
    init.add_argument("--base", required=True, help="base model of all that will be added")
    init.add_argument(
        "--method", default="opcm", help="opcm (default), linear, task_arithmetic or ties"
    )
    init.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the method, such as alpha=0.5; repeatable",
    )
    init.add_argument("--rules", metavar="FILE", help="a YAML list, as 'rules' of a recipe")
    init.add_argument(
        "--keep", type=_count, default=2, metavar="N", help="sums that stay (default %(default)s)"
    )
    init.add_argument("--json", action="store_true", help="as one JSON object")

    add = steps.add_parser("add", help="add a model", epilog=EXIT_CODES)
    add.set_defaults(command="continual add")
    _state(add)
    add.add_argument("model", help="a fine-tune of the base model")
    add.add_argument("--name", help="of the model, for people (default: as it was given)")
    add.add_argument("--base", help="where the base model lies from now on, if it was moved")
    add.add_argument("--keep", type=_count, metavar="N", help="sums that stay, from now on")
    add.add_argument("--plan", action="store_true", help="only say what would be done")
    _resources(add)
    _cluster(add)
    _telling(add)

    status = steps.add_parser("status", help="what is in a state")
    status.set_defaults(command="continual status")
    _state(status)
    status.add_argument("--json", action="store_true", help="as one JSON object")

    publish = steps.add_parser("publish", help="write the merged model", epilog=EXIT_CODES)
    publish.set_defaults(command="continual publish")
    _state(publish)
    publish.add_argument("out", help="folder of the new checkpoint, or s3://bucket/folder")
    publish.add_argument("--base", help="where the base model lies now, if it was moved")
    publish.add_argument("--dtype", help="float32, bfloat16, ... (default: the base model's)")
    _resources(publish)
    _cluster(publish)
    _replacing(publish)
    _telling(publish)

    undo = steps.add_parser("undo", help="go back one step", epilog=EXIT_CODES)
    undo.set_defaults(command="continual undo")
    _state(undo)
    undo.add_argument("--json", action="store_true", help="as one JSON object")


def _state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state", help="folder of the state, or s3://bucket/folder")
    _places(parser)


def _add_extract(commands: _Commands[argparse.ArgumentParser]) -> None:
    extract = commands.add_parser(
        "extract-lora", help="the LoRA adapter of a model against its base", epilog=EXIT_CODES
    )
    extract.set_defaults(command="extract-lora")
    extract.add_argument("model", help="a fine-tune of the base model, or BASE+ADAPTER")
    extract.add_argument("out", help="folder of the adapter, or s3://bucket/folder")
    extract.add_argument("--base", required=True, help="the base model")
    ranks = extract.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--rank", type=_count, metavar="R", help="of every layer")
    ranks.add_argument(
        "--energy",
        type=_share,
        metavar="E",
        help="for each layer the least rank that holds this share of the squared singular values",
    )
    extract.add_argument("--max-rank", type=_count, metavar="R", help="the largest, by --energy")
    extract.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the adapter (default %(default)s)",
    )
    for name, what in (
        ("--include", "take only these matrices of linear layers, by their tensors' names"),
        ("--exclude", "leave these tensors out"),
        ("--save-modules", "store these modules whole, such as '*norm*' or lm_head"),
    ):
        extract.add_argument(
            name, action="append", default=[], metavar="GLOB", help=f"{what}; repeatable"
        )
    _memory(extract)
    extract.add_argument(
        "--threads",
        type=_count,
        metavar="N",
        help="matrices at a time, as far as memory allows (default: every CPU)",
    )
    _places(extract)
    _replacing(extract)
    _telling(extract)


def _add_fisher(commands: _Commands[argparse.ArgumentParser]) -> None:
    fisher = commands.add_parser(
        "fisher", help="Fisher information of a model, or what stands in for it", epilog=EXIT_CODES
    )
    fisher.set_defaults(command="fisher")
    fisher.add_argument("model", help="a model; with --from adam, the folder of a training")
    fisher.add_argument("out", help="folder of the new checkpoint, or s3://bucket/folder")
    ways = fisher.add_mutually_exclusive_group(required=True)
    _data(ways)
    ways.add_argument(
        "--from",
        dest="source",
        choices=("task-vector", "adam"),
        help="without data: the squared difference from --base, or Adam's second moment",
    )
    _examples(fisher)
    fisher.add_argument(
        "--label-field", default="label", metavar="NAME", help="of classifiers (default label)"
    )
    fisher.add_argument(
        "--exact",
        action="store_true",
        help="over a classifier's own predictions; no labels are read",
    )
    fisher.add_argument(
        "--deepspeed",
        choices=("zero3",),
        help="share a model among the processes that torchrun has started",
    )
    fisher.add_argument(
        "--work", metavar="FOLDER", help="what a stopped run goes on from (default: in OUT)"
    )
    fisher.add_argument("--base", help="the base model, of --from task-vector")
    _resources(fisher)
    _places(fisher)
    _cluster(fisher)
    _replacing(fisher)
    _telling(fisher)
    ways_of = {"--data": _WITH_DATA, "--from": _WITHOUT_DATA}
    only = {way: {n: fisher.get_default(n) for n in names} for way, names in ways_of.items()}
    fisher.set_defaults(only=only)


_WITH_DATA = (
    *("text_field", "task", "samples", "max_length", "seed"),
    *("label_field", "exact", "deepspeed", "work"),
)
_WITHOUT_DATA = ("base", "executor", "memory", "threads", "address", "gpus")
"""Options of ``fisher`` that have no effect without data, or with it."""


def _add_gram(commands: _Commands[argparse.ArgumentParser]) -> None:
    gram = commands.add_parser(
        "gram", help="collect what regmean needs of a model's layers", epilog=EXIT_CODES
    )
    gram.set_defaults(command="gram")
    gram.add_argument("model", help="folder of a transformers model, or its name on the Hub")
    gram.add_argument("out", help="folder of the new checkpoint, or s3://bucket/folder")
    _data(gram, required=True)
    _examples(gram)
    gram.add_argument(
        "--memory",
        type=_bytes,
        default=_bytes("4GiB"),
        metavar="SIZE",
        help="most bytes of matrices in one pass over the data, beside the model (default 4GiB)",
    )
    gram.add_argument("--device", choices=(CPU, CUDA), default=CPU, help="default cpu")
    _places(gram)
    _replacing(gram)
    _telling(gram)


def _data(parser: argparse._ActionsContainer, **options: bool) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help=".txt (an example in each line), .jsonl or .parquet",
        **options,  # type: ignore[arg-type]
    )


def _examples(parser: argparse.ArgumentParser) -> None:
    """Which examples a model is run on, and how."""
    parser.add_argument(
        "--text-field",
        action="append",
        metavar="NAME",
        help="of .jsonl and .parquet (default text); give two for pairs",
    )
    parser.add_argument("--task", choices=tuple(Task), help="default: by config.json")
    parser.add_argument(
        "--samples", type=_many, default=SAMPLES, metavar="N", help="examples (default %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=_many,
        metavar="N",
        help=f"tokens of an example (default {MAX_LENGTH}, or what the model takes)",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="default %(default)s")


def _add_slices(commands: _Commands[argparse.ArgumentParser]) -> None:
    worker = commands.add_parser(
        "worker", help="do a slice of a saved plan, as an array's element", epilog=EXIT_CODES
    )
    worker.set_defaults(command="worker")
    worker.add_argument("--plan", required=True, metavar="FILE", help="of 'plan --save'")
    worker.add_argument(
        "--slice", type=_slice, required=True, metavar="I/N", help="slice I (from 0) of N"
    )
    worker.add_argument("--json", action="store_true", help="as JSON lines")

    publish = commands.add_parser(
        "publish", help="publish what all slices of a saved plan have written", epilog=EXIT_CODES
    )
    publish.set_defaults(command="publish")
    publish.add_argument("--plan", required=True, metavar="FILE", help="of 'plan --save'")
    publish.add_argument("--json", action="store_true", help="as one JSON object")


def _add_looking(commands: _Commands[argparse.ArgumentParser]) -> None:
    verify = commands.add_parser("verify", help="check a published checkpoint, every byte")
    verify.set_defaults(command="verify")
    verify.add_argument("checkpoint", help="its folder")
    _places(verify)
    verify.add_argument("--json", action="store_true", help="as one JSON object")

    inspect = commands.add_parser("inspect", help="list tensors, dtypes, shapes, sizes")
    inspect.set_defaults(command="inspect")
    inspect.add_argument("checkpoint", help="folder or file")
    _places(inspect)
    inspect.add_argument("--json", action="store_true", help="as JSON lines")

    diff = commands.add_parser("diff", help="compare two checkpoints tensor by tensor")
    diff.set_defaults(command="diff")
    diff.add_argument("a", help="a checkpoint")
    diff.add_argument("b", help="another")
    _places(diff)
    diff.add_argument("--json", action="store_true", help="as JSON lines")

    report = commands.add_parser("report", help="say where the time of a merge went")
    report.set_defaults(command="report")
    report.add_argument("checkpoint", help="folder that it was published at")
    _places(report)
    report.add_argument("--json", action="store_true", help="as one JSON object")

    clean = commands.add_parser("clean", help="remove what an abandoned run has left")
    clean.set_defaults(command="clean")
    clean.add_argument("out", help="where it was to publish")
    _places(clean)
    clean.add_argument("--dry-run", action="store_true", help="only list it")


def _add_methods(commands: _Commands[argparse.ArgumentParser]) -> None:
    listing = commands.add_parser("methods", help="list merge methods")
    listing.set_defaults(command="methods")
    listing.add_argument("--json", action="store_true", help="as JSON lines")

    explain = commands.add_parser("explain", help="the page of one merge method")
    explain.set_defaults(command="explain")
    explain.add_argument("method", help="its name")


def _resources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor",
        choices=("local", "ray", "slurm-array"),
        default="local",
        help="where tasks run (default local)",
    )
    _memory(parser)
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


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        type=_bytes,
        default=_bytes("4GiB"),
        metavar="SIZE",
        help="most anonymous memory of the process, or of each worker of a cluster (default 4GiB)",
    )


def _cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT (default: one is started here)",
    )
    parser.add_argument(
        "--gpus",
        type=_gpus,
        default=1.0,
        metavar="PART",
        help="of a GPU for each worker of a cluster with --device cuda; 0.5: two share one "
        "(default 1)",
    )


def _replacing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another checkpoint at OUT when done"
    )
    parser.add_argument("--fresh", action="store_true", help="forget an unfinished run at OUT")


def _telling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="progress on stderr and the result as JSON lines"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


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


def settings_of(options: argparse.Namespace) -> Settings:
    """Of the stores, as options give them."""
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


def _share(text: str) -> float:
    found = float(text) if re.fullmatch(r"[01](\.\d{1,16})?", text) else 0.0
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share; write 0.9, 0.99 or 1")
    return found


def _many(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no count; write a number from 1")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no seed; write a number from 0")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no count; write a number from 1 to 9999")
    return int(text)
