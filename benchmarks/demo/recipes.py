"""The recipes (YAML, mergekit's vocabulary), and the call of the program that runs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

# Task vectors that have nothing to do with each other could be added in full; these do overlap, and
# 0.6 of their sum keeps most of each. With agreeing values averaged (ties), the same strength needs
# a larger factor.
_SUM_LAMBDA = 0.6
_TIES_LAMBDA = 1.2


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge to run.

    Args:
        name: Its name, also of the recipe's file and of the output folder.
        recipe: What the YAML file says.
        tasks: The tasks whose fine-tunes go in.
        note: What to know about it, in a few words.
    """

    name: str
    recipe: Mapping[str, object]
    tasks: tuple[str, ...]
    note: str


def recipes(models: Path, tasks: Sequence[str], *, quick: bool) -> list[Merge]:
    """Return the merges to run, over the checkpoints ``models/base`` and ``models/<task>``."""
    merges = _recipes(models.resolve(), tuple(tasks))
    return [m for m in merges if not quick or m.name in ("linear", "task_arithmetic", "ties")]


def _recipes(models: Path, tasks: tuple[str, ...]) -> Iterator[Merge]:
    def merge(method: str, note: str, *, top: dict[str, object], **each: object) -> Merge:
        entries = [{"model": str(models / task), "parameters": dict(each)} for task in tasks]
        base = {"base_model": str(models / "base")} if top else {}
        parameters = {"parameters": top} if top else {}
        return Merge(
            method,
            {"merge_method": method, **base, "models": entries, **parameters, "dtype": "float32"},
            tasks,
            note,
        )

    yield merge("linear", "the mean of the fine-tunes", top={}, weight=1.0)
    yield merge(
        "task_arithmetic",
        f"base + {_SUM_LAMBDA} x the sum of the task vectors",
        top={"lambda": _SUM_LAMBDA, "normalize": False},
        weight=1.0,
    )
    yield merge(
        "ties",
        "largest half of each task vector, signs elected",
        top={"lambda": _TIES_LAMBDA, "normalize": True},
        weight=1.0,
        density=0.5,
    )
    yield merge(
        "dare_linear",
        "a random half of each task vector, rescaled",
        top={"lambda": _SUM_LAMBDA, "normalize": False, "rescale": True},
        weight=1.0,
        density=0.5,
    )
    yield merge(
        "dare_ties",
        "as dare_linear, signs elected as in ties",
        top={"lambda": _TIES_LAMBDA, "normalize": True, "rescale": True},
        weight=1.0,
        density=0.5,
    )
    yield _fisher(models, tasks)
    yield _slerp(models, tasks[:2])


def _fisher(models: Path, tasks: tuple[str, ...]) -> Merge:
    recipe = {
        "merge_method": "fisher",
        "models": [
            {"model": str(models / task), "fisher": str(models / task / "fisher")} for task in tasks
        ],
        "dtype": "float32",
    }
    return Merge("fisher", recipe, tasks, "mean, weighted by squared gradients")


def _slerp(models: Path, pair: tuple[str, ...]) -> Merge:
    recipe = {
        "merge_method": "slerp",
        "base_model": str(models / pair[0]),
        "models": [{"model": str(models / task)} for task in pair],
        "parameters": {"t": 0.5},
        "dtype": "float32",
    }
    return Merge("slerp", recipe, pair, f"two only: half way from {pair[0]} to {pair[1]}")


def run(merge: Merge, *, recipe: Path, out: Path) -> None:
    """Write the recipe and run ``shardmerge merge`` on it, as a user would.

    Raises:
        RuntimeError: The program failed; the message holds what it said.
    """
    recipe.parent.mkdir(parents=True, exist_ok=True)
    text = f"# {merge.note}\n{yaml.safe_dump(dict(merge.recipe), sort_keys=False)}"
    recipe.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "shardmerge", "merge", str(recipe), str(out), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{' '.join(command[1:])} failed ({done.returncode}):\n{said}")
