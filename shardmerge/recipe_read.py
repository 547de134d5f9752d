"""From YAML nodes to the parts of a recipe: slices and rules, and what they need to fit together.

Every function adds what is wrong to the node's problems.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from shardmerge.methods.api import METHODS, Base, MethodInfo, Parameter
from shardmerge.recipe_parts import ModelName, Rule, Setting, Slice, Source, Split
from shardmerge.recipe_settings import (
    elsewhere,
    optional,
    read_method,
    read_model,
    read_parameters,
    with_adapter,
)
from shardmerge.recipe_yaml import Node, clipped, shown, unknown

RULE_KEYS = ("tensors", "merge_method", "parameters", "from", "missing", "drop", "split")
SPLIT_KEYS = ("rows", "columns")
MISSING = ("error", "base", "skip")


@dataclass(frozen=True, slots=True)
class Scope:
    """What the parts of a recipe are read with.

    Args:
        info: the recipe's method; None where it was refused.
        others: methods of rules.
        base: the base model.
        missing_base: whether a rule counts on the base model for missing tensors.
        notes: what was accepted and has no effect; added to.
        models: all models that were read, None for one that was refused; added to.
    """

    info: MethodInfo | None
    others: tuple[MethodInfo, ...]
    base: ModelName | None
    missing_base: bool
    notes: list[str] = field(default_factory=list)
    models: list[ModelName | None] = field(default_factory=list)

    @property
    def infos(self) -> tuple[MethodInfo, ...]:
        """The recipe's method and those of its rules; none where the former was refused."""
        return (self.info, *self.others) if self.info else ()

    @property
    def needs_base(self) -> bool:
        """Whether something is taken from the base model's tensors."""
        return self.missing_base or any(info.base is Base.REQUIRED for info in self.infos)


# --- sources and slices -------------------------------------------------------------------------


def read_slices(fields: Mapping[str, Node], root: Node, scope: Scope) -> tuple[Slice, ...]:
    """``models`` as one slice, or ``slices``."""
    if isinstance(root.value, dict) and ("models" in fields) == ("slices" in fields):
        root.wrong("needs exactly one of models and slices")
    if "slices" in fields:
        return tuple(
            part for node in fields["slices"].entries() if (part := _read_slice(node, scope))
        )
    if "models" not in fields:
        return ()
    node = fields["models"]
    entries = node.entries()
    sources = [_read_source(entry, scope, layered=False) for entry in entries]
    if None in sources or not entries:
        return ()
    part = Slice(tuple(source for source in sources if source), None, {}, node.where)
    return (_with_base(part, scope.base, "base_model", node, scope),)


def _read_slice(node: Node, scope: Scope) -> Slice | None:
    instead = elsewhere() | {"residual_weight": "has no effect in mergekit either; remove it"}
    fields = node.fields(("sources", "base_model", "parameters"), instead)
    own_base = optional(fields, "base_model", read_model)
    scope.models.extend([own_base] if "base_model" in fields else [])
    parameters = read_parameters(fields.get("parameters"), scope.infos, scope.notes)
    if "sources" not in fields:
        node.wrong("needs 'sources'")
        return None
    sources = [_read_source(item, scope, layered=True) for item in fields["sources"].entries()]
    if None in sources or not sources:
        return None
    part = Slice(tuple(source for source in sources if source), None, parameters, node.where)
    _check_lengths(part, node)
    place = f"{node.where}.base_model" if own_base else "base_model"
    return _with_base(part, own_base or scope.base, place, node, scope)


def _read_source(node: Node, scope: Scope, *, layered: bool) -> Source | None:
    if isinstance(node.value, str):
        scope.models.append(None)
        node.wrong(f"must be a mapping; write model: {clipped(node.value)}")
        return None
    kinds = sorted({kind for info in scope.infos for kind in info.extras})
    unused = {kind for info in METHODS.values() for kind in info.extras} - set(kinds)
    instead = elsewhere()
    if scope.info:
        instead |= dict.fromkeys(unused, f"is not used by {scope.info.name}; remove it")
    if not layered:
        instead["layer_range"] = "belongs to slices; models takes all layers"
    layer_key = ("layer_range",) if layered else ()
    keys = ("model", "lora", "any_base", "parameters")
    fields = node.fields((*keys, *layer_key, *kinds), instead)
    model = with_adapter(optional(fields, "model", read_model), fields)
    scope.models.append(model)
    layers = optional(fields, "layer_range", _read_layers)
    extras = {kind: optional(fields, kind, read_model) for kind in kinds}
    parameters = read_parameters(fields.get("parameters"), scope.infos, scope.notes, of_model=True)
    for key in ("model", *layer_key):
        if key not in fields and isinstance(node.value, dict):
            node.wrong(f"needs '{key}'")
    if model is None or (layered and layers is None):
        return None
    given = {kind: name for kind, name in extras.items() if name}
    return Source(model, layers, parameters, given, node.where)


def _read_layers(node: Node) -> tuple[int, int] | None:
    match node.value:
        case [int(first), int(last)] if type(first) is type(last) is int and 0 <= first < last:
            return first, last
    given = node.value if isinstance(node.value, list) else None
    what = f"[{', '.join(map(shown, given))}]" if given and len(given) < 4 else shown(node.value)
    node.wrong(
        f"must be two whole numbers [first, last) with 0 <= first < last, not {what}; the last "
        "layer itself is not included"
    )
    return None


def _check_lengths(part: Slice, node: Node) -> None:
    ranges = [source.layers for source in part.sources if source.layers]
    if len({last - first for first, last in ranges}) > 1:
        each = ", ".join(
            f"{last - first} ([{first}, {last}) of {source.model})"
            for source, (first, last) in zip(part.sources, ranges, strict=True)
        )
        node.wrong(f"all sources of a slice must have equally many layers; they have {each}")


def _with_base(part: Slice, base: ModelName | None, place: str, node: Node, scope: Scope) -> Slice:
    """The slice with the base model where the method wants it: apart, or among the sources."""
    if scope.info is None:
        return part
    listed = [source for source in part.sources if source.model == base]
    kind = scope.info.base
    if base and (kind is Base.REQUIRED or scope.needs_base):
        made = Source(base, part.sources[0].layers, {}, {}, place)
        part = replace(part, base=replace(listed[0], parameters={}, extras={}) if listed else made)
    if kind is Base.REQUIRED and listed:
        _check_listed(listed, scope.info, node)
        part = replace(part, sources=tuple(item for item in part.sources if item not in listed))
    if kind is Base.INPUT and base and not listed and part.sources[0].layers is None:
        added = Source(base, None, {}, {}, place)
        part = replace(part, sources=(*part.sources, added))
    _check_slice(part, base, node, scope)
    return part


def _check_listed(listed: list[Source], info: MethodInfo, node: Node) -> None:
    if len(listed) > 1:
        places = " and ".join(source.where for source in listed)
        node.wrong(f"the base model {listed[0].model} is listed twice ({places}); remove one")
    for source in listed:
        given = [*source.parameters, *source.extras]
        if given:
            node.at(source.where).wrong(
                f"{', '.join(given)} of the base model has no effect: {info.name} merges the other "
                "models onto it; remove it"
            )


def _check_slice(part: Slice, base: ModelName | None, node: Node, scope: Scope) -> None:
    if scope.missing_base and base is None:
        node.at("base_model").wrong("is missing; a rule says 'missing: base'")
    for info in scope.infos:
        of = "" if info is scope.info else " (the method of a rule)"
        if info.base is Base.REQUIRED and base is None:
            node.at("base_model").wrong(
                f"is missing; {info.name}{of} takes task vectors from it: add base_model: <path>"
            )
        elif info.base is Base.REQUIRED and info is not scope.info and _merges(part, base):
            node.wrong(
                f"{info.name}{of} takes task vectors from the base model {base}, which "
                f"{scope.infos[0].name} merges like the others; make {info.name} the recipe's "
                f"merge_method and {scope.infos[0].name} that of rules"
            )
        low, high = info.models
        if len(part.sources) < low or (high is not None and len(part.sources) > high):
            node.wrong(_wrong_count(info, of, part))
        for source in part.sources:
            for kind in sorted(set(info.extras) - set(source.extras)):
                node.at(source.where).wrong(f"needs '{kind}: <checkpoint>' for {info.name}{of}")


def _merges(part: Slice, base: ModelName | None) -> bool:
    return any(source.model == base for source in part.sources)


def _wrong_count(info: MethodInfo, of: str, part: Slice) -> str:
    low, high = info.models
    count = f"exactly {low}" if low == high else f"at least {low}"
    if high is not None and low != high:
        count = f"{low} to {high}"
    besides = " besides the base model" if info.base is Base.REQUIRED else ""
    given = ", ".join(str(source.model) for source in part.sources) or "none"
    number = len(part.sources)
    return (
        f"{info.name}{of} merges {count} model{'' if (low, high) == (1, 1) else 's'}{besides}; "
        f"there {'is' if number == 1 else 'are'} {number} ({clipped(given)})"
    )


# --- rules --------------------------------------------------------------------------------------


def methods_of_rules(node: Node | None) -> tuple[MethodInfo, ...]:
    """The methods that rules name, as far as they are right; what is wrong is not reported here."""
    rules = node.value if node and isinstance(node.value, list) else []
    names = [rule.get("merge_method") for rule in rules if isinstance(rule, dict)]
    known = dict.fromkeys(name for name in names if isinstance(name, str) and name in METHODS)
    return tuple(METHODS[name] for name in known)


def counts_on_base(node: Node | None) -> bool:
    """Whether a rule says ``missing: base``."""
    rules = node.value if node and isinstance(node.value, list) else []
    return any(isinstance(rule, dict) and rule.get("missing") == "base" for rule in rules)


def read_rules(node: Node | None, scope: Scope) -> tuple[Rule, ...]:
    """Rules; after the models, which ``from`` names."""
    return tuple(_read_rule(entry, scope) for entry in (node.entries() if node else ()))


def _read_rule(node: Node, scope: Scope) -> Rule:
    fields = node.fields(RULE_KEYS, elsewhere())
    info = optional(fields, "merge_method", read_method)
    of_rule = (info or scope.info,) if "merge_method" not in fields or info else ()
    infos = tuple(item for item in of_rule if item)
    rule = Rule(
        tensors=_read_globs(fields["tensors"]) if "tensors" in fields else (),
        merge_method=info.name if info else None,
        parameters=read_parameters(fields.get("parameters"), infos, scope.notes),
        take_from=optional(fields, "from", lambda item: _read_from(item, scope)),
        missing=optional(fields, "missing", _read_missing),
        drop=optional(fields, "drop", Node.flag) or False,
        where=node.where,
        split=optional(fields, "split", _read_split),
    )
    if isinstance(node.value, dict):
        _check_rule(node, fields)
    return rule


def _check_rule(node: Node, fields: Mapping[str, Node]) -> None:
    if "tensors" not in fields:
        node.wrong("needs 'tensors': a glob of tensor names, such as '*.bias', or a list of them")
    actions = [key for key in RULE_KEYS[1:] if key in fields and fields[key].value != {}]
    if not actions:
        node.wrong(f"does nothing; give it one of {', '.join(RULE_KEYS[1:])}")
    if "drop" in fields and fields["drop"].value is False:
        fields["drop"].wrong("false does nothing; remove it")
    for alone in ("drop", "from"):
        if alone in actions and len(actions) > 1:
            others = ", ".join(key for key in actions if key != alone)
            node.wrong(f"'{alone}' leaves nothing to do for {others}; remove one or the other")
            return


def _read_globs(node: Node) -> tuple[str, ...]:
    if not isinstance(node.value, list):
        one = node.text()
        return (one,) if one else ()
    return tuple(glob for entry in node.entries() if (glob := entry.text()))


def _read_from(node: Node, scope: Scope) -> ModelName | None:
    if node.value == "base" and scope.base is not None:
        return scope.base
    model = read_model(node)
    if model and model not in scope.models and None not in scope.models:
        names = dict.fromkeys(map(str, scope.models))
        node.wrong(unknown("model", str(model), names, has="the recipe has"))
    return model


def _read_missing(node: Node) -> str | None:
    choice = node.text()
    if choice is not None and choice not in MISSING:
        node.wrong(unknown("choice", choice, MISSING, has="there are"))
    return choice


def _read_split(node: Node) -> Split | None:
    """``{rows: 3}``, ``{rows: [4096, 1024, 1024]}``, or the same with columns."""
    fields = node.fields(SPLIT_KEYS, {})
    if len(fields) != 1:
        node.wrong("needs one of 'rows' and 'columns': their number, or a list of sizes")
        return None
    ((axis, sizes),) = fields.items()
    if not isinstance(sizes.value, list):
        number = sizes.whole(2, 2**20)
        return None if number is None else Split(axis, number)
    found = [entry.whole(1, 2**40) for entry in sizes.entries()]
    if len(found) < 2:
        sizes.wrong("needs at least two sizes")
        return None
    return Split(axis, tuple(size or 1 for size in found))


# --- required parameters ------------------------------------------------------------------------


def check_required(
    slices: tuple[Slice, ...],
    top: Mapping[str, Setting],
    rules: tuple[Rule, ...],
    root: Node,
    scope: Scope,
) -> None:
    """Report required parameters that are given nowhere, whatever the tensor."""
    by_rules = {key for rule in rules for key in rule.parameters}
    anywhere = by_rules | set(top) | {key for part in slices for key in _given(part)}
    for info in scope.others:
        for item in info.parameters:
            if item.required and item.key not in anywhere and slices:
                rule = next(rule for rule in rules if rule.merge_method == info.name)
                root.at(rule.where).wrong(
                    f"{info.name} needs '{item.key}'; give it in {rule.where}.parameters"
                )
    for item in scope.info.parameters if scope.info else ():
        if item.required and item.key not in by_rules and item.key not in top:
            for part in slices:
                _check_given(item, part, root, scope)


def _given(part: Slice) -> Iterator[str]:
    yield from part.parameters
    for source in part.sources:
        yield from source.parameters


def _check_given(item: Parameter, part: Slice, root: Node, scope: Scope) -> None:
    assert scope.info
    if item.key in part.parameters:
        return
    lacking = [source for source in part.sources if item.key not in source.parameters]
    if not item.per_model:
        root.at(part.where).wrong(
            f"{scope.info.name} needs '{item.key}'; give it in the top-level parameters"
        )
    elif lacking:
        root.at(", ".join(source.where for source in lacking)).wrong(
            lacking_text(item, scope.info, lacking)
        )


def lacking_text(item: Parameter, info: MethodInfo, lacking: Iterable[Source]) -> str:
    """What to do about models without a value of their own."""
    text = (
        f"no '{item.key}': {info.name} needs it of each model; give it in the model's parameters, "
        "or once in the top-level parameters"
    )
    if info.base is Base.INPUT and any(source.where.endswith("base_model") for source in lacking):
        text += (
            f". {info.name} averages the base model like every other: list it in models with "
            f"{item.key}: 0 to leave it out, or remove base_model"
        )
    return text
