"""The steps, one after the other, over one work folder."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from torch import Tensor

from benchmarks.demo.encoder import Encoder, accuracy, packaged_model
from benchmarks.demo.steps import say
from benchmarks.demo.train import Settings, checkpoint, fine_tune, save_base
from benchmarks.quality.candidates import (
    Candidate,
    batch_candidates,
    recipe,
    sequential_candidates,
)
from benchmarks.quality.commands import Continual, merge
from benchmarks.quality.figures import Run
from benchmarks.quality.report import Choice, Result, Row
from benchmarks.quality.tasks import Divided, Sizes, build_divided

_SIZES = Sizes(train=2048, validation=100, test=300)
_QUICK_SIZES = Sizes(train=160, validation=20, test=40)
_QUICK_TASKS = 4


class Quality:
    """The steps of the measurement, over one work folder.

    Args:
        work: Folder for models and merges; fine-tunes there are reused.
        quick: A small run that shows that everything works, not good figures.
        n_orders: In how many orders to merge one by one.
    """

    def __init__(self, work: Path, *, quick: bool, n_orders: int) -> None:
        self.work = work / "quick" if quick else work
        self.quick = quick
        self.settings = Settings(steps=5 if quick else 64)
        self.tasks: dict[str, Divided] = {}
        self.heads: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}
        self._choices: list[Choice] = []
        self._n_orders = n_orders

    def run(self) -> Result:
        """Do everything.

        Raises:
            RuntimeError: A merge failed.
            ValueError: The standard library here has too little text.
        """
        base = self._prepare()
        own = {name: self._fine_tune(name) for name in self.tasks}
        orders = self._orders()
        rows = [*self._merge_at_once(orders[0]), *self._merge_in_sequence(orders)]
        return Result(base, own, rows, self._choices, self.seconds)

    def _prepare(self) -> dict[str, float]:
        with self._timed("prepare"):
            say("reading the standard library")
            if self.quick:
                divided = build_divided(_QUICK_SIZES, every=3)[:_QUICK_TASKS]
            else:
                divided = build_divided(_SIZES)
            self.tasks = {each.task.name: each for each in divided}
            base = save_base(packaged_model(), self.work)
            self.heads = {name: base.head(each.task) for name, each in self.tasks.items()}
        return self._test(base, self.tasks)

    def _fine_tune(self, name: str) -> float:
        task = self.tasks[name].task

        def progress(done: int) -> None:
            say(f"fine-tuning on {name}: {done}/{self.settings.steps}", passing=True)

        with self._timed("fine-tune"):
            trained = fine_tune(self.work, task, self.heads[name], self.settings, progress=progress)
        say(f"fine-tuning on {name}: {'done' if trained else 'reused'}")
        return self._test(Encoder(checkpoint(self.work, name)), [name])[name]

    def _orders(self) -> list[tuple[str, ...]]:
        names = [*self.tasks]
        return [
            tuple(random.Random(seed).sample(names, len(names))) for seed in range(self._n_orders)
        ]

    def _merge_at_once(self, order: Sequence[str]) -> Iterator[Row]:
        """Merge all models by each method; the order is that of the first sequence."""
        for candidates in batch_candidates(quick=self.quick).values():
            best = self._best("at once", candidates, order)
            final = self._test(Encoder(self._merged(best, order)), self.tasks)
            yield Row("at once", best, (final,))

    def _merged(self, candidate: Candidate, order: Sequence[str]) -> Path:
        out = self.work / "merged" / "at-once"
        with self._timed("merge at once"):
            merge(recipe(candidate, self.work, order), out)
        return out

    def _merge_in_sequence(self, orders: Sequence[tuple[str, ...]]) -> Iterator[Row]:
        """Merge one by one in each order; parameters are chosen in the first order."""
        for candidates in sequential_candidates(quick=self.quick).values():
            best = self._best("in sequence", candidates, orders[0])
            runs = tuple(self._sequence(best, order) for order in orders)
            yield Row("in sequence", best, tuple(run.final for run in runs), runs)

    def _sequence(self, candidate: Candidate, order: tuple[str, ...]) -> Run:
        say(f"merging in sequence: {candidate.name}, {' '.join(order)}")
        continual = self._begin(candidate)
        after: list[Mapping[str, float]] = []
        for step, name in enumerate(order, start=1):
            with self._timed("merge in sequence"):
                continual.add(checkpoint(self.work, name))
                out = continual.publish()
            after.append(self._test(Encoder(out), order[:step]))
        return Run(order, tuple(after))

    def _begin(self, candidate: Candidate) -> Continual:
        folder = self.work / "merged" / "in-sequence"
        return Continual(folder, checkpoint(self.work, "base"), candidate)

    def _at_end(self, candidate: Candidate, order: Sequence[str]) -> Path:
        """Merge one by one, and look at the end only."""
        with self._timed("merge in sequence"):
            continual = self._begin(candidate)
            for name in order:
                continual.add(checkpoint(self.work, name))
            return continual.publish()

    def _best(self, kind: str, candidates: Sequence[Candidate], order: Sequence[str]) -> Candidate:
        """Return the candidate with the largest mean accuracy on the validation examples."""
        if len(candidates) == 1:
            return candidates[0]
        make = self._merged if kind == "at once" else self._at_end
        tried = []
        for candidate in candidates:
            say(f"choosing, {kind}: {candidate.name}")
            encoder = Encoder(make(candidate, order))
            with self._timed("validate"):
                found = [
                    accuracy(encoder, each.validation, self.heads[name])
                    for name, each in self.tasks.items()
                ]
            tried.append(Choice(kind, candidate, fmean(found)))
        self._choices += tried
        return max(tried, key=lambda choice: choice.accuracy).candidate

    def _test(self, encoder: Encoder, names: Iterable[str]) -> dict[str, float]:
        with self._timed("test"):
            return {
                name: accuracy(encoder, self.tasks[name].task, self.heads[name]) for name in names
            }

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
