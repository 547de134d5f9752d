"""The same recipe gives the same bytes, whatever the memory, threads, tiles and stops."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from shardmerge import layout, memory, plan
from shardmerge.arrays import merge_raw
from shardmerge.errors import Stopped
from shardmerge.memory import inputs_of, kernel_inputs
from shardmerge.merge import merge
from shardmerge.methods.api import ORACLES, Over, info_of, levels_of
from shardmerge.numerics import DType
from shardmerge.plan import MergeTask
from shardmerge.progress import Quiet
from shardmerge.sources.tensor import TensorRef
from tests import support
from tests.crash_child import SYNCS
from tests.support import (
    BLOCK,
    PLENTY_BYTES,
    SEVERAL_DTYPES,
    digests,
    least_memory,
    loaded,
    plan_of,
    read_tensors,
    recipe_of,
    write_checkpoint,
    write_recipe,
)


@dataclass(frozen=True)
class Way:
    """A method, its parameters, and those of each of its models."""

    method: str
    each: tuple[Mapping[str, object], ...]
    parameters: Mapping[str, object]
    base: bool = True
    fisher: bool = False
    top: Mapping[str, object] | None = None


WEIGHTS = ({"weight": 0.7}, {"weight": -0.2}, {"weight": 0.5})
DENSITIES = tuple({**own, "density": d} for own, d in zip(WEIGHTS, (0.3, 0.9, 0.55), strict=True))
SCALES = {"rules": [{"tensors": "*.norm.*", "merge_method": "linear"}]}

WAYS = {
    "linear": Way("linear", WEIGHTS, {}, base=False),
    "passthrough": Way("passthrough", ({},), {"scale": 1.5}, base=False),
    "task_arithmetic": Way("task_arithmetic", WEIGHTS, {"lambda": 0.9, "normalize": True}),
    "slerp": Way("slerp", ({},), {"t": 0.3}),
    "ties": Way("ties", DENSITIES, {}),
    "ties rescaled": Way("ties", DENSITIES, {"rescale": True, "normalize": False}),
    "ties over the model": Way("ties", DENSITIES, {"trim": "model"}),
    "ties, all kept": Way("ties", WEIGHTS, {}),
    "dare_linear l1": Way("dare_linear", DENSITIES, {}),
    "dare_linear inv_keep": Way("dare_linear", DENSITIES, {"rescale": "inv_keep"}),
    "dare_ties l1": Way("dare_ties", DENSITIES, {}, top={"seed": 3}),
    "dare_ties none": Way("dare_ties", DENSITIES, {"rescale": "none"}),
    "fisher normalised": Way("fisher", ({}, {}, {}), {}, base=False, fisher=True),
    "fisher": Way("fisher", ({}, {}, {}), {"normalize": False}, base=False, fisher=True),
    "rules": Way("ties", DENSITIES, {"trim": "model"}, top=SCALES),
    "out_dtype": Way("dare_linear", DENSITIES, {}, top={"out_dtype": "bfloat16"}),
    "dtype": Way("ties", DENSITIES, {}, top={"dtype": "float64", "shard_size": 4096}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Checkpoints, and the Fisher information of each."""
    folder = tmp_path_factory.mktemp("models")
    floats = {name: spec for name, spec in SEVERAL_DTYPES.items() if spec[0].is_float}
    write_checkpoint(folder / "base", shards=2)
    for number in range(3):
        write_checkpoint(folder / f"m{number}", seed=10 + number, shards=1 + number % 2)
        write_checkpoint(folder / f"f{number}", floats, seed=20 + number, positive=True)
    return folder


@pytest.fixture(autouse=True)
def small_engine(monkeypatch):
    support.shrink(monkeypatch.setattr)
    for name in SYNCS:
        monkeypatch.setattr(os, name, lambda _: None)


def recipe_at(path: Path, models: Path, way: Way) -> str:
    recipe = recipe_of(
        way.method,
        models / "base" if way.base else None,
        {models / f"m{i}": own for i, own in enumerate(way.each)},
        parameters=dict(way.parameters),
        **(way.top or {}),
    )
    if way.fisher:
        recipe["models"] = [
            {**entry, "fisher": str(models / f"f{i}")} for i, entry in enumerate(recipe["models"])
        ]
    return write_recipe(path / "r.yml", recipe)


class StopAfter(Quiet):
    """Stops the run when so many tasks have ended."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.stop = threading.Event()
        self._most = tasks
        self._ended = 0

    def task(self, done, task):
        super().task(done, task)
        self._ended += 1
        if self._ended >= self._most:
            self.stop.set()


def streams(recipe: str, memory_bytes: int) -> bool:
    """Whether some tensor is measured in one task and merged in another."""
    tasks = plan_of(recipe, memory_bytes=memory_bytes).tasks
    return not all(t.resident for t in tasks if isinstance(t, MergeTask))


# --- laws ---------------------------------------------------------------------------------------


@pytest.fixture(params=WAYS)
def quiet(request, tmp_path, models) -> Iterator[tuple[Way, str, dict[str, str]]]:
    """A way, its recipe, and the digests of its shards when everything is resident."""
    way = WAYS[request.param]
    recipe = recipe_at(tmp_path, models, way)
    merge(recipe, str(tmp_path / "quiet"), memory_bytes=PLENTY_BYTES, threads=1)
    return way, recipe, digests(tmp_path / "quiet")


def test_memory_threads_tiles_and_parts(quiet, tmp_path, monkeypatch):
    _, recipe, expected = quiet
    least = least_memory(recipe)
    runs: list[tuple[int, int, dict[str, int]]] = [
        (least, 1, {}),
        (least + 3_000, 2, {}),
        (least + 30_000, 2, {}),
        (least_memory(recipe, workers=8), 4, {}),
        (PLENTY_BYTES, 3, {}),
        (least, 1, {"TILE_ELEMENTS": BLOCK, "MEASURE_ELEMENTS": BLOCK}),
        (least_memory(recipe, workers=4), 2, {"TILE_ELEMENTS": 3 * BLOCK, "PART_BYTES": 8 * BLOCK}),
        (PLENTY_BYTES, 2, {"TILE_ELEMENTS": 7 * BLOCK, "PART_BYTES": 2**20}),
    ]
    owners = {"PART_BYTES": layout, "TILE_ELEMENTS": memory, "MEASURE_ELEMENTS": plan}
    for number, (memory_bytes, threads, constants) in enumerate(runs):
        with monkeypatch.context() as patch:
            for name, value in constants.items():
                patch.setattr(owners[name], name, value)
            out = tmp_path / str(number)
            merge(recipe, str(out), memory_bytes=memory_bytes, threads=threads)
        assert digests(out) == expected, runs[number]


def test_stops_and_resumption(quiet, tmp_path):
    """A run that is stopped again and again, each time with other memory and threads."""
    _, recipe, expected = quiet
    rng = random.Random(0)
    out = tmp_path / "stopped"
    stops, published = 0, None
    while published is None:
        # At first one worker, so that most is left to do after the stop.
        workers, threads = (1, 1) if stops < 2 else (rng.randint(1, 4), rng.randint(1, 4))
        memory_bytes = least_memory(recipe, workers=workers)
        # Later and later: what is measured over the whole model is begun again after a stop.
        progress = StopAfter(1 + 3 * stops)
        with contextlib.suppress(Stopped):
            published = merge(
                recipe,
                str(out),
                memory_bytes=memory_bytes
                if stops < 2
                else rng.choice((memory_bytes, PLENTY_BYTES)),
                threads=threads,
                progress=progress,
                stop=progress.stop,
            )
        stops += published is None
    assert stops >= 2
    assert digests(out) == expected


def test_whole_tensors_give_the_same(quiet, tmp_path):
    """Every tensor at once, without parts, tiles and tasks."""
    _, recipe, _ = quiet
    written = read_tensors(tmp_path / "quiet")
    made = plan_of(recipe)
    for tensor in made.tensors:
        dtype, shape, content = written.pop(tensor.name)
        assert (dtype, shape) == (tensor.dtype, tensor.shape)
        inputs = [raw(ref) for ref in inputs_of(tensor)]
        if tensor.method is None:
            assert content == inputs[0].tobytes()
        elif Over.MODEL not in levels_of(tensor.method).values():
            merged, _ = merge_raw(
                tensor.method,
                kernel_inputs(tensor),
                inputs,
                output=tensor.dtype,
                seed=made.recipe.seed,
                tensor=tensor.name,
            )
            assert content == merged.tobytes(), tensor.name
    assert written == {}


def raw(ref: TensorRef) -> np.ndarray:
    [segment] = ref.segments
    kind = {DType.BF16: "uint16", DType.F16: "uint16"}.get(ref.dtype, ref.dtype.torch_name)
    return np.fromfile(segment.url, kind, count=ref.numel, offset=segment.offset)


@pytest.mark.parametrize("name", ["linear", "passthrough", "task_arithmetic", "slerp", "fisher"])
def test_the_formula_gives_the_same_values(name, tmp_path, models):
    """In float64 on whole tensors, as the method's page has it."""
    way = WAYS[name]
    recipe = recipe_at(tmp_path, models, way)
    merge(recipe, str(tmp_path / "out"), memory_bytes=least_memory(recipe))
    written = read_tensors(tmp_path / "out")
    for tensor in plan_of(recipe).tensors:
        if tensor.method is None or 0 in tensor.shape:
            continue
        inputs = [loaded(raw(ref), ref.dtype) for ref in inputs_of(tensor)]
        base = inputs.pop(0) if tensor.base else None
        parameters = {
            item.name: getattr(tensor.method, item.name)
            for item in info_of(tensor.method).parameters
        }
        count = len(tensor.models)
        extras = {"fisher": inputs[count:]} if way.fisher else {}
        expected = ORACLES[way.method](base, inputs[:count], **extras, **parameters)
        dtype, _, content = written[tensor.name]
        rounding = {DType.BF16: 2.0**-8, DType.F16: 2.0**-11}.get(dtype, 2.0**-22)
        np.testing.assert_allclose(loaded(content, dtype), expected, rtol=rounding, atol=1e-7)


# --- the real blocks and parts --------------------------------------------------------------------

LARGE = {
    "model.embed_tokens.weight": (DType.BF16, (700, 1024)),
    "model.layers.0.weight": (DType.F32, (3, 100_001)),
    "model.norm.weight": (DType.BF16, (1024,)),
}


@pytest.mark.parametrize("name", ["slerp", "ties", "ties over the model", "dare_linear l1"])
def test_real_blocks(name, tmp_path, monkeypatch):
    monkeypatch.undo()
    way = WAYS[name]
    write_checkpoint(tmp_path / "base", LARGE)
    for number in range(len(way.each)):
        write_checkpoint(tmp_path / f"m{number}", LARGE, seed=number + 1)
    recipe = recipe_at(tmp_path, tmp_path, way)
    least = least_memory(recipe)
    assert name == "ties over the model" or streams(recipe, least)
    expected = None
    for number, (memory_bytes, threads) in enumerate(((PLENTY_BYTES, 2), (least, 1))):
        out = tmp_path / str(number)
        merge(recipe, str(out), memory_bytes=memory_bytes, threads=threads)
        assert expected in (None, digests(out))
        expected = digests(out)


# --- NaN ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slerp", "dare_linear l1", "ties", "fisher normalised"])
def test_not_a_number_in_a_decision(name, tmp_path):
    """A NaN's sign and payload come from the processor, and the ledger keeps neither."""
    floats = {"a.weight": (DType.F32, (30, 30)), "b.weight": (DType.F32, (7,))}
    way = WAYS[name]
    for folder in ("base", "m0", "m1", "m2", "f0", "f1", "f2"):
        write_checkpoint(tmp_path / folder, floats, seed=sum(folder.encode()), positive=True)
    for folder in ("m0", "f0"):
        support.set_element(tmp_path / folder, "a.weight", 77, float("inf"))
        support.set_element(tmp_path / folder, "a.weight", 800, float("nan"))
    recipe = recipe_at(tmp_path, tmp_path, replace(way, top={"allow_non_finite": True}))
    merge(recipe, str(tmp_path / "quiet"), memory_bytes=PLENTY_BYTES)
    expected = read_tensors(tmp_path / "quiet")
    merge(recipe, str(tmp_path / "least"), memory_bytes=least_memory(recipe))
    assert read_tensors(tmp_path / "least") == expected
    for tasks in range(1, 8):
        progress = StopAfter(tasks)
        out = str(tmp_path / f"stop{tasks}")
        try:
            least = least_memory(recipe)
            merge(recipe, out, memory_bytes=least, progress=progress, stop=progress.stop)
        except Stopped:
            merge(recipe, out, memory_bytes=least_memory(recipe))
        assert read_tensors(Path(out)) == expected, tasks
