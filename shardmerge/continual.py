"""Continual merging: models arrive one at a time, and are no longer needed once they are in.

A state is a folder. Its record, one small file, says which models are in it, in which order, and
where the sum of their task vectors lies: an ordinary float32 checkpoint for each step that is kept.
The record is replaced at once when a step is complete; until then the step before is the last.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from shardmerge import __version__
from shardmerge.errors import (
    CheckpointError,
    LedgerMismatchError,
    NonFiniteError,
    OutputError,
    SourceChangedError,
    StateError,
    StoreError,
)
from shardmerge.execute import Progress
from shardmerge.kept import check_added, scale_decisions, scaled, summed
from shardmerge.ledger import fingerprint
from shardmerge.merge import published_sums, run
from shardmerge.outputs import open_output
from shardmerge.outputs.api import STAGING
from shardmerge.prepare import Planner, Prepared, Sources, Where, model_named, open_model
from shardmerge.progress import counted
from shardmerge.publish import PROVENANCE, Published
from shardmerge.recipe import ModelName
from shardmerge.sources import open_checkpoint
from shardmerge.sources.tensor import Checkpoint, reads
from shardmerge.state import KEEP, RECORD, Model, Record, Step, as_json, kept, record_from
from shardmerge.steps import (
    defaults_of,
    folder_of,
    in_dtype_of_base,
    method_info,
    method_of,
    recipe_of,
    refuse_known,
    refuse_other_methods,
    refuse_other_tensors,
    refuse_pending,
    refuse_same,
    setting,
    step_of,
    told,
)
from shardmerge.stores import Settings, Stores, is_remote
from shardmerge.verify import verify


class State:
    """A state of continual merging at a folder or ``s3://bucket/folder``.

    Args:
        settings: of the places that bytes come from and go to.
        stop: set it to stop a step; the same call goes on from there.
    """

    def __init__(
        self, url: str, settings: Settings | None = None, stop: threading.Event | None = None
    ) -> None:
        self._stop = stop or threading.Event()
        self._stores = Stores(settings, stopping=self._stop)
        self._output = open_output(url, Stores(settings, stopping=self._stop))
        self.url = self._output.url

    # --- looking ------------------------------------------------------------------------------

    def record(self, base: str | None = None) -> Record:
        """What it says about itself.

        Args:
            base: where the base model lies now; None: where it was.
        Raises:
            StateError: for a place that holds no state.
        """
        if self._output.size(RECORD) is None:
            raise StateError(
                f"{self.url} holds no state of continual merging.\n"
                "  Begin one with 'shardmerge continual init STATE --base BASE'."
            )
        try:
            found = record_from(json.loads(self._output.read(RECORD)))
        except (ValueError, KeyError, TypeError) as problem:
            raise StateError(f"{self.url}/{RECORD} is damaged ({problem}).") from None
        if base is None:
            return found
        place = _model_name(base)
        return replace(
            found, base=replace(found.base, url=place.url, revision=place.revision, versions={})
        )

    def kept_bytes(self) -> dict[str, int]:
        """Bytes of the shards of every sum that is kept, by its folder."""
        found = {}
        for step in self.record().steps:
            if step.folder is not None:
                output = open_output(f"{self.url}/{step.folder}", self._stores)
                names = [name for name in output.names() if name.endswith(".safetensors")]
                found[step.folder] = sum(output.size(name) or 0 for name in names)
        return found

    # --- changing -----------------------------------------------------------------------------

    def init(
        self,
        base: str,
        *,
        method: str = "opcm",
        settings: Sequence[str] = (),
        rules: str = "",
        keep: int = KEEP,
    ) -> Record:
        """Begin a state.

        Args:
            base: the base model of all models that will be added.
            settings: parameters of the method, each ``KEY=VALUE``.
            rules: YAML text, as in a recipe.
        Raises:
            UsageError: for an unknown method or parameter.
            OutputError: for a place that holds something.
        """
        info = method_info(method)
        parameters = defaults_of(info) | dict(setting(info, text) for text in settings)
        self._refuse_occupied()
        name = _model_name(base)
        checkpoint = open_model(name, self._stores)
        record = Record(
            version=__version__,
            method=method,
            parameters=parameters,
            rules=rules,
            keep=keep,
            base=self._model("base", name, checkpoint),
            steps=(),
        )
        recipe_of(record, ModelName("MODEL"), dtype="float32")  # refuses rules that are wrong
        with self._locked():
            self._refuse_occupied()  # by now, perhaps
            self._write(record)
        return record

    def plan_add(self, model: str, where: Where) -> Prepared:
        """What adding a model would do."""
        return self._step(self.record(), _model_name(model), where)[0]

    def add(
        self,
        model: str,
        where: Where,
        *,
        name: str | None = None,
        keep: int | None = None,
        base: str | None = None,
        progress: Progress | None = None,
    ) -> Step:
        """Add a model; reads the base model, the sum so far and that model only.

        Args:
            name: for people; None: the model's own.
            keep: steps whose sums stay from now on; None: as before.
            base: where the base model lies from now on; None: where it was.
        Raises:
            StateError: for a model that is in the state, another base model, a tensor that is
                missing, or another model whose step was begun.
            LockedError: another process adds a model.
        """
        with self._locked():
            record, model_name = self.record(base), _model_name(model)
            finished = self._finished(record, model_name)
            if finished is not None:
                return finished
            ready, sources = self._step(record, model_name, where)
            added = self._model(name or str(model_name), model_name, sources[model_name])
            refuse_pending(record, added, self.url)
            record = replace(record, pending=added, keep=keep or record.keep)
            self._sweep(record)
            self._write(record)
            with _told_of_states(self.url):
                run(ready, where, progress=progress, stop=self._stop)
            step = self._step_after(record, added, ready)
            steps = (*record.steps, step)
            record = replace(record, steps=kept(steps, record.keep), pending=None)
            self._write(record)
            self._sweep(record)
            return step

    def _finished(self, record: Record, model: ModelName) -> Step | None:
        """The last step, if it is this model's and was killed before it had cleaned up."""
        last = record.steps[-1] if record.steps else None
        if last is None or record.pending is not None or last.model.model != model:
            return None
        return last if self._sweep(record) else None

    def undo(self) -> Model:
        """Go back to before the last step, or before one that was begun; gives its model.

        Raises:
            StateError: where there is no step, or the sum before it is not kept.
        """
        with self._locked():
            record = self.record()
            if record.pending is not None:
                self._forget(replace(record, pending=None))
                return record.pending
            if not record.steps:
                raise StateError(f"{self.url} has no step to go back from.")
            *before, last = record.steps
            if before and before[-1].folder is None:
                raise StateError(
                    f"{self.url}: the sum before step {last.number} ({last.model.name}) is not "
                    f"kept: of {counted(len(record.steps), 'step')} the last {record.keep} "
                    f"{'is' if record.keep == 1 else 'are'}.\n"
                    "  Add models to a state with a larger --keep to be able to go back further."
                )
            if before:
                self._sum(before[-1])
            self._forget(replace(record, steps=tuple(before)))
            return last.model

    def _forget(self, record: Record) -> None:
        self._write(record)
        self._sweep(record)

    def publish(
        self,
        out: str,
        where: Where,
        *,
        dtype: str | None = None,
        base: str | None = None,
        overwrite: bool = False,
        fresh: bool = False,
        progress: Progress | None = None,
    ) -> Published:
        """Write the merged model: the base model and the scaled sum.

        Args:
            dtype: of the model; None: the base model's, tensor by tensor.
            base: where the base model lies now; None: where it was.
        Raises:
            StateError: for a state without a model, or another base model.
        """
        record = self.record(base)
        if not record.steps:
            raise StateError(f"{self.url} has no model yet; add one first.")
        last = record.steps[-1]
        self._refuse_inside(out)
        self._sum(last)
        planner = Planner(out, where, self._stores, self._stop)
        state = ModelName(f"{self.url}/{last.folder}")
        recipe = recipe_of(record, state, dtype=dtype or "float32")
        sources, outputs = planner.read(recipe)
        self._refuse_base(record, sources[record.base.model])
        refuse_other_methods(recipe, outputs, record)
        made = scaled(outputs, sources[state].tensors)
        if dtype is None:
            made = replace(made, tensors=tuple(map(in_dtype_of_base, made.tensors)))
        whole = told(recipe, record, None, dtype)
        ready = planner.plan(whole, sources, made, step=f"scale {last.scale!r}")
        ready = replace(ready, given=scale_decisions(ready.plan, last.scale))
        return run(
            ready, where, overwrite=overwrite, fresh=fresh, progress=progress, stop=self._stop
        )

    # --- steps --------------------------------------------------------------------------------

    def _step(self, record: Record, model: ModelName, where: Where) -> tuple[Prepared, Sources]:
        """The plan of one more step, and the checkpoints it reads."""
        if model == record.base.model:
            raise StateError(f"{model} is the base model of {self.url}; add its fine-tunes.")
        planner = Planner(self.url, where, self._stores, self._stop)
        recipe = recipe_of(record, model, dtype="float32")
        sources, outputs = planner.read(recipe)
        added = sources[model]
        refuse_known(record, model, added, self.url)
        self._refuse_base(record, sources[record.base.model])
        refuse_other_tensors(model, added, sources[record.base.model])
        refuse_other_methods(recipe, outputs, record)
        check_added(recipe, outputs)
        everything, state = dict(sources), None
        if record.steps:
            name = ModelName(f"{self.url}/{record.steps[-1].folder}")
            state = everything[name] = self._sum(record.steps[-1])
        method = method_of(record)
        if state is None and hasattr(method, "first"):
            method = method.first()
        made = summed(
            outputs,
            method=None if record.method == recipe.merge_method else method,
            state=state,
            integers=True,
        )
        folder = folder_of(record, Model.of("", model, added.all_versions))
        planner = replace(planner, out=f"{self.url}/{folder}")
        settings = json.dumps(dict(record.parameters), sort_keys=True)
        step = f"{record.method} {settings} {len(record.steps) + 1}"
        return planner.plan(told(recipe, record, model, None), everything, made, step=step), sources

    def _step_after(self, record: Record, added: Model, ready: Prepared) -> Step:
        """The record of a step whose sum is published; one of a model that is known is dropped."""
        sums = open_checkpoint(ready.output.url, None, self._stores)
        made = fingerprint(ready.plan.identity)
        step = step_of(record, added, published_sums(ready.output), made, sums.versions)
        try:
            refuse_same(record, step)
        except StateError:
            self._forget(replace(record, pending=None))
            raise
        return step

    def _sum(self, step: Step) -> Checkpoint:
        """The sum after a step.

        Raises:
            StateError: for one that is gone, damaged, or another.
        """
        url = f"{self.url}/{step.folder}"
        try:
            found = open_checkpoint(url, None, self._stores)
            if dict(found.versions) == dict(step.versions):
                return found
            # Touched: the whole state may have been copied, or somebody has written there.
            problems = verify(url, self._stores).problems
            made = json.loads(open_output(url, self._stores).read(PROVENANCE))["fingerprint"]
        except (CheckpointError, OutputError, StoreError, ValueError, KeyError) as problem:
            raise StateError(
                f"the sum after step {step.number} ({step.model.name}) cannot be read: {problem}"
            ) from None
        if problems or made != step.fingerprint:
            raise StateError(
                f"the sum after step {step.number} ({step.model.name}), {url}, is not what was "
                f"written: {problems[0] if problems else 'it is of another plan'}.\n"
                "  Put it back from a copy, or begin a new state."
            )
        return found

    def _model(self, name: str, model: ModelName, found: Checkpoint) -> Model:
        content = content_of(found, self._stores)
        return Model.of(name, model, found.all_versions, content)

    def _refuse_inside(self, out: str) -> None:
        place = out.rstrip("/")
        if not is_remote(out):
            place = str(Path(out).expanduser().resolve())
        state = self.url if is_remote(self.url) else str(Path(self.url).resolve())
        if f"{place}/".startswith(f"{state}/"):
            raise OutputError(f"{out} lies in the state {self.url}. Give another place.")

    def _refuse_occupied(self) -> None:
        held = [name for name in self._output.names() if name != f"{STAGING}/"]
        if held:
            told = f"{', '.join(held[:3])}{', ...' if len(held) > 3 else ''}"
            raise OutputError(f"{self.url} is not empty ({told}); give another place.")

    def _refuse_base(self, record: Record, base: Checkpoint) -> None:
        """Refuse a base model whose files are others, unless they hold the same."""
        if dict(base.versions) == dict(record.base.versions):
            return
        if content_of(base, self._stores) != record.base.content:
            raise StateError(
                f"{record.base.model} is not the base model that {self.url} began with: it holds "
                "other values.\n"
                "  Put it back, or say where it lies with --base; task vectors from two base\n"
                "  models cannot be added."
            )

    def _write(self, record: Record) -> None:
        self._output.check_lock()
        self._output.write(RECORD, (json.dumps(as_json(record), indent=1) + "\n").encode())

    def _sweep(self, record: Record) -> bool:
        """Remove every sum that the record does not name; gives whether there was one."""
        named = {step.folder for step in record.steps}
        if record.pending is not None:
            named.add(folder_of(record, record.pending))
        found = [name.rstrip("/") for name in self._output.names("steps/")]
        left = [name for name in found if f"steps/{name}" not in named]
        for name in left:
            open_output(f"{self.url}/steps/{name}", self._stores).clear()
        return bool(left)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._output.locked():
            try:
                yield
            finally:
                self._output.check_lock()  # else another's would be removed
                self._output.tidy()  # of a state only the lock lies there


@contextmanager
def _told_of_states(state: str) -> Iterator[None]:
    """What is advised for recipes does not help in a state."""
    try:
        yield
    except (NonFiniteError, LedgerMismatchError, SourceChangedError) as problem:
        found, _, _ = str(problem).partition("\n  Mend the inputs")
        raise StateError(
            f"{found}\n  Mend the model, drop this step with 'shardmerge continual undo {state}' "
            "(there is no --fresh here), and add it again."
        ) from None


def _model_name(text: str) -> ModelName:
    """The model; a path is made absolute: a state is gone on with from other folders."""
    name = model_named(text)
    adapter = None if name.adapter is None else _absolute(name.adapter)
    return replace(_absolute(name), adapter=adapter)


def _absolute(name: ModelName) -> ModelName:
    if is_remote(name.url) or not Path(name.url).expanduser().exists():
        return name
    return replace(name, url=str(Path(name.url).expanduser().absolute()))


def content_of(checkpoint: Checkpoint, stores: Stores) -> str:
    """A digest of all names, dtypes and shapes, and of elements of some tensors.

    It tells base models from each other wherever they lie and whenever they were copied. It does
    not tell fine-tunes from each other, which may differ in few tensors.
    """
    digest = hashlib.blake2b(digest_size=16)
    tensors = [checkpoint.tensors[name] for name in sorted(checkpoint.tensors)]
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.dtype.name} {tensor.shape}\n".encode())
    ranges = []
    for tensor in tensors[:: max(1, len(tensors) // _SAMPLES)]:
        count = min(tensor.numel, _SAMPLED)
        buffer = memoryview(bytearray(count * tensor.dtype.itemsize))
        ranges += reads(tensor, 0, count, buffer)
    stores.read(ranges)
    for item in ranges:
        digest.update(item.into)
    if checkpoint.adapter is not None:
        digest.update(content_of(checkpoint.adapter, stores).encode())
    return digest.hexdigest()


_SAMPLES, _SAMPLED = 128, 1024
"""Tensors of which the first elements are read, about, and how many of each."""
