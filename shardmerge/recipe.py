"""What to merge: a YAML recipe in mergekit's vocabulary, as frozen values. Reads no checkpoint.

``Recipe.parse`` finds every problem of the text at once. ``rules_for`` and ``method_for`` give what
is done with one output tensor: copied, left out, or merged by a method with its parameters.
"""

from __future__ import annotations

import enum
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shardmerge.errors import RecipeError
from shardmerge.methods.api import METHODS, Method, MethodInfo, Parameter, info_of, problems_of
from shardmerge.numerics import DType
from shardmerge.recipe_parts import (
    Filtered,
    Gradient,
    ModelName,
    Rule,
    Scalar,
    Setting,
    Slice,
    Source,
    Split,
    applicable,
    setting_at,
    value_at,
    wrong_value,
)
from shardmerge.recipe_read import (
    Scope,
    check_required,
    counts_on_base,
    lacking_text,
    methods_of_rules,
    read_rules,
    read_slices,
)
from shardmerge.recipe_settings import (
    NOT_YET,
    TOP_KEYS,
    elsewhere,
    optional,
    read_dtype,
    read_method,
    read_model,
    read_parameters,
    read_shard_size,
    read_tokenizer,
)
from shardmerge.recipe_yaml import MAX_BYTES, Node, read_yaml

__all__ = [
    "Filtered",
    "Gradient",
    "ModelName",
    "Recipe",
    "Rule",
    "Ruled",
    "Scalar",
    "Setting",
    "Slice",
    "Source",
    "Split",
    "method_for",
    "rules_for",
]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe without a problem of its own.

    Args:
        text: the YAML, verbatim.
        slices: at least one.
        layered: whether the recipe has ``slices`` (output layers are numbered anew).
        parameters: at the top level, by recipe key.
        dtype: of the arithmetic's result where ``out_dtype`` is not given.
        tokenizer_source: ``base``, a model, or None (the base model, else the first model).
        seed: of random masks.
        shard_size: bytes per output shard; None keeps the base model's shards.
        allow_non_finite: whether NaN and infinity are merged like other values.
        notes: what the text says that has no effect, for the user to know.
    """

    text: str
    merge_method: str
    base_model: ModelName | None
    slices: tuple[Slice, ...]
    layered: bool
    parameters: Mapping[str, Setting]
    dtype: DType | None
    out_dtype: DType | None
    tokenizer_source: ModelName | None
    rules: tuple[Rule, ...]
    seed: int
    shard_size: int | None
    allow_non_finite: bool
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, *, where: str = "recipe") -> Recipe:
        """Read a recipe from YAML.

        Args:
            text: one YAML document of at most 1 MiB.
            where: what the text is called in messages.

        Raises:
            RecipeError: with every problem of the text.
        """
        root = read_yaml(text, where)
        fields = root.fields(TOP_KEYS, elsewhere() | NOT_YET)
        scope = _scope(fields, root)
        slices = read_slices(fields, root, scope)
        top = read_parameters(fields.get("parameters"), scope.infos, scope.notes)
        rules = read_rules(fields.get("rules"), scope)
        check_required(slices, top, rules, root, scope)
        recipe = cls(
            text=text,
            merge_method=scope.info.name if scope.info else "",
            base_model=scope.base,
            slices=slices,
            layered="slices" in fields,
            parameters=top,
            dtype=None,
            out_dtype=None,
            tokenizer_source=None,
            rules=rules,
            seed=0,
            shard_size=None,
            allow_non_finite=False,
            notes=tuple(scope.notes),
        )
        if not root.problems:
            root.problems.extend(_problems_of_any_tensor(recipe))
        recipe = _with_options(recipe, fields)
        if root.problems:
            raise RecipeError(tuple(dict.fromkeys(root.problems)))
        return recipe

    @classmethod
    def load(cls, recipe: Recipe | str | Path) -> Recipe:
        """A recipe as it is, or the one in a YAML file.

        Args:
            recipe: a recipe, or the path of a file.

        Raises:
            RecipeError: for a file that cannot be read, or with every problem of its text.
        """
        if isinstance(recipe, Recipe):
            return recipe
        path = str(recipe)
        if not path:
            raise RecipeError("recipe: its path is empty; give a YAML file")
        if "\n" in path:
            raise RecipeError("recipe: this is a text, not a path; use Recipe.parse(text)")
        try:
            with Path(path).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            return cls.parse(data.decode("utf-8"), where=path)
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{path}: is not UTF-8 text (byte {error.start}); a recipe is a YAML file"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RecipeError(f"{path}: cannot read the recipe: {reason}") from None


def _scope(fields: Mapping[str, Node], root: Node) -> Scope:
    if "merge_method" not in fields and isinstance(root.value, dict):
        root.wrong(f"needs 'merge_method' ({', '.join(sorted(METHODS))})")
    info = optional(fields, "merge_method", read_method)
    base = optional(fields, "base_model", read_model)
    rules = fields.get("rules")
    return Scope(
        info=info,
        others=tuple(other for other in methods_of_rules(rules) if other is not info),
        base=base,
        missing_base=counts_on_base(rules),
        models=[base] if "base_model" in fields else [],
    )


def _with_options(recipe: Recipe, fields: Mapping[str, Node]) -> Recipe:
    """The recipe with everything that does not concern methods and models."""

    def tokenizer(node: Node) -> ModelName | None:
        return read_tokenizer(node, recipe.base_model)

    return replace(
        recipe,
        dtype=optional(fields, "dtype", read_dtype),
        out_dtype=optional(fields, "out_dtype", read_dtype),
        tokenizer_source=optional(fields, "tokenizer_source", tokenizer),
        seed=optional(fields, "seed", lambda node: node.whole(0, 2**63 - 1)) or 0,
        shard_size=optional(fields, "shard_size", read_shard_size),
        allow_non_finite=optional(fields, "allow_non_finite", Node.flag) or False,
    )


# --- rules --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ruled:
    """What the rules say about one output tensor; later rules count more.

    ``drop``, ``from`` and ``merge_method`` are one choice: the last rule that makes it counts.

    Args:
        merge_method: of the recipe or of a rule.
        parameters: by recipe key.
        take_from: copy the tensor from this model instead of merging.
        missing: ``error``, ``base`` or ``skip``, for a tensor that some inputs lack.
        drop: leave the tensor out of the output.
    """

    merge_method: str
    parameters: Mapping[str, Scalar | Gradient]
    take_from: ModelName | None = None
    missing: str = "error"
    drop: bool = False


def rules_for(recipe: Recipe, tensor: str) -> Ruled:
    """What all rules that match ``tensor`` say together.

    Args:
        recipe: with its rules.
        tensor: name in the output.
    """
    name, missing = recipe.merge_method, "error"
    parameters: dict[str, Scalar | Gradient] = {}
    choice: Rule | None = None
    for rule in recipe.rules:
        if not _matcher(rule.tensors)(tensor):
            continue
        for key, setting in rule.parameters.items():
            value = applicable(setting, tensor)
            if value is not None:
                parameters[key] = value
        missing = rule.missing or missing
        name = rule.merge_method or name
        if rule.drop or rule.take_from or rule.merge_method:
            choice = rule
    if choice is None:
        return Ruled(name, parameters, missing=missing)
    return Ruled(name, parameters, choice.take_from, missing, choice.drop)


@functools.lru_cache(maxsize=4096)
def _matcher(globs: tuple[str, ...]) -> Callable[[str], re.Match[str] | None]:
    """Case-sensitive, ``*`` matches dots as well."""
    return re.compile("|".join(map(fnmatch.translate, globs))).match


# --- methods ------------------------------------------------------------------------------------

_Value = Scalar | enum.Enum | None


def method_for(
    recipe: Recipe,
    part: Slice,
    tensor: str,
    t: float,
    models: tuple[int, ...] | None = None,
) -> Method:
    """The merge method of one output tensor, with its parameters.

    A parameter's value is that of the last matching rule, else of the model, the slice, the top
    level, else the default. A list of filters of which none matches says nothing.

    Args:
        recipe: that ``part`` is of.
        part: a slice of the recipe.
        tensor: name in the output.
        t: place of the tensor's layer in the slice, from 0 to 1; 0 for tensors outside of layers.
        models: positions in ``part.sources`` that are merged, in order; None for all. Per-model
            parameters have this order.

    Raises:
        RecipeError: for a required parameter that nothing gives for this tensor, or values that
            cannot work together (weights that sum to 0).
        ValueError: for ``t`` outside of [0, 1].
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t must be from 0 to 1, not {t}")
    ruled = rules_for(recipe, tensor)
    info = METHODS[ruled.merge_method]
    sources = part.sources if models is None else tuple(part.sources[index] for index in models)
    outer = (part.parameters, recipe.parameters)
    values: list[_Value] = []
    problems: list[str] = []
    for item in info.parameters:
        found = _values(item, ruled, sources, outer, tensor, t)
        if item.default is None and None in found:
            problems.append(_lacking(item, info, sources, found, part))
        values += found
    if not problems:
        made, wrong = _made(info.cls, len(sources), *values)
        if made is not None:
            return made
        problems.extend(wrong)
    place = f" (for {tensor})" if tensor else ""
    raise RecipeError([f"{problem}{place}" for problem in problems])


def _values(
    item: Parameter,
    ruled: Ruled,
    sources: tuple[Source, ...],
    outer: tuple[Mapping[str, Setting], ...],
    tensor: str,
    t: float,
) -> list[_Value]:
    """A parameter's value for each source, or the one for all; None where nothing gives it."""
    by_rule = ruled.parameters.get(item.key)
    if by_rule is not None:
        return [value_at(by_rule, t)] * (len(sources) if item.per_model else 1)
    common = _common(item, outer, tensor, t)
    if not item.per_model:
        return [common]
    own = [source.parameters.get(item.key) for source in sources]
    values = [None if setting is None else setting_at(setting, tensor, t) for setting in own]
    return [common if value is None else value for value in values]


def _common(
    item: Parameter, outer: tuple[Mapping[str, Setting], ...], tensor: str, t: float
) -> _Value:
    """The value where no rule and no model gives one."""
    for level in outer:
        if item.key in level:
            value = setting_at(level[item.key], tensor, t)
            if value is not None:
                return value
    return item.default


def _lacking(
    item: Parameter,
    info: MethodInfo,
    sources: tuple[Source, ...],
    found: list[_Value],
    part: Slice,
) -> str:
    hint = "; a list of filters needs a last entry without filter"
    if not item.per_model:
        return f"{part.where}: no '{item.key}': {info.name} needs it{hint}"
    lacking = [source for source, value in zip(sources, found, strict=True) if value is None]
    places = ", ".join(f"{source.where} ({source.model})" for source in lacking)
    return f"{places}: {lacking_text(item, info, lacking)}{hint}"


@functools.lru_cache(maxsize=65_536, typed=True)
def _made(cls: type, models: int, *values: _Value) -> tuple[Method | None, tuple[str, ...]]:
    """The method with these values (of each model one, where per model), or what is wrong.

    Typed, as 1.0 and true are equal and yet different values.
    """
    info = info_of(cls)
    left = iter(values)
    fields: dict[str, object] = {}
    problems: list[str] = []
    for item in info.parameters:
        given = [next(left) for _ in range(models if item.per_model else 1)]
        wrong = [problem for value in given if (problem := wrong_value(item, value))]
        problems.extend(f"{item.key} of {info.name} {problem}" for problem in wrong)
        if not wrong:
            typed = tuple(item.kind(value) for value in given)
            fields[item.name] = typed if item.per_model else typed[0]
    low, high = info.models
    if models < low or (high is not None and models > high):
        problems.append(f"{info.name} cannot merge {models} models")
    if problems:
        return None, tuple(problems)
    made = cls(**fields)
    together = tuple(f"{info.name}: {problem}" for problem in problems_of(made))
    return (None if together else made), together


def _problems_of_any_tensor(recipe: Recipe) -> list[str]:
    """Values that cannot work together for any tensor; only where no rule or filter matters."""
    if recipe.rules:
        return []
    problems: dict[str, None] = {}
    for part in recipe.slices:
        levels = (recipe.parameters, part.parameters, *(item.parameters for item in part.sources))
        settings = [setting for level in levels for setting in level.values()]
        if any(isinstance(setting, tuple) for setting in settings):
            continue
        # A single layer is at 1 only, and an inner slice has no tensors outside of its layers.
        layers = part.sources[0].layers
        ends = (1.0,) if layers and layers[1] - layers[0] == 1 else (0.0, 1.0)
        for t in ends:
            try:
                method_for(recipe, part, "", t)
            except RecipeError as error:
                problems.update(dict.fromkeys(f"{part.where}: {text}" for text in error.problems))
    return list(problems)
