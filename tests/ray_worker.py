"""What a worker process of a test's cluster does before its first task: shrink, and obey gates.

``SHARDMERGE_TEST_GATES`` names a folder. Each task leaves a line in its ``log``. While a file
``hold-NUMBER`` is there, the first attempt of that task does not begin; it leaves a file
``held-NUMBER`` that holds its process's number and its node's.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

GATES = "SHARDMERGE_TEST_GATES"
SHRINK = "SHARDMERGE_TEST_SHRINK"


def prepare() -> None:
    """Ray calls this in each new worker of the job."""
    from tests import support

    if os.environ.get(SHRINK) == "1":
        support.shrink(setattr)
    if GATES in os.environ:
        _obey(Path(os.environ[GATES]))


def _obey(gates: Path) -> None:
    from shardmerge.excerpt import WorkPlan
    from shardmerge.plan import Task
    from shardmerge.runs import Decided
    from shardmerge.work import Done, Worker

    real = Worker.run

    def run(
        self: Worker, task: Task, decided: Decided, plan: WorkPlan, *, attempt: int = 1
    ) -> Done:
        import ray

        node = ray.get_runtime_context().get_node_id()
        with (gates / "log").open("a") as log:
            log.write(json.dumps([task.number, attempt, os.getpid(), node]) + "\n")
        hold = gates / f"hold-{task.number}"
        if attempt == 1 and hold.exists():
            part = gates / f"part-{task.number}"
            part.write_text(json.dumps([os.getpid(), node]))
            part.rename(gates / f"held-{task.number}")
            while hold.exists():
                time.sleep(0.01)
        return real(self, task, decided, plan, attempt=attempt)

    Worker.run = run  # type: ignore[method-assign]
