"""The recipes (YAML, mergekit's vocabulary), and the call of the program that runs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.demo.train import adam, checkpoint, fisher

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
        note: What to know about it, in a few words.
    """

    name: str
    recipe: Mapping[str, object]
    note: str


def recipes(work: Path, tasks: Sequence[str], *, quick: bool) -> list[Merge]:
    """Return the merges to run over the fine-tunes on ``tasks`` in ``work``."""
    merges = _recipes(work.resolve(), tuple(tasks))
    return [merge for merge in merges if not quick or merge.name in ("linear", "fisher", "ties")]


def _recipes(work: Path, tasks: tuple[str, ...]) -> Iterator[Merge]:
    def merge(method: str, note: str, *, top: dict[str, object], **each: object) -> Merge:
        entries = [{"model": _model(work, task), "parameters": dict(each)} for task in tasks]
        base = {"base_model": _model(work, "base")} if top else {}
        parameters = {"parameters": top} if top else {}
        return Merge(
            method,
            {"merge_method": method, **base, "models": entries, **parameters, "dtype": "float32"},
            note,
        )

    yield merge("linear", "the mean of the fine-tunes", top={}, weight=1.0)
    yield _fisher("fisher", fisher, work, tasks, "mean, weighted by estimated Fisher information")
    yield _fisher("fisher_adam", adam, work, tasks, "mean, weighted by Adam's squared gradients")
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
    yield _slerp(work, *tasks[:2])


def _model(work: Path, name: str) -> str:
    return str(checkpoint(work, name))


def _fisher(
    name: str, folder: Callable[[Path, str], Path], work: Path, tasks: tuple[str, ...], note: str
) -> Merge:
    recipe = {
        "merge_method": "fisher",
        "models": [
            {"model": _model(work, task), "fisher": str(folder(work, task))} for task in tasks
        ],
        "parameters": {"epsilon": 1e-12},  # far below their elements
        "dtype": "float32",
    }
    return Merge(name, recipe, note)


def _slerp(work: Path, first: str, second: str) -> Merge:
    recipe = {
        "merge_method": "slerp",
        "base_model": _model(work, first),
        "models": [{"model": _model(work, task)} for task in (first, second)],
        "parameters": {"t": 0.5},
        "dtype": "float32",
    }
    return Merge("slerp", recipe, f"two only: half way from {first} to {second}")


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
