"""The recipes that are measured, in the YAML that mergekit and shardmerge share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.families import Family

PER_MODEL: dict[str, dict[str, float]] = {
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 0.4, "density": 0.5},
    "dare_ties": {"weight": 0.4, "density": 0.5},
    "dare_linear": {"weight": 0.4, "density": 0.5},
}
SHARED: dict[str, dict[str, float]] = {"slerp": {"t": 0.4}}
METHODS = ("linear", *PER_MODEL, *SHARED)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One method on one family, and the checkpoints it reads."""

    method: str
    inputs: tuple[Path, ...]
    content: dict[str, object]

    def input_bytes(self) -> int:
        """Size of all shards of all inputs."""
        shards = (path for folder in self.inputs for path in folder.glob("*.safetensors"))
        return sum(path.stat().st_size for path in shards)

    def write(self, path: Path) -> Path:
        """Write the recipe as YAML and return ``path``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.content, sort_keys=False))
        return path


def recipe(method: str, family: Family) -> Recipe:
    """``method`` on the base model and all models of ``family`` (slerp: the first), in bfloat16.

    linear knows no base model: there it is one more model, so that each method reads as much.
    """
    content: dict[str, object] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "linear":
        inputs = models = family.checkpoints()
        parameters = {"weight": round(1 / len(models), 3)}
    else:
        content["base_model"] = str(family.base)
        models = family.models[:1] if method == "slerp" else family.models
        inputs = (family.base, *models)
        parameters = PER_MODEL.get(method, {})
    content["models"] = [_entry(path, parameters) for path in models]
    if method in SHARED:
        content["parameters"] = SHARED[method]
    return Recipe(method, inputs, content)


def _entry(path: Path, parameters: dict[str, float]) -> dict[str, object]:
    entry: dict[str, object] = {"model": str(path)}
    return entry | ({"parameters": dict(parameters)} if parameters else {})
