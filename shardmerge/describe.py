"""Plans, checkpoints and methods in words and as plain values, for the command line. Pure."""

from __future__ import annotations

from collections import Counter

from shardmerge.memory import footprint_bytes
from shardmerge.methods.api import MethodInfo, info_of
from shardmerge.plan import MeasureTask, MergeTask, Plan
from shardmerge.progress import counted, size
from shardmerge.sources.tensor import Checkpoint, TensorRef


def describe_plan(plan: Plan) -> dict[str, object]:
    """A plan's figures, as JSON values."""
    measures = [task for task in plan.tasks if isinstance(task, MeasureTask)]
    merges = [task for task in plan.tasks if isinstance(task, MergeTask)]
    used = Counter(
        "copy" if tensor.method is None else info_of(tensor.method).name for tensor in plan.tensors
    )
    passes = Counter(task.step for task in measures)
    fused = sum(task.resident for task in merges)
    return {
        "out": plan.out,
        "tensors": len(plan.tensors),
        "methods": dict(sorted(used.items())),
        "tasks": len(plan.tasks),
        "passes": {
            **{f"measure {step}": count for step, count in passes.items()},
            "measure and merge in one read": fused,
            "merge": len(merges) - fused,
        },
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.output_bytes,
        "scratch_bytes": 0,
        "disk_bytes": plan.output_bytes,
        "device": plan.device,
        "workers": plan.workers,
        "memory_bytes": plan.memory_bytes,
        "worker_bytes": max((task.memory_bytes for task in plan.tasks), default=0),
        "footprint_bytes": footprint_bytes(plan.device),
        "peak_bytes": plan.peak_bytes,
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
    lines = [
        f"tensors   {facts['tensors']}: {counts('methods')}",
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
        "block_scaled": tensor.decode is not None,
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
