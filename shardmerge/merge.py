"""The whole path: recipe, sources, plan, execute, publish."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from shardmerge import __version__, assets, executors
from shardmerge.errors import NonFiniteError, SourceChangedError
from shardmerge.execute import Progress, execute
from shardmerge.kept import adding, norms_in, scale_decisions, total_of
from shardmerge.kernels.device import AUTO
from shardmerge.ledger import Ledger, fingerprint
from shardmerge.memory import inputs_of
from shardmerge.methods.api import Decision, Method
from shardmerge.outputs import Output
from shardmerge.plan import Plan
from shardmerge.prepare import (
    AT_A_TIME,
    DEFAULT_MEMORY_BYTES,
    Prepared,
    Sources,
    Where,
    donors,
    prepare,
)
from shardmerge.progress import Quiet, counted
from shardmerge.publish import PROVENANCE, RECIPE, Published, publish, shard_checksums
from shardmerge.recipe import Recipe
from shardmerge.records import TASKS, TaskRecord, from_parquet, to_parquet
from shardmerge.sources.tensor import Checkpoint
from shardmerge.staging import refuse_occupied, refuse_sources, staging, sweep
from shardmerge.stores import Settings, Stores


def merge(
    recipe: Recipe | str,
    out: str,
    *,
    executor: str = "local",
    address: str | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int | None = None,
    device: str = AUTO,
    gpus: float = 1.0,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    settings: Settings | None = None,
) -> Published:
    """Merge the checkpoints that ``recipe`` names into a new one; go on from where a run stopped.

    Args:
        recipe: a recipe, or the path of one.
        out: folder of the new checkpoint, or ``s3://bucket/folder``.
        executor: where tasks run, and what they may use there: see ``Where``, also for ``address``,
            ``memory_bytes``, ``threads``, ``device`` and ``gpus``. A run that began on one kind of
            device is not gone on with on another.
        overwrite: replace another checkpoint at ``out``, once the new one is complete.
        fresh: forget an unfinished run at ``out``.
        stop: set it to stop the run; the same call goes on from there.
        settings: of the places that bytes come from and go to.
    Raises:
        ShardmergeError: for everything that a user can mend.
    """
    where = Where(executor, address, device, gpus, memory_bytes, threads)
    where.check()
    stop = stop or threading.Event()
    ready = prepare(recipe, out, where, settings=settings, stop=stop)
    return run(ready, where, overwrite=overwrite, fresh=fresh, progress=progress, stop=stop)


def run(
    ready: Prepared,
    where: Where,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    stop: threading.Event,
) -> Published:
    """Do what was planned, and publish it; see ``merge``."""
    plan, output, stores = ready.plan, ready.output, ready.stores
    refuse_sources(output, ready.sources)
    files = ready.files
    if not fresh and ready.is_published():
        sweep(output)
        return ready.published(already=True)
    with output.locked():
        if not fresh and ready.is_published():  # by a run that was waited for
            output.tidy()
            return ready.published(already=True)
        with staging(output, plan, files, overwrite=overwrite, fresh=fresh) as (ledger, writer):
            given = dict(ready.given)
            if ready.first is not None:
                run(ready.first, where, progress=progress, stop=stop)
                given |= decisions_after(ready)
            give(ledger, given)
            with executors.start(
                where.executor,
                plan,
                writer,
                stores,
                output,
                address=where.address,
                gpus=where.gpus,
            ) as workers:
                execute(plan, workers, ledger, writer, progress=progress or Quiet(), stop=stop)
            refuse_occupied(output, plan, files, ledger, overwrite=overwrite)  # by now, perhaps
            finish(ready, ledger)
    return ready.published(already=False)


def decisions_after(ready: Prepared) -> dict[str, Decision]:
    """What a plan is given once its first is published: what the sum is scaled with."""
    assert ready.first is not None
    method: Method = adding(ready.first.plan.outputs)
    sums = published_sums(ready.first.output)
    if not sums:  # of tensors without elements
        return scale_decisions(ready.plan, 1.0)
    norms = norms_in(sums)
    return scale_decisions(ready.plan, method.scale(norms.models, norms.total))


def give(ledger: Ledger, decisions: Mapping[str, Decision]) -> None:
    """Record decisions that no task takes, unless an earlier run has."""
    ledger.record(decisions={k: d for k, d in decisions.items() if k not in ledger.decisions})


def published_sums(output: Output) -> tuple[float, ...]:
    """What a published checkpoint's method has summed up over the model."""
    return tuple(map(float, json.loads(output.read(PROVENANCE)).get("sums", ())))


def finish(ready: Prepared, ledger: Ledger) -> None:
    """Check what was written and read, and publish it.

    Raises:
        SourceChangedError: an input is not what it was when the plan was made.
        NonFiniteError: NaN or infinity, which the recipe does not allow.
    """
    plan = ready.plan
    _refuse_changed(ready.sources, ready.stores)
    _refuse_non_finite(plan, ledger)
    names = [tensor.name for tensor in plan.tensors]
    publish(ready.output, plan.shards, names, ledger, _files(ready, ledger))


# --- checks before publishing -------------------------------------------------------------------


def _refuse_changed(sources: Sources, stores: Stores) -> None:
    def same(checkpoint: Checkpoint, folder: bool, file: str) -> bool:
        store = stores.open(checkpoint.url)
        found = store.stat(store.join(checkpoint.url, file) if folder else checkpoint.url)
        return found is not None and found.version == checkpoint.versions[file]

    parts = [(name, part) for name, checkpoint in sources.items() for part in checkpoint.parts]
    folders = {part.url: stores.open(part.url).is_folder(part.url) for _, part in parts}
    files = [(name, part, file) for name, part in parts for file in part.versions]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        found = pool.map(lambda item: same(item[1], folders[item[1].url], item[2]), files)
        for (name, _, file), unchanged in zip(files, found, strict=True):
            if not unchanged:
                raise SourceChangedError(
                    f"{name}: {file} changed while it was being merged. Nothing was published.\n"
                    "  Put it back, or run the command again with --fresh to merge it as it is."
                )


def _non_finite(ledger: Ledger) -> list[tuple[int, int]]:
    """Number and input of every tensor that holds NaN or infinity; input -1 is the result."""
    return sorted({pair for receipt in ledger.receipts.values() for pair in receipt.non_finite})


_ALLOW = (
    "\n  To publish it as it is, write allow_non_finite: true into the recipe and run the same "
    "command again: nothing is lost. Else:"
)


def _refuse_non_finite(plan: Plan, ledger: Ledger) -> None:
    if plan.recipe.allow_non_finite:
        return
    found = _non_finite(ledger)
    if not found:
        return
    places: dict[str, list[str]] = {}
    for number, which in found:
        tensor = plan.tensors[number]
        urls = [] if which < 0 else [s.url for s in inputs_of(tensor)[which].all_segments]
        where = " with ".join(dict.fromkeys(urls)) or "the result"
        places.setdefault(tensor.name, []).append(where)
    raise NonFiniteError(
        f"NaN or infinity in {counted(len(places), 'tensor')}; nothing was published:\n"
        + "\n".join(f"  {name}: {', '.join(where)}" for name, where in places.items())
        + ("" if adding(plan.outputs) else _ALLOW)
        + "\n  Mend the inputs, or take these tensors from another model by a rule, and start over "
        "with --fresh."
    )


# --- what is published beside the shards --------------------------------------------------------


def _files(ready: Prepared, ledger: Ledger) -> dict[str, bytes]:
    """Their content."""
    plan, stores = ready.plan, ready.stores

    def read(checkpoint: Checkpoint, name: str) -> bytes:
        store = stores.open(checkpoint.url)
        return store.read(store.join(checkpoint.url, name))

    donor, tokenizer = donors(plan, ready.sources)
    files = assets.files_of(plan.recipe, plan.outputs, donor, tokenizer, read, version=__version__)
    files[RECIPE] = assets.public_text(plan.recipe.text).encode()
    files[PROVENANCE] = assets.provenance(
        version=__version__,
        fingerprint=fingerprint(plan.identity),
        recipe=plan.recipe,
        sources=ready.sources,
        shards=shard_checksums(plan.shards, ledger.receipts),
        files=files,
        non_finite=len(_non_finite(ledger)),
        notes=(*plan.recipe.notes, *plan.outputs.notes),
        sums=total_of(ledger.receipts.values()),
    )
    # After the provenance: it differs with every run.
    files[TASKS] = to_parquet([*_first_tasks(ready), *ledger.tasks])
    return files


def _first_tasks(ready: Prepared) -> list[TaskRecord]:
    """What became of the tasks of the plan that was published first."""
    if ready.first is None:
        return []
    rows = from_parquet(ready.first.output.read(TASKS))
    return [replace(row, step="sum") if row.step == "merge" else row for row in rows]
