"""Which tensors of further checkpoints (``fisher``, ``gram``) go with each output tensor. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge import mismatch
from shardmerge.inputs import Inputs
from shardmerge.methods.api import ExtraTensor, Method, info_of
from shardmerge.mismatch import Findings
from shardmerge.parts import Part
from shardmerge.recipe import ModelName, Recipe
from shardmerge.sources.tensor import Checkpoint, TensorRef

Extras = tuple[tuple[str, tuple[TensorRef, ...]], ...]
"""By kind, in the method's order; each as long as the models."""
Named = tuple[ModelName, ModelName, TensorRef | None]
"""A model, its further checkpoint, and the tensor of it."""


class ExtrasChooser:
    """Chooses the further inputs of one tensor after the other."""

    def __init__(
        self, recipe: Recipe, sources: Mapping[ModelName, Checkpoint], findings: Findings
    ) -> None:
        self._recipe = recipe
        self._sources = sources
        self._findings = findings
        self._fitted: dict[Method, Method] = {}
        self._without: dict[tuple[str, str], bool] = {}

    def extras(
        self, part: Part, name: str, inputs: Inputs, method: Method
    ) -> tuple[Method, Extras] | None:
        """The tensors that go with the models', and the method that takes them.

        None where one does not fit.
        """
        kinds = inputs.info.extras if inputs.info else ()
        if not kinds:
            return method, ()
        own = hasattr(method, "fits")
        found: list[tuple[str, tuple[TensorRef, ...]]] = []
        complete = True
        for kind in kinds:
            named = self._named(kind, part, name, inputs)
            if named is None:
                complete = False
            elif own and not any(ref for _, _, ref in named):
                self._note_absence(kind, name, inputs)
            elif self._check(kind, name, inputs, method if own else None, named):
                found.append((kind, tuple([ref for _, _, ref in named if ref is not None])))
            else:
                complete = False
        if not complete:
            return None
        if own and found:
            return self._fit(name, inputs, method, dict(found), part)
        return method, tuple(found)

    def check(self) -> None:
        """Report methods whose further checkpoints hold nothing for any tensor: they are others."""
        for (method, kind), alone in self._without.items():
            if alone:
                self._findings.problem(mismatch.NoExtras(method, kind))

    def _named(self, kind: str, part: Part, name: str, inputs: Inputs) -> list[Named] | None:
        """What each model's further checkpoint holds; None where the recipe names none."""
        found: list[Named] = []
        for position, ref in zip(inputs.positions, inputs.models, strict=True):
            source = self._recipe.slices[part.slice].sources[position]
            extra = source.extras.get(kind)
            if extra is None:
                self._findings.problem(mismatch.ExtraUnnamed(kind, source.where), name)
                continue
            found.append((source.model, extra, self._sources[extra].tensors.get(ref.name)))
        return found if len(found) == len(inputs.models) else None

    def _check(
        self, kind: str, name: str, inputs: Inputs, method: Method | None, named: list[Named]
    ) -> bool:
        """Report which of a kind do not fit; ``method`` says it, where that is not None."""
        good = True
        for (model, extra, held), ref in zip(named, inputs.models, strict=True):
            if held is None:
                wrong = "it is missing"
            elif method is None:
                wrong = _unlike(held, ref)
            else:
                wrong = method.fits(ref.shape, self._fact(held, extra))
            if wrong:
                good = False
                unfit = mismatch.ExtraUnfit(kind, extra, model, own=method is not None)
                self._findings.problem(unfit, name, f"{ref.name}: {wrong}")
        return good

    def _fit(
        self,
        name: str,
        inputs: Inputs,
        method: Method,
        found: Mapping[str, tuple[TensorRef, ...]],
        part: Part,
    ) -> tuple[Method, Extras] | None:
        """The method as it is for these; one value for all tensors that are alike."""
        sources = self._recipe.slices[part.slice].sources
        facts = {
            kind: [
                self._fact(ref, sources[position].extras[kind])
                for position, ref in zip(inputs.positions, refs, strict=True)
            ]
            for kind, refs in found.items()
        }
        fitted = method.fitted(inputs.models[0].shape, facts)
        if isinstance(fitted, str):
            self._findings.problem(mismatch.Parameters(fitted), name)
            return None
        self._without.update({(info_of(method).name, kind): False for kind in found})
        return self._fitted.setdefault(fitted, fitted), tuple(found.items())

    def _fact(self, ref: TensorRef, extra: ModelName) -> ExtraTensor:
        config = self._sources[extra].config
        return ExtraTensor(ref.name, ref.shape, ref.dtype.torch_name, config)

    def _note_absence(self, kind: str, name: str, inputs: Inputs) -> None:
        """A matrix that is merged without: of smaller tensors it goes without saying."""
        assert inputs.info is not None
        self._without.setdefault((inputs.info.name, kind), True)
        if len(inputs.models[0].shape) > 1:
            self._findings.note(f"in no {kind} checkpoint; merged element by element", name)


def _unlike(held: TensorRef, ref: TensorRef) -> str:
    """How a tensor of a further checkpoint differs from a model's, where that is wrong."""
    if held.shape != ref.shape:
        return f"its shape is {list(held.shape)}, the model's {list(ref.shape)}"
    return "" if held.dtype.is_float else f"its dtype is {held.dtype.torch_name}"
