"""The recipes (YAML, mergekit's vocabulary), and the call of the program that runs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

# Small task vectors that hardly overlap could be added in full; these overlap.
_SUM_WEIGHT = 0.7


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
    recipe: dict[str, object]
    tasks: tuple[str, ...]
    note: str


def recipes(models: Path, tasks: Sequence[str], *, quick: bool) -> list[Merge]:
    """Return the merges to run, over the checkpoints ``models/base`` and ``models/<task>``."""
    merges = _recipes(models.resolve(), tuple(tasks))
    return [m for m in merges if not quick or m.name in ("linear", "task_arithmetic", "ties")]


def _recipes(models: Path, tasks: tuple[str, ...]) -> Iterator[Merge]:
    base = {"base_model": str(models / "base")}

    def merge(method: str, note: str, *, top: dict[str, object], **each: object) -> Merge:
        entries: list[dict[str, object]] = [
            {"model": str(models / task), "parameters": each} for task in tasks
        ]
        recipe = {"merge_method": method, "dtype": "float32", "models": entries, **top}
        return Merge(method, recipe, tasks, note)

    def parameters(**values: object) -> dict[str, object]:
        return {**base, "parameters": values}

    yield merge("linear", "plain mean of the fine-tunes", top={}, weight=1.0)
    yield merge(
        "task_arithmetic",
        f"base + {_SUM_WEIGHT} x the sum of the task vectors",
        top=parameters(**{"lambda": _SUM_WEIGHT, "normalize": False}),
        weight=1.0,
    )
    yield merge(
        "ties",
        "half of each task vector; signs elected; lambda 1.5",
        top=parameters(**{"lambda": 1.5, "normalize": True}),
        weight=1.0,
        density=0.5,
    )
    yield merge(
        "dare_linear",
        "half of the elements dropped at random, rest doubled",
        top=parameters(**{"lambda": _SUM_WEIGHT, "normalize": False}),
        weight=1.0,
        density=0.5,
    )
    yield merge(
        "dare_ties",
        "as dare_linear, with signs elected as in ties",
        top=parameters(**{"lambda": 1.5, "normalize": True}),
        weight=1.0,
        density=0.5,
    )
    yield _fisher(models, tasks)
    yield _slerp(models, tasks[:2])


def _fisher(models: Path, tasks: tuple[str, ...]) -> Merge:
    entries = [
        {"model": str(models / task), "fisher": str(models / task / "fisher")} for task in tasks
    ]
    recipe: dict[str, object] = {"merge_method": "fisher", "dtype": "float32", "models": entries}
    return Merge("fisher", recipe, tasks, "mean weighted by squared gradients of the training")


def _slerp(models: Path, pair: tuple[str, ...]) -> Merge:
    recipe: dict[str, object] = {
        "merge_method": "slerp",
        "dtype": "float32",
        "base_model": str(models / pair[0]),
        "models": [{"model": str(models / task)} for task in pair],
        "parameters": {"t": 0.5},
    }
    return Merge("slerp", recipe, pair, f"half way from {pair[0]} to {pair[1]}, on a sphere")


def run(merge: Merge, *, recipe: Path, out: Path) -> None:
    """Write the recipe and run ``shardmerge merge`` on it, as a user would.

    Raises:
        RuntimeError: The program failed; the message holds what it said.
    """
    recipe.parent.mkdir(parents=True, exist_ok=True)
    text = f"# {merge.note}\n{yaml.safe_dump(merge.recipe, sort_keys=False)}"
    recipe.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "shardmerge", "merge", str(recipe), str(out), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{' '.join(command[1:])} failed ({done.returncode}):\n{said}")
