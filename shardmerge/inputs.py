"""Which inputs each output tensor has: what rules say, and what is done if one is missing. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardmerge import mismatch
from shardmerge.methods.api import METHODS, Base, MethodInfo
from shardmerge.mismatch import Findings
from shardmerge.parts import Part, Views
from shardmerge.recipe import ModelName, Recipe, Ruled, rules_for
from shardmerge.recipe_yaml import nearest
from shardmerge.sources.tensor import Checkpoint, TensorRef


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one output tensor is made from.

    Args:
        info: the method that merges them; None where one model's tensor is copied.
        base: None where the method does not use it.
        positions: of ``models``, among the sources of the slice.
        origin: the model that a copied tensor is from.
        rules: numbers of the rules that match the tensor.
    """

    info: MethodInfo | None
    base: TensorRef | None
    models: tuple[TensorRef, ...]
    positions: tuple[int, ...]
    origin: ModelName | None
    rules: tuple[int, ...]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All inputs, the base model's first."""
        return self.models if self.base is None else (self.base, *self.models)

    def named(self, part: Part) -> list[tuple[ModelName, TensorRef]]:
        """All inputs with the models they are from, the base model first."""
        if self.origin is not None:
            return [(self.origin, self.models[0])]
        named = [(part.models[k], ref) for k, ref in zip(self.positions, self.models, strict=True)]
        if self.base is not None and part.base_model is not None:
            named.insert(0, (part.base_model, self.base))
        return named


class Chooser:
    """Chooses the inputs of one tensor after the other; keeps what rules say about many of them."""

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
        self._patterns = [
            (number, pattern, re.compile(fnmatch.translate(pattern)).match)
            for number, rule in enumerate(recipe.rules)
            for pattern in rule.tensors
        ]
        # Most names match no pattern at all: that is found out by one search, not by one for each.
        globs = (glob for rule in recipe.rules for glob in rule.tensors)
        self._any_pattern = re.compile("|".join(map(fnmatch.translate, globs))).match
        self._matched: set[tuple[int, str]] = set()
        self._ruled: dict[tuple[int, ...], Ruled] = {}

    def inputs(self, part: Part, name: str) -> Inputs | None:
        """The inputs of an output tensor; None where a rule drops it, or there is a problem."""
        rules = self._matching(name)
        ruled = self._ruled.get(rules)
        if ruled is None:
            ruled = self._ruled[rules] = rules_for(self._recipe, name)
        if ruled.drop:
            return None
        if ruled.take_from is not None:
            return self._taken(part, name, ruled.take_from, rules)
        info = METHODS[ruled.merge_method]
        base = None if part.base is None else part.base.get(name)
        held = tuple([view.get(name) for view in part.sources])
        found = _complete(held)
        if found is None or (base is None and info.base is Base.REQUIRED):
            return self._incomplete(part, name, base, held, info, ruled.missing, rules)
        used = base if info.base is Base.REQUIRED else None
        return Inputs(info, used, found, part.positions, None, rules)

    # --- rules ----------------------------------------------------------------------------------

    def _matching(self, name: str) -> tuple[int, ...]:
        """Numbers of the rules that match a name."""
        if not self._patterns or not self._any_pattern(name):
            return ()
        hits = [(number, pattern) for number, pattern, match in self._patterns if match(name)]
        self._matched.update(hits)
        return tuple(dict.fromkeys([number for number, _ in hits]))

    def check_patterns(self, names: Sequence[str]) -> None:
        """Report the patterns that matched nothing: a rule with a typo would change nothing."""
        unmatched = [(n, text) for n, text, _ in self._patterns if (n, text) not in self._matched]
        if not unmatched:
            return
        alike = {_starred(name): name for name in reversed(names)}
        for number, pattern in unmatched:
            near = nearest(_starred(pattern), alike)
            hint = None if near is None else alike[near]
            where = self._recipe.rules[number].where
            self._findings.problem(mismatch.Unmatched(where, pattern, hint))

    def _taken(
        self, part: Part, name: str, model: ModelName, rules: tuple[int, ...]
    ) -> Inputs | None:
        """The one input of a tensor that a rule takes from ``model``."""
        view = next(
            (view for own, view in zip(part.models, part.sources, strict=True) if own == model),
            part.base if model == part.base_model else None,
        )
        if view is None and part.numbered:
            where = self._recipe.slices[part.slice].where
            self._findings.problem(mismatch.NotInSlice(model, where), name)
            return None
        if view is None:
            view = self._views[model] if model in self._views else self._sources[model].tensors
        ref = view.get(name)
        if ref is None:
            self._findings.problem(mismatch.TakeFrom(model), name)
            return None
        return Inputs(None, None, (ref,), (0,), model, rules)

    # --- missing tensors ------------------------------------------------------------------------

    def _incomplete(
        self,
        part: Part,
        name: str,
        base: TensorRef | None,
        held: tuple[TensorRef | None, ...],
        info: MethodInfo,
        missing: str,
        rules: tuple[int, ...],
    ) -> Inputs | None:
        """The inputs of a tensor that some model, or a base model that is needed, does not have."""
        present = [(k, ref) for k, ref in enumerate(held) if ref is not None]
        holders = [(part.models[k], ref) for k, ref in present]
        base_model = part.base_model
        if base is not None and base_model is not None and base_model not in dict(holders):
            holders.append((base_model, base))
        if len(holders) == 1:
            ((origin, only),) = holders
            self._findings.note(f"only in {origin}; copied from it", name)
            return Inputs(None, None, (only,), (0,), origin, rules)
        base_lacks = info.base is Base.REQUIRED and base is None
        used = base if info.base is Base.REQUIRED else None
        if missing == "base" and base is not None:
            models = tuple(base if ref is None else ref for ref in held)
            return Inputs(info, used, models, part.positions, None, rules)
        if missing == "skip" and not base_lacks and len(present) >= info.models[0]:
            positions, refs = zip(*present, strict=True)
            return Inputs(info, used, refs, positions, None, rules)
        lacking = [model for model, ref in zip(part.models, held, strict=True) if ref is None]
        if base_lacks and base_model is not None:
            lacking.append(base_model)
        kind = mismatch.Missing(
            held=tuple(dict.fromkeys(model for model, _ in holders)),
            lacking=tuple(dict.fromkeys(lacking)),
            base=None if base is None else base_model,
            base_lacks=base_lacks,
            present=len(present),
            least=info.models[0],
            asked=missing,
        )
        self._findings.problem(kind, name)
        return None


def _complete(held: tuple[TensorRef | None, ...]) -> tuple[TensorRef, ...] | None:
    """The same, where every model has the tensor."""
    found = tuple([ref for ref in held if ref is not None])
    return found if len(found) == len(held) else None


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)
