"""Diagonal Fisher information of a model on examples, streamed: one gradient is alive at a time.

The empirical one is the mean over examples of the squared gradient of log p(target | example); of a
language model, log p is the sum over the example's targets. The exact one of a classifier takes the
mean over its own predictions instead: sum_y p(y | example) * (gradient of log p(y | example))^2.

Reference: Matena, Raffel. Merging Models with Fisher-Weighted Averaging. NeurIPS 2022.
    arXiv:2111.09832, section 3.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shardmerge.assets import as_json, patched_config
from shardmerge.computed import Compute, write_computed
from shardmerge.errors import DataError, Stopped, UsageError
from shardmerge.estimate.counting import Counter
from shardmerge.estimate.examples import IGNORED, Example, Question, Sample, Task
from shardmerge.estimate.models import (
    Described,
    Loaded,
    describe_model,
    examples_for,
    identity_of,
    in_words_of,
    logits_of,
    sample_for,
)
from shardmerge.estimate.saved import Saved
from shardmerge.estimate.sums import Runner, Sums
from shardmerge.estimate.tensors import stored
from shardmerge.layout import Spec
from shardmerge.methods.fisher import SMALL
from shardmerge.numerics import DType
from shardmerge.outputs import open_output
from shardmerge.outputs.api import STAGING, Output
from shardmerge.progress import counted
from shardmerge.publish import Published
from shardmerge.recipe_parts import ModelName
from shardmerge.sources.folder import few
from shardmerge.staging import refuse_sources
from shardmerge.stores import Settings, Stores, is_remote

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class FisherQuestion(Question):
    """What is to be estimated.

    Args:
        label_field: where the labels are; read for the empirical information of classifiers only.
        exact: over the model's own predictions in place of labels; of classifiers only.
    """

    label_field: str = "label"
    exact: bool = False


# --- from the command to the output ---------------------------------------------------------------


def estimate_fisher(
    model: str,
    out: str,
    question: FisherQuestion,
    runner: Runner,
    *,
    counter: Counter,
    stop: threading.Event,
    settings: Settings,
    work: str | None = None,
    overwrite: bool = False,
    fresh: bool = False,
) -> Published | None:
    """Estimate the Fisher information of a model and publish it as a checkpoint of its own.

    The checkpoint has the model's tensor names and shapes, in float32; integers are left out.

    Args:
        model: a local folder in transformers' format, or a name of the Hub.
        out: where to publish.
        runner: where the work is done.
        stop: set to stop after the next example.
        work: folder of what a stopped run needs to go on; None: in ``out``, where that is local.
        overwrite: replace another checkpoint at ``out``.
        fresh: forget a stopped run.
    Returns:
        what was published; None in every process but the first.
    Raises:
        UsageError: for what cannot be asked of this model.
        DataError: for examples that cannot be used.
        CheckpointError: for a model that cannot be loaded, whole.
        Stopped: by ``stop``; the same call goes on.
    """
    stores = Stores(settings, stopping=stop)
    output = open_output(out, stores)
    folder = _work_folder(output, work)
    described = describe_model(model, question.task, stores)
    refuse_sources(output, {ModelName(model): described.checkpoint})
    sample = _sample(described, question)
    examples = examples_for(
        described, sample.chosen, max_length=question.max_length, seed=question.seed
    )
    made = "Fisher information, " + ("exact" if question.exact else "empirical")
    identity = identity_of(described, question, sample, made=made, arithmetic=runner.what)
    saved = Saved(folder, identity, process=runner.rank, processes=runner.size, meet=runner.meet)
    loaded = runner.load(described)
    run = _Run(loaded, examples, question.exact, runner, saved, counter, stop, fresh)
    if runner.rank:
        for _ in run.values(runner.told(())):
            pass
        runner.leave()
        return None
    config = patched_config(described.checkpoint.config, dtype=DType.F32)
    with _telling_others(runner, run) as compute:
        published = write_computed(
            output,
            _specs(loaded),
            compute,
            identity=identity,
            files={"config.json": as_json(config)},
            overwrite=overwrite,
            fresh=fresh,
            notes=_notes(loaded, sample),
        )
    if not published.already:
        saved.forget()
    runner.leave()
    return published


@contextlib.contextmanager
def _telling_others(runner: Runner, run: _Run) -> Iterator[Compute]:
    """What computes the values in process 0, when all others have been told which ones.

    They wait until then, so they are told if it never comes to that.
    """
    told = False

    def compute(names: Sequence[str]) -> Iterator[npt.NDArray[np.floating]]:
        nonlocal told
        told = True
        return run.values(runner.told(names))

    try:
        yield compute
    finally:
        if not told:
            runner.told(())


def _work_folder(output: Output, work: str | None) -> Path:
    if work is not None:
        return Path(work).expanduser()
    if is_remote(output.url):
        raise UsageError(
            f"{output.url}: sums are saved in a local folder while they grow, so that a run which "
            "was stopped can go on. Give --work FOLDER."
        )
    return Path(output.url) / STAGING / "sums"


def _sample(described: Described, question: FisherQuestion) -> Sample:
    classifies = described.task is Task.CLASSIFICATION
    if question.exact and not classifies:
        raise UsageError(
            f"--exact is for classifiers: a sum over all {described.task} answers has no end."
        )
    label_field = question.label_field if classifies and not question.exact else None
    return sample_for(described, question, label_field=label_field)


def _specs(loaded: Loaded) -> tuple[Spec, ...]:
    """The output's tensors: those that become parameters group by group, then all others."""
    tensors = loaded.described.checkpoint.tensors
    used = [name for group in loaded.groups for name in group.sources]
    names = [name for name in (*used, *_without_place(loaded)) if tensors[name].dtype.is_float]
    return tuple(Spec(name, DType.F32, tensors[name].shape) for name in names)


def _without_place(loaded: Loaded) -> list[str]:
    """Tensors of the checkpoint that the model for this task does not have."""
    used = {name for group in loaded.groups for name in group.sources}
    return [name for name in loaded.described.checkpoint.tensors if name not in used]


def _notes(loaded: Loaded, sample: Sample) -> tuple[str, ...]:
    notes = [f"{len(sample.chosen):,} of {counted(sample.total, 'example')} were used", SMALL]
    if unused := _without_place(loaded):
        notes.append(
            f"{counted(len(unused), 'tensor')} of the checkpoint took no part in "
            f"{loaded.described.task}, so F is 0 there: {few(unused)}"
        )
    return tuple(notes)


# --- the estimate ---------------------------------------------------------------------------------

_GO_ON, _SAVE, _STOP, _FAIL = 0, 1, 2, 3
"""What a process wishes for after an example; the largest wish is everybody's."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Everything that an estimate needs."""

    loaded: Loaded
    examples: Sequence[Example]
    exact: bool
    runner: Runner
    saved: Saved
    counter: Counter
    stop: threading.Event
    fresh: bool

    def values(self, names: Sequence[str]) -> Iterator[npt.NDArray[np.floating]]:
        """The information on tensors of the checkpoint, in the order of ``_specs``.

        Every process calls this; all but the first yield nothing.
        """
        if not names:
            return
        sums, wanted = self._summed(), set(names)

        def mean(target: str) -> torch.Tensor | None:
            parameter = self.loaded.parameter_of.get(target)
            whole = None if parameter is None else sums.whole(parameter)
            return None if whole is None else whole / len(self.examples)

        for group in self.loaded.groups:
            if not wanted & set(group.sources):
                continue
            if self.runner.rank:
                for target in group.targets:
                    mean(target)  # gives its part to process 0
                continue
            for name, value in stored(self.loaded.described.checkpoint, group, mean):
                if name in wanted:
                    yield value.numpy()
        if self.runner.rank:
            return
        for name in _without_place(self.loaded):
            if name in wanted:
                shape = self.loaded.described.checkpoint.tensors[name].shape
                yield np.zeros(shape, dtype=np.float32)

    def _summed(self) -> Sums:
        """Sums over all examples, from those that are saved on."""
        if self.fresh and self.runner.rank == 0:
            self.saved.forget()
        self.runner.meet()
        sums = self.runner.sums(self.loaded)
        done, parts = self.saved.load()
        sums.restore(parts)
        total = len(self.examples)
        self.counter.start(total=total, done=done)
        while done < total:
            problem = self._added(sums, done + self.runner.rank)
            wish = self.runner.agree(self._wish(problem))
            if wish == _FAIL:
                raise DataError(problem or "another process has failed at its example; it says why")
            done = min(done + self.runner.size, total)
            self.counter.done(done)
            if wish != _GO_ON or done == total:
                self.saved.save(done, sums.parts())
            if wish == _STOP and done < total:
                raise Stopped(
                    f"stopped after {done:,} of {counted(total, 'example')}; the same command goes "
                    "on from there"
                )
        return sums

    def _wish(self, problem: str) -> int:
        if problem:
            return _FAIL
        return _STOP if self.stop.is_set() else _SAVE if self.saved.due else _GO_ON

    def _added(self, sums: Sums, number: int) -> str:
        """Add an example's squares, or, past the last one, take the same steps for nothing.

        Returns:
            what is wrong with the example; empty where nothing is.
        Raises:
            DataError: for an example that the model cannot take.
            DeviceError: for one that the device has too little memory for.
        """
        example = self.examples[min(number, len(self.examples) - 1)]
        present = float(number < len(self.examples))
        with in_words_of(example):
            if self.exact:
                _add_exact(self.loaded, sums, example, present, keeps_graph=self.runner.keeps_graph)
            else:
                sums.weight = present
                _log_p(self.loaded, example).backward()
        if unsound := sums.unsound():
            return (
                f"{example.where}: the gradient of {few(unsound)} for this example, or its square, "
                "is NaN or infinite.\n  Leave the example out (with --fresh), or mend the model."
            )
        return ""


def _log_p(loaded: Loaded, example: Example) -> torch.Tensor:
    """Log-likelihood of an example's targets, a scalar; natural logarithm."""
    import torch

    logits = logits_of(loaded, example)
    targets = torch.tensor(example.targets, device=logits.device)
    return -torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORED, reduction="sum"
    )


def _add_exact(
    loaded: Loaded, sums: Sums, example: Example, present: float, *, keeps_graph: bool
) -> None:
    """Add sum_y p(y) * (gradient of log p(y))^2."""
    logits = logits_of(loaded, example)
    count = logits.shape[-1]
    for label in range(count):
        if label and not keeps_graph:
            logits = logits_of(loaded, example)
        log_p = logits.log_softmax(-1)[0]
        sums.weight = log_p[label].detach().exp() * present
        log_p[label].backward(retain_graph=keeps_graph and label + 1 < count)
