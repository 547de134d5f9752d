"""The calls of ``shardmerge``: in this process, as starting hundreds of others would take long."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import yaml

from benchmarks.quality.candidates import Candidate


def shardmerge(*arguments: str | Path) -> None:
    """Run a command as a user would, but for the process.

    Raises:
        RuntimeError: It failed; the message holds what it said.
    """
    from shardmerge.cli import main

    words = [str(argument) for argument in arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status: object = main(words)
        except SystemExit as end:  # what argparse does with words that it does not know
            status = end.code
    if status:
        raise RuntimeError(f"shardmerge {' '.join(words)} failed ({status}):\n{said.getvalue()}")


def merge(recipe: dict[str, object], out: Path) -> None:
    """Merge all models of ``recipe``, which is written beside ``out``; replaces what is there."""
    shutil.rmtree(out, ignore_errors=True)  # else a run that was stopped would have to be resumed
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    shardmerge("merge", file, out)


class Continual:
    """A continual merge: models come one by one, and the result can be looked at in between.

    Args:
        folder: Where its state and what it publishes lie; what was there is deleted.
        base: The checkpoint of the base model.
        candidate: The method and its parameters.
    """

    def __init__(self, folder: Path, base: Path, candidate: Candidate) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._state = folder / "state"
        self._out = folder / "merged"
        settings = [f"--set={name}={value:g}" for name, value in candidate.settings.items()]
        method = ("--method", candidate.method)
        shardmerge("continual", "init", self._state, "--base", base, *method, *settings)

    def add(self, model: Path) -> None:
        """Merge one more model."""
        shardmerge("continual", "add", self._state, model, "--name", model.name)

    def publish(self) -> Path:
        """Return the checkpoint of what is merged so far; the next call replaces it."""
        shutil.rmtree(self._out, ignore_errors=True)
        shardmerge("continual", "publish", self._state, self._out, "--dtype", "float32")
        return self._out
