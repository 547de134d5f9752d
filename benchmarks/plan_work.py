"""What ``bench_cluster`` does in a process of its own: make a plan, and cut it for workers."""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import fields
from shardmerge.excerpt import excerpt
from shardmerge.executors.placement import UNIT_BYTES, UNIT_TASKS
from shardmerge.plan import Plan
from shardmerge.prepare import Prepared, Where, prepare


def make(recipe: str) -> tuple[dict[str, object], Plan]:
    """Read every header and plan."""
    began = time.perf_counter()
    ready = prepare(recipe, "out", Where(threads=8, device="cpu"))
    figures: dict[str, object] = {"prepare_s": time.perf_counter() - began, **_sizes(ready)}
    figures["anon_bytes"], figures["peak_rss_bytes"] = _memory()
    return figures, ready.plan


def send(plan: Plan) -> dict[str, object]:
    """What workers of a cluster would be sent, unit by unit."""
    began = time.perf_counter()
    sizes = [len(pickle.dumps(excerpt(plan, unit), protocol=5)) for unit in _units(plan)]
    return {
        "send_s": time.perf_counter() - began,
        "units": len(sizes),
        "sent_bytes": sum(sizes),
        "largest_unit_bytes": max(sizes),
    }


def _units(plan: Plan) -> Iterator[list[int]]:
    """Tasks that would go together if all were ready at once."""
    unit: list[int] = []
    filled = 0
    for task in plan.tasks:
        unit.append(task.number)
        filled += task.read_bytes + task.write_bytes
        if filled >= UNIT_BYTES or len(unit) == UNIT_TASKS:
            yield unit
            unit, filled = [], 0
    if unit:
        yield unit


def _sizes(ready: Prepared) -> dict[str, object]:
    plan = ready.plan
    return {
        "read_tensors": sum(len(source.tensors) for source in ready.sources.values()),
        "output_tensors": len(plan.tensors),
        "tasks": len(plan.tasks),
        "shards": len(plan.shards),
        "merge_read_bytes": plan.read_bytes,
    }


def _memory() -> tuple[int, int]:
    """Anonymous memory now, and the most memory of any kind so far."""
    found = fields(Path("/proc/self/status"))
    return found["RssAnon"] * 1024, found["VmHWM"] * 1024


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--send", action="store_true", help="also what workers would be sent")
    args = parser.parse_args()
    figures, plan = make(args.recipe)
    if args.send:
        figures |= send(plan)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
