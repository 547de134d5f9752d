"""A stand-in for ``shardmerge merge``: what ``ray.sbatch`` relies on, and what it is tested by.

Its recipe is JSON: how many ``nodes`` there must be, how many ``tasks`` of how many ``seconds`` to
run. Each task that is done is a line of the file OUT; those that are there are not done again. A
USR1, a TERM or an INT stops it, resumable: it finishes what runs and ends with 3.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

NODES_TIMEOUT_S = 120.0
PENDING = 6
"""Tasks submitted at a time."""


def main() -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    merge = commands.add_parser("merge")
    merge.set_defaults(run=_merge)
    merge.add_argument("recipe", type=Path)
    merge.add_argument("out", type=Path)
    merge.add_argument("--executor", choices=["ray"], required=True)
    merge.add_argument("--address", required=True)
    options = parser.parse_args()
    status: int = options.run(options)
    return status


def _merge(options: argparse.Namespace) -> int:
    stop: list[int] = []

    def told(number: int, _: FrameType | None) -> None:
        stop.append(number)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    return run(json.loads(options.recipe.read_text()), options.out, options.address, stop)


def run(recipe: dict[str, Any], out: Path, address: str, stop: list[int]) -> int:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    end = time.monotonic() + NODES_TIMEOUT_S
    while len(alive := [node for node in ray.nodes() if node["Alive"]]) < recipe["nodes"]:
        if time.monotonic() > end:
            print(f"only {len(alive)} nodes", file=sys.stderr)
            return 1
        time.sleep(0.1)

    @ray.remote(num_cpus=1, max_retries=4, scheduling_strategy="SPREAD")
    def work(index: int) -> dict[str, Any]:
        time.sleep(recipe["seconds"])
        slurms = os.environ["SLURMD_NODENAME"]
        return {"task": index, "node": slurms, "restart": os.environ.get("SLURM_RESTART_COUNT")}

    done = {each["task"] for each in lines(out)}
    todo = [index for index in range(recipe["tasks"]) if index not in done]
    resources = ray.cluster_resources()
    facts = {"nodes": len(alive), "cpus": resources["CPU"], "memory": resources["memory"]}
    print("standin:", json.dumps({**facts, "todo": len(todo)}), flush=True)
    pending: list[Any] = []
    with out.open("a") as ledger:
        while pending or (todo and not stop):
            while todo and not stop and len(pending) < PENDING:
                pending.append(work.remote(todo.pop(0)))
            ready, pending = ray.wait(pending, num_returns=1, timeout=0.2)
            for result in ray.get(ready):
                ledger.write(json.dumps(result) + "\n")
                ledger.flush()
    return 3 if todo else 0


def lines(out: Path) -> list[dict[str, Any]]:
    """What the runs so far have done."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


if __name__ == "__main__":
    sys.exit(main())
