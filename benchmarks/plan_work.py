"""What ``bench_cluster`` does in processes of their own: make a plan, or take one that was made."""

from __future__ import annotations

import argparse
import json
import pickle
import time
from pathlib import Path

from benchmarks.harness import fields
from shardmerge.merge import Prepared, Where, prepare


def make(recipe: str, saved: Path | None) -> tuple[dict[str, object], object]:
    """Read every header and plan; a plan may be kept as the bytes that a worker would get."""
    began = time.perf_counter()
    ready = prepare(recipe, "out", Where(threads=8, device="cpu"))
    figures: dict[str, object] = {"prepare_s": time.perf_counter() - began, **_sizes(ready)}
    figures["anon_bytes"], figures["peak_rss_bytes"] = _memory()
    if saved is not None:
        began = time.perf_counter()
        content = pickle.dumps(ready.plan, protocol=5)
        figures |= {"pickle_s": time.perf_counter() - began, "pickle_bytes": len(content)}
        saved.write_bytes(content)
    return figures, ready


def _sizes(ready: Prepared) -> dict[str, object]:
    plan = ready.plan
    return {
        "read_tensors": sum(len(source.tensors) for source in ready.sources.values()),
        "output_tensors": len(plan.tensors),
        "tasks": len(plan.tasks),
        "shards": len(plan.shards),
        "merge_read_bytes": plan.read_bytes,
    }


def take(saved: Path) -> tuple[dict[str, object], object]:
    """Unpickle a plan, as a worker of a cluster does."""
    before, _ = _memory()
    began = time.perf_counter()
    with saved.open("rb") as file:
        plan = pickle.load(file)
    took = time.perf_counter() - began
    after, peak = _memory()
    figures: dict[str, object] = {
        "unpickle_s": took,
        "plan_anon_bytes": after - before,
        "anon_bytes": after,
        "peak_rss_bytes": peak,
    }
    return figures, plan


def _memory() -> tuple[int, int]:
    """Anonymous memory now, and the most memory of any kind so far."""
    found = fields(Path("/proc/self/status"))
    return found["RssAnon"] * 1024, found["VmHWM"] * 1024


def main() -> None:
    """Do what is asked; print the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["make", "take"])
    parser.add_argument("path", help="a recipe, or a pickled plan")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    figures, _ = make(args.path, args.save) if args.action == "make" else take(Path(args.path))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
