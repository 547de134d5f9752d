"""The methods, the parameters to choose theirs from, and the recipes (YAML, mergekit's words).

Parameters are chosen on validation examples, never on the test's, and all from the same few values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.demo.train import adam, checkpoint

LAMBDAS = (0.1, 0.2, 0.3, 0.5, 1.0)
DENSITIES = (0.2, 0.5)
ALPHAS = (0.3, 0.5, 0.7)

_SUMS = ("task_arithmetic", "dare_linear", "ties", "dare_ties")
_SPARSE = ("ties", "dare_linear", "dare_ties")
_ORDERED = "opcm"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method with its parameters.

    Args:
        method: Its name, as shardmerge's.
        settings: Its parameters, by name; empty for a method that has none.
    """

    method: str
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name for files."""
        return "-".join((self.method, *(f"{k}{v:g}" for k, v in self.settings.items())))

    @property
    def parameters(self) -> str:
        """The parameters in words."""
        return ", ".join(f"{name} {value:g}" for name, value in self.settings.items())


def batch_candidates(*, quick: bool) -> dict[str, list[Candidate]]:
    """Return what to choose from, by method, where all models are merged at once."""
    lambdas, densities = (LAMBDAS[2:3], DENSITIES[1:]) if quick else (LAMBDAS, DENSITIES)
    found = {"linear": [Candidate("linear")], "fisher": [Candidate("fisher")]}
    for method in _SUMS:
        found[method] = [
            Candidate(method, {"lambda": lam, **each})
            for lam in lambdas
            for each in ([{"density": d} for d in densities] if method in _SPARSE else [{}])
        ]
    found[_ORDERED] = _opcm(quick=quick)
    return found


def sequential_candidates(*, quick: bool) -> dict[str, list[Candidate]]:
    """Return what to choose from, by method, where models are merged one after the other."""
    lambdas = LAMBDAS[2:3] if quick else LAMBDAS
    return {
        _ORDERED: _opcm(quick=quick),
        "linear": [Candidate("linear")],
        "task_arithmetic": [Candidate("task_arithmetic", {"lambda": lam}) for lam in lambdas],
        "ties": [Candidate("ties", {"lambda": lam}) for lam in lambdas],
    }


def _opcm(*, quick: bool) -> list[Candidate]:
    return [Candidate(_ORDERED, {"alpha": alpha}) for alpha in (ALPHAS[1:2] if quick else ALPHAS)]


def recipe(candidate: Candidate, work: Path, order: Sequence[str]) -> dict[str, object]:
    """Return what the YAML file says that merges the models of ``order``, all at once."""
    work = work.resolve()
    settings = dict(candidate.settings)
    if candidate.method in _SUMS:
        settings["normalize"] = False
    return {
        "merge_method": candidate.method,
        **({"base_model": str(checkpoint(work, "base"))} if settings else {}),
        "models": list(_entries(candidate.method, work, order)),
        **({"parameters": settings} if settings else {}),
        "dtype": "float32",
    }


def _entries(method: str, work: Path, order: Sequence[str]) -> Iterator[dict[str, object]]:
    for task in order:
        entry: dict[str, object] = {"model": str(checkpoint(work, task))}
        if method == "fisher":
            entry["fisher"] = str(adam(work, task))
        elif method != _ORDERED:
            entry["parameters"] = {"weight": 1.0}
        yield entry
