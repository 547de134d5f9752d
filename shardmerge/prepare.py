"""Everything that is known before anything runs: what is read, where, and the plan."""

from __future__ import annotations

import gc
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
from shardmerge.errors import CheckpointError, RecipeError, UsageError
from shardmerge.kept import adding, check_added, refs_of, scaled, summed
from shardmerge.kernels.device import AUTO, CPU, CUDA, choose_device
from shardmerge.match import Outputs, match
from shardmerge.methods.api import Decision
from shardmerge.outputs import Output, open_output
from shardmerge.outputs.api import KEPT
from shardmerge.plan import Plan, make_plan
from shardmerge.publish import PROVENANCE, RECIPE, Published
from shardmerge.recipe import ModelName, Recipe
from shardmerge.recipe_yaml import read_yaml
from shardmerge.records import TASKS
from shardmerge.sources import Twins, open_adapted, open_checkpoint
from shardmerge.sources.tensor import Checkpoint
from shardmerge.staging import is_published
from shardmerge.stores import Settings, Stores

DEFAULT_MEMORY_BYTES = 4 * 2**30
GPU_CPUS = 4
"""CPUs of a cluster's worker for each GPU: they read and write for it."""
AT_A_TIME = 16
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
        donor, tokenizer = donors(self.plan, self.sources)
        return [*assets.names_of_files(donor, tokenizer), RECIPE, PROVENANCE, TASKS]

    def is_published(self) -> bool:
        """Whether the checkpoint is there, complete as far as names, sizes and headers tell."""
        allow = self.plan.recipe.allow_non_finite
        return is_published(self.output, self.plan, self.files, allow_non_finite=allow)

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


def prepare(
    recipe: Recipe | str,
    out: str,
    where: Where,
    *,
    settings: Settings | None = None,
    stop: threading.Event | None = None,
) -> Prepared:
    """Read the recipe and the headers of its sources, and plan. Touches nothing at ``out``."""
    # Before anything is read:
    where.chosen()
    open_output(out, Stores(settings, stopping=stop))
    with _uncollected():
        planner = Planner(out, where, Stores(settings, stopping=stop), stop)
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
        stores: that sources are read from, now and by workers: they know what URLs must not tell.
        stop: ends what waits for a server.
    """

    out: str
    where: Where
    stores: Stores
    stop: threading.Event | None

    def read(self, recipe: Recipe) -> tuple[Sources, Outputs]:
        """Open what a recipe names, and match the tensors."""
        sources = open_sources(recipe, self.stores)
        return sources, self.match(recipe, sources)

    def match(self, recipe: Recipe, sources: Sources) -> Outputs:
        """Match the tensors of sources that are open."""
        outputs = match(recipe, sources)
        notes = [*outputs.notes, *_notes(sources)]
        if not sources[outputs.donor].config:
            notes.append(f"{outputs.donor}: has no config.json, so there is none beside the result")
        outputs = replace(outputs, notes=tuple(notes))
        assets.config_of(outputs, sources[outputs.donor])  # refuses layers that it cannot describe
        return outputs

    def plan(
        self, recipe: Recipe, sources: Sources, outputs: Outputs, *, step: str = ""
    ) -> Prepared:
        """The plan for these outputs.

        Args:
            step: names one of several plans of a recipe.
        """
        # Stores of its own: when workers that read are ended, the ledger is still written.
        output = open_output(self.out, Stores(self.stores.settings, stopping=self.stop))
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
        return Prepared(plan, sources, output, self.stores)

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


IN_A_RECIPE = " Where '+' is part of a path, write {path: ...}."
"""Advice about models that recipes name."""


def open_sources(recipe: Recipe, stores: Stores, *, advice: str = IN_A_RECIPE) -> Sources:
    """Every checkpoint that the recipe names, by name.

    Args:
        advice: on a model that is not there, where its name has a ``+``.
    """
    names, twins = _named(recipe), Twins()

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        opened = pool.map(lambda name: open_model(name, stores, twins, advice), names)
        return dict(zip(names, opened, strict=True))


def open_model(
    name: ModelName, stores: Stores, twins: Twins | None = None, advice: str = ""
) -> Checkpoint:
    """A checkpoint, with its adapter where it has one; ``advice`` as for ``open_sources``."""
    try:
        found = open_checkpoint(name.url, name.revision, stores, twins)
    except CheckpointError as problem:
        if name.adapter is None:
            raise
        raise CheckpointError(
            f"{problem}\n  (Of {name}: the base of an adapter, '+', and the adapter.{advice})"
        ) from None
    if name.adapter is None:
        return found
    adapter = name.adapter
    return open_adapted(found, adapter.url, adapter.revision, stores, any_base=name.any_base)


def model_named(text: str) -> ModelName:
    """A model as a command names it.

    A local path that exists is itself, whatever is in it; else it is what a recipe makes of the
    text: a path or URL, with ``@revision``, with ``+`` and an adapter.

    Raises:
        UsageError: for a text that names no model.
    """
    if os.path.exists(os.path.expanduser(text)):  # noqa: PTH110, PTH111  Path raises
        return ModelName(text.rstrip("/") or "/")
    values = {"merge_method": "linear", "models": [{"model": text, "parameters": {"weight": 1.0}}]}
    try:
        recipe = Recipe.parse(yaml.safe_dump(values), where=text)
    except RecipeError as problem:
        what = str(problem).removeprefix("models[0].model: ").partition("; if ")[0]
        raise UsageError(f"a model {what}" if what.startswith("must") else what) from None
    return recipe.slices[0].sources[0].model


def public_name(name: ModelName, stores: Stores) -> str:
    """The name as it may be shown: without login and query, which the stores keep for requests."""
    adapter = name.adapter and replace(name.adapter, url=stores.public(name.adapter.url))
    return str(replace(name, url=stores.public(name.url), adapter=adapter))


def _named(recipe: Recipe) -> list[ModelName]:
    """The checkpoints that a recipe names, each once, in its order."""
    found = [recipe.base_model, recipe.tokenizer_source]
    for part in recipe.slices:
        for source in (part.base, *part.sources):
            if source is not None:
                found += [source.model, *source.extras.values()]
    found += [rule.take_from for rule in recipe.rules]
    return list(dict.fromkeys(name for name in found if name is not None))


def _notes(sources: Sources) -> Iterator[str]:
    """What was taken for granted, and what lies beside the shards and is not read."""
    for name, checkpoint in sources.items():
        yield from checkpoint.notes
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
        lines = [f"{file} {text}" for file, text in sorted(checkpoint.all_versions.items())]
        identity[f"source {assets.public_text(str(name))}"] = "\n".join(lines)
    return identity


def donors(plan: Plan, sources: Sources) -> tuple[Checkpoint, Checkpoint]:
    """Whose configuration is used, and whose tokenizer."""
    donor = sources[plan.outputs.donor]
    tokenizer = plan.recipe.tokenizer_source
    return donor, donor if tokenizer is None else sources[tokenizer]
