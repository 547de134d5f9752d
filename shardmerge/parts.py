"""What each slice of a recipe contributes to the output: names, layer numbers, depths. Pure.

A recipe without ``slices`` is one part, in which every tensor keeps its name. One with ``slices``
is a part for what comes before the layers (the first slice's), one for the layers of each slice,
and one for what comes after them (the last slice's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain

from shardmerge import mismatch
from shardmerge.layers import (
    Layout,
    depth,
    input_embedding,
    is_before_layers,
    is_encoder_decoder,
    is_tied,
    layout_of,
    output_embeddings,
)
from shardmerge.mismatch import Findings
from shardmerge.recipe import ModelName, Recipe, Slice, Source
from shardmerge.sources.tensor import Checkpoint, TensorRef

View = Mapping[str, TensorRef]
"""Tensors of a checkpoint by the names that they have in the output."""
Views = Mapping[ModelName, View]


@dataclass(frozen=True, slots=True)
class Part:
    """Output tensors that come from one slice.

    Args:
        slice: its number.
        base_model: of the slice or the recipe, even if only its config is used.
        base: its tensors; None where there is no base model, or it is not known which layers.
        models: the sources of the slice.
        sources: the tensors of each.
        positions: the numbers of all sources.
        names: of all of these tensors, in output order.
        depths: of names in a stack of layers, from 0 (first layer) to 1 (last); others are at 0.
        numbered: whether names are layers that are numbered anew.
        layer_count: of the model whose config is used.
        beyond: names of layers beyond these.
    """

    slice: int
    base_model: ModelName | None
    base: View | None
    models: tuple[ModelName, ...]
    sources: tuple[View, ...]
    positions: tuple[int, ...]
    names: tuple[str, ...]
    depths: Mapping[str, float]
    numbered: bool
    layer_count: int = 0
    beyond: frozenset[str] | None = None


def tied_views(
    recipe: Recipe, sources: Mapping[ModelName, Checkpoint]
) -> tuple[Views, dict[str, list[ModelName]]]:
    """The tensors of each model, with its tied output embedding where another model stores one.

    Returns:
        the tensors of each model by name, and the models in which each output embedding is tied.
    """
    models = [source.model for part in recipe.slices for source in part.sources]
    models += [part.base.model for part in recipe.slices if part.base]
    models += [recipe.base_model] if recipe.base_model else []
    stored = {model: output_embeddings(sources[model].tensors) for model in dict.fromkeys(models)}
    heads = dict.fromkeys(chain.from_iterable(stored.values()))
    views: dict[ModelName, View] = {}
    tied: dict[str, list[ModelName]] = {}
    for model, own in stored.items():
        tensors = views[model] = sources[model].tensors
        embedding = None
        if heads and not own and is_tied(sources[model].config):
            embedding = input_embedding(tensors)
        if embedding is not None:
            views[model] = {**tensors, **dict.fromkeys(heads, tensors[embedding])}
            for head in heads:
                tied.setdefault(head, []).append(model)
    return views, tied


# --- without slices -----------------------------------------------------------------------------


def plain_part(
    recipe: Recipe,
    sources: Mapping[ModelName, Checkpoint],
    views: Views,
    donor: ModelName,
    findings: Findings,
) -> list[Part]:
    """The one part of a recipe without ``slices``; names in the donor's order, then the others'."""
    for model, view in views.items():
        if views[donor].keys().isdisjoint(view):
            findings.problem(mismatch.Plain(_nothing_shared(donor, model, views)))
    models = tuple(source.model for source in recipe.slices[0].sources)
    views_of_models = tuple(views[model] for model in models)
    names = tuple(dict.fromkeys(chain(views[donor], *views_of_models)))
    layout = layout_of(names, sources[donor].config)
    count = layout.layers_among(views[donor])
    return [
        Part(
            slice=0,
            base_model=recipe.base_model,
            base=None if recipe.base_model is None else views[recipe.base_model],
            models=models,
            sources=views_of_models,
            positions=tuple(range(len(models))),
            names=names,
            depths={name: layout.depth(name) for name in layout.places},
            numbered=False,
            layer_count=count,
            beyond=_beyond(layout, count) if sources[donor].config and count else None,
        )
    ]


def _beyond(layout: Layout, count: int) -> frozenset[str]:
    """Names of the main stack's layers from number ``count``."""
    if layout.main is None or layout.lengths[layout.main] <= count:
        return frozenset()
    return frozenset(
        name
        for name, place in layout.places.items()
        if place.prefix == layout.main and place.layer >= count
    )


def _nothing_shared(donor: ModelName, model: ModelName, views: Views) -> str:
    first, second = (next(iter(views[name]), "nothing") for name in (donor, model))
    return (
        f"{model} and {donor} have no tensor name in common ({second}, ...; {first}, ...).\n"
        "  Only models of one architecture, saved in the same way, can be merged. Save both with\n"
        "  the same version of transformers, or check the paths."
    )


# --- with slices --------------------------------------------------------------------------------


def layered_parts(
    recipe: Recipe,
    sources: Mapping[ModelName, Checkpoint],
    views: Views,
    donor: ModelName,
    findings: Findings,
) -> tuple[list[Part], tuple[int, ...]]:
    """The parts of a recipe with ``slices``, in output order.

    Returns:
        them, and for each output layer the layer of the donor whose settings it takes.
    """
    layouts = {model: layout_of(view, sources[model].config) for model, view in views.items()}
    if not _check(recipe, sources, layouts, findings):
        return [], ()
    before: list[Part] = []
    layers: list[int] = []
    for number, recipe_slice in enumerate(recipe.slices):
        before.append(_layers(number, recipe_slice, views, layouts, first=len(layers)))
        donors = [source for source in _all(recipe_slice) if source.model == donor]
        start, stop = _range((*donors, *recipe_slice.sources)[0])
        layers += range(start, stop)
    outside = _outside_layers(views, layouts)
    head = _outside(recipe, 0, views, layouts, [name for name in outside if outside[name]])
    last = len(recipe.slices) - 1
    tail = _outside(recipe, last, views, layouts, [name for name in outside if not outside[name]])
    _note_left_out(views, layouts, {*head.names, *tail.names}, findings)
    embedding = input_embedding(views[donor])
    if embedding and not output_embeddings(outside) and set(head.models) != set(tail.models):
        last_models = mismatch.models(tail.models)
        findings.note(f"also the output embedding, after layers of {last_models}", embedding)
    return [head, *before, tail], tuple(layers)


def _all(recipe_slice: Slice) -> tuple[Source, ...]:
    """The base model of a slice, if it has layers, and its sources."""
    base = recipe_slice.base
    return (*((base,) if base and base.layers else ()), *recipe_slice.sources)


def _range(source: Source) -> tuple[int, int]:
    assert source.layers is not None, f"{source.where} has no layer_range"
    return source.layers


def _check(
    recipe: Recipe,
    sources: Mapping[ModelName, Checkpoint],
    layouts: Mapping[ModelName, Layout],
    findings: Findings,
) -> bool:
    """Whether all layers that the slices name are there; reports what is not."""
    problems = []
    for model, layout in layouts.items():
        if is_encoder_decoder(layout, sources[model].config):
            problems.append(
                f"slices: {model} has an encoder and a decoder, whose layers are numbered apart.\n"
                "  Slices of such models are not supported; merge whole models with `models:`."
            )
        elif layout.main is None:
            problems.append(
                f"slices: {model} has no numbered layers among its {len(sources[model].tensors):,} "
                "tensors.\n  Merge whole models with `models:`."
            )
    mains: dict[str | None, ModelName] = {}
    for model, layout in layouts.items():
        mains.setdefault(layout.main, model)
    if not problems and len(mains) > 1:
        told = ", ".join(f"'{main}0.' in {model}" for main, model in mains.items())
        problems.append(
            f"slices: the models name their layers in different ways: {told}.\n"
            "  Only models of one architecture, saved in the same way, can be merged."
        )
    for recipe_slice in recipe.slices:
        everyone = _all(recipe_slice)
        problems += [_too_far(source, layouts[source.model]) for source in everyone]
        lengths = {stop - start for start, stop in map(_range, everyone)}
        if len(lengths) > 1:
            told = ", ".join(f"{list(_range(source))} of {source.model}" for source in everyone)
            problems.append(
                f"{recipe_slice.where}: the sources have different numbers of layers: {told}.\n"
                "  Layers are merged one by one, so each layer_range must be equally long."
            )
    problems = [problem for problem in problems if problem]
    for problem in problems:
        findings.problem(mismatch.Plain(problem))
    return not problems


def _too_far(source: Source, layout: Layout) -> str:
    """What is wrong with a ``layer_range``; empty where nothing is."""
    if layout.main is None or _range(source)[1] <= layout.layer_count:
        return ""
    return (
        f"{source.where}: layer_range {list(_range(source))} goes beyond the "
        f"{layout.layer_count} layers of {source.model}.\n"
        f"  The end is not included: the last possible one is {layout.layer_count}."
    )


def _layers(
    number: int,
    recipe_slice: Slice,
    views: Views,
    layouts: Mapping[ModelName, Layout],
    *,
    first: int,
) -> Part:
    """The layers of a slice; the output's begin with number ``first``."""
    order: dict[str, int] = {}

    def renamed(source: Source) -> View:
        layout = layouts[source.model]
        start, stop = _range(source)
        found = {}
        for name, ref in views[source.model].items():
            place = layout.places.get(name)
            if place and place.prefix == layout.main and start <= place.layer < stop:
                layer = first + place.layer - start
                new = f"{place.prefix}{layer}{place.suffix}"
                found[new] = ref
                order.setdefault(new, layer)
        return found

    base = recipe_slice.base
    base_view = renamed(base) if base and base.layers else None
    others = tuple(renamed(source) for source in recipe_slice.sources)
    start, stop = _range(recipe_slice.sources[0])
    return Part(
        slice=number,
        base_model=base.model if base and base.layers else None,
        base=base_view,
        models=tuple(source.model for source in recipe_slice.sources),
        sources=others,
        positions=tuple(range(len(others))),
        names=tuple(sorted(order, key=order.__getitem__)),
        depths={name: depth(layer - first, stop - start) for name, layer in order.items()},
        numbered=True,
    )


def _outside(
    recipe: Recipe,
    number: int,
    views: Views,
    layouts: Mapping[ModelName, Layout],
    names: Sequence[str],
) -> Part:
    """Tensors outside the main stack, from the models of one slice."""
    recipe_slice = recipe.slices[number]
    base = recipe_slice.base.model if recipe_slice.base else recipe.base_model
    models = tuple(source.model for source in recipe_slice.sources)
    everyone = (*((base,) if base else ()), *models)
    kept = {
        model: {name: views[model][name] for name in names if name in views[model]}
        for model in everyone
    }
    layout = layouts[everyone[0]]
    return Part(
        slice=number,
        base_model=base,
        base=kept[base] if base else None,
        models=models,
        sources=tuple(kept[model] for model in models),
        positions=tuple(range(len(models))),
        names=tuple(dict.fromkeys(chain.from_iterable(kept.values()))),
        depths={name: layout.depth(name) for name in names},
        numbered=False,
    )


def _outside_layers(views: Views, layouts: Mapping[ModelName, Layout]) -> dict[str, bool]:
    """The names outside the main stack, and whether they come before its layers."""
    found: dict[str, bool] = {}
    for model, view in views.items():
        layout = layouts[model]
        for name in view:
            place = layout.places.get(name)
            if place is None or place.prefix != layout.main:
                found[name] = found.get(name, False) or bool(place) or is_before_layers(name)
    return found


def _note_left_out(
    views: Views,
    layouts: Mapping[ModelName, Layout],
    taken: Set[str],
    findings: Findings,
) -> None:
    """Note tensors outside of layers that only models of other slices have, and MTP layers."""
    for model, view in views.items():
        layout = layouts[model]
        for name in view:
            place = layout.places.get(name)
            if place is None or place.prefix != layout.main:
                if name not in taken:
                    findings.note(f"only in {model}, which gives layers; left out", name)
            elif place.layer >= layout.layer_count:
                findings.note(f"beyond the {layout.layer_count} layers of {model}; left out", name)
