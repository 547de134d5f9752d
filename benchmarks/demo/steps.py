"""The steps of the demonstration, one after the other, over one work folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from torch import Tensor

from benchmarks.demo.encoder import Encoder, accuracy, packaged_model
from benchmarks.demo.recipes import Merge, recipes, run
from benchmarks.demo.report import Row
from benchmarks.demo.tasks import Task, build_tasks
from benchmarks.demo.train import Settings, checkpoint, fine_tune, save_base


class Demo:
    """The steps of the demonstration, over one work folder.

    Args:
        work: Folder for models, recipes and merges; fine-tunes there are reused.
        quick: A small run that shows that everything works, not good figures.
    """

    def __init__(self, work: Path, *, quick: bool) -> None:
        self.work = work / "quick" if quick else work
        self.quick = quick
        self.settings: Settings = (
            Settings(steps=5, fisher_samples=8) if quick else Settings(steps=64)
        )
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.seconds: dict[str, float] = {}
        self.tasks: list[Task] = []
        self.heads: dict[str, Tensor] = {}

    def run(self) -> None:
        """Do everything; the figures are in :attr:`rows`, what went wrong in :attr:`failures`."""
        self._prepare()
        for task in self.tasks:
            self._fine_tune(task)
        for merge in recipes(self.work, [t.name for t in self.tasks], quick=self.quick):
            self._merge(merge)

    def _prepare(self) -> None:
        started = time.perf_counter()
        say("reading the standard library")
        train_size = self.settings.steps * self.settings.batch_size
        if self.quick:
            self.tasks = build_tasks(train_size=train_size, test_size=40, every=3)[:2]
        else:
            self.tasks = build_tasks(train_size=train_size, test_size=200)
        base = save_base(packaged_model(), self.work)
        self.heads = {task.name: base.head(task) for task in self.tasks}
        self._took("prepare", started)
        self._measure(base, "base", "base", "sentence-transformers/all-MiniLM-L6-v2")

    def _fine_tune(self, task: Task) -> None:
        def progress(done: int) -> None:
            say(f"fine-tuning on {task.name}: {done}/{self.settings.steps}", passing=True)

        started = time.perf_counter()
        trained = fine_tune(
            self.work, task, self.heads[task.name], self.settings, progress=progress
        )
        folder = checkpoint(self.work, task.name)
        if trained:
            self._took("fine-tune", started)
        say(f"fine-tuning on {task.name}: {'done' if trained else 'reused from ' + str(folder)}")
        note = f"{len(task.train)} texts, {len(task.classes)} classes"
        self._measure(Encoder(folder), task.name, "fine-tune", note)

    def _merge(self, merge: Merge) -> None:
        say(f"merging: {merge.name}")
        started = time.perf_counter()
        out = self.work / "merged" / merge.name
        try:
            run(merge, recipe=self.work / "recipes" / f"{merge.name}.yaml", out=out)
            self._took("merge", started)
            encoder = Encoder(out)
        except (RuntimeError, OSError, ValueError) as error:
            self.failures.append(f"{merge.name}: {error}")
            return
        self._measure(encoder, merge.name, "merge", merge.note)

    def _measure(self, encoder: Encoder, model: str, kind: str, note: str) -> None:
        started = time.perf_counter()
        say(f"measuring {model}", passing=True)
        accuracies = {t.name: accuracy(encoder, t, self.heads[t.name]) for t in self.tasks}
        self.rows.append(Row(model, kind, accuracies, note))
        self._took("measure", started)

    def _took(self, what: str, started: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


def say(text: str, *, passing: bool = False) -> None:
    """Report progress on stderr; a ``passing`` line is shown on a terminal only and overwritten."""
    terminal = sys.stderr.isatty()
    if passing and not terminal:
        return
    start, end = ("\r\x1b[K", "" if passing else "\n") if terminal else ("", "\n")
    print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
