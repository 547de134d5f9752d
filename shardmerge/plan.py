"""How a merge is done: tasks, what each reads, keeps in memory and writes. Pure: no I/O, no clock.

A plan is made from the output backwards. The layout says which bytes are written where; a task
computes some of them, or measures something that others wait for. No two tasks write one byte.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardmerge.decode import read_beside
from shardmerge.errors import RecipeError
from shardmerge.kernels.device import CPU, CUDA
from shardmerge.layout import Part, Piece, Shard, Spec, Unit, lay_out
from shardmerge.match import Outputs, OutputTensor
from shardmerge.matrices import block_numel, matrix_shapes
from shardmerge.memory import (
    LOCAL_WORKERS,
    REMOTE_WORKERS,
    alike,
    footprint_bytes,
    inputs_of,
    is_far,
    matrix_bytes,
    refs_read,
    resident_bytes,
    share_memory,
    tensor_numel,
    tile_bytes,
    tile_elements,
)
from shardmerge.methods.api import Kind, Method, Over, Pass, info_of, levels_of
from shardmerge.numerics import CANONICAL_BLOCK
from shardmerge.recipe import Recipe

CUDA_KERNELS = 4
"""Calls of a CUDA device at a time: one copies in, one computes, one copies out, one gets ready."""

MEASURE_ELEMENTS = 1024 * CANONICAL_BLOCK
"""Elements of one measuring task, about: larger tensors are measured by several workers."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Tensors that share decisions: one tensor, or all of the model that a method is taken over.

    Args:
        key: names it in the ledger.
        method: of the (first) tensor.
        tensors: their numbers.
    """

    key: str
    method: Method
    tensors: tuple[int, ...]

    def decision(self, step: str) -> str:
        """The ledger's key of what a settling pass decides here."""
        return f"{self.key}/{step}"


def scope_key(decision: str) -> str:
    """The key of the scope that a decision was taken in."""
    return decision.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class MeasureTask:
    """Read pieces of tensors and keep a summary.

    Args:
        number: tasks run in this order as far as what they need is there.
        scope: number of the scope it belongs to.
        step: the measuring pass.
        pieces: what is read.
        needs: keys of the decisions that must be there.
    """

    number: int
    scope: int
    step: str
    pieces: tuple[Piece, ...]
    needs: tuple[str, ...]
    read_bytes: int
    memory_bytes: int
    write_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MergeTask:
    """Compute and write parts.

    Args:
        resident: the inputs of each tensor are read once and kept while it is measured and merged.
    """

    number: int
    parts: tuple[Part, ...]
    resident: bool
    needs: tuple[str, ...]
    read_bytes: int
    memory_bytes: int
    write_bytes: int


Task = MeasureTask | MergeTask


def pieces_of(task: Task) -> tuple[Piece, ...]:
    """What a task works on, in order."""
    if isinstance(task, MeasureTask):
        return task.pieces
    return tuple(piece for part in task.parts for piece in part.pieces)


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know, and all that decides its bytes.

    Args:
        out: where the checkpoint is published.
        device: where kernels run: ``cpu`` or ``cuda``.
        kernels: that may run at a time.
        readers: workers that may read at a time: where reading and writing share a network, half of
            them, or all would read together, then write together.
        networked: whether something is read or written over a network.
        worker_bytes: memory that each worker may use for tiles.
        buffer_bytes: memory of each worker for the part that it writes.
        identity: what the output's bytes depend on, as texts; the ledger is bound to it.
    """

    recipe: Recipe
    outputs: Outputs
    out: str
    shards: tuple[Shard, ...]
    scopes: tuple[Scope, ...]
    tasks: tuple[Task, ...]
    workers: int
    device: str
    kernels: int
    readers: int
    networked: bool
    worker_bytes: int
    buffer_bytes: int
    memory_bytes: int
    identity: Mapping[str, str]
    model_scope: Mapping[int, int] = field(repr=False)

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The output's tensors."""
        return self.outputs.tensors

    @property
    def seed(self) -> int:
        """Of all random numbers."""
        return self.recipe.seed

    @functools.cached_property
    def output_bytes(self) -> int:
        """Bytes of all output shards."""
        return sum(shard.nbytes for shard in self.shards)

    @functools.cached_property
    def read_bytes(self) -> int:
        """Bytes read from the sources."""
        return sum(task.read_bytes for task in self.tasks)

    @functools.cached_property
    def peak_bytes(self) -> int:
        """The most memory the process uses, by the tasks' promises."""
        most = sorted((task.memory_bytes for task in self.tasks), reverse=True)
        return footprint_bytes(self.device) + sum(most[: self.workers])

    def scope_of(self, tensor: int, over: Over) -> int:
        """Number of the scope in which ``tensor``'s decisions over ``over`` are taken."""
        return tensor if over is Over.TENSOR else self.model_scope[tensor]

    def key(self, tensor: int, step: str, over: Over) -> str:
        """The ledger's key of a decision."""
        return self.scopes[self.scope_of(tensor, over)].decision(step)


def make_plan(
    recipe: Recipe,
    outputs: Outputs,
    out: str,
    *,
    memory_bytes: int,
    cpus: int,
    identity: Mapping[str, str],
    device: str = CPU,
    part_bytes: int | None = None,
    buffers_parts: bool = False,
    workers: int | None = None,
) -> Plan:
    """The plan of a merge.

    Args:
        memory_bytes: the most memory the process may use.
        cpus: kernels that may run at a time; workers are as many for each, wherever kernels run.
        device: where kernels run: ``cpu`` or ``cuda``.
        part_bytes: of the output's parts, about; None: as usual.
        buffers_parts: whether a part is in memory until it is whole.
        workers: of one process; None: as many as keep its CPUs busy.
    Raises:
        MemoryBudgetError: for a budget in which some task cannot be done.
        RecipeError: for parameters that must be the same over the model and are not.
    """
    tensors = outputs.tensors
    specs = [
        Spec(t.name, t.dtype, t.shape, block_numel(t.shape) if t.whole else 1) for t in tensors
    ]
    shards = lay_out(specs, outputs.shard_of, recipe.shard_size, part_bytes=part_bytes)
    scopes, model_scope = _scopes(tensors, layered=recipe.layered)
    parts = [part.nbytes for shard in shards for part in shard.parts]
    buffer_bytes = max(parts, default=0) if buffers_parts else 0
    kinds = alike(tensors)
    kept = [tensors[number] for number in sorted(set(kinds))]
    networked = buffers_parts or any(map(is_far, kept))
    wanted = workers or cpus * (REMOTE_WORKERS if networked else LOCAL_WORKERS)
    workers, worker_bytes = share_memory(kept, memory_bytes, wanted, buffer_bytes, device)
    planner = _Planner(tensors, kinds, model_scope, scopes, worker_bytes, buffer_bytes, device)
    tasks = tuple(planner.tasks(shards))
    return Plan(
        recipe=recipe,
        outputs=outputs,
        out=out,
        shards=shards,
        scopes=scopes,
        tasks=tasks,
        workers=workers,
        device=device,
        kernels=min(cpus, CUDA_KERNELS) if device == CUDA else cpus,
        readers=-(-workers // 2) if networked else workers,
        networked=networked,
        worker_bytes=worker_bytes,
        buffer_bytes=buffer_bytes,
        memory_bytes=memory_bytes,
        identity=identity,
        model_scope=model_scope,
    )


# --- scopes -------------------------------------------------------------------------------------


def _scopes(
    tensors: Sequence[OutputTensor], *, layered: bool
) -> tuple[tuple[Scope, ...], dict[int, int]]:
    """One scope for each tensor, then one for each group that is measured over the model."""
    groups: dict[tuple[str, object], list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.method is not None and _over_model(tensor.method):
            key = (info_of(tensor.method).name, tensor.group)
            groups.setdefault(key, []).append(number)
    if not layered:
        _check_whole(tensors, groups)
    scopes = [Scope(tensor.name, tensor.method, (i,)) for i, tensor in enumerate(tensors)]
    model_scope: dict[int, int] = {}
    for number, ((name, _), members) in enumerate(groups.items()):
        _check_same(name, members, tensors)
        model_scope.update(dict.fromkeys(members, len(scopes)))
        scopes.append(Scope(f"#{number}:{name}", tensors[members[0]].method, tuple(members)))
    return tuple(scopes), model_scope


def _check_whole(
    tensors: Sequence[OutputTensor], groups: Mapping[tuple[str, object], Sequence[int]]
) -> None:
    """Refuse a measure over the model of which some models lack tensors."""
    first: dict[str, int] = {}
    for (name, _), members in groups.items():
        if first.setdefault(name, members[0]) != members[0]:
            raise RecipeError(
                f"{name} is measured over the whole model, but {tensors[members[0]].name} is "
                f"merged from other models than {tensors[first[name]].name}.\n"
                "  Instead of 'missing: skip', give it another merge_method by a rule, or 'from'."
            )


def _over_model(method: Method) -> bool:
    return Over.MODEL in levels_of(method).values()


def _check_same(name: str, members: Sequence[int], tensors: Sequence[OutputTensor]) -> None:
    """Refuse parameters that differ between tensors where one decision reads them for all."""
    first = tensors[members[0]]
    info = info_of(first.method)
    fields = {field for step in info.passes for field in step.same}
    for parameter in info.parameters:
        if parameter.name not in fields:
            continue
        for member in members[1:]:
            values = [getattr(t.method, parameter.name) for t in (first, tensors[member])]
            if values[0] != values[1]:
                raise RecipeError(
                    f"{name} is measured over the whole model, so '{parameter.key}' must be the "
                    f"same for all its tensors;\n  it is {values[0]} for {first.name} and "
                    f"{values[1]} for {tensors[member].name}. Give one value, or trim per tensor."
                )


# --- tasks --------------------------------------------------------------------------------------


class _Planner:
    """Makes the tasks; holds what they are numbered by."""

    def __init__(
        self,
        tensors: Sequence[OutputTensor],
        kinds: Sequence[int],
        model_scope: Mapping[int, int],
        scopes: Sequence[Scope],
        worker_bytes: int,
        buffer_bytes: int,
        device: str,
    ) -> None:
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._tensors = tensors
        self._kinds = kinds
        self._model_scope = model_scope
        self._scopes = scopes
        self._worker_bytes = worker_bytes
        # By kind of tensor, each computed once: a large plan asks for them 200,000 times.
        self._tiles: dict[int, int] = {}
        self._resident: dict[int, int] = {}
        self._reads: dict[tuple[int, int, int, str | None], int] = {}
        self._number = 0

    def tasks(self, shards: Sequence[Shard]) -> Iterator[Task]:
        """Whole-model measures first, then each unit's measures right before its merge."""
        for scope in range(len(self._tensors), len(self._scopes)):
            yield from self._measures(scope, Over.MODEL)
        for shard in shards:
            for unit in shard.units:
                yield from self._unit(unit)

    def _unit(self, unit: Unit) -> Iterator[Task]:
        measured = [t for t in unit.tensors if self._has(t, Over.TENSOR)]
        needed = max(map(self._resident_bytes, measured), default=0)
        if measured and needed <= self._worker_bytes:
            yield self._merge(unit.parts, resident=True)
            return
        for tensor in measured:
            yield from self._measures(tensor, Over.TENSOR)
        together = any(self._tensors[tensor].whole for tensor in unit.tensors)
        for parts in [unit.parts] if together else [(part,) for part in unit.parts]:
            yield self._merge(parts, resident=False)

    def _has(self, tensor: int, over: Over) -> bool:
        """Whether a measuring pass of the tensor is taken over ``over``."""
        method = self._tensors[tensor].method
        return method is not None and bool(_measured(method, over))

    def _measures(self, scope: int, over: Over) -> Iterator[MeasureTask]:
        members = self._scopes[scope].tensors
        for step in _measured(self._scopes[scope].method, over):
            for pieces in self._batches(members):
                yield MeasureTask(
                    number=self._next(),
                    scope=scope,
                    step=step.name,
                    pieces=tuple(pieces),
                    needs=self._needs({piece.tensor for piece in pieces}, step, None),
                    read_bytes=sum(self._read_bytes(piece, step) for piece in pieces),
                    memory_bytes=max(self._tile_bytes(piece.tensor) for piece in pieces),
                )

    def _batches(self, members: Sequence[int]) -> Iterator[list[Piece]]:
        """The elements of some tensors in batches of about ``MEASURE_ELEMENTS``."""
        batch: list[Piece] = []
        filled = 0
        for tensor in members:
            numel = tensor_numel(self._tensors[tensor])
            # Without elements too: a decision is waited for, and is taken from nothing.
            for start in range(0, max(numel, 1), MEASURE_ELEMENTS):
                stop = min(numel, start + MEASURE_ELEMENTS)
                if filled + stop - start > MEASURE_ELEMENTS:
                    yield batch
                    batch, filled = [], 0
                batch.append(Piece(tensor, start, stop))
                filled += stop - start
        if batch:
            yield batch

    def _merge(self, parts: tuple[Part, ...], *, resident: bool) -> MergeTask:
        tensors = {piece.tensor for part in parts for piece in part.pieces}
        pieces = [piece for part in parts for piece in part.pieces]
        needs: set[str] = set()
        for tensor in tensors:
            method = self._tensors[tensor].method
            if method is not None:
                only = Over.MODEL if resident else None
                steps = info_of(method).passes if resident else (info_of(method).merge_pass,)
                needs.update(key for step in steps for key in self._needs({tensor}, step, only))
        return MergeTask(
            number=self._next(),
            parts=parts,
            resident=resident,
            needs=tuple(sorted(needs)),
            read_bytes=sum(self._read_bytes(piece, None) for piece in pieces),
            memory_bytes=self._buffer_bytes + self._together_bytes(tensors, resident),
            write_bytes=sum(part.nbytes for part in parts),
        )

    def _needs(self, tensors: set[int], step: Pass, only: Over | None) -> tuple[str, ...]:
        """Keys of the decisions that ``step`` takes for these tensors (those over ``only``)."""
        found = set()
        for tensor in tensors:
            for need, over in _decisions(self._tensors[tensor].method, step):
                if only in (None, over):
                    scope = tensor if over is Over.TENSOR else self._model_scope[tensor]
                    found.add(self._scopes[scope].decision(need))
        return tuple(sorted(found))

    def _read_bytes(self, piece: Piece, step: Pass | None) -> int:
        name = None if step is None else step.name
        key = self._kinds[piece.tensor], piece.start, piece.stop, name
        if key not in self._reads:
            self._reads[key] = self._count_bytes(piece, step)
        return self._reads[key]

    def _count_bytes(self, piece: Piece, step: Pass | None) -> int:
        tensor = self._tensors[piece.tensor]
        refs = inputs_of(tensor) if step is None else refs_read(tensor, step)
        times = len(matrix_shapes(tensor.shape, tensor.split)) if _is_cut_across(tensor) else 1
        nbytes, numel = 0, max(1, tensor_numel(tensor))
        for ref in refs:
            # Of an input of another shape, as large a part as of the tensor: all blocks together.
            first, last = (at * ref.numel // numel for at in (piece.start, piece.stop))
            nbytes += times * (last - first) * ref.dtype.itemsize
            nbytes += read_beside(ref, piece.start, piece.stop)
        return nbytes

    def _tile_bytes(self, tensor: int) -> int:
        kind = self._kinds[tensor]
        if kind not in self._tiles:
            output = self._tensors[kind]
            elements = tile_elements(output, self._worker_bytes, self._device)
            self._tiles[kind] = tile_bytes(output, elements)
        return self._tiles[kind]

    def _resident_bytes(self, tensor: int) -> int:
        kind = self._kinds[tensor]
        if kind not in self._resident:
            self._resident[kind] = resident_bytes(self._tensors[kind], self._device)
        return self._resident[kind]

    def _together_bytes(self, tensors: set[int], resident: bool) -> int:
        """Memory for tensors that are read together as far as they fit."""
        alone = [self._merge_bytes(t, resident) for t in tensors if self._tensors[t].whole]
        each = [self._merge_bytes(t, resident) for t in tensors if not self._tensors[t].whole]
        return max(*alone, *each, min(sum(each), self._worker_bytes), 0)

    def _merge_bytes(self, tensor: int, resident: bool) -> int:
        output = self._tensors[tensor]
        if output.whole:
            return matrix_bytes(output)
        if resident and self._has(tensor, Over.TENSOR):
            return self._resident_bytes(tensor)
        return self._tile_bytes(tensor)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


def _is_cut_across(tensor: OutputTensor) -> bool:
    """Whether each of a tensor's matrices is a part of every row, which is then read for each."""
    return tensor.whole and tensor.split is not None and tensor.split.axis == "columns"


@functools.lru_cache(maxsize=4096)
def _measured(method: Method, over: Over) -> tuple[Pass, ...]:
    """The measuring passes that are taken over ``over``, in order."""
    levels = levels_of(method)
    return tuple(
        step
        for step in info_of(method).passes[:-1]
        if step.kind is Kind.MEASURE and levels[step.name] is over
    )


@functools.lru_cache(maxsize=4096)
def _decisions(method: Method, step: Pass) -> tuple[tuple[str, Over], ...]:
    """The decisions that a pass takes, and what they are taken over; those not needed left out."""
    levels = levels_of(method)
    kinds = (Kind.SETTLE, Kind.GIVEN)
    settles = {other.name for other in info_of(method).passes if other.kind in kinds}
    asked = [(need, levels[need]) for need in step.needs if need in settles]
    return tuple((need, over) for need, over in asked if over is not None)
