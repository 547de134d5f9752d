"""Plans, checkpoints and methods in words and as plain values, for the command line. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from shardmerge.match import OutputTensor
from shardmerge.matrices import block_shape
from shardmerge.memory import footprint_bytes, matrix_bytes
from shardmerge.methods.api import Method, MethodInfo, info_of
from shardmerge.plan import MeasureTask, MergeTask, Plan
from shardmerge.progress import counted, size
from shardmerge.sources.tensor import BlockScale, Checkpoint, TensorRef
from shardmerge.state import Record


def describe_plan(plan: Plan, first: Plan | None = None) -> dict[str, object]:
    """A plan's figures, as JSON values.

    Args:
        first: the plan of the sum that is made before.
    """
    plans = [plan] if first is None else [first, plan]
    summed = {} if first is None else {tensor.name: tensor for tensor in first.tensors}
    tensors = [summed.get(tensor.name, tensor) for tensor in plan.tensors]
    used = Counter("copy" if t.method is None else info_of(t.method).name for t in tensors)
    tasks = [task for each in plans for task in each.tasks]
    scratch = 0 if first is None else first.output_bytes
    return {
        "out": plan.out,
        "tensors": len(plan.tensors),
        "methods": dict(sorted(used.items())),
        "matrices": _matrices(tensors),
        "projected": _projected(tensors),
        "tasks": len(tasks),
        "passes": _passes(plan, first),
        "read_bytes": sum(each.read_bytes for each in plans),
        "write_bytes": plan.output_bytes,
        "scratch_bytes": scratch,
        "disk_bytes": plan.output_bytes + scratch,
        "device": plan.device,
        "workers": min(each.workers for each in plans),
        "memory_bytes": plan.memory_bytes,
        "worker_bytes": max((task.memory_bytes for task in tasks), default=0),
        "footprint_bytes": footprint_bytes(plan.device),
        "peak_bytes": max(each.peak_bytes for each in plans),
        "shards": [
            {
                "name": shard.name,
                "bytes": shard.nbytes,
                "tensors": len(shard.tensors),
                "parts": len(shard.parts),
            }
            for shard in plan.shards
        ],
        "notes": [*plan.recipe.notes, *plan.outputs.notes],
    }


def _passes(plan: Plan, first: Plan | None) -> dict[str, int]:
    """How many tasks there are of each kind."""
    merges = [task for task in plan.tasks if isinstance(task, MergeTask)]
    fused = sum(task.resident for task in merges)
    measures = [
        (each, task)
        for each in (first, plan)
        for task in (each.tasks if each else ())
        if isinstance(task, MeasureTask)
    ]
    sums = sum(isinstance(task, MergeTask) for task in first.tasks) if first else 0
    return {
        **Counter(f"measure {task.step}" for _, task in measures),
        **({"sum": sums} if sums else {}),
        "measure and merge in one read": fused,
        "merge": len(merges) - fused,
    }


def _matrices(tensors: Sequence[OutputTensor]) -> dict[str, object] | None:
    """The tensors of which a method sees whole matrices; None where none does."""
    whole = [tensor for tensor in tensors if tensor.whole]
    if not whole:
        return None
    largest = max(whole, key=matrix_bytes)
    return {
        "tensors": len(whole),
        "largest": largest.name,
        "largest_shape": list(block_shape(largest.shape)),
        "largest_bytes": matrix_bytes(largest),
    }


def _projected(tensors: Sequence[OutputTensor]) -> dict[str, object] | None:
    """Those of a method for which some matrices are none; None where there is no such method."""
    found = [tensor for tensor in tensors if tensor.whole and hasattr(tensor.method, "tables")]
    if not found:
        return None
    method: Method = found[0].method
    return {"tensors": len(found), "not": list(method.tables())}


def plan_text(facts: dict[str, object]) -> str:
    """The same for people."""

    def counts(name: str) -> str:
        values = facts[name]
        assert isinstance(values, dict)
        return ", ".join(f"{count} {what}" for what, count in values.items() if count)

    def number(name: str) -> int:
        value = facts[name]
        assert isinstance(value, int)
        return value

    def nbytes(name: str) -> str:
        return size(number(name))

    shards, notes = facts["shards"], facts["notes"]
    assert isinstance(shards, list) and isinstance(notes, list)
    lines = [f"tensors   {facts['tensors']}: {counts('methods')}"]
    projected, matrices = facts["projected"], facts["matrices"]
    if isinstance(projected, dict):
        lines.append(
            f"projected {projected['tensors']} as whole matrices; not "
            f"{', '.join(projected['not'])}, unless a rule says project: always"
        )
    if isinstance(matrices, dict):
        rows, columns = matrices["largest_shape"]
        lines += [
            f"matrices  {counted(matrices['tensors'], 'tensor')} seen as a whole",
            f"  {matrices['largest']}  {rows}x{columns} takes the most, "
            f"{size(matrices['largest_bytes'])}",
        ]
    lines += [
        f"tasks     {facts['tasks']}: {counts('passes')}",
        f"read      {nbytes('read_bytes')}",
        f"write     {nbytes('write_bytes')} in {counted(len(shards), 'shard')}",
        f"scratch   {nbytes('scratch_bytes')}",
        f"disk      {nbytes('disk_bytes')} at {facts['out']}",
        f"memory    at most {nbytes('peak_bytes')} of {nbytes('memory_bytes')}: "
        f"{counted(number('workers'), 'worker')} with up to {nbytes('worker_bytes')} each, "
        f"{nbytes('footprint_bytes')} for the program",
        f"device    {facts['device']}",
        *(
            f"  {s['name']}  {size(s['bytes'])}, {counted(s['tensors'], 'tensor')}"
            for s in shards[:20]
        ),
    ]
    if len(shards) > 20:
        lines.append(f"  ... {len(shards) - 20} more shards")
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def describe_tensor(checkpoint: Checkpoint, tensor: TensorRef) -> dict[str, object]:
    """One tensor, as JSON values."""
    return {
        "name": tensor.name,
        "dtype": tensor.dtype.torch_name,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "shard": checkpoint.shards[checkpoint.shard_of[tensor.name]],
        "block_scaled": isinstance(tensor.decode, BlockScale),
    }


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """A checkpoint in a few lines."""
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    elements = sum(tensor.numel for tensor in checkpoint.tensors.values())
    lines = [
        f"{counted(len(checkpoint.tensors), 'tensor')}, {counted(elements, 'element')}, "
        f"{size(total)} in {counted(len(checkpoint.shards), 'shard')}"
    ]
    if checkpoint.ignored:
        lines.append(f"not read: {', '.join(checkpoint.ignored)}")
    return "\n".join(lines)


def method_page(info: MethodInfo) -> str:
    """A method's documentation with its parameters as recipes write them."""
    lines = [info.name, "=" * len(info.name), "", info.page, "", "In a recipe:"]
    for parameter in info.parameters:
        default = parameter.default
        value = getattr(default, "value", default)
        needed = "required" if parameter.required else f"default {str(value).lower()}"
        place = "each model" if parameter.per_model else "the recipe"
        lines.append(f"  {parameter.key}: {needed}; of {place}")
    if info.extras:
        lines.append(f"  each model also names: {', '.join(f'{kind}:' for kind in info.extras)}")
    if info.inert:
        lines.append(f"  accepted without effect: {', '.join(info.inert)}")
    return "\n".join(lines)


def describe_state(url: str, record: Record, kept: Mapping[str, int]) -> dict[str, object]:
    """A state of continual merging, as JSON values.

    Args:
        kept: bytes of the sums that are there, by folder.
    """
    return {
        "state": url,
        "method": record.method,
        "parameters": dict(record.parameters),
        "base": str(record.base.model),
        "keep": record.keep,
        "disk_bytes": sum(kept.values()),
        "pending": None if record.pending is None else str(record.pending.model),
        "steps": [
            {
                "step": step.number,
                "name": step.model.name,
                "model": str(step.model.model),
                "norm": step.norm,
                "lambda": 1 / step.scale if step.scale else None,
                "added": step.added,
                "sum": step.folder,
                "sum_bytes": kept.get(step.folder or "", 0),
            }
            for step in record.steps
        ],
    }


def state_text(facts: Mapping[str, object]) -> str:
    """The same for people."""
    parameters, steps = facts["parameters"], facts["steps"]
    assert isinstance(parameters, dict) and isinstance(steps, list)
    settings = "".join(f", {key} {value}" for key, value in parameters.items())
    disk = facts["disk_bytes"]
    assert isinstance(disk, int)
    lines = [
        f"method    {facts['method']}{settings}",
        f"base      {facts['base']}",
        f"models    {len(steps)}",
        *(
            f"  {step['step']}  {step['name']}: norm {step['norm']:.6g}, "
            f"lambda {step['lambda'] or math.inf:.6g}, "
            + (f"sum of {size(step['sum_bytes'])} kept" if step["sum"] else "sum not kept")
            for step in steps
        ),
        f"disk      {size(disk)}; the last {facts['keep']} sums are kept",
    ]
    if facts["pending"] is not None:
        lines.append(f"begun     {facts['pending']}: add it again to go on, or undo to drop it")
    return "\n".join(lines)
