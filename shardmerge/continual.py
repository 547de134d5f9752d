"""Continual merging: models arrive one at a time, and are no longer needed once they are in.

A state is a folder. Its record, one small file, says which models are in it, in which order, and
where the sum of their task vectors lies: an ordinary float32 checkpoint for each step that is kept.
The record is replaced at once when a step is complete; until then the step before is the last.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml

from shardmerge import __version__
from shardmerge.errors import OutputError, RecipeError, StateError, UsageError
from shardmerge.execute import Progress
from shardmerge.kept import check_added, norms_in, scale_decisions, scaled, summed
from shardmerge.layers import is_tied, output_embeddings
from shardmerge.merge import Planner, Prepared, Sources, Where, published_sums, run
from shardmerge.methods.api import CONTINUAL, Method, MethodInfo
from shardmerge.outputs import open_output
from shardmerge.progress import counted
from shardmerge.publish import Published
from shardmerge.recipe import ModelName, Recipe
from shardmerge.recipe_parts import wrong_value
from shardmerge.recipe_yaml import nearest
from shardmerge.sources import open_checkpoint
from shardmerge.sources.tensor import Checkpoint
from shardmerge.state import KEEP, RECORD, Model, Record, Step, as_json, dropped, kept, record_from
from shardmerge.stores import Settings, Stores, is_remote


class State:
    """A state of continual merging at a folder or ``s3://bucket/folder``.

    Args:
        settings: of the places that bytes come from and go to.
        stop: set it to stop a step; the same call goes on from there.
    """

    def __init__(
        self, url: str, settings: Settings | None = None, stop: threading.Event | None = None
    ) -> None:
        self._settings = settings
        self._stop = stop or threading.Event()
        self._output = open_output(url, Stores(settings, stopping=self._stop))
        self.url = self._output.url

    # --- looking ------------------------------------------------------------------------------

    def record(self) -> Record:
        """What it says about itself.

        Raises:
            StateError: for a place that holds no state.
        """
        if self._output.size(RECORD) is None:
            raise StateError(
                f"{self.url} holds no state of continual merging.\n"
                "  Begin one with 'shardmerge continual init STATE --base BASE'."
            )
        try:
            return record_from(json.loads(self._output.read(RECORD)))
        except (ValueError, KeyError, TypeError) as problem:
            raise StateError(f"{self.url}/{RECORD} is damaged ({problem}).") from None

    def kept_bytes(self) -> dict[str, int]:
        """Bytes of the shards of every sum that is kept, by its folder."""
        found = {}
        for step in self.record().steps:
            if step.folder is not None:
                stores = Stores(self._settings, stopping=self._stop)
                output = open_output(f"{self.url}/{step.folder}", stores)
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
        info = _method_info(method)
        parameters = dict(_setting(info, text) for text in settings)
        if self._output.names():
            held = ", ".join(self._output.names()[:3])
            raise OutputError(f"{self.url} is not empty ({held}, ...); give another place.")
        name = _model_name(base)
        stores = Stores(self._settings, stopping=self._stop)
        checkpoint = open_checkpoint(name.url, name.revision, stores)
        record = Record(
            version=__version__,
            method=method,
            parameters=parameters,
            rules=rules,
            keep=keep,
            base=Model("base", name.url, name.revision, dict(checkpoint.versions)),
            steps=(),
        )
        _recipe(record, ModelName("MODEL"))  # refuses rules that are wrong
        with self._locked():
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
        progress: Progress | None = None,
    ) -> Step:
        """Add a model; reads the base model, the sum so far and that model only.

        Args:
            name: for people; None: the model's own.
            keep: steps whose sums stay from now on; None: as before.
        Raises:
            StateError: for a model that is in the state, another base model, a tensor that is
                missing, or another model whose step was begun.
            LockedError: another process adds a model.
        """
        with self._locked():
            record = self.record()
            model_name = _model_name(model)
            ready, sources = self._step(record, model_name, where)
            found = sources[model_name]
            added = Model(
                name or str(model_name), model_name.url, model_name.revision, dict(found.versions)
            )
            _refuse_pending(record, added, self.url)
            record = replace(record, pending=added, keep=keep or record.keep)
            self._write(record)
            run(ready, where, progress=progress, stop=self._stop)
            step = _step_of(record, added, published_sums(ready.output), self._folder(record))
            _refuse_same(record, step, self.url)
            steps = (*record.steps, step)
            self._write(replace(record, steps=kept(steps, record.keep), pending=None))
            self._clear([old.folder for old in dropped(steps, record.keep)])
            return step

    def undo(self) -> Model:
        """Go back to before the last step, or before one that was begun; gives its model.

        Raises:
            StateError: where there is no step, or the sum before it is not kept.
        """
        with self._locked():
            record = self.record()
            if record.pending is not None:
                self._write(replace(record, pending=None))
                self._clear([self._folder(record)])
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
            self._write(replace(record, steps=tuple(before)))
            self._clear([last.folder])
            return last.model

    def publish(
        self,
        out: str,
        where: Where,
        *,
        dtype: str | None = None,
        overwrite: bool = False,
        fresh: bool = False,
        progress: Progress | None = None,
    ) -> Published:
        """Write the merged model: the base model and the scaled sum.

        Args:
            dtype: of the model; None: the base model's, tensor by tensor.
        Raises:
            StateError: for a state without a model, or another base model.
        """
        record = self.record()
        if not record.steps:
            raise StateError(f"{self.url} has no model yet; add one first.")
        last = record.steps[-1]
        planner = Planner(out, where, self._settings, self._stop)
        state = ModelName(f"{self.url}/{last.folder}")
        recipe = _recipe(record, state, dtype=dtype)
        sources, outputs = planner.read(recipe)
        _refuse_base(record, sources[record.base.model], self.url)
        made = scaled(outputs, sources[state].tensors)
        if dtype is None:
            tensors = [replace(t, dtype=t.base.dtype) if t.base else t for t in made.tensors]
            made = replace(made, tensors=tuple(tensors))
        ready = planner.plan(recipe, sources, made, step=f"scale {last.scale!r}")
        ready = replace(ready, given=scale_decisions(ready.plan, last.scale))
        return run(
            ready, where, overwrite=overwrite, fresh=fresh, progress=progress, stop=self._stop
        )

    # --- steps --------------------------------------------------------------------------------

    def _step(self, record: Record, model: ModelName, where: Where) -> tuple[Prepared, Sources]:
        """The plan of one more step, and the checkpoints it reads."""
        planner = Planner(f"{self.url}/{self._folder(record)}", where, self._settings, self._stop)
        if model == record.base.model:
            raise StateError(f"{model} is the base model of {self.url}; add its fine-tunes.")
        recipe = _recipe(record, model)
        sources, outputs = planner.read(recipe)
        base, added = sources[record.base.model], sources[model]
        _refuse_base(record, base, self.url)
        _refuse_known(record, model, added, self.url)
        _refuse_other_tensors(model, added, base)
        check_added(recipe, outputs)
        last = record.steps[-1] if record.steps else None
        everything = dict(sources)
        if last is not None:
            name = ModelName(f"{self.url}/{last.folder}")
            stores = Stores(self._settings, stopping=self._stop)
            everything[name] = open_checkpoint(name.url, None, stores)
        method = _method(record)
        if last is None and hasattr(method, "first"):
            method = method.first()
        made = summed(
            outputs,
            method=None if record.method == recipe.merge_method else method,
            state=None if last is None else everything[name],
        )
        settings = json.dumps(dict(record.parameters), sort_keys=True)
        step = f"{record.method} {settings} {len(record.steps) + 1}"
        return planner.plan(recipe, everything, made, step=step), sources

    def _folder(self, record: Record) -> str:
        return f"steps/{len(record.steps) + 1:06d}"

    def _write(self, record: Record) -> None:
        self._output.write(RECORD, (json.dumps(as_json(record), indent=1) + "\n").encode())

    def _clear(self, folders: Sequence[str | None]) -> None:
        for folder in folders:
            if folder is not None:
                stores = Stores(self._settings, stopping=self._stop)
                open_output(f"{self.url}/{folder}", stores).clear()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._output.locked():
            try:
                yield
            finally:
                self._output.tidy()  # of a state only the lock lies there


# --- what is refused ------------------------------------------------------------------------------


def _refuse_base(record: Record, base: Checkpoint, state: str) -> None:
    if dict(base.versions) != dict(record.base.versions):
        changed = sorted(
            name
            for name in {*base.versions, *record.base.versions}
            if base.versions.get(name) != record.base.versions.get(name)
        )
        raise StateError(
            f"{record.base.model} is not the base model that {state} began with: "
            f"{', '.join(changed[:3])} changed.\n"
            "  Put it back; task vectors from two base models cannot be added."
        )


def _refuse_known(record: Record, name: ModelName, model: Checkpoint, state: str) -> None:
    for step in record.steps:
        known = step.model
        if name == known.model and dict(model.versions) == dict(known.versions):
            raise StateError(
                f"{name} is in {state} already, as step {step.number} ({known.name}).\n"
                "  Go back with 'shardmerge continual undo' if it should not be."
            )


def _refuse_other_tensors(name: ModelName, model: Checkpoint, base: Checkpoint) -> None:
    heads = output_embeddings({**base.tensors, **model.tensors})
    tied = [head for head in heads if is_tied(model.config) or is_tied(base.config)]
    lacking = [t for t in base.tensors if t not in model.tensors and t not in tied]
    beyond = [t for t in model.tensors if t not in base.tensors and t not in tied]
    if lacking:
        raise StateError(
            f"{name} lacks {counted(len(lacking), 'tensor')} of the base model: "
            f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}.\n"
            "  A step adds all tensors or none. Save the whole model."
        )
    if beyond:
        raise StateError(
            f"{name} has {counted(len(beyond), 'tensor')} that the base model lacks: "
            f"{', '.join(beyond[:3])}{', ...' if len(beyond) > 3 else ''}.\n"
            "  Remove them from the checkpoint: there is nothing to add them to."
        )


def _refuse_pending(record: Record, model: Model, state: str) -> None:
    pending = record.pending
    if pending is not None and pending.model != model.model:
        raise StateError(
            f"adding {pending.model} to {state} was begun and is not complete.\n"
            f"  Run 'shardmerge continual add {state} {pending.model}' to go on, or "
            f"'shardmerge continual undo {state}' to drop it."
        )


def _refuse_same(record: Record, step: Step, state: str) -> None:
    """Task vectors of exactly one norm, of billions of elements, are the same."""
    for known in record.steps:
        if step.norm and step.norm == known.norm:
            raise StateError(
                f"{step.model.model} has exactly the task vector norm of step {known.number} "
                f"({known.model.name}): it is the same model at another place.\n"
                f"  Drop the step with 'shardmerge continual undo {state}'."
            )


# --- steps and records ----------------------------------------------------------------------------


def _step_of(record: Record, model: Model, sums: Sequence[float], folder: str) -> Step:
    norms = norms_in(sums)
    everything = (*(step.norm for step in record.steps), *norms.models)
    return Step(
        number=len(record.steps) + 1,
        model=model,
        norm=norms.models[0],
        total=norms.total,
        scale=_method(record).scale(everything, norms.total),
        added=round(time.time(), 3),
        folder=folder,
    )


# --- methods and recipes --------------------------------------------------------------------------


def _method_info(name: str) -> MethodInfo:
    if name not in CONTINUAL:
        near = nearest(name, CONTINUAL)
        hint = f" Did you mean '{near}'?" if near else ""
        known = ", ".join(sorted(CONTINUAL))
        raise UsageError(f"'{name}' does not add one model at a time ({known} do).{hint}")
    return CONTINUAL[name]


def _setting(info: MethodInfo, text: str) -> tuple[str, float | bool | str]:
    """A parameter from ``KEY=VALUE``."""
    key, separator, value = text.partition("=")
    known = {item.key: item for item in info.parameters if item.key != "shuffle"}
    if not separator or key not in known:
        near = nearest(key, known)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UsageError(
            f"--set {text}: {info.name} has {', '.join(known) or 'no parameters'}; write "
            f"KEY=VALUE.{hint}"
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    problem = wrong_value(known[key], parsed)
    if problem:
        raise UsageError(f"--set {text}: {key} {problem}")
    return key, float(parsed) if isinstance(parsed, int) and parsed is not True else parsed


def _method(record: Record) -> Method:
    """The method with its parameters."""
    info = _method_info(record.method)
    values: dict[str, object] = {}
    for item in info.parameters:
        value = record.parameters.get(item.key, item.default)
        values[item.name] = item.kind(value)
    return info.cls(**values)


def _model_name(text: str) -> ModelName:
    """A model as a recipe would name it: a path or URL, with ``@revision``.

    A path is made absolute: a state is gone on with from other folders.
    """
    values = {"merge_method": "linear", "models": [{"model": text, "parameters": {"weight": 1.0}}]}
    try:
        recipe = Recipe.parse(yaml.safe_dump(values), where=text)
    except RecipeError as problem:
        raise UsageError(str(problem)) from None
    name = recipe.slices[0].sources[0].model
    if not is_remote(name.url) and Path(name.url).expanduser().exists():
        name = replace(name, url=str(Path(name.url).expanduser().absolute()))
    return name


def _recipe(record: Record, model: ModelName, *, dtype: str | None = None) -> Recipe:
    """What one step merges, as a recipe: one model and the base model."""

    def named(name: ModelName) -> dict[str, str]:
        found = {"path": name.url}
        return found if name.revision is None else {**found, "revision": name.revision}

    values: dict[str, object] = {
        "merge_method": "opcm",
        "base_model": {"model": named(record.base.model)},
        "models": [{"model": {"model": named(model)}}],
    }
    if record.method == "opcm":
        values["parameters"] = dict(record.parameters)
    if dtype is not None:
        values["dtype"] = dtype
    if record.rules:
        values["rules"] = yaml.safe_load(record.rules)
    return Recipe.parse(yaml.safe_dump(values, sort_keys=False), where="continual")
