"""What a cluster costs beside the work: tasks that do nothing, a longer merge, a plan of 90,000.

- ``control``: 100,000 tasks that write no byte, by the real engine, executor, writer and ledger on
  a Ray cluster of this machine: each a unit of its own, then as many to a unit as usual.
- ``slope``: how much longer a merge of three times the bytes takes on the cluster, beside how much
  longer on threads of one process: what does not grow with the bytes (processes that start, nodes
  that are examined) is not in it. Both have the same number of CPUs.
- ``plan``: DeepSeek-V3's headers, five times: headers are read from disk, of elements there is only
  a hole.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks import harness, hollow
from benchmarks.families import Design, Family, Llama, make
from benchmarks.harness import Report, Workplace, median, mib
from benchmarks.hollow import DeepSeek
from benchmarks.recipes import recipe
from shardmerge import executors
from shardmerge.execute import execute
from shardmerge.executors import placement
from shardmerge.executors.api import Executor
from shardmerge.layout import Part, Shard, Unit
from shardmerge.outputs.api import ShardWriter
from shardmerge.plan import MergeTask, Plan
from shardmerge.prepare import Prepared, Where, prepare
from shardmerge.progress import Quiet
from shardmerge.staging import staging

log = logging.getLogger("benchmarks")

CPUS = 2
NODES = 2
NODE_BYTES = 8 << 30
MEMORY = "1GiB"
SHARDS = 64
"""Shards that the tasks that do nothing are of: several for each node, which owns them whole."""
SINGLE_TARGET_S, TOGETHER_TARGET_S = 120.0, 15.0
SLOPE_TARGET = 1.1
PLAN_TARGET_S, PLAN_TARGET_BYTES = 10.0, 1 << 30
SLOPE_MODELS = 3
PLAN_MODELS = 5
GIB = 1 << 30


# --- a cluster of this machine --------------------------------------------------------------------


@contextmanager
def cluster(cpus: Sequence[int]) -> Iterator[str]:
    """The address of a cluster with a node of so many CPUs each, and a head that does not work."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(harness.ROOT)}
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 256 << 20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for count in cpus:
            started.add_node(num_cpus=count, memory=NODE_BYTES, object_store_memory=256 << 20)
        started.wait_for_nodes()
        yield str(started.address)
    finally:
        ray.shutdown()
        started.shutdown()


# --- tasks that do nothing ------------------------------------------------------------------------


def measure_control(place: Workplace, report: Report, *, tasks: int, runs: int) -> list[object]:
    """Each task its own unit, and units as usual."""
    import ray

    tiny = make(_llama(1, hidden=64), place.families, models=1, seed=0)
    file = recipe("linear", tiny).write(place.file("tiny.yaml"))
    found: dict[str, list[float]] = {"single": [], "together": []}
    usual = placement.UNIT_TASKS
    with cluster([CPUS // NODES] * NODES) as address:
        # One driver for all runs; each run has worker processes of its own all the same.
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        for number in range(runs):
            for kind, times in found.items():
                placement.UNIT_TASKS = 1 if kind == "single" else usual
                log.info("%d empty tasks, %s, run %d", tasks, kind, number)
                load = round(os.getloadavg()[0], 2)
                start_s, run_s = control(file, place.fresh("empty"), address, tasks)
                times.append(run_s)
                report.line(
                    "control-run", units=kind, run=number, tasks=tasks, load_before=load,
                    start_s=round(start_s, 3), run_s=round(run_s, 3),
                    tasks_per_s=round(tasks / run_s),
                )  # fmt: skip
    placement.UNIT_TASKS = usual
    targets = {"single": SINGLE_TARGET_S, "together": TOGETHER_TARGET_S}
    figures = {
        kind: {"median_s": median(times), "best_s": round(min(times), 3), "target_s": targets[kind]}
        for kind, times in found.items()
    }
    report.line("control", tasks=tasks, runs=runs, **figures)
    return [
        f"{tasks:,} empty tasks, s",
        *(f"{median(times):.1f} (<= {targets[kind]:.0f})" for kind, times in found.items()),
    ]


def control(file: Path, out: Path, address: str, tasks: int) -> tuple[float, float]:
    """Seconds until workers may be sent work, and seconds of the run."""
    ready = prepare(str(file), str(out), Where("ray", memory_bytes=GIB))
    ready = replace(ready, plan=_emptied(ready.plan, tasks))
    output = ready.output
    with (
        output.locked(),
        staging(output, ready.plan, ready.files) as (ledger, writer),
    ):
        began = time.perf_counter()
        with _workers(ready, writer, address) as workers:
            started = time.perf_counter()
            stop = threading.Event()
            execute(ready.plan, workers, ledger, writer, progress=Quiet(), stop=stop)
            ended = time.perf_counter()
        if len(ledger.receipts) != tasks:
            sys.exit(f"{len(ledger.receipts)} receipts of {tasks} tasks")
    return started - began, ended - started


def _workers(ready: Prepared, writer: ShardWriter, address: str) -> Executor:
    return executors.start("ray", ready.plan, writer, ready.stores, ready.output, address=address)


def _emptied(plan: Plan, tasks: int) -> Plan:
    """The same with other tasks: each writes a part of no bytes of some shard."""
    each = -(-tasks // SHARDS)
    shards, units = [], []
    for number in range(SHARDS):
        count = min(each, tasks - number * each)
        parts = [Part(number, i, 0, 0, ()) for i in range(count)]
        units += [Unit((part,)) for part in parts]
        shards.append(Shard(f"empty-{number:05d}.safetensors", b"", (), 0, tuple(units[-count:])))
    empty = [
        MergeTask(i, unit.parts, False, (), 0, plan.tasks[0].memory_bytes, 0)
        for i, unit in enumerate(units)
    ]
    return replace(plan, shards=tuple(shards), tasks=tuple(empty))


# --- three times as much --------------------------------------------------------------------------


def measure_slope(
    place: Workplace, report: Report, *, method: str, layers: int, runs: int, seed: int
) -> list[object]:
    """Both sizes by both executors, in turn."""
    families = {
        size: make(_llama(layers * size), place.families, models=SLOPE_MODELS, seed=seed)
        for size in (1, 3)
    }
    files = {
        size: recipe(method, family).write(place.file(f"{method}-{size}.yaml"))
        for size, family in families.items()
    }
    times: dict[tuple[str, int], list[float]] = {}
    with cluster([CPUS]) as address:
        ways = {
            "local": ["--threads", str(CPUS)],
            "ray": ["--executor", "ray", "--address", address],
        }
        for number in range(runs + 1):
            for size, family in families.items():
                for way, options in ways.items():
                    _warm(recipe(method, family).inputs)
                    measured = harness.run(
                        [sys.executable, "-m", "shardmerge", "merge", files[size],
                         place.fresh("out"), "--memory", MEMORY, "--quiet", *options],
                        env=place.kernel_caches(),
                    )  # fmt: skip
                    if number:  # run 0 compiles kernels
                        times.setdefault((way, size), []).append(measured.wall_s)
                    report.line(
                        "slope-run", executor=way, size=size, method=method, run=number,
                        bytes_each=family.bytes_each, **measured.figures(),
                    )  # fmt: skip
    middle = {f"{way}_{size}x_s": median(found) for (way, size), found in times.items()}
    ray_s, local_s = (middle[f"{way}_3x_s"] - middle[f"{way}_1x_s"] for way in ("ray", "local"))
    figures = {"ratio": round(ray_s / local_s, 3), "target": SLOPE_TARGET, **middle}
    report.line("slope", method=method, runs=runs, **figures)
    return [f"slope, {method}", f"{figures['ratio']} (<= {SLOPE_TARGET})", *middle.values()]


def _llama(layers: int, *, hidden: int = 2048) -> Design:
    """A llama of so many layers and hardly any vocabulary, so that bytes grow with the layers."""
    sizes = Llama(hidden, layers, hidden * 11 // 4, 512, 16, 4)
    return Design(f"{layers}x{hidden}", sizes.tensors(), sizes.config(), 10**9)


def _warm(folders: Sequence[Path]) -> None:
    """Read every shard, so that it is in the page cache as far as that has room."""
    buffer = bytearray(16 << 20)
    for folder in folders:
        for shard in folder.glob("*.safetensors"):
            with shard.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


# --- a large plan ---------------------------------------------------------------------------------


def measure_plan(place: Workplace, report: Report, *, method: str, runs: int) -> list[object]:
    """Headers of five models read and planned, each time in a fresh process."""
    file = place.file(f"deepseek-{method}.yaml")
    inputs = _deepseek(place)
    family = Family("deepseek-v3", inputs[0], inputs[1:], 0)
    recipe(method, family).write(file)
    work: list[str | Path] = [sys.executable, "-m", "benchmarks.plan_work", file]
    times, peaks = [], []
    for number in range(runs):
        measured = harness.run(work)
        figures = json.loads(measured.stdout)
        times.append(figures["prepare_s"])
        peaks.append(measured.peak_anon_bytes)
        report.line("plan-run", method=method, run=number, **measured.figures(), **figures)
    sent = json.loads(harness.run([*work, "--send"]).stdout)
    figures = {
        "median_s": median(times),
        "best_s": round(min(times), 3),
        "target_s": PLAN_TARGET_S,
        "peak_anon_bytes": max(peaks),
        "target_bytes": PLAN_TARGET_BYTES,
        **{name: sent[name] for name in ("units", "sent_bytes", "largest_unit_bytes", "send_s")},
    }
    report.line("plan", method=method, runs=runs, **figures)
    return [
        f"plan, {method}",
        f"{median(times):.1f} s (<= {PLAN_TARGET_S:.0f})",
        f"{mib(max(peaks))} MiB (<= {mib(PLAN_TARGET_BYTES)})",
        f"{sent['largest_unit_bytes'] / 1024:.0f} KiB at most for a unit",
        f"{sent['sent_bytes'] / sent['units'] / 1024:.1f} KiB on average",
    ]


def _deepseek(place: Workplace) -> tuple[Path, ...]:
    design = DeepSeek()
    tensors = list(design.tensors())
    folders = tuple(place.file("deepseek") / f"model{number}" for number in range(PLAN_MODELS))
    for folder in folders:
        if not folder.exists():
            hollow.write(folder, tensors, design.config())
    return folders


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(".bench"), help="inputs and outputs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=100_000, help="that do nothing")
    parser.add_argument("--methods", nargs="+", default=["linear", "ties"])
    parser.add_argument("--layers", type=int, default=4, help="of 90 MB; 16 for a minute or more")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    place = Workplace(args.dir, "cluster")
    report = Report("cluster", "generated", nodes=NODES, node_cpus=CPUS // NODES)
    rows: list[list[object]] = []
    if "plan" in args.only:
        for method in args.methods:
            rows.append(measure_plan(place, report, method=method, runs=args.runs))
        shutil.rmtree(place.file("deepseek"))
    if "control" in args.only:
        rows.append(measure_control(place, report, tasks=args.tasks, runs=args.runs))
    if "slope" in args.only:
        for method in args.methods:
            chosen = {"method": method, "layers": args.layers, "seed": args.seed}
            rows.append(measure_slope(place, report, runs=args.runs, **chosen))
        place.fresh("out")
    for row in rows:
        report.table([""] * len(row), [row])


PARTS = ["plan", "control", "slope"]

if __name__ == "__main__":
    main()
