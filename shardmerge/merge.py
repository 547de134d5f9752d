"""The whole path: recipe, sources, plan, execute, publish."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import llvmlite
import numpy as np
import yaml

from shardmerge import __version__, assets, executors
from shardmerge.errors import NonFiniteError, SourceChangedError, UsageError
from shardmerge.execute import Progress, execute
from shardmerge.kept import (
    adding,
    check_added,
    norms_in,
    refs_of,
    scale_decisions,
    scaled,
    summed,
    total_of,
)
from shardmerge.kernels.device import AUTO, CPU, CUDA, choose_device
from shardmerge.ledger import Ledger, fingerprint
from shardmerge.match import Outputs, match
from shardmerge.memory import inputs_of
from shardmerge.methods.api import Decision, Method
from shardmerge.outputs import Output, open_output
from shardmerge.outputs.api import KEPT
from shardmerge.plan import Plan, make_plan
from shardmerge.progress import Quiet, counted
from shardmerge.publish import PROVENANCE, RECIPE, Published, publish, shard_checksums
from shardmerge.recipe import ModelName, Recipe
from shardmerge.recipe_yaml import read_yaml
from shardmerge.records import TASKS, TaskRecord, from_parquet, to_parquet
from shardmerge.sources import Twins, open_checkpoint
from shardmerge.sources.tensor import Checkpoint
from shardmerge.staging import is_published, refuse_occupied, refuse_sources, staging, sweep
from shardmerge.stores import Settings, Stores

DEFAULT_MEMORY_BYTES = 4 * 2**30
GPU_CPUS = 4
"""CPUs of a cluster's worker for each GPU: they read and write for it."""
_AT_A_TIME = 16
"""Small questions that are asked of stores together: each may take a round trip."""

Sources = Mapping[ModelName, Checkpoint]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is known before anything runs.

    Args:
        first: what has to be published before, in a folder of OUT that is removed at the end: a sum
            of task vectors, from which this plan makes the model.
        given: decisions that no task takes, by the ledger's keys.
    """

    plan: Plan
    sources: Sources
    output: Output
    stores: Stores
    first: Prepared | None = None
    given: Mapping[str, Decision] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """Names of every file of the checkpoint that is not a shard or the index."""
        donor, tokenizer = _donors(self.plan, self.sources)
        return [*assets.names_of_files(donor, tokenizer), RECIPE, PROVENANCE, TASKS]

    def published(self, *, already: bool) -> Published:
        """What is told of a published checkpoint.

        Args:
            already: whether it was there before.
        """
        requests, read_bytes = self.stores.requests
        return Published(
            out=self.plan.out,
            shards=tuple(shard.name for shard in self.plan.shards),
            nbytes=self.plan.output_bytes,
            tensors=len(self.plan.tensors),
            already=already,
            notes=(*self.plan.recipe.notes, *self.plan.outputs.notes),
            requests=requests,
            requested_bytes=read_bytes,
        )


@dataclass(frozen=True, slots=True)
class Where:
    """Where tasks run.

    Args:
        executor: ``local`` or ``ray``.
        address: of the cluster; None for one that is started here and ends with the run.
        device: where kernels run: ``cpu``, ``cuda``, or ``auto``: CUDA where there is a device. On
            a cluster, ``auto`` is the CPU.
        gpus: of each worker of a cluster on CUDA; less than 1 for a part of one.
        memory_bytes: the most anonymous memory the process may use; on a cluster, each worker.
        threads: kernels that may run at a time; None: one per CPU that the process may use.
    """

    executor: str = "local"
    address: str | None = None
    device: str = AUTO
    gpus: float = 1.0
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    threads: int | None = None

    def chosen(self) -> str:
        """The device that is meant.

        Raises:
            UsageError: CUDA is asked for, and something that it needs is not there.
        """
        return choose_device(self.device, here=self.executor not in executors.ELSEWHERE)

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            UsageError: for options of a cluster where there is none.
        """
        executors.refuse_array(self.executor)
        if self.executor != "ray" and self.address is not None:
            raise UsageError("--address is of a Ray cluster: give --executor ray with it.")
        if self.gpus != 1.0 and (self.executor != "ray" or self.device != CUDA):
            raise UsageError("--gpus is for --executor ray with --device cuda.")


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
    if not fresh and is_published(output, plan, files):
        sweep(output)
        return ready.published(already=True)
    with output.locked():
        if not fresh and is_published(output, plan, files):  # by a run that was waited for
            output.tidy()
            return ready.published(already=True)
        with staging(output, plan, files, overwrite=overwrite, fresh=fresh) as (ledger, writer):
            given = dict(ready.given)
            if ready.first is not None:
                run(ready.first, where, progress=progress, stop=stop)
                given |= decisions_after(ready)
            ledger.record(decisions={k: v for k, v in given.items() if k not in ledger.decisions})
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
    norms = norms_in(published_sums(ready.first.output))
    return scale_decisions(ready.plan, method.scale(norms.models, norms.total))


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


def prepare(
    recipe: Recipe | str,
    out: str,
    where: Where,
    *,
    settings: Settings | None = None,
    stop: threading.Event | None = None,
) -> Prepared:
    """Read the recipe and the headers of its sources, and plan. Touches nothing at ``out``."""
    where.chosen()  # before anything is read
    with _uncollected():
        planner = Planner(out, where, settings, stop)
        recipe = Recipe.load(recipe)
        sources, outputs = planner.read(recipe)
        check_added(recipe, outputs)
        if adding(outputs) is None:
            return planner.plan(recipe, sources, outputs)
        first = replace(planner, out=f"{out.rstrip('/')}/{KEPT}").plan(
            recipe, sources, summed(outputs, state=None), step="sum"
        )
        made = scaled(outputs, refs_of(first.plan, first.output.url))
        return replace(planner.plan(recipe, sources, made, step="scale"), first=first)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's collector is off: in the millions of objects of a large plan there is no cycle to
    find, and looking for them takes up to a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes plans for one place.

    Args:
        out: where the plan publishes.
        settings: of the places that bytes come from and go to.
        stop: ends what waits for a server.
    """

    out: str
    where: Where
    settings: Settings | None
    stop: threading.Event | None

    def read(self, recipe: Recipe, stores: Stores | None = None) -> tuple[Sources, Outputs]:
        """Open what a recipe names, and match the tensors."""
        stores = stores or Stores(self.settings, stopping=self.stop)
        sources = open_sources(recipe, stores)
        outputs = match(recipe, sources)
        outputs = replace(outputs, notes=(*outputs.notes, *_ignored(sources)))
        assets.config_of(outputs, sources[outputs.donor])  # refuses layers that it cannot describe
        return sources, outputs

    def plan(
        self, recipe: Recipe, sources: Sources, outputs: Outputs, *, step: str = ""
    ) -> Prepared:
        """The plan for these outputs.

        Args:
            step: names one of several plans of a recipe.
        """
        stores = Stores(self.settings, stopping=self.stop)
        # Stores of its own: when workers that read are ended, the ledger is still written.
        output = open_output(self.out, Stores(self.settings, stopping=self.stop))
        device = self._device(outputs)
        cpus, workers = self.where.threads or available_cpus(), None
        if self.where.executor == "ray":
            # Workers are processes: on CPUs of one each, but all that use a GPU share its process.
            cpus, workers = (1, 1) if device == CPU else (self.where.threads or GPU_CPUS, None)
        plan = make_plan(
            recipe,
            outputs,
            self.out,
            memory_bytes=self.where.memory_bytes,
            cpus=cpus,
            workers=workers,
            identity=_identity(recipe, sources, outputs, device, step),
            device=device,
            part_bytes=output.part_bytes,
            buffers_parts=output.buffers_parts,
        )
        return Prepared(plan, sources, output, stores)

    def _device(self, outputs: Outputs) -> str:
        """Where kernels run.

        Raises:
            UsageError: CUDA is asked for, and something that it needs is not there.
        """
        here, device = self.where.executor not in executors.ELSEWHERE, self.where.chosen()
        if device == CUDA and here and any(tensor.whole for tensor in outputs.tensors):
            from shardmerge.kernels.linalg import lacking

            missing = lacking()
            if missing is not None and self.where.device == CUDA:
                raise UsageError(
                    f"--device cuda: {missing}, which decomposes matrices there.\n"
                    "  Install PyTorch with CUDA, or give --device cpu."
                )
            return CPU if missing else CUDA
        return device


def open_sources(recipe: Recipe, stores: Stores) -> Sources:
    """Every checkpoint that the recipe names, by name."""
    names, twins = _named(recipe), Twins()

    def opened_one(name: ModelName) -> Checkpoint:
        return open_checkpoint(name.url, name.revision, stores, twins)

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        opened = pool.map(opened_one, names)
        return dict(zip(names, opened, strict=True))


def _named(recipe: Recipe) -> list[ModelName]:
    """The checkpoints that a recipe names, each once, in its order."""
    found = [recipe.base_model, recipe.tokenizer_source]
    for part in recipe.slices:
        for source in (part.base, *part.sources):
            if source is not None:
                found += [source.model, *source.extras.values()]
    found += [rule.take_from for rule in recipe.rules]
    return list(dict.fromkeys(name for name in found if name is not None))


def _ignored(sources: Sources) -> Iterator[str]:
    """What lies beside the shards of each source and is not read."""
    for name, checkpoint in sources.items():
        if checkpoint.ignored:
            yield f"{name}: not read: {', '.join(checkpoint.ignored)}"


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its control group."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def _identity(
    recipe: Recipe, sources: Sources, outputs: Outputs, device: str, step: str
) -> dict[str, str]:
    """What the bytes of the output depend on. Permissions and resources are not among it."""
    settings = read_yaml(recipe.text, "recipe").value
    assert isinstance(settings, dict)
    settings = {key: value for key, value in settings.items() if key != "allow_non_finite"}
    identity = {
        # Credentials are no part of it: others may be used to go on.
        "recipe": assets.public_text(yaml.safe_dump(settings, sort_keys=True)),
        "shardmerge": __version__,
        "compiler": f"llvmlite {llvmlite.__version__}",
        "device": device,
    }
    if step:
        identity["step"] = step
    if any(tensor.whole for tensor in outputs.tensors):
        identity["linear algebra"] = f"numpy {np.__version__}"  # another may round another way
    for name, checkpoint in sources.items():
        lines = [f"{file} {text}" for file, text in sorted(checkpoint.versions.items())]
        identity[f"source {assets.public_text(str(name))}"] = "\n".join(lines)
    return identity


# --- checks before publishing -------------------------------------------------------------------


def _refuse_changed(sources: Sources, stores: Stores) -> None:
    def same(checkpoint: Checkpoint, folder: bool, file: str) -> bool:
        store = stores.open(checkpoint.url)
        found = store.stat(store.join(checkpoint.url, file) if folder else checkpoint.url)
        return found is not None and found.version == checkpoint.versions[file]

    files = [(name, file) for name, checkpoint in sources.items() for file in checkpoint.versions]
    folders = {name: stores.open(c.url).is_folder(c.url) for name, c in sources.items()}
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        found = pool.map(lambda item: same(sources[item[0]], folders[item[0]], item[1]), files)
        for (name, file), unchanged in zip(files, found, strict=True):
            if not unchanged:
                raise SourceChangedError(
                    f"{name}: {file} changed while it was being merged. Nothing was published.\n"
                    "  Put it back, or run the command again with --fresh to merge it as it is."
                )


def _non_finite(ledger: Ledger) -> list[tuple[int, int]]:
    """Number and input of every tensor that holds NaN or infinity; input -1 is the result."""
    return sorted({pair for receipt in ledger.receipts.values() for pair in receipt.non_finite})


def _refuse_non_finite(plan: Plan, ledger: Ledger) -> None:
    if plan.recipe.allow_non_finite:
        return
    found = _non_finite(ledger)
    if not found:
        return
    places: dict[str, list[str]] = {}
    for number, which in found:
        tensor = plan.tensors[number]
        where = "the result" if which < 0 else inputs_of(tensor)[which].segments[0].url
        places.setdefault(tensor.name, []).append(where)
    raise NonFiniteError(
        f"NaN or infinity in {counted(len(places), 'tensor')}; nothing was published:\n"
        + "\n".join(f"  {name}: {', '.join(where)}" for name, where in places.items())
        + "\n  To publish it as it is, write allow_non_finite: true into the recipe and run the "
        "same command again: nothing is lost.\n"
        "  Else mend the inputs, or take these tensors from another model by a rule, and start "
        "over with --fresh."
    )


# --- what is published beside the shards --------------------------------------------------------


def _donors(plan: Plan, sources: Sources) -> tuple[Checkpoint, Checkpoint]:
    """Whose configuration is used, and whose tokenizer."""
    donor = sources[plan.outputs.donor]
    tokenizer = plan.recipe.tokenizer_source
    return donor, donor if tokenizer is None else sources[tokenizer]


def _files(ready: Prepared, ledger: Ledger) -> dict[str, bytes]:
    """Their content."""
    plan, stores = ready.plan, ready.stores

    def read(checkpoint: Checkpoint, name: str) -> bytes:
        store = stores.open(checkpoint.url)
        return store.read(store.join(checkpoint.url, name))

    donor, tokenizer = _donors(plan, ready.sources)
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
