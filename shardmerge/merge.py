"""The whole path: recipe, sources, plan, execute, publish."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import llvmlite
import yaml

from shardmerge import __version__, assets
from shardmerge.errors import NonFiniteError, SourceChangedError
from shardmerge.execute import Progress, execute
from shardmerge.executors.api import Executor
from shardmerge.executors.local import LocalExecutor
from shardmerge.ledger import Ledger, fingerprint
from shardmerge.match import Outputs, match
from shardmerge.plan import Plan, inputs_of, make_plan
from shardmerge.progress import Quiet, counted
from shardmerge.publish import PROVENANCE, RECIPE, Published, publish, shard_checksums
from shardmerge.recipe import ModelName, Recipe
from shardmerge.recipe_yaml import read_yaml
from shardmerge.shards import ShardWriter
from shardmerge.sources import open_checkpoint
from shardmerge.sources.tensor import Checkpoint
from shardmerge.staging import (
    is_published,
    output_folder,
    refuse_occupied,
    refuse_sources,
    staging,
    sweep,
)
from shardmerge.stores import open_store

DEFAULT_MEMORY_BYTES = 4 * 2**30

Sources = Mapping[ModelName, Checkpoint]

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
    place = output_folder(out)
    refuse_sources(place, sources)
    files = _written_files(plan, sources)
    if not fresh and is_published(place, plan, files):
        sweep(place)
        return _published(plan, already=True)
    with staging(place, plan, files, overwrite=overwrite, fresh=fresh) as (ledger, writer):
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
        refuse_occupied(place, plan, files, ledger, overwrite=overwrite)  # by now, perhaps
        contents = _contents(plan, sources, checksums, non_finite=len(_non_finite(ledger)))
        publish(place, plan.shards, names, ledger, contents)
    return _published(plan, already=False)


def prepare(
    recipe: Recipe | str, out: str, *, memory_bytes: int, threads: int | None
) -> tuple[Plan, Sources]:
    """Read the recipe and the headers of its sources, and plan. Touches nothing at ``out``."""
    output_folder(out)  # refuses what is none
    recipe = Recipe.load(recipe)
    sources = open_sources(recipe)
    outputs = match(recipe, sources)
    outputs = replace(outputs, notes=(*outputs.notes, *_ignored(sources)))
    _config(outputs, sources[outputs.donor])  # refuses layers that a config cannot describe
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
    return {name: open_checkpoint(name.url, name.revision) for name in _named(recipe)}


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


# --- small files --------------------------------------------------------------------------------


def _donors(plan: Plan, sources: Sources) -> tuple[Checkpoint, Checkpoint]:
    """Whose configuration is used, and whose tokenizer."""
    donor = sources[plan.outputs.donor]
    tokenizer = plan.recipe.tokenizer_source
    return donor, donor if tokenizer is None else sources[tokenizer]


def _written_files(plan: Plan, sources: Sources) -> list[str]:
    """Names of every file of the checkpoint that is not a shard or the index."""
    donor, tokenizer = _donors(plan, sources)
    copied = [name for _, name in assets.files_to_copy(donor, tokenizer)]
    return [*copied, *(["config.json"] if donor.config else []), "README.md", RECIPE, PROVENANCE]


def _contents(
    plan: Plan,
    sources: Sources,
    checksums: Mapping[str, Mapping[str, object]],
    *,
    non_finite: int,
) -> dict[str, bytes]:
    """Their content."""
    donor, tokenizer = _donors(plan, sources)
    files: dict[str, bytes] = {}
    for checkpoint, name in assets.files_to_copy(donor, tokenizer):
        store = open_store(checkpoint.url)
        files[name] = store.read(store.join(checkpoint.url, name))
    if donor.config:
        files["config.json"] = _json(_config(plan.outputs, donor))
    files["README.md"] = assets.model_card(plan.recipe, plan.outputs, version=__version__).encode()
    files[RECIPE] = assets.public_text(plan.recipe.text).encode()
    files[PROVENANCE] = _json(
        assets.provenance(
            version=__version__,
            fingerprint=fingerprint(plan.identity),
            recipe=plan.recipe,
            sources=sources,
            shards=checksums,
            non_finite=non_finite,
            notes=(*plan.recipe.notes, *plan.outputs.notes),
        )
    )
    return files


def _config(outputs: Outputs, donor: Checkpoint) -> dict[str, object]:
    return assets.patched_config(
        donor.config,
        dtype=assets.written_dtype(outputs.tensors),
        layer_count=outputs.layer_count,
        layers=outputs.layers,
        untied=outputs.untied,
        vocab_size=outputs.vocab_size,
    )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _published(plan: Plan, *, already: bool) -> Published:
    return Published(
        out=plan.out,
        shards=tuple(shard.name for shard in plan.shards),
        nbytes=plan.output_bytes,
        tensors=len(plan.tensors),
        already=already,
        notes=(*plan.recipe.notes, *plan.outputs.notes),
    )
