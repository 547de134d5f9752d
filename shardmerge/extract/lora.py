"""From two models to a LoRA adapter: one matrix at a time, with the error of each.

Finished matrices are kept beside the output, as ranks that are chosen by energy are known only when
all are decomposed; then the adapter is laid out and written. A run that is killed goes on there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shardmerge import __version__
from shardmerge.assets import as_json, public_text
from shardmerge.computed import write_computed
from shardmerge.diff import compare
from shardmerge.errors import NonFiniteError, OutputError, PlanError, Stopped, StoreError
from shardmerge.extract.choice import Choice, Wanted, choose
from shardmerge.extract.decompose import STOPPED, decompose, workers_for
from shardmerge.extract.deltas import delta_norms, is_adapted, read_values
from shardmerge.extract.finished import Finished, Matrix
from shardmerge.extract.names import ROOT, adapter_config
from shardmerge.extract.report import REPORT, Extracted, LeftOut, extracted, report_of
from shardmerge.kernels.factors import Array
from shardmerge.layout import Spec
from shardmerge.ledger import Ledger, fingerprint
from shardmerge.outputs import Output, open_output
from shardmerge.prepare import (
    DEFAULT_MEMORY_BYTES,
    available_cpus,
    model_named,
    open_model,
    public_name,
)
from shardmerge.progress import Display, Quiet
from shardmerge.publish import PROVENANCE, Published, occupants
from shardmerge.sources import Checkpoint, Twins
from shardmerge.sources.adapter import ADAPTER_CONFIG
from shardmerge.sources.folder import ADAPTER, few
from shardmerge.staging import refuse_sources
from shardmerge.stores import Settings, Stores


def extract_lora(
    model: str,
    out: str,
    *,
    base: str,
    wanted: Wanted,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Display | None = None,
    stop: threading.Event | None = None,
    settings: Settings | None = None,
) -> Extracted:
    """Extract a LoRA adapter from a model; go on from where a run stopped.

    Of the difference of each linear layer's weight from the base model's, the best approximation
    of a rank is split evenly over two factors: B = U sqrt(S), A = sqrt(S) V^T.

    Args:
        model: anything that is read as a checkpoint, with ``+`` and an adapter of it, if need be;
            ``base``, the base model, too.
        out: folder of the adapter, or ``s3://bucket/folder``.
        memory_bytes: the most anonymous memory the process may use.
        threads: matrices at a time, as far as memory allows; None: one per CPU.
        overwrite: replace what lies at ``out``, once the adapter is complete.
        fresh: forget an unfinished run at ``out``.
        stop: set it to stop the run; the same call goes on from there.
    Raises:
        PlanError: models that do not fit together, or do not differ in a linear layer.
        MemoryBudgetError: a matrix that does not fit.
        NonFiniteError: NaN or infinity in a tensor that is needed.
        ShardmergeError: for everything else that a user can mend.
    """
    wanted.check()
    stop = stop or threading.Event()
    stores = Stores(settings, stopping=stop)
    output = open_output(out, Stores(settings, stopping=stop))
    twins = Twins()
    names = [model_named(text) for text in (model, base)]
    ours, theirs = (open_model(name, stores, twins) for name in names)
    refuse_sources(output, dict(zip(names, (ours, theirs), strict=True)))
    choice = choose(ours, theirs, wanted)
    workers = workers_for(choice.layers, wanted, memory_bytes, threads or available_cpus())
    urls = [public_name(name, stores) for name in names]
    identity = _identity(wanted, ours, theirs, urls)
    run = _Run(choice, wanted, identity, urls, output, stores, stop)
    before = None if fresh else run.published()
    if before is not None:
        return before
    return run.go(workers, progress or Quiet(), overwrite=overwrite, fresh=fresh)


def _identity(
    wanted: Wanted, model: Checkpoint, base: Checkpoint, urls: Sequence[str]
) -> dict[str, str]:
    """What the adapter's bytes depend on."""
    identity = {
        "shardmerge": __version__,
        "command": "extract-lora",
        "asked": json.dumps(_asked(wanted, urls), sort_keys=True),
        "linear algebra": f"numpy {np.__version__}",
    }
    for kind, checkpoint in (("model", model), ("base model", base)):
        lines = [f"{file} {text}" for file, text in sorted(checkpoint.all_versions.items())]
        urls = [public_text(part.url) for part in checkpoint.parts]
        identity[f"source {kind}"] = "\n".join([*urls, *lines])
    return identity


def _any_of(number: int) -> str:
    return "the one matrix" if number == 1 else f"any of {number:,} matrices"


def _asked(wanted: Wanted, urls: Sequence[str]) -> dict[str, object]:
    """What was asked for, of which models, as plain values."""
    plain = asdict(wanted) | {"dtype": wanted.dtype.torch_name}
    return {"model": urls[0], "base": urls[1], **plain}


@dataclass(frozen=True, slots=True)
class _Run:
    """One extraction.

    Args:
        urls: of the model and the base model, as they may be shown.
    """

    choice: Choice
    wanted: Wanted
    identity: Mapping[str, str]
    urls: Sequence[str]
    output: Output
    stores: Stores
    stop: threading.Event

    def published(self) -> Extracted | None:
        """What lies at OUT, if it is this very adapter."""
        try:
            record = json.loads(self.output.read(PROVENANCE))
            report = json.loads(self.output.read(REPORT))
            nbytes = record["shards"][ADAPTER]["bytes"]
            if (
                record["fingerprint"] != fingerprint(self.identity)
                or self.output.size(ADAPTER) != nbytes
                or self.output.is_unfinished()
            ):
                return None
            count = 2 * len(report["matrices"]) + len(self.choice.saved_tensors)
            there = Published(self.output.url, (ADAPTER,), nbytes, count, already=True)
            return extracted(there, report)
        except (OSError, OutputError, StoreError, ValueError, KeyError, TypeError):
            return None

    def go(self, workers: int, progress: Display, *, overwrite: bool, fresh: bool) -> Extracted:
        """Decompose what is not decomposed yet, and publish."""
        finished = Finished(self.output, fingerprint(self.identity), self.wanted.dtype)
        with self.output.locked():
            self._begin(overwrite=overwrite, fresh=fresh)
            try:
                left_out = tuple(self._left_out())
                known = self._decompose(finished, workers, progress)
                if not any(matrix.rank for matrix in known.values()):
                    raise PlanError(self._nothing(left_out))
            except (NonFiniteError, PlanError):
                self.output.tidy()  # the inputs have to change, and all begins anew
                raise
        matrices = [known[layer.model.name] for layer in self.choice.layers]
        asked = _asked(self.wanted, self.urls)
        report = report_of(asked, matrices, self.choice.saved, left_out)
        layers = [matrix for matrix in matrices if matrix.rank]
        return extracted(self._write(finished, layers, report, overwrite=overwrite), report)

    def _begin(self, *, overwrite: bool, fresh: bool) -> None:
        """Refuse a place that is taken; begin a ledger, or see that it is of the same run."""
        if fresh:
            self.output.forget()
        if not self.output.is_unfinished():
            found = occupants(self.output, [ADAPTER, ADAPTER_CONFIG, REPORT, PROVENANCE])
            if found and not overwrite:
                self.output.tidy()
                raise OutputError(
                    f"{self.output.url} holds something else: {few(found, 5)}.\n"
                    "  Give --overwrite to replace it once the adapter is complete, or another "
                    "place."
                )
        Ledger(self.output.journal(), self.identity).close()

    def _left_out(self) -> Iterator[LeftOut]:
        """Tensors that differ, and are neither layers nor saved."""
        yield from (LeftOut(name, None, why) for name, why in self.choice.lacking.items())
        for name, differs, delta, norm in self._differences():
            if self.stop.is_set():
                raise Stopped(STOPPED)
            if differs:
                share = delta / norm if norm else None
                yield LeftOut(name, share, "no linear layer that was asked for")

    def _differences(self) -> Iterator[tuple[str, bool, float, float]]:
        """Of each other tensor: whether it differs, the difference's norm, and the base's."""
        adapted, ours, theirs = [], {}, {}
        for model, base in self.choice.others:
            if is_adapted(model) or is_adapted(base):
                adapted.append((model, base))
            else:
                ours[model.name], theirs[base.name] = model, base
        for found in compare(ours, theirs, self.stores):
            yield found.name, found.differing > 0, found.norm_diff, found.norm_b
        for model, base in adapted:
            delta, norm = delta_norms(model, base, self.stores)
            yield model.name, delta > 0, delta, norm

    def _decompose(
        self, finished: Finished, workers: int, progress: Display
    ) -> Mapping[str, Matrix]:
        """What became of every layer's matrix, by the name of its tensor."""
        layers = self.choice.layers
        sizes = {each.model.name: each.model.nbytes + each.base.nbytes for each in layers}
        numbers = {layer.model.name: number for number, layer in enumerate(layers)}
        known = finished.load()
        progress.start(
            tasks=len(layers),
            tasks_done=len(known),
            all_bytes=sum(sizes.values()),
            done_bytes=sum(sizes[name] for name in known),
            write_bytes=0,
            written_bytes=0,
        )
        left = [layer for layer in layers if layer.model.name not in known]
        ended = decompose(left, self.wanted, self.stores, workers=workers, stop=self.stop)
        for layer, matrix, stored in ended:
            name = layer.model.name
            finished.save(numbers[name], matrix, stored)
            known[name] = matrix
            progress.step(sizes[name])
        return known

    def _nothing(self, left_out: Sequence[LeftOut]) -> str:
        models = f"{self.urls[0]} and its base model {self.urls[1]}"
        if not self.choice.layers:
            return (
                f"{models}: no matrix of a linear layer is left that may become a layer of LoRA, "
                "and an adapter needs one.\n"
                "  Let --include, --exclude and --save-modules leave some."
            )
        what = (
            f"{models} do not differ in {_any_of(len(self.choice.layers))} of linear layers: "
            "there is nothing to extract."
        )
        if left_out:
            return f"{what}\n  What differs: {few((t.tensor for t in left_out), 5)}."
        return f"{what}\n  They do not differ in other tensors either: is it the same model?"

    def _write(
        self,
        finished: Finished,
        layers: Sequence[Matrix],
        report: Mapping[str, Any],
        *,
        overwrite: bool,
    ) -> Published:
        specs: list[Spec] = []
        origins: dict[str, tuple[str, int]] = {}
        for matrix in layers:
            rows, columns = matrix.shape
            shapes = {"A": (matrix.rank, columns), "B": (rows, matrix.rank)}
            for which, (letter, shape) in enumerate(shapes.items()):
                name = f"{ROOT}{matrix.module}.lora_{letter}.weight"
                specs.append(Spec(name, self.wanted.dtype, shape))
                origins[name] = (matrix.tensor, 1 - which)
        whole = {f"{ROOT}{name}": ref for name, ref in self.choice.saved_tensors.items()}
        specs += [Spec(name, self.wanted.dtype, ref.shape) for name, ref in whole.items()]

        def compute(names: Sequence[str]) -> Iterator[Array]:
            for name in names:
                if self.stop.is_set():
                    raise Stopped(STOPPED)
                if name in whole:
                    yield read_values(whole[name], self.stores)
                else:
                    tensor, which = origins[name]
                    yield finished.factors(tensor)[which]

        ranks = {matrix.module: matrix.rank for matrix in layers}
        choice = self.choice
        config = adapter_config(ranks, choice.modules, choice.saved, choice.config, self.urls[1])
        return write_computed(
            self.output,
            specs,
            compute,
            identity=self.identity,
            files={ADAPTER_CONFIG: as_json(config), REPORT: as_json(report)},
            single=ADAPTER,
            overwrite=overwrite,
        )
