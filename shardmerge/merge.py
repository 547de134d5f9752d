"""The whole path: recipe, sources, plan, execute, publish."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import llvmlite
import yaml

from shardmerge import __version__
from shardmerge.errors import (
    NonFiniteError,
    OutputError,
    SourceChangedError,
)
from shardmerge.execute import Progress, execute
from shardmerge.executors.api import Executor
from shardmerge.executors.local import LocalExecutor
from shardmerge.ledger import LEDGER, Ledger, Lock, fingerprint
from shardmerge.match import Outputs, match
from shardmerge.plan import Plan, inputs_of, make_plan
from shardmerge.progress import Quiet
from shardmerge.publish import (
    CLEARED,
    INDEX,
    PROVENANCE,
    Published,
    occupants,
    publish,
    shard_checksums,
)
from shardmerge.recipe import ModelName, Recipe
from shardmerge.recipe_yaml import read_yaml
from shardmerge.shards import STAGING, ShardWriter, opened, staged, write_failed
from shardmerge.sources import open_checkpoint
from shardmerge.sources.tensor import Checkpoint
from shardmerge.stores import open_store

DEFAULT_MEMORY_BYTES = 4 * 2**30
_SPARE_BYTES = 16 * 2**20
"""Disk kept free for the ledger and the small files."""

Sources = Mapping[ModelName, Checkpoint]

log = logging.getLogger(__name__)


EXECUTORS: Mapping[str, Callable[[Plan, ShardWriter], Executor]] = {"local": LocalExecutor}
"""Places to run, by their name on the command line."""


def merge(
    recipe: Recipe | str,
    out: str,
    *,
    executor: str = "local",
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Published:
    """Merge the checkpoints that ``recipe`` names into a new one; go on from where a run stopped.

    Args:
        recipe: a recipe, or the path of one.
        out: folder of the new checkpoint.
        memory_bytes: the most anonymous memory the process may use.
        threads: kernels that may run at a time; None: one per CPU that the process may use.
        overwrite: replace another checkpoint at ``out``, once the new one is complete.
        fresh: forget an unfinished run at ``out``.
        stop: set it to stop the run; the same call goes on from there.
    Raises:
        ShardmergeError: for everything that a user can mend.
    """
    plan, sources = prepare(recipe, out, memory_bytes=memory_bytes, threads=threads)
    place = Path(out)
    files = _asset_names(plan, sources)
    _refuse_sources(place, sources)
    if not (fresh or overwrite) and _is_published(place, plan):
        return _published(plan, already=True)
    with _staging(place, plan, files, overwrite=overwrite, fresh=fresh) as (ledger, writer):
        with EXECUTORS[executor](plan, writer) as workers:
            execute(
                plan,
                workers,
                ledger,
                writer,
                progress=progress or Quiet(),
                stop=stop or threading.Event(),
            )
        _refuse_changed(sources)
        _refuse_non_finite(plan, ledger)
        checksums = shard_checksums(plan.shards, ledger.receipts)
        names = [tensor.name for tensor in plan.tensors]
        publish(place, plan.shards, names, ledger, _assets(plan, sources, checksums))
    return _published(plan, already=False)


def prepare(
    recipe: Recipe | str, out: str, *, memory_bytes: int, threads: int | None
) -> tuple[Plan, Sources]:
    """Read the recipe and the headers of its sources, and plan. Touches nothing at ``out``."""
    recipe = Recipe.load(recipe)
    sources = open_sources(recipe)
    outputs = match(recipe, sources)
    plan = make_plan(
        recipe,
        outputs,
        out,
        memory_bytes=memory_bytes,
        cpus=threads or available_cpus(),
        identity=_identity(recipe, sources),
    )
    return plan, sources


def open_sources(recipe: Recipe) -> Sources:
    """Every checkpoint that the recipe names, by name."""
    return {name: open_checkpoint(name.url) for name in _named(recipe)}


def _named(recipe: Recipe) -> list[ModelName]:
    """The checkpoints that a recipe names, each once, in its order."""
    found = [recipe.base_model, recipe.tokenizer_source]
    for part in recipe.slices:
        for source in (part.base, *part.sources):
            if source is not None:
                found += [source.model, *source.extras.values()]
    found += [rule.take_from for rule in recipe.rules]
    return list(dict.fromkeys(name for name in found if name is not None))


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its control group."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def _identity(recipe: Recipe, sources: Sources) -> dict[str, str]:
    """What the bytes of the output depend on. Permissions and resources are not among it."""
    settings = read_yaml(recipe.text, "recipe").value
    assert isinstance(settings, dict)
    settings = {key: value for key, value in settings.items() if key != "allow_non_finite"}
    identity = {
        "recipe": yaml.safe_dump(settings, sort_keys=True),
        "shardmerge": __version__,
        "compiler": f"llvmlite {llvmlite.__version__}",
        "device": "cpu",
    }
    for name, checkpoint in sources.items():
        lines = [f"{file} {text}" for file, text in sorted(checkpoint.versions.items())]
        identity[f"source {name}"] = "\n".join(lines)
    return identity


# --- OUT ----------------------------------------------------------------------------------------


def _refuse_sources(out: Path, sources: Sources) -> None:
    for name, checkpoint in sources.items():
        folder = Path(checkpoint.url)
        folder = folder if folder.is_dir() else folder.parent
        if out.exists() and folder.exists() and out.samefile(folder):
            raise OutputError(
                f"{out} is where the source {name} lies. Give another place for the output."
            )


def _is_published(out: Path, plan: Plan) -> bool:
    """Whether OUT holds exactly what this plan makes, complete."""
    last = out / (INDEX if len(plan.shards) > 1 else plan.shards[0].name)
    if (out / STAGING).exists() or not last.exists():
        return False
    try:
        record = yaml.safe_load((out / PROVENANCE).read_bytes())
        shards = record["shards"]
        return record["fingerprint"] == fingerprint(plan.identity) and all(
            (out / shard.name).stat().st_size == shards[shard.name]["bytes"]
            for shard in plan.shards
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return False


@contextmanager
def _staging(
    out: Path, plan: Plan, files: list[str], *, overwrite: bool, fresh: bool
) -> Iterator[tuple[Ledger, ShardWriter]]:
    """The folder of the unfinished run: locked, with its ledger and the space for every shard."""
    staging = out / STAGING
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise write_failed(staging, problem) from problem
    with Lock(staging):
        if fresh:
            _forget(staging)
        ledger = Ledger(staging / LEDGER, plan.identity)
        writer = ShardWriter(out, plan.shards)
        try:
            done = _recover(out, plan, ledger)
            if CLEARED not in ledger.events:
                _refuse_occupied(out, plan, files, overwrite=overwrite)
            _refuse_full(out, plan, done)
            with opened(writer):
                writer.reserve(done)
                yield ledger, writer
        finally:
            ledger.close()


def _forget(staging: Path) -> None:
    for path in staging.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _recover(out: Path, plan: Plan, ledger: Ledger) -> set[int]:
    """Shards that already have their names; forgets the receipts of shards whose bytes are gone."""
    done: set[int] = set()
    gone: set[int] = set()
    for number, shard in enumerate(plan.shards):
        if not staged(out, shard).exists():
            (done if CLEARED in ledger.events and (out / shard.name).exists() else gone).add(number)
        elif staged(out, shard).stat().st_size != shard.nbytes:
            gone.add(number)
    ledger.forget_shards(gone)
    return done


def _refuse_occupied(out: Path, plan: Plan, files: list[str], *, overwrite: bool) -> None:
    planned = [*files, INDEX, PROVENANCE, *(shard.name for shard in plan.shards)]
    found = occupants(out, planned)
    if found and not overwrite:
        raise OutputError(
            f"{out} holds another checkpoint: {', '.join(found[:5])}"
            f"{', ...' if len(found) > 5 else ''}.\n"
            "  Give --overwrite to replace it once the new one is complete, or another place."
        )


def _refuse_full(out: Path, plan: Plan, done: set[int]) -> None:
    """Refuse a disk that cannot hold the output, before anything is read."""
    needed = _SPARE_BYTES
    for number, shard in enumerate(plan.shards):
        if number not in done:
            part = staged(out, shard)
            needed += shard.nbytes - (part.stat().st_blocks * 512 if part.exists() else 0)
    room = os.statvfs(out)
    if room.f_bavail * room.f_frsize < needed:
        raise OutputError(
            f"{out} has {room.f_bavail * room.f_frsize:,} bytes free; the output needs "
            f"{needed:,} more.\n  Free some, or give another place."
        )
    if room.f_files > 0 and room.f_favail < len(plan.shards) + 64:
        raise OutputError(f"{out} has room for {room.f_favail} more files; that is too few.")


# --- checks before publishing -------------------------------------------------------------------


def _refuse_changed(sources: Sources) -> None:
    for name, checkpoint in sources.items():
        for file, before in checkpoint.versions.items():
            store = open_store(checkpoint.url)
            url = store.join(checkpoint.url, file) if store.is_folder(checkpoint.url) else None
            found = store.stat(url or checkpoint.url)
            if found is None or found.version != before:
                raise SourceChangedError(
                    f"{name}: {file} changed while it was being merged. Nothing was published.\n"
                    "  Put it back, or run the command again with --fresh to merge it as it is."
                )


def _refuse_non_finite(plan: Plan, ledger: Ledger) -> None:
    if plan.recipe.allow_non_finite:
        return
    found = sorted({pair for receipt in ledger.receipts.values() for pair in receipt.non_finite})
    if not found:
        return
    lines = []
    for number, which in found:
        tensor = plan.tensors[number]
        where = "the result" if which < 0 else inputs_of(tensor)[which].segments[0].url
        lines.append(f"  {tensor.name}: {where}")
    raise NonFiniteError(
        f"NaN or infinity in {len(found)} tensors; nothing was published:\n"
        + "\n".join(lines)
        + "\n  Mend the inputs, take these tensors from another model by a rule, or write "
        "allow_non_finite: true into the recipe and run the same command again: nothing is lost."
    )


# --- small files --------------------------------------------------------------------------------


def _donors(plan: Plan, sources: Sources) -> tuple[Checkpoint, Checkpoint]:
    """Whose configuration is used, and whose tokenizer."""
    donor = sources[plan.outputs.donor]
    tokenizer = plan.recipe.tokenizer_source
    return donor, donor if tokenizer is None else sources[tokenizer]


def _asset_names(plan: Plan, sources: Sources) -> list[str]:
    copied = []
    return ["config.json", "README.md", *copied]


def _assets(
    plan: Plan, sources: Sources, checksums: Mapping[str, Mapping[str, object]]
) -> dict[str, bytes]:
    """The content of every file of the checkpoint that is not a shard or the index."""
    import json

    return {
        PROVENANCE: json.dumps(
            {"shards": checksums, "fingerprint": fingerprint(plan.identity)}
        ).encode()
    }


def _published(plan: Plan, *, already: bool) -> Published:
    return Published(
        out=plan.out,
        shards=tuple(shard.name for shard in plan.shards),
        nbytes=plan.output_bytes,
        tensors=len(plan.tensors),
        already=already,
        notes=(*plan.recipe.notes, *plan.outputs.notes),
    )


__all__ = ["DEFAULT_MEMORY_BYTES", "Outputs", "merge", "open_sources", "prepare"]
