"""Sums of task vectors that are kept as checkpoints, and the models that are made of them. Pure.

A method that adds takes two plans: the first makes the sum, in float32, with the norms over the
model; the second scales it and adds it to the base model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from shardmerge.errors import NonFiniteError, PlanError, RecipeError
from shardmerge.match import Outputs, OutputTensor
from shardmerge.methods.api import Decision, Method, info_of
from shardmerge.methods.scaled import Scaled
from shardmerge.numerics import DType
from shardmerge.outputs.api import Receipt
from shardmerge.plan import Plan
from shardmerge.recipe import Recipe
from shardmerge.sources.tensor import Checkpoint, Segment, TensorRef

STATE = "state"
"""Kind of the extra input that a sum goes on from."""


@dataclass(frozen=True, slots=True)
class Norms:
    """Euclidean norms over all tensors of the model that are added.

    Args:
        models: of each task vector, in the order in which they were added.
        total: of the sum.
    """

    models: tuple[float, ...]
    total: float


def is_added(tensor: OutputTensor) -> bool:
    """Whether a tensor is made by a method that adds."""
    return tensor.method is not None and info_of(tensor.method).adds


def adding(outputs: Outputs) -> Method | None:
    """The method that adds, with the parameters of the first tensor; None where there is none."""
    return next((tensor.method for tensor in outputs.tensors if is_added(tensor)), None)


def check_added(recipe: Recipe, outputs: Outputs) -> None:
    """Refuse what cannot be scaled by one number.

    Raises:
        RecipeError: for slices of layers, or tensors that are made of other models than the rest.
    """
    added = [tensor for tensor in outputs.tensors if is_added(tensor)]
    if not added:
        return
    name = info_of(added[0].method).name
    if recipe.allow_non_finite:
        raise RecipeError(
            f"{name} scales by norms over the whole model, which one NaN would make NaN; remove "
            "allow_non_finite."
        )
    if recipe.layered:
        raise RecipeError(f"{name} adds whole models; give 'models' instead of 'slices'.")
    for tensor in added:
        if tensor.positions != added[0].positions:
            raise RecipeError(
                f"{name} scales by norms over the whole model, but {tensor.name} is merged from "
                f"other models than {added[0].name}.\n"
                "  Instead of 'missing: skip', say 'missing: base', or take it 'from' one model."
            )


def summed(
    outputs: Outputs,
    *,
    method: Method | None = None,
    state: Checkpoint | None,
    integers: bool = False,
) -> Outputs:
    """The outputs of the first plan: the sum of each tensor that is added, in float32.

    Args:
        method: that adds instead of the recipe's; it takes every tensor element by element.
        state: the sum so far.
        integers: whether tensors of integers are copied too, if they are the same in all models.
    """
    tensors, shards = [], []
    for tensor, shard in zip(outputs.tensors, outputs.shard_of, strict=True):
        if is_added(tensor):
            tensors.append(_sum_of(tensor, method, state))
            shards.append(shard)
        elif integers and tensor.method is None:
            tensors.append(tensor)
            shards.append(shard)
    return replace(outputs, tensors=tuple(tensors), shard_of=tuple(shards), notes=())


def _sum_of(tensor: OutputTensor, method: Method | None, state: Checkpoint | None) -> OutputTensor:
    extras: tuple[tuple[str, tuple[TensorRef, ...]], ...] = ()
    if state is not None:
        ref = state.tensors.get(tensor.name)
        if ref is None or ref.shape != tensor.shape:
            shape = "missing" if ref is None else list(ref.shape)
            raise PlanError(
                f"{tensor.name} is {shape} in the sum so far, {list(tensor.shape)} in the models.\n"
                "  Models of another architecture cannot be added."
            )
        extras = ((STATE, (ref,)),)
    whole = tensor.whole and method is None
    return replace(
        tensor,
        dtype=DType.F32,
        method=method or tensor.method,
        extras=extras,
        whole=whole,
        split=tensor.split if whole else None,
    )


def scaled(outputs: Outputs, sums: Mapping[str, TensorRef]) -> Outputs:
    """The outputs of the second plan: what is added is made of the base model and its sum."""
    method = Scaled()  # one for all: what follows for tensors is computed once for each method
    tensors = [
        replace(
            tensor,
            method=method,
            models=(sums[tensor.name],),
            positions=(0,),
            extras=(),
            group=0,
            whole=False,
            split=None,
        )
        if is_added(tensor)
        else tensor
        for tensor in outputs.tensors
    ]
    return replace(outputs, tensors=tuple(tensors))


def refs_of(plan: Plan, url: str) -> dict[str, TensorRef]:
    """The tensors that a plan will have published at ``url``."""
    found = {}
    for shard in plan.shards:
        tensors = [plan.tensors[number] for number in shard.tensors]
        sizes = [math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors]
        offsets = accumulate(sizes, initial=len(shard.header))
        for tensor, nbytes, offset in zip(tensors, sizes, offsets, strict=False):
            segments = (Segment(f"{url}/{shard.name}", offset, nbytes),) if nbytes else ()
            found[tensor.name] = TensorRef(tensor.name, tensor.dtype, tensor.shape, segments)
    return found


def total_of(receipts: Iterable[Receipt]) -> tuple[float, ...]:
    """The sums over all parts; empty where the method sums nothing up."""
    rows = [receipt.sums for receipt in receipts if receipt.sums]
    columns = zip(*rows, strict=True)
    return tuple(_rounded([term for sums in column for term in sums]) for column in columns)


def _rounded(terms: Sequence[float]) -> float:
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # too large, or infinities of both signs
        return math.nan


def norms_in(sums: Sequence[float]) -> Norms:
    """The norms, from sums of squares: of each task vector, then of the sum.

    Raises:
        NonFiniteError: for norms that are NaN or infinite.
    """
    if not all(map(math.isfinite, sums)):
        raise NonFiniteError(
            "the norm over the model is NaN or infinite, so nothing can be scaled by it.\n"
            "  Mend the inputs, or take the tensors that hold NaN from one model by a rule."
        )
    *models, total = map(math.sqrt, sums)
    return Norms(tuple(models), total)


def scale_decisions(plan: Plan, scale: float) -> dict[str, Decision]:
    """What a second plan is given, by the ledger's keys."""
    scopes = plan.scopes[len(plan.tensors) :]
    return {
        scope.decision("scale"): (scale,) for scope in scopes if isinstance(scope.method, Scaled)
    }
