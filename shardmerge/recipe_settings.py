"""From YAML nodes to single values of a recipe: models, methods, options, parameters.

Every function adds what is wrong to the node's problems. A setting that was refused is replaced by
a stand-in, so that the rest is checked as well; such a recipe is never returned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from shardmerge import methods
from shardmerge.methods.api import METHODS, MethodInfo, Parameter
from shardmerge.numerics import DTYPE_BY_TORCH_NAME, DType
from shardmerge.recipe_parts import (
    Filtered,
    Gradient,
    ModelName,
    Scalar,
    Setting,
    wrong_value,
)
from shardmerge.recipe_yaml import Node, clipped, nearest, shown, unknown

T = TypeVar("T")

TOP_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "rules",
    "seed",
    "shard_size",
    "allow_non_finite",
)
DTYPES = ("float16", "bfloat16", "float32", "float64")
SMALLEST_SHARD = 4096

NOT_YET = {
    "modules": "is not supported yet; give models or slices, one recipe per module",
    "tokenizer": "is not supported yet; write tokenizer_source: base, or the model to copy it from",
    "chat_template": "is not supported yet; remove it (the tokenizer's own template is copied)",
    "name": "belongs to mergekit-multi's recipes of several documents; remove it",
}
OTHER_METHODS = (
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "karcher",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "ramplus_tl",
    "sce",
)
"""Mergekit's methods that are not here."""
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    unit: 1 << power for unit, power in (("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40))
}


def optional(fields: Mapping[str, Node], key: str, read: Callable[[Node], T | None]) -> T | None:
    """What ``read`` makes of a key that need not be there."""
    return read(fields[key]) if key in fields else None


# --- models, methods, options -------------------------------------------------------------------


def read_model(node: Node) -> ModelName | None:
    """``path``, ``path@revision``, ``model+lora``, or a mapping.

    The mappings are {path, revision} and {model, lora, any_base}; ``model`` and ``lora`` may be
    mappings themselves.
    """
    if not isinstance(node.value, dict):
        text = node.text()
        return None if text is None else _split_adapter(node, text)
    instead = {"override_architecture": "is not supported yet; remove it"}
    fields = node.fields(("model", "path", "revision", "lora", "any_base"), instead)
    if "model" in fields:
        return with_adapter(read_model(fields["model"]), fields)
    if "path" not in fields:
        node.wrong("needs 'path'")
        return None
    path, revision = fields["path"].text(), optional(fields, "revision", Node.text)
    return with_adapter(None if path is None else ModelName(_trimmed(path), revision), fields)


def with_adapter(model: ModelName | None, fields: Mapping[str, Node]) -> ModelName | None:
    """A model with the adapter that ``lora`` beside it names; ``any_base`` goes with that."""
    adapter = optional(fields, "lora", read_model)
    any_base = optional(fields, "any_base", Node.flag) or False
    if "lora" not in fields:
        if "any_base" in fields:
            fields["any_base"].wrong("is about an adapter; name it with 'lora', or remove this")
        return model
    if (model and model.adapter) or (adapter and adapter.adapter):
        fields["lora"].wrong(f"is a second adapter; {ONE_ADAPTER}")
        return None
    return model and adapter and replace(model, adapter=adapter, any_base=any_base)


ONE_ADAPTER = "a model has one, so publish the model with the first and add the other to that"


def _split_adapter(node: Node, text: str) -> ModelName | None:
    """A model in one text, with what follows ``+`` as its adapter."""
    before, plus, after = text.partition("+")
    if not plus:
        return _split_revision(node, text)
    form = f"if '+' is part of the path, write {{path: '{clipped(text)}'}}"
    if "+" in after:
        node.wrong(f"'{clipped(text)}' has more than one '+' (model+lora): {ONE_ADAPTER}; {form}")
        return None
    if not before or not after:
        node.wrong(f"'{clipped(text)}' has nothing on one side of '+' (model+lora); {form}")
        return None
    model, adapter = _split_revision(node, before), _split_revision(node, after)
    return model and adapter and replace(model, adapter=adapter)


def _split_revision(node: Node, text: str) -> ModelName | None:
    form = f"if it is part of the path, write {{path: '{clipped(text)}'}}"
    scheme, separator, rest = text.rpartition("://")
    host, slash, path = rest.partition("/") if separator else ("", "", rest)
    if path.count("@") > 1:
        node.wrong(f"'{clipped(text)}' has more than one '@' (path@revision); {form}")
        return None
    path, at, revision = path.partition("@")
    if at and not (path and revision):
        node.wrong(f"'{clipped(text)}' has nothing on one side of '@' (path@revision); {form}")
        return None
    return ModelName(_trimmed(scheme + separator + host + slash + path), revision or None)


def _trimmed(path: str) -> str:
    """The path without slashes at its end, so that a model is the same with them and without."""
    return path.rstrip("/") or path


def read_method(node: Node) -> MethodInfo | None:
    """A merge method by name."""
    name = node.text()
    if name is None or name in METHODS:
        return METHODS.get(name or "")
    known = methods.names()
    if name in OTHER_METHODS:
        there = ", ".join(known)
        node.wrong(
            f"'{name}' is a method of mergekit that is not supported yet (there are {there})"
        )
    else:
        node.wrong(unknown("merge method", name, known, has="there are"))
    return None


def read_dtype(node: Node) -> DType | None:
    """A floating dtype by torch's name."""
    name = node.text()
    if name is None or name in DTYPES:
        return DTYPE_BY_TORCH_NAME[name] if name else None
    if name == "int64":
        reason = "'int64' would round the merged values to whole numbers"
    else:
        reason = f"'{clipped(name)}' is not a dtype that can be written"
    node.wrong(f"{reason}; it must be one of {', '.join(DTYPES)}")
    return None


def read_tokenizer(node: Node, base: ModelName | None) -> ModelName | None:
    """Where the tokenizer is copied from: ``base`` or a model."""
    if node.value == "union":
        node.wrong(
            "'union' (a vocabulary of all models' tokens) is not supported yet; write base, or the "
            "model to copy the tokenizer from"
        )
        return None
    if node.value == "base":
        if base is None:
            node.wrong("'base' needs base_model; add it, or name a model")
        return base
    return read_model(node)


def read_shard_size(node: Node) -> int | None:
    """Bytes, or a number with a unit."""
    size: int | float | None = None
    if isinstance(node.value, int) and not isinstance(node.value, bool):
        size = node.value
    elif isinstance(node.value, str):
        found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?) ?([a-zA-Z]*)", node.value)
        number, unit = found.groups() if found else ("", "")
        if unit.lower() in ("k", "m", "g", "b"):
            node.wrong(
                f"'{clipped(node.value)}' is ambiguous: mergekit documents such sizes as "
                f"parameters and counts them as bytes; write bytes with a unit, such as 5GB"
            )
            return None
        scale = {name.lower(): scale for name, scale in UNITS.items()}.get(unit.lower())
        size = float(number) * scale if scale else None
    if size is None:
        units = ", ".join(UNITS)
        node.wrong(f"must be bytes, or a number with one of {units}, not {shown(node.value)}")
    elif size < SMALLEST_SHARD:
        node.wrong(f"must be at least {SMALLEST_SHARD} bytes, not {shown(node.value)}")
    return None if size is None else int(size)


# --- parameters ---------------------------------------------------------------------------------


def read_parameters(
    node: Node | None, infos: tuple[MethodInfo, ...], notes: list[str], *, of_model: bool = False
) -> dict[str, Setting]:
    """Settings by key. What is shared by all models is refused where ``of_model``."""
    known = _known(infos)
    inert = {key for info in infos for key in info.inert}
    found: dict[str, Setting] = {}
    for key, child in node.pairs() if node and infos else ():
        if key in known:
            found[key] = read_setting(child, known[key][1])
            if of_model and not known[key][1].per_model:
                child.wrong(
                    f"{key} is one value for all models of {known[key][0].name}; move it to the "
                    "top-level parameters"
                )
        elif key in inert:
            notes.append(f"{child.where}: has no effect here")
        else:
            child.at(node.where if node else "").wrong(_unknown_parameter(key, infos))
            found.setdefault(nearest(key, known) or "", 0.0)  # meant, probably: not missing as well
    return found


def _known(infos: Iterable[MethodInfo]) -> dict[str, tuple[MethodInfo, Parameter]]:
    """Each parameter by key, with the first method that has it."""
    known: dict[str, tuple[MethodInfo, Parameter]] = {}
    for info in infos:
        for item in info.parameters:
            known.setdefault(item.key, (info, item))
    return known


def _unknown_parameter(key: str, infos: tuple[MethodInfo, ...]) -> str:
    if len(infos) == 1:
        return unknown("parameter", key, _known(infos), of=f" of {infos[0].name}")
    each = (f"{info.name} has {', '.join(item.key for item in info.parameters)}" for info in infos)
    near = nearest(key, _known(infos))
    hint = f". Did you mean '{near}'?" if near else ""
    return f"unknown parameter '{clipped(key)}' ({'; '.join(each)}){hint}"


def read_setting(node: Node, parameter: Parameter) -> Setting:
    """A scalar, a list of them (a gradient), or a list of {filter, value}."""
    if not isinstance(node.value, list):
        return _read_scalar(node, parameter)
    entries = node.entries()
    mappings = sum(isinstance(entry.value, dict) for entry in entries)
    if mappings == 0:
        return Gradient(tuple(_read_scalar(entry, parameter) for entry in entries))
    if mappings < len(entries):
        node.wrong(
            "mixes numbers and {filter, value} mappings; make it a list of one kind (a number for "
            "all other tensors is {value: ...}, as the last entry)"
        )
        return 0.0
    filters = tuple(_read_filtered(entry, parameter) for entry in entries)
    ends = [item.substring is None for item in filters]
    if True in ends[:-1]:
        entries[ends.index(True) + 1].wrong(
            f"is never reached: {entries[ends.index(True)].where} has no filter and so matches "
            "every tensor, and the first match counts; put it last"
        )
    return filters


def _read_filtered(node: Node, parameter: Parameter) -> Filtered:
    fields = node.fields(("filter", "value"), {})
    substring = optional(fields, "filter", Node.text)
    if substring == "*":
        substring = None
    elif substring and "*" in substring:
        fields["filter"].wrong("is a part of tensor names, not a glob; write it without '*'")
    if "value" not in fields:
        node.wrong("needs 'value'")
        return Filtered(substring, 0.0)
    value = fields["value"]
    if isinstance(value.value, list):
        entries = tuple(_read_scalar(entry, parameter) for entry in value.entries())
        return Filtered(substring, Gradient(entries))
    return Filtered(substring, _read_scalar(value, parameter))


def _read_scalar(node: Node, parameter: Parameter) -> Scalar:
    problem = wrong_value(parameter, node.value)
    if problem:
        node.wrong(problem)
        return 0.0
    if isinstance(node.value, bool | str):
        return node.value
    assert isinstance(node.value, int | float)
    return float(node.value) + 0.0  # no negative zero: equal values are the same value


def elsewhere() -> dict[str, str]:
    """Parameters of methods, which are not keys of the recipe itself."""
    text = "belongs under 'parameters:'"
    return {item.key: text for info in METHODS.values() for item in info.parameters}
