"""What a worker asks of a plan, and an excerpt that answers it for the tasks of one unit. Pure.

A plan of 45,000 tensors takes 400 MiB in a process, and a cluster has many of them: so each is sent
what its tasks need, some 2 KB for each tensor, and its memory does not grow with the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from shardmerge.layout import Shard
from shardmerge.match import OutputTensor
from shardmerge.methods.api import Over
from shardmerge.plan import MeasureTask, Plan, Scope, Task, pieces_of

T_co = TypeVar("T_co", covariant=True)


class Numbered(Protocol[T_co]):
    """Values by number: all of a plan's, or those that an excerpt has."""

    def __getitem__(self, number: int, /) -> T_co: ...


class WorkPlan(Protocol):
    """What a worker asks. A ``Plan`` answers it for every task, an ``Excerpt`` for some."""

    @property
    def tensors(self) -> Numbered[OutputTensor]:
        """What is written, and what it is made from."""

    @property
    def scopes(self) -> Numbered[Scope]:
        """Where decisions are taken."""

    @property
    def shards(self) -> Numbered[Shard]:
        """For their headers."""

    @property
    def seed(self) -> int:
        """Of all random numbers."""

    @property
    def device(self) -> str:
        """Where kernels run."""

    @property
    def kernels(self) -> int:
        """That may run at a time."""

    @property
    def readers(self) -> int:
        """Workers that may read at a time."""

    @property
    def worker_bytes(self) -> int:
        """Memory that each worker may use for tiles."""

    def key(self, tensor: int, step: str, over: Over) -> str:
        """The ledger's key of a decision."""


@dataclass(frozen=True)  # without slots: pickled three times as fast
class Excerpt:
    """The part of a plan that some of its tasks need.

    Args:
        tasks: by number, as all that follow.
        scopes: those that the tensors' decisions are taken in, without their other members.
        shards: those whose header is written, without their parts.
        model_scope: for each tensor whose method is measured over the model, that scope.
    """

    tasks: Mapping[int, Task]
    tensors: Mapping[int, OutputTensor]
    scopes: Mapping[int, Scope]
    shards: Mapping[int, Shard]
    model_scope: Mapping[int, int]
    seed: int
    device: str
    kernels: int
    readers: int
    worker_bytes: int

    def key(self, tensor: int, step: str, over: Over) -> str:
        """The ledger's key of a decision."""
        scope = tensor if over is Over.TENSOR else self.model_scope[tensor]
        return self.scopes[scope].decision(step)


def excerpt(plan: Plan, numbers: Iterable[int]) -> Excerpt:
    """What the tasks of these numbers need; without a task, what is the same for all."""
    tasks = {number: plan.tasks[number] for number in numbers}
    tensors = sorted({piece.tensor for task in tasks.values() for piece in pieces_of(task)})
    model_scope = {n: plan.model_scope[n] for n in tensors if n in plan.model_scope}
    scopes = {*tensors, *model_scope.values()}
    shards = set()
    for task in tasks.values():
        if isinstance(task, MeasureTask):
            scopes.add(task.scope)
        else:
            shards |= {part.shard for part in task.parts if part.number == 0}
    return Excerpt(
        tasks=tasks,
        tensors={number: plan.tensors[number] for number in tensors},
        scopes={number: replace(plan.scopes[number], tensors=()) for number in sorted(scopes)},
        shards={n: replace(plan.shards[n], tensors=(), units=()) for n in sorted(shards)},
        model_scope=model_scope,
        seed=plan.seed,
        device=plan.device,
        kernels=plan.kernels,
        readers=plan.readers,
        worker_bytes=plan.worker_bytes,
    )
