"""What a step of continual merging is: its recipe, its place, and what is refused. Pure."""

from __future__ import annotations

import enum
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import yaml

from shardmerge.errors import StateError, UsageError
from shardmerge.kept import adding, is_added, norms_in
from shardmerge.layers import is_tied, output_embeddings
from shardmerge.match import Outputs, OutputTensor
from shardmerge.methods.api import CONTINUAL, Method, MethodInfo
from shardmerge.progress import counted
from shardmerge.recipe import ModelName, Recipe, Source, rules_for
from shardmerge.recipe_parts import wrong_value
from shardmerge.recipe_yaml import nearest, read_yaml
from shardmerge.sources.tensor import Checkpoint
from shardmerge.state import Model, Record, Step

# --- what is refused ------------------------------------------------------------------------------


def refuse_known(record: Record, name: ModelName, model: Checkpoint, state: str) -> None:
    """Refuse a model that is in the state."""
    for step in record.steps:
        known = step.model
        if name == known.model and model.all_versions == dict(known.versions):
            raise StateError(
                f"{name} is in {state} already, as step {step.number} ({known.name}).\n"
                "  Go back with 'shardmerge continual undo' if it should not be."
            )


def refuse_other_tensors(name: ModelName, model: Checkpoint, base: Checkpoint) -> None:
    """Refuse a model that has other tensors than the base model."""
    tied = output_embeddings(base.tensors) if is_tied(model.config) else []
    lacking = [t for t in base.tensors if t not in model.tensors and t not in tied]
    beyond = [t for t in model.tensors if t not in base.tensors]
    if lacking:
        raise StateError(
            f"{name} lacks {counted(len(lacking), 'tensor')} of the base model: "
            f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}.\n"
            "  A step adds all tensors or none. Save the whole model."
        )
    if beyond:
        raise StateError(
            f"{name} has {counted(len(beyond), 'tensor')} that the base model lacks: "
            f"{', '.join(beyond[:3])}{', ...' if len(beyond) > 3 else ''}.\n"
            "  There is nothing to add them to. Save the model without them; a copy of a tied "
            "embedding is not needed."
        )


def refuse_other_methods(recipe: Recipe, outputs: Outputs, record: Record) -> None:
    """Refuse tensors that would be the base model's without a rule that says so."""
    others = [
        tensor.name
        for tensor in outputs.tensors
        if tensor.method is not None
        and not is_added(tensor)
        and rules_for(recipe, tensor.name).take_from != record.base.model
    ]
    if others or adding(outputs) is None:
        what = ", ".join(others[:3]) or "everything"
        raise StateError(
            f"the rules of this state give {what}{', ...' if len(others) > 3 else ''} to another "
            "method or model; a state adds.\n"
            "  Begin one with rules that say 'parameters: {project: never}' (added as it is), "
            "'from: base' or 'drop: true'."
        )


def refuse_pending(record: Record, model: Model, state: str) -> None:
    """Refuse another model than the one whose step was begun."""
    pending = record.pending
    if pending is not None and pending.model != model.model:
        raise StateError(
            f"adding {pending.model} to {state} was begun and is not complete.\n"
            f"  Run 'shardmerge continual add {state} {pending.model}' to go on, or "
            f"'shardmerge continual undo {state}' to drop it."
        )


def refuse_same(record: Record, step: Step) -> None:
    """Refuse a model that is in the state under another name: the same elements, the same norm."""
    for known in record.steps:
        if (step.norm, step.model.content) == (known.norm, known.model.content):
            raise StateError(
                f"{step.model.model} holds the same elements as step {known.number} "
                f"({known.model.name}) did, and its task vector has the same norm: it is the same "
                "model at another place. It was not added."
            )


# --- steps, methods and recipes -------------------------------------------------------------------


def folder_of(record: Record, model: Model) -> str:
    """Where the sum with one more model lies: never where another sum ever lay."""
    history = [record.base, *(step.model for step in record.steps), model]
    named = [[known.url, known.revision, dict(known.versions)] for known in history]
    digest = hashlib.blake2b(json.dumps(named, sort_keys=True).encode(), digest_size=4)
    return f"steps/{len(record.steps) + 1:06d}-{digest.hexdigest()}"


def step_of(
    record: Record,
    model: Model,
    sums: Sequence[float],
    fingerprint: str,
    versions: Mapping[str, str],
) -> Step:
    """The record of a step, from what was summed up."""
    norms = norms_in(sums)
    everything = (*(step.norm for step in record.steps), *norms.models)
    return Step(
        number=len(record.steps) + 1,
        model=model,
        norm=norms.models[0],
        total=norms.total,
        scale=method_of(record).scale(everything, norms.total),
        added=round(time.time(), 3),
        folder=folder_of(record, model),
        fingerprint=fingerprint,
        versions=dict(versions),
    )


def method_info(name: str) -> MethodInfo:
    """The method of that name that adds one model at a time."""
    if name not in CONTINUAL:
        near = nearest(name, CONTINUAL)
        hint = f" Did you mean '{near}'?" if near else ""
        known = ", ".join(sorted(CONTINUAL))
        raise UsageError(f"'{name}' does not add one model at a time ({known} do).{hint}")
    return CONTINUAL[name]


def defaults_of(info: MethodInfo) -> dict[str, float | bool | str]:
    """The parameters of a method that a state has, with what they are if nothing is said."""
    found: dict[str, float | bool | str] = {}
    for item in info.parameters:
        if item.key != "shuffle" and item.default is not None:
            default = item.default
            found[item.key] = default.value if isinstance(default, enum.Enum) else default
    return found


def setting(info: MethodInfo, text: str) -> tuple[str, float | bool | str]:
    """A parameter from ``KEY=VALUE``."""
    key, separator, value = text.partition("=")
    known = {item.key: item for item in info.parameters if item.key != "shuffle"}
    if not separator or key not in known:
        near = nearest(key, known)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UsageError(
            f"--set {text}: {info.name} has {', '.join(known) or 'no parameters'}; write "
            f"KEY=VALUE.{hint}"
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    problem = wrong_value(known[key], parsed)
    if problem:
        raise UsageError(f"--set {text}: {key} {problem}")
    return key, parsed if isinstance(parsed, bool | str) else float(parsed)


def method_of(record: Record) -> Method:
    """The method with its parameters."""
    info = method_info(record.method)
    values: dict[str, object] = {}
    for item in info.parameters:
        value = record.parameters.get(item.key, item.default)
        values[item.name] = item.kind(value)
    return info.cls(**values)


def recipe_of(record: Record, model: ModelName, *, dtype: str) -> Recipe:
    """What is matched, as a recipe: one model (or the sum) and the base model."""
    values = _values(record, [model]) | {"merge_method": "opcm", "out_dtype": dtype}
    if record.method != "opcm":
        del values["parameters"]
    return Recipe.parse(yaml.safe_dump(values, sort_keys=False), where="continual")


def told(recipe: Recipe, record: Record, last: ModelName | None, dtype: str | None) -> Recipe:
    """The recipe as it is published: all models that are in the state, in their order.

    Args:
        last: the one that is being added.
    """
    added = [*(step.model.model for step in record.steps), *([] if last is None else [last])]
    values = _values(record, added)
    if dtype is not None:
        values["dtype"] = dtype
    (part,) = recipe.slices
    sources = tuple(Source(model, None, {}, {}, str(model)) for model in added)
    return replace(
        recipe,
        text=yaml.safe_dump(values, sort_keys=False),
        merge_method=record.method,
        slices=(replace(part, sources=sources),),
    )


def named(name: ModelName) -> dict[str, object]:
    """A model as a recipe names it, whatever is in its path."""

    def path(name: ModelName) -> dict[str, object]:
        revision = {} if name.revision is None else {"revision": name.revision}
        return {"path": name.url, **revision}

    if name.adapter is None:
        return {"model": path(name)}
    return {"model": path(name), "lora": path(name.adapter), "any_base": name.any_base}


def _values(record: Record, models: Sequence[ModelName]) -> dict[str, object]:
    values: dict[str, object] = {
        "merge_method": record.method,
        "base_model": named(record.base.model),
        "models": [named(model) for model in models],
        "parameters": dict(record.parameters),
    }
    if record.rules:
        values["rules"] = read_yaml(record.rules, "rules").value
    return values


def in_dtype_of_base(tensor: OutputTensor) -> OutputTensor:
    """A tensor in the base model's dtype."""
    if tensor.base is None or not tensor.dtype.is_float:
        return tensor
    if tensor.base.dtype.is_fp8:
        raise UsageError(
            f"{tensor.name} is {tensor.base.dtype.torch_name} in the base model, which cannot be "
            "written. Give --dtype bfloat16, or another."
        )
    return replace(tensor, dtype=tensor.base.dtype)
