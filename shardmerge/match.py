"""Which input tensors make each output tensor. Pure: works on names, shapes and dtypes alone.

Never drops a tensor in silence, and never guesses where a wrong model could result: what does not
fit is refused, all of it at once, with the rule that would decide it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge import methods, mismatch
from shardmerge.layers import input_embedding, is_vocabulary, output_embeddings, place_of
from shardmerge.methods.api import Base, Method, MethodInfo, problems_of
from shardmerge.mismatch import Findings
from shardmerge.numerics import DType, promote
from shardmerge.parts import Part, Views, layered_parts, plain_part, tied_views
from shardmerge.recipe import Filtered, ModelName, Recipe, Rule, Setting, method_for, rules_for
from shardmerge.recipe_yaml import nearest
from shardmerge.sources.tensor import Checkpoint, TensorRef

SHARD_BYTES = 5 * 10**9
"""Least bytes at which a recipe with ``slices`` begins a new shard, if the donor's are not larger."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output and what it is made from.

    Args:
        dtype: as it is written.
        method: with its parameters. A float that is copied has ``passthrough``, which converts and
            looks for NaN. None for integers and booleans: the bytes of ``models[0]`` are copied, and
            the others must hold the same bytes.
        base: None where the method does not use the base model.
        models: in the order of the slice's sources. The base model is among them where ``method`` is
            None, and in place of a model that lacks the tensor under ``missing: base``.
        positions: for each of ``models``, its place among the slice's sources: its random numbers
            depend on it.
        extras: by kind, in the method's order; each as long as ``models``.
        wide: whether values are float64 while they are merged.
        group: tensors of one group are made from the same models; a measure over the model is
            taken over a group.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    method: Method | None
    base: TensorRef | None
    models: tuple[TensorRef, ...]
    positions: tuple[int, ...]
    extras: tuple[tuple[str, tuple[TensorRef, ...]], ...]
    wide: bool
    group: int


@dataclass(frozen=True, slots=True)
class Outputs:
    """All tensors of the output, and what follows for the files beside them.

    Args:
        tensors: in output order.
        shard_of: number of the shard of each, from 0.
        notes: every default that was used, in words.
        donor: the model whose config and other files are copied.
        layer_count: of the output, where the recipe numbers layers anew (``slices``).
        layers: for each output layer, then, the layer of the donor whose settings it has.
        untied: whether the output stores an output embedding that the donor does not.
        vocab_size: rows of the token embedding, where they are others than the donor's.
    """

    tensors: tuple[OutputTensor, ...]
    shard_of: tuple[int, ...]
    notes: tuple[str, ...]
    donor: ModelName
    layer_count: int | None = None
    layers: tuple[int, ...] | None = None
    untied: bool = False
    vocab_size: int | None = None


def match(recipe: Recipe, sources: Mapping[ModelName, Checkpoint]) -> Outputs:
    """Every output tensor of a recipe over these checkpoints.

    Args:
        sources: every model that the recipe names, extras too.
    Raises:
        PlanError: for checkpoints that do not fit together; lists all problems of all tensors.
    """
    findings = Findings()
    donor = recipe.base_model or recipe.slices[0].sources[0].model
    views, tied = tied_views(recipe, sources)
    layers = None
    if recipe.layered:
        parts, layers = layered_parts(recipe, sources, views, donor, findings)
    else:
        parts = plain_part(recipe, sources, views, donor, findings)
    findings.check()
    matcher = _Matcher(recipe, sources, views, findings)
    tensors = [found for part in parts for found in matcher.tensors(part)]
    matcher.check_patterns([name for part in parts for name in part.names])
    names = {tensor.name: tensor for tensor in tensors}
    for head, models in tied.items():
        if head in names:
            text = f"tied to the token embedding in {mismatch.models(models)}; stored in the output"
            findings.note(text, head)
    findings.check()
    stored = sources[donor].tensors
    return Outputs(
        tensors=tuple(tensors),
        shard_of=tuple(_shards(tensors, sources[donor], layered=recipe.layered)),
        notes=findings.told(),
        donor=donor,
        layer_count=None if layers is None else len(layers),
        layers=layers,
        untied=any(head not in stored for head in output_embeddings(names)),
        vocab_size=_vocab_size(names, stored),
    )


# --- the inputs of one tensor -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What one output tensor is merged from; ``copied`` without a method."""

    base: TensorRef | None
    models: tuple[TensorRef, ...]
    positions: tuple[int, ...]
    copied: bool = False


class _Matcher:
    """Decides tensor by tensor; keeps what many tensors share."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[ModelName, Checkpoint],
        views: Views,
        findings: Findings,
    ) -> None:
        self._recipe = recipe
        self._sources = sources
        self._views = views
        self._findings = findings
        self._dtype = recipe.out_dtype or recipe.dtype
        self._patterns = [
            (number, pattern, re.compile(fnmatch.translate(pattern)).match)
            for number, rule in enumerate(recipe.rules)
            for pattern in rule.tensors
        ]
        self._matched: set[tuple[int, str]] = set()
        self._rules: dict[tuple[int, ...], Rule] = {}
        self._filters = tuple(_filters(recipe))
        self._methods: dict[object, Method] = {}
        self._groups: dict[tuple[int, tuple[int, ...]], int] = {}
        self._copy = methods.get("passthrough").cls(scale=(1.0,))

    def tensors(self, part: Part) -> Iterator[OutputTensor]:
        """The tensors of a part, but for dropped ones and those with problems."""
        everything = tuple(range(len(part.sources)))
        for name in part.names:
            matching = self._matching(name)
            rule = self._rule(matching, name)
            if rule.drop:
                continue
            if rule.take_from is not None:
                inputs = self._taken(part, name, rule.take_from)
                info = methods.get("passthrough")
            else:
                info = methods.get(rule.merge_method or self._recipe.merge_method)
                base = None if part.base is None else part.base.get(name)
                held = tuple([view.get(name) for view in part.sources])
                needs_base = info.base is Base.REQUIRED
                if None not in held and not (needs_base and base is None):
                    inputs = _Inputs(base if needs_base else None, held, everything)
                else:
                    inputs = self._incomplete(part, name, base, held, info, rule.missing)
            if inputs is not None:
                found = self._output(part, name, inputs, info, matching)
                if found is not None:
                    yield found

    def _matching(self, name: str) -> tuple[int, ...]:
        """Numbers of the rules that match a name."""
        if not self._patterns:
            return ()
        hits = [(number, pattern) for number, pattern, match in self._patterns if match(name)]
        self._matched.update(hits)
        return tuple(dict.fromkeys(number for number, _ in hits))

    def _rule(self, matching: tuple[int, ...], name: str) -> Rule:
        if matching not in self._rules:
            self._rules[matching] = rules_for(self._recipe, name)
        return self._rules[matching]

    def check_patterns(self, names: Sequence[str]) -> None:
        """Report the patterns that matched nothing: a rule with a typo would change nothing."""
        unmatched = [key[:2] for key in self._patterns if key[:2] not in self._matched]
        if not unmatched:
            return
        alike = {re.sub(r"\d+", "*", name): name for name in reversed(names)}
        for number, pattern in unmatched:
            near = nearest(re.sub(r"\d+", "*", pattern), alike)
            kind = mismatch.Unmatched(
                self._recipe.rules[number].where, pattern, None if near is None else alike[near]
            )
            self._findings.problem(kind)

    def _taken(self, part: Part, name: str, model: ModelName) -> _Inputs | None:
        """The one input of a tensor that a rule takes from ``model``."""
        recipe_slice = self._recipe.slices[part.slice]
        view = next(
            (
                view
                for source, view in zip(recipe_slice.sources, part.sources, strict=True)
                if source.model == model
            ),
            part.base if model == self._recipe.base_model else None,
        )
        if view is None and part.numbered:
            self._findings.problem(mismatch.NotInSlice(model, recipe_slice.where), name)
            return None
        if view is None:
            view = self._views[model] if model in self._views else self._sources[model].tensors
        ref = view.get(name)
        if ref is None:
            self._findings.problem(mismatch.TakeFrom(model), name)
            return None
        return _Inputs(None, (ref,), (0,), copied=True)

    def _incomplete(
        self,
        part: Part,
        name: str,
        base: TensorRef | None,
        held: tuple[TensorRef | None, ...],
        info: MethodInfo,
        missing: str | None,
    ) -> _Inputs | None:
        """The inputs of a tensor that some models, or a base model that is needed, do not have."""
        sources = self._recipe.slices[part.slice].sources
        base_model = self._recipe.base_model
        present = [(k, ref) for k, ref in enumerate(held) if ref is not None]
        holders = [sources[k].model for k, _ in present]
        only = [ref for _, ref in present]
        if base is not None and base_model is not None and base_model not in holders:
            holders.append(base_model)
            only.append(base)
        if len(only) == 1 and missing != "error":
            self._findings.note(f"only in {holders[0]}; copied from it", name)
            return _Inputs(None, (only[0],), (0,), copied=True)
        needs_base = info.base is Base.REQUIRED
        used = base if needs_base else None
        if not needs_base or base is not None:
            if missing == "base" and base is not None:
                models = tuple(base if ref is None else ref for ref in held)
                return _Inputs(used, models, tuple(range(len(models))))
            if missing == "skip" and len(present) >= info.models[0]:
                positions, refs = zip(*present, strict=True)
                return _Inputs(used, refs, positions)
        lacking = [source.model for source, ref in zip(sources, held, strict=True) if ref is None]
        if needs_base and base is None and base_model is not None:
            lacking.append(base_model)
        kind = mismatch.Missing(
            held=tuple(dict.fromkeys(holders)),
            lacking=tuple(dict.fromkeys(lacking)),
            base=None if base is None else base_model,
            base_lacks=needs_base and base is None,
            models=len(present),
            least=info.models[0],
            asked=missing,
        )
        self._findings.problem(kind, name)
        return None

    # --- shapes, dtypes, method -----------------------------------------------------------------

    def _output(
        self, part: Part, name: str, inputs: _Inputs, info: MethodInfo, matching: tuple[int, ...]
    ) -> OutputTensor | None:
        """The output tensor, if its inputs fit together."""
        base, models = inputs.base, inputs.models
        refs = models if base is None else (base, *models)
        first = refs[0]
        dtypes = {ref.dtype for ref in refs}
        if any(ref.shape != first.shape for ref in refs):
            self._report_shapes(part, name, inputs)
            return None
        if not first.dtype.is_float or len(dtypes) > 1:
            floats = {dtype.is_float for dtype in dtypes}
            if floats != {True} and len(dtypes) > 1:
                self._report_kinds(part, name, inputs)
                return None
            if floats == {False}:
                return self._integers(part, name, inputs, refs)
        if self._dtype is None and any(dtype.is_fp8 for dtype in dtypes):
            self._report_fp8(part, name, inputs)
            return None
        extras: tuple[tuple[str, tuple[TensorRef, ...]], ...] = ()
        if inputs.copied:
            method = self._copy
        else:
            method = self._method(part, name, inputs.positions, matching)
            if info.extras:
                found = self._extras(part, name, inputs, info)
                if found is None:
                    return None
                extras = found
        stored = promote(dtypes) if self._dtype is None or self._recipe.dtype is None else None
        return OutputTensor(
            name=name,
            shape=first.shape,
            dtype=self._dtype or stored or first.dtype,
            method=method,
            base=base,
            models=models,
            positions=inputs.positions,
            extras=extras,
            wide=(self._recipe.dtype or stored) is DType.F64,
            group=self._group(part, inputs.positions),
        )

    def _integers(
        self, part: Part, name: str, inputs: _Inputs, refs: tuple[TensorRef, ...]
    ) -> OutputTensor:
        return OutputTensor(
            name=name,
            shape=refs[0].shape,
            dtype=refs[0].dtype,
            method=None,
            base=None,
            models=refs,
            positions=tuple(range(len(refs))),
            extras=(),
            wide=False,
            group=self._group(part, inputs.positions),
        )

    def _group(self, part: Part, positions: tuple[int, ...]) -> int:
        return self._groups.setdefault((part.slice, positions), len(self._groups))

    def _method(
        self, part: Part, name: str, positions: tuple[int, ...], matching: tuple[int, ...]
    ) -> Method:
        """The method with its parameters; the same value for tensors with the same settings."""
        t = part.depths.get(name, 0.0)
        hits = tuple([text for text in self._filters if text in name])
        key = (part.slice, t, positions, matching, hits)
        method = self._methods.get(key)
        if method is None:
            recipe_slice = self._recipe.slices[part.slice]
            method = method_for(self._recipe, recipe_slice, name, t, models=positions)
            self._methods[key] = method
            for problem in problems_of(method):
                kind = mismatch.Parameters(method.merge_name, problem)
                self._findings.problem(kind, name)
        return method

    def _extras(
        self, part: Part, name: str, inputs: _Inputs, info: MethodInfo
    ) -> tuple[tuple[str, tuple[TensorRef, ...]], ...] | None:
        """The tensors of further checkpoints, by kind; None where one does not fit."""
        found = []
        complete = True
        for kind in info.extras:
            refs = []
            for position, ref in zip(inputs.positions, inputs.models, strict=True):
                source = self._recipe.slices[part.slice].sources[position]
                extra = source.extras.get(kind)
                if extra is None:
                    self._findings.problem(mismatch.ExtraUnnamed(kind, source.where), name)
                    complete = False
                    continue
                held = self._sources[extra].tensors.get(ref.name)
                wrong = _extra_problem(held, ref)
                if held is None or wrong:
                    unfit = mismatch.ExtraUnfit(kind, extra, source.model)
                    self._findings.problem(unfit, ref.name, f"{ref.name}: {wrong}")
                    complete = False
                else:
                    refs.append(held)
            found.append((kind, tuple(refs)))
        return tuple(found) if complete else None

    # --- problems -------------------------------------------------------------------------------

    def _named(self, part: Part, inputs: _Inputs) -> list[tuple[ModelName, TensorRef]]:
        """The inputs with the models they are from, the base model first."""
        sources = self._recipe.slices[part.slice].sources
        named = [(sources[k].model, r) for k, r in zip(inputs.positions, inputs.models, strict=True)]
        if inputs.base is not None and self._recipe.base_model is not None:
            named.insert(0, (self._recipe.base_model, inputs.base))
        return named

    def _keep(self) -> ModelName:
        return self._recipe.base_model or self._recipe.slices[0].sources[0].model

    def _report_shapes(self, part: Part, name: str, inputs: _Inputs) -> None:
        named = self._named(part, inputs)
        shapes = {ref.shape for _, ref in named}
        rows_only = all(shape and len({s[1:] for s in shapes}) == 1 for shape in shapes)
        kind = mismatch.Vocabulary if rows_only and is_vocabulary(name) else mismatch.Shapes
        detail = _told([(model, str(list(ref.shape))) for model, ref in named])
        self._findings.problem(kind(self._keep()), name, f"{name}: {detail}")

    def _report_kinds(self, part: Part, name: str, inputs: _Inputs) -> None:
        named = self._named(part, inputs)
        detail = _told([(model, ref.dtype.torch_name) for model, ref in named])
        self._findings.problem(mismatch.Kinds(self._keep()), name, f"{name}: {detail}")

    def _report_fp8(self, part: Part, name: str, inputs: _Inputs) -> None:
        refs = inputs.models if inputs.base is None else (inputs.base, *inputs.models)
        url = next(ref.segments[0].url for ref in refs if ref.dtype.is_fp8)
        self._findings.problem(mismatch.Fp8(url.rpartition("/")[0] or url), name)


def _told(values: Sequence[tuple[ModelName, str]]) -> str:
    """Each value with the models that have it."""
    by_value: dict[str, list[ModelName]] = {}
    for model, value in values:
        by_value.setdefault(value, []).append(model)
    return "; ".join(f"{value} in {mismatch.models(held)}" for value, held in by_value.items())


def _extra_problem(held: TensorRef | None, ref: TensorRef) -> str:
    """Why ``held`` cannot go with ``ref``; empty when it can."""
    if held is None:
        return "it is missing"
    if held.shape != ref.shape:
        return f"its shape is {list(held.shape)}, the model's {list(ref.shape)}"
    return "" if held.dtype.is_float else f"its dtype is {held.dtype.torch_name}"


def _filters(recipe: Recipe) -> Iterator[str]:
    """The substrings of names that any parameter of the recipe depends on."""
    holders: list[Mapping[str, Setting]] = [recipe.parameters]
    holders += [rule.parameters for rule in recipe.rules]
    for recipe_slice in recipe.slices:
        holders.append(recipe_slice.parameters)
        holders += [source.parameters for source in recipe_slice.sources]
        holders += [recipe_slice.base.parameters] if recipe_slice.base else []
    found = {
        item.substring
        for parameters in holders
        for setting in parameters.values()
        if isinstance(setting, tuple)
        for item in setting
        if isinstance(item, Filtered) and item.substring is not None
    }
    yield from sorted(found)


# --- shards and vocabulary --------------------------------------------------------------------------


def _shards(
    tensors: Sequence[OutputTensor], donor: Checkpoint, *, layered: bool
) -> Iterator[int]:
    """The donor's shard of each tensor, the last one for tensors it lacks; by size for new layers."""
    if not layered:
        last = len(donor.shards) - 1
        numbers = [donor.shard_of.get(tensor.name, last) for tensor in tensors]
        new = {number: i for i, number in enumerate(sorted(set(numbers)))}
        yield from (new[number] for number in numbers)
        return
    sizes = [0] * len(donor.shards)
    for name, ref in donor.tensors.items():
        sizes[donor.shard_of[name]] += ref.nbytes
    limit = max(SHARD_BYTES, *sizes)
    shard = filled = 0
    for tensor in tensors:
        nbytes = tensor.models[0].numel * tensor.dtype.itemsize
        if filled and filled + nbytes > limit:
            shard, filled = shard + 1, 0
        filled += nbytes
        yield shard


def _vocab_size(tensors: Mapping[str, OutputTensor], donor: Mapping[str, TensorRef]) -> int | None:
    """Rows of the output's token embedding, if the donor's has others."""
    name, theirs = input_embedding(tensors), input_embedding(donor)
    if name is None or theirs is None or tensors[name].shape[:1] == donor[theirs].shape[:1]:
        return None
    return tensors[name].shape[0]
