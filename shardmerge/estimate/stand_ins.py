"""Stand-ins for Fisher information that need no data: ordinary checkpoints, made as merges are."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from shardmerge.errors import CheckpointError, PlanError, UsageError
from shardmerge.execute import Progress
from shardmerge.match import Outputs, OutputTensor
from shardmerge.merge import run
from shardmerge.methods.api import Method, info_of
from shardmerge.methods.fisher import SMALL
from shardmerge.methods.stand_ins import SecondMoment, TaskVectorSquared, Untrained
from shardmerge.numerics import DType
from shardmerge.prepare import (
    Planner,
    Prepared,
    Where,
    model_named,
    open_sources,
    public_name,
)
from shardmerge.progress import counted
from shardmerge.publish import Published
from shardmerge.recipe import ModelName, Recipe
from shardmerge.sources import open_adam
from shardmerge.sources.folder import few
from shardmerge.sources.tensor import Checkpoint, TensorRef
from shardmerge.sources.zero_states import SECOND_MOMENT
from shardmerge.steps import named
from shardmerge.stores import Settings, Stores, is_remote


@dataclass(frozen=True, slots=True)
class To:
    """Where a stand-in is published, and what its run may use and does.

    Args:
        out: folder of the new checkpoint, or ``s3://bucket/folder``.
        overwrite: replace another checkpoint at ``out``, once the new one is complete.
        fresh: forget an unfinished run at ``out``.
        stop: set it to stop the run; the same call goes on from there.
    """

    out: str
    where: Where
    overwrite: bool = False
    fresh: bool = False
    progress: Progress | None = None
    stop: threading.Event | None = None
    settings: Settings | None = None


def fisher_from_task_vector(model: str, to: To, *, base: str) -> Published:
    """F = (model - base)^2, element by element: a float32 checkpoint with the model's names.

    Integers are left out: no method asks for their Fisher information.

    Args:
        model: anything that is read as a checkpoint, with ``+`` and an adapter of it, if need be;
            ``base``, its base model, too.
    Raises:
        UsageError: for a model and itself.
        PlanError: for models that do not fit together.
        ShardmergeError: for everything else that a user can mend.
    """
    planner = _planner(to)
    ours, theirs = model_named(model), model_named(base)
    model, base = (public_name(name, planner.stores) for name in (ours, theirs))
    if ours == theirs:
        raise _same_model(model, base)
    one = {"model": named(ours), "parameters": {"weight": 1.0}}
    recipe = _recipe("task_arithmetic", base_model=named(theirs), models=[one])
    sources = open_sources(recipe, planner.stores, advice="")
    if _same(sources[ours], sources[theirs]):
        raise _same_model(model, base)
    try:
        outputs = planner.match(recipe, sources)
    except PlanError:  # whose advice is for recipes
        _refuse_other_shapes(sources[ours], sources[theirs], model, base)
        raise
    _refuse_unpaired(outputs, model, base)
    method = TaskVectorSquared()
    tensors = {t.name: replace(t, method=method) for t in outputs.tensors if t.method is not None}
    recipe = _told(recipe, method, base_model=base, model=model)
    return _run(planner.plan(recipe, sources, _only(outputs, tensors)), to)


def _same(model: Checkpoint, base: Checkpoint) -> bool:
    """Whether both are the same files, whatever way they are named."""
    places = [
        [part.url if is_remote(part.url) else str(Path(part.url).resolve()) for part in each.parts]
        for each in (model, base)
    ]
    return places[0] == places[1] and model.all_versions == base.all_versions


def _same_model(model: str, base: str) -> UsageError:
    return UsageError(
        f"{model} and --base {base}: they are the same model; F would be 0 everywhere."
    )


_ONE_ARCHITECTURE = "  Both must be of one architecture, saved in the same way. Check the paths."


def _refuse_other_shapes(ours: Checkpoint, theirs: Checkpoint, model: str, base: str) -> None:
    """Refuse models whose tensors have other names or shapes."""
    shapes = [{name: ref.shape for name, ref in each.tensors.items()} for each in (ours, theirs)]
    names = [*shapes[0], *(name for name in shapes[1] if name not in shapes[0])]
    wrong = [name for name in names if shapes[0].get(name) != shapes[1].get(name)]
    if wrong:
        raise PlanError(
            f"{model} and its base model {base} differ in names or shapes of "
            f"{counted(len(wrong), 'tensor')}: {few(wrong)}.\n{_ONE_ARCHITECTURE}"
        )


def _refuse_unpaired(outputs: Outputs, model: str, base: str) -> None:
    """Refuse tensors that one of two models lacks."""
    alone = [t.name for t in outputs.tensors if t.method is not None and t.base is None]
    if alone:
        raise PlanError(
            f"{counted(len(alone), 'tensor')} of {model} and its base model {base} "
            f"{'is' if len(alone) == 1 else 'are'} in one of them only: {few(alone)}.\n"
            f"{_ONE_ARCHITECTURE}"
        )


def fisher_from_adam(training: str, to: To) -> Published:
    """F = Adam's second moment of each parameter, as it is stored: float32, read in place.

    What was not trained (frozen parameters, buffers) has F = 0, and is told in the notes. Integers
    are left out.

    Args:
        training: folder of a training by DeepSpeed ZeRO-1, 2 or 3, of a universal checkpoint, or of
            ``torch.distributed``.
    Raises:
        CheckpointError: for one without Adam's states.
        ShardmergeError: for everything else that a user can mend.
    """
    recipe = _recipe("passthrough", models=[{"model": {"path": training}}])
    planner = _planner(to)
    weights, moments = open_adam(training, planner.stores)
    _check(weights, moments)
    name = recipe.slices[0].sources[0].model
    sources = {name: weights, ModelName(name.url, SECOND_MOMENT): moments}
    # What is not read as weights (the optimizer's folder) is read here.
    outputs = planner.match(recipe, {name: replace(weights, ignored=())})
    methods = SecondMoment(), Untrained()
    tensors = {
        t.name: _moment_of(t, moments.tensors, *methods)
        for t in outputs.tensors
        if t.method is not None
    }
    untrained = [t.name for t in tensors.values() if t.method is methods[1]]
    if untrained:
        note = f"not trained, so 0: {counted(len(untrained), 'tensor')} ({few(untrained, 8)})"
        outputs = replace(outputs, notes=(*outputs.notes, note))
    recipe = _told(recipe, methods[0], model=training)
    return _run(planner.plan(recipe, sources, _only(outputs, tensors)), to)


def _moment_of(
    tensor: OutputTensor, moments: Mapping[str, TensorRef], trained: Method, untrained: Method
) -> OutputTensor:
    moment = moments.get(tensor.name)
    if moment is None:
        return replace(tensor, method=untrained)
    return replace(tensor, method=trained, models=(moment,))


def _check(weights: Checkpoint, moments: Checkpoint) -> None:
    """Refuse moments that are not of these weights."""
    wrong = [
        name
        for name, moment in moments.tensors.items()
        if name not in weights.tensors or weights.tensors[name].shape != moment.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{moments.url}: {SECOND_MOMENT} of {counted(len(wrong), 'parameter')} that the model "
            f"does not have in this shape: {few(wrong)}.\n"
            "  Its optimizer was saved with numbers in place of names, or is of another model."
        )


# --- as merges are ------------------------------------------------------------------------------


def _recipe(method: str, **values: object) -> Recipe:
    """What is matched, as a recipe of a method with the same inputs."""
    text = yaml.safe_dump({"merge_method": method, "out_dtype": "float32", **values})
    return Recipe.parse(text, where="fisher")


def _told(recipe: Recipe, method: Method, **models: str) -> Recipe:
    """The recipe as it is published: what was made, of which models."""
    name = info_of(method).name
    text = yaml.safe_dump({"fisher": name, **models}, sort_keys=False)
    return replace(recipe, text=text, merge_method=name)


def _planner(to: To) -> Planner:
    to.where.check()
    stop = to.stop or threading.Event()
    return Planner(to.out, to.where, Stores(to.settings, stopping=stop), stop)


def _only(outputs: Outputs, tensors: Mapping[str, OutputTensor]) -> Outputs:
    """These of the output's tensors, in float32."""
    shards = zip(outputs.tensors, outputs.shard_of, strict=True)
    return replace(
        outputs,
        notes=(*outputs.notes, SMALL),
        tensors=tuple(replace(tensor, dtype=DType.F32) for tensor in tensors.values()),
        shard_of=tuple(shard for tensor, shard in shards if tensor.name in tensors),
    )


def _run(ready: Prepared, to: To) -> Published:
    return run(
        ready,
        to.where,
        overwrite=to.overwrite,
        fresh=to.fresh,
        progress=to.progress,
        stop=to.stop or threading.Event(),
    )
