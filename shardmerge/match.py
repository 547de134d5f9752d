"""Which input tensors make each output tensor. Pure: works on names, shapes and dtypes alone.

Never drops a tensor in silence, and never guesses where a wrong model could result: what does not
fit is refused, all of it at once, with the rule that would decide it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shardmerge import methods, mismatch
from shardmerge.errors import PlanError, RecipeError
from shardmerge.extras import Extras, ExtrasChooser
from shardmerge.inputs import Chooser, Inputs
from shardmerge.layers import input_embedding, is_vocabulary, output_embeddings
from shardmerge.matrices import split_problem
from shardmerge.methods.api import Method, info_of
from shardmerge.mismatch import Findings
from shardmerge.numerics import DType, promote
from shardmerge.parts import Part, layered_parts, plain_part, tied_views
from shardmerge.recipe import ModelName, Recipe, Setting, Split, method_for
from shardmerge.sources.tensor import Checkpoint, TensorRef

SHARD_BYTES = 5 * 10**9
"""Bytes of a shard with ``slices``, where the donor's shards are not larger."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output and what it is made from.

    Args:
        dtype: as it is written.
        method: with its parameters. A float that is copied has ``passthrough``, which converts and
            looks for NaN. None for integers and booleans: the bytes of ``models[0]`` are copied,
            and the others must hold the same bytes.
        base: None where the method does not use the base model.
        models: in the order of the slice's sources. The base model is among them where ``method``
            is None, and in place of a model that lacks the tensor under ``missing: base``.
        positions: for each of ``models``, its place among the slice's sources: its random numbers
            depend on it. (Where ``method`` is None they only count.)
        extras: by kind, in the method's order; each as long as ``models``. Of methods that say
            which fit them, nothing where the further checkpoints hold nothing.
        wide: whether values are float64 while they are merged.
        group: tensors of one group are made from the same models; a measure over the model is
            taken over a group.
        whole: whether the method sees matrices as a whole, not element by element.
        split: the matrices in each of the tensor's, where a rule says so.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    method: Method | None
    base: TensorRef | None
    models: tuple[TensorRef, ...]
    positions: tuple[int, ...]
    extras: Extras
    wide: bool
    group: int
    whole: bool = False
    split: Split | None = None


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
    layers: tuple[int, ...] | None = None
    if recipe.layered:
        parts, layers = layered_parts(recipe, sources, views, donor, findings)
    else:
        parts = plain_part(recipe, sources, views, donor, findings)
    universe = [name for part in parts for name in part.names]
    findings.check(universe)
    chooser = Chooser(recipe, sources, views, findings)
    fitter = _Fitter(recipe, sources, donor, findings)
    tensors: dict[str, OutputTensor] = {}
    for part in parts:
        for name in part.names:
            inputs = chooser.inputs(part, name)
            found = None if inputs is None else fitter.output(part, name, inputs)
            if found is not None:
                tensors[name] = found
    chooser.check_patterns(universe)
    fitter.extras.check()
    if not tensors and not findings.problems:
        text = "The rules drop every tensor, so there is nothing to write. Narrow their patterns."
        findings.problem(mismatch.Plain(text))
    for head in (head for head in tied if head in tensors):
        text = f"tied to the token embedding in {mismatch.models(tied[head])}; stored in the output"
        findings.note(text, head)
    findings.check(universe)
    stored = sources[donor].tensors
    _check_vocabulary(tensors, stored)
    return Outputs(
        tensors=tuple(tensors.values()),
        shard_of=tuple(_shards(tensors, sources[donor], layered=recipe.layered)),
        notes=findings.told(),
        donor=donor,
        layer_count=None if layers is None else len(layers),
        layers=layers,
        untied=any(head not in stored for head in output_embeddings(tensors)),
        vocab_size=_vocab_size(tensors, stored),
    )


class _Fitter:
    """Checks that the inputs of a tensor fit together; keeps what many tensors share.

    Attributes:
        extras: chooses what further checkpoints hold for it.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[ModelName, Checkpoint],
        donor: ModelName,
        findings: Findings,
    ) -> None:
        self._recipe = recipe
        self._sources = sources
        self._donor = donor
        self._findings = findings
        self._written = recipe.out_dtype or recipe.dtype
        self._filters = _filters(recipe)
        self._methods: dict[object, tuple[Method | None, tuple[str, ...]]] = {}
        self._groups: dict[tuple[int, tuple[int, ...]], int] = {}
        self._copy = methods.get("passthrough").cls(scale=(1.0,))
        self.extras = ExtrasChooser(recipe, sources, findings)

    def output(self, part: Part, name: str, inputs: Inputs) -> OutputTensor | None:
        """The output tensor; None where there is a problem."""
        if part.beyond is not None and name in part.beyond:
            self._findings.problem(mismatch.Deeper(self._donor, part.layer_count), name)
            return None
        refs = inputs.refs
        shape, stored = refs[0].shape, refs[0].dtype
        if any([ref.shape != shape for ref in refs]):  # noqa: C419 (faster)
            self._report_shapes(part, name, inputs)
            return None
        dtypes = {ref.dtype for ref in refs}
        if len(dtypes) > 1:
            if not all(dtype.is_float for dtype in dtypes):
                self._report_kinds(part, name, inputs)
                return None
            stored = promote(dtypes)
        elif not stored.is_float:
            return self._integers(part, name, inputs)
        if self._written is None and any(dtype.is_fp8 for dtype in dtypes):
            models = [model for model, ref in inputs.named(part) if ref.dtype.is_fp8]
            self._findings.problem(mismatch.Fp8(tuple(dict.fromkeys(models))), name)
            return None
        method = self._method(part, name, inputs)
        found = None if method is None else self.extras.extras(part, name, inputs, method)
        if found is None:
            return None
        method, extras = found
        whole, split = self._matrices(method, name, shape, inputs, extras)
        inputs = self._ordered(method, inputs)
        return OutputTensor(
            name=name,
            shape=shape,
            dtype=self._written or stored,
            method=method,
            base=inputs.base,
            models=inputs.models,
            positions=inputs.positions,
            extras=extras,
            wide=(self._recipe.dtype or stored) is DType.F64,
            group=self._group(part, inputs),
            whole=whole,
            split=split,
        )

    def _matrices(
        self, method: Method, name: str, shape: tuple[int, ...], inputs: Inputs, extras: Extras
    ) -> tuple[bool, Split | None]:
        """Whether the method sees matrices of this tensor as a whole, and how they lie in it."""
        info = info_of(method)
        whole = info.matrix_pass is not None and method.whole(name, shape)
        whole = whole and (bool(extras) or not info.extras)
        splits = [self._recipe.rules[number].split for number in inputs.rules]
        split = next((split for split in reversed(splits) if split), None)
        if split is None:
            return whole, None
        wrong = split_problem(shape, split) if whole else f"{info.name} takes it element by element"
        if whole and extras:
            wrong = f"its {' and '.join(info.extras)} is of the whole tensor; remove it"
        if wrong:
            self._findings.problem(mismatch.Parameters(f"split: {wrong}"), name)
        return whole, split if whole and not wrong else None

    def _ordered(self, method: Method, inputs: Inputs) -> Inputs:
        """The models in the order in which they are added one after the other."""
        if not hasattr(method, "order"):
            return inputs
        order = method.order(len(inputs.models), self._recipe.seed)
        return replace(
            inputs,
            models=tuple(inputs.models[place] for place in order),
            positions=tuple(inputs.positions[place] for place in order),
        )

    def _integers(self, part: Part, name: str, inputs: Inputs) -> OutputTensor:
        refs = inputs.refs
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
            group=self._group(part, inputs),
        )

    def _group(self, part: Part, inputs: Inputs) -> int:
        return self._groups.setdefault((part.slice, inputs.positions), len(self._groups))

    def _method(self, part: Part, name: str, inputs: Inputs) -> Method | None:
        """The method with its parameters; one value for all tensors with the same settings."""
        if inputs.info is None:
            return self._copy
        t = part.depths.get(name, 0.0)
        hits = tuple([text for text in self._filters if text in name])
        key = (part.slice, t, inputs.positions, inputs.rules, hits)
        found = self._methods.get(key)
        if found is None:
            recipe_slice = self._recipe.slices[part.slice]
            try:
                method = method_for(self._recipe, recipe_slice, name, t, models=inputs.positions)
                found = method, ()
            except RecipeError as error:
                # The name is told once, with those of all other tensors of the same problem.
                texts = (text.removesuffix(f" (for {name})") for text in error.problems)
                found = None, tuple(texts)
            self._methods[key] = found
        for text in found[1]:
            self._findings.problem(mismatch.Parameters(text), name)
        return found[0]

    def _report_shapes(self, part: Part, name: str, inputs: Inputs) -> None:
        named = inputs.named(part)
        rows_only = len({ref.shape[1:] for _, ref in named if ref.shape}) == 1
        same_rank = len({len(ref.shape) for _, ref in named}) == 1
        vocabulary = rows_only and same_rank and is_vocabulary(name)
        kind = mismatch.Vocabulary if vocabulary else mismatch.Shapes
        told = mismatch.by_value([(model, str(list(ref.shape))) for model, ref in named])
        self._findings.problem(kind(named[0][0]), name, f"{name}: {told}")

    def _report_kinds(self, part: Part, name: str, inputs: Inputs) -> None:
        named = inputs.named(part)
        told = mismatch.by_value([(model, ref.dtype.torch_name) for model, ref in named])
        self._findings.problem(mismatch.Kinds(named[0][0]), name, f"{name}: {told}")


def _filters(recipe: Recipe) -> tuple[str, ...]:
    """The substrings of names that any parameter of the recipe depends on."""
    levels: list[Mapping[str, Setting]] = [recipe.parameters]
    levels += [rule.parameters for rule in recipe.rules]
    for recipe_slice in recipe.slices:
        levels.append(recipe_slice.parameters)
        levels += [source.parameters for source in recipe_slice.sources]
    settings = [setting for level in levels for setting in level.values()]
    filters = [item for setting in settings if isinstance(setting, tuple) for item in setting]
    return tuple(sorted({item.substring for item in filters if item.substring is not None}))


# --- shards and vocabulary ----------------------------------------------------------------------


def _shards(
    tensors: Mapping[str, OutputTensor], donor: Checkpoint, *, layered: bool
) -> Iterator[int]:
    """The donor's shard of each tensor, its last for those it lacks; by size for new layers, and
    where the donor's files hold pieces of tensors.
    """
    if layered or donor.cut:
        yield from _shards_by_size(list(tensors.values()), donor)
        return
    last = len(donor.shards) - 1
    numbers = [donor.shard_of.get(name, last) for name in tensors]
    consecutive = {number: i for i, number in enumerate(sorted(set(numbers)))}
    yield from (consecutive[number] for number in numbers)


def _shards_by_size(tensors: Sequence[OutputTensor], donor: Checkpoint) -> Iterator[int]:
    sizes = [0] * len(donor.shards)
    for name, ref in donor.tensors.items():
        sizes[donor.shard_of[name]] += ref.nbytes
    limit = SHARD_BYTES if donor.cut else max(SHARD_BYTES, *sizes)
    shard = filled = 0
    for tensor in tensors:
        nbytes = tensor.models[0].numel * tensor.dtype.itemsize
        if filled and filled + nbytes > limit:
            shard, filled = shard + 1, 0
        filled += nbytes
        yield shard


def _check_vocabulary(tensors: Mapping[str, OutputTensor], donor: Mapping[str, TensorRef]) -> None:
    """Refuse token and output embeddings of other row counts, unless the donor has such."""
    name = input_embedding(tensors)
    for head in output_embeddings(tensors):
        if name is None or tensors[name].shape[:1] == tensors[head].shape[:1]:
            continue
        if {name, head} <= donor.keys() and donor[name].shape[:1] != donor[head].shape[:1]:
            continue
        raise PlanError(
            f"{name} would have {tensors[name].shape[0]} rows and {head} "
            f"{tensors[head].shape[0]}: no tokenizer fits both.\n"
            "  Let the same rule decide both."
        )


def _vocab_size(tensors: Mapping[str, OutputTensor], donor: Mapping[str, TensorRef]) -> int | None:
    """Rows of the output's token embedding, if the donor's has others."""
    name, theirs = input_embedding(tensors), input_embedding(donor)
    if name is None or theirs is None or tensors[name].shape[:1] == donor[theirs].shape[:1]:
        return None
    return tensors[name].shape[0]
