"""Places to run tasks: ``api`` says what an executor promises; ``start`` begins one.

``local`` runs tasks on threads of this process, ``ray`` on the nodes of a cluster (``placement``
decides which, ``node`` is what a process there does).
"""

from __future__ import annotations

from shardmerge.errors import UsageError
from shardmerge.executors.api import Executor
from shardmerge.executors.local import LocalExecutor
from shardmerge.outputs.api import Output, ShardWriter
from shardmerge.plan import Plan
from shardmerge.stores import Stores

NAMES = ("local", "ray")
"""What ``start`` knows, as on the command line."""
ELSEWHERE = frozenset({"ray", "slurm-array"})
"""Those whose tasks run on other machines than the one that plans. Arrays are ``slices``'."""


def start(
    name: str,
    plan: Plan,
    writer: ShardWriter,
    stores: Stores,
    output: Output,
    *,
    address: str | None = None,
    gpus: float = 1.0,
) -> Executor:
    """A place that runs the tasks of a plan.

    Args:
        address: of a cluster; None for one that ends with the run.
        gpus: of each of its workers on CUDA.
    Raises:
        UsageError: for a name that is not known, or whose packages are not installed.
    """
    if name == "local":
        return LocalExecutor(plan, writer, stores)
    if name == "ray":
        try:
            from shardmerge.executors.ray import RayExecutor  # a second; most merges need none
        except ModuleNotFoundError as problem:
            raise UsageError(
                f"--executor ray needs the package {problem.name}: pip install 'shardmerge[ray]'"
            ) from problem
        return RayExecutor(plan, writer, stores, output, address=address, gpus=gpus)
    raise UsageError(f"no executor '{name}'; there are {', '.join(NAMES)}")


def refuse_array(name: str) -> None:
    """Refuse to run an array of jobs from one process.

    Raises:
        UsageError: with the commands that do.
    """
    if name == "slurm-array":
        raise UsageError(
            "--executor slurm-array is a merge of several jobs, which one command cannot run:\n"
            "  sbatch launch/array.sbatch RECIPE OUT N submits all of them. They are\n"
            "  shardmerge plan RECIPE OUT --executor slurm-array --save PLAN, then for each I\n"
            "  shardmerge worker --plan PLAN --slice I/N, and at last\n"
            "  shardmerge publish --plan PLAN."
        )
