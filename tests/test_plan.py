"""Laws of plans: what tasks read, keep in memory and write, and what they wait for."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardmerge import layout, memory, plan
from shardmerge.errors import MemoryBudgetError, RecipeError
from shardmerge.excerpt import excerpt
from shardmerge.kernels.device import CPU, CUDA
from shardmerge.match import Outputs, OutputTensor, match
from shardmerge.memory import inputs_of
from shardmerge.methods.api import Kind, Over, info_of, levels_of
from shardmerge.numerics import DType
from shardmerge.plan import MeasureTask, MergeTask, Plan, make_plan, pieces_of
from shardmerge.recipe import ModelName, Recipe
from shardmerge.sources.tensor import Checkpoint, Segment, TensorRef
from tests import support
from tests.support import BLOCK, Specs

MIB, GIB = 2**20, 2**30
FLOATS = (DType.BF16, DType.F16, DType.F32, DType.F64)

many = settings(max_examples=150, deadline=None)


# --- recipes over checkpoints that exist on paper only --------------------------------------------


@dataclass(frozen=True)
class Way:
    """A method with parameters; ``models`` besides the base model, if it takes one."""

    method: str
    parameters: Mapping[str, object]
    models: int = 2
    base: bool = True
    fisher: bool = False


WAYS = {
    "linear": Way("linear", {"weight": 1.0}, base=False),
    "passthrough": Way("passthrough", {}, models=1, base=False),
    "task_arithmetic": Way("task_arithmetic", {"weight": 0.5}, models=3),
    "slerp": Way("slerp", {"t": 0.3}, models=1),
    "ties": Way("ties", {"weight": 1.0, "density": 0.4}),
    "ties, all kept": Way("ties", {"weight": 1.0}),
    "ties, rescaled": Way("ties", {"weight": 1.0, "density": 0.4, "rescale": True}),
    "ties over the model": Way("ties", {"weight": 1.0, "density": 0.4, "trim": "model"}),
    "dare_linear": Way("dare_linear", {"weight": 1.0, "density": 0.4}, models=3),
    "dare_ties as the paper": Way(
        "dare_ties", {"weight": 1.0, "density": 0.4, "rescale": "inv_keep"}
    ),
    "fisher": Way("fisher", {}, base=False, fisher=True),
    "fisher as it is": Way("fisher", {"normalize": False}, base=False, fisher=True),
}


def checkpoint(url: str, specs: Specs, *, shards: int = 1) -> Checkpoint:
    refs = {}
    for name, (dtype, shape) in specs.items():
        ref = TensorRef(name, dtype, shape, ())
        refs[name] = replace(ref, segments=(Segment(f"{url}/m.safetensors", 0, ref.nbytes),))
    return Checkpoint(
        url=url,
        tensors=refs,
        shard_of={name: number % shards for number, name in enumerate(refs)},
        shards=tuple(f"{number}.safetensors" for number in range(shards)),
    )


def recipe_of(way: Way, **top: object) -> Recipe:
    models = [
        {"model": f"m{i}", **({"fisher": f"f{i}"} if way.fisher else {})} for i in range(way.models)
    ]
    found = {"merge_method": way.method, "models": models, "parameters": dict(way.parameters)}
    if way.base:
        found["base_model"] = "base"
    return Recipe.parse(yaml.safe_dump(found | top))


def outputs_of(recipe: Recipe, specs: Specs, *, shards: int = 1) -> Outputs:
    everyone = ["base", *(f"{kind}{i}" for kind in "mf" for i in range(3))]
    everyone = [name for name in everyone if re.search(rf"\b{name}\b", recipe.text)]
    floats = {name: spec for name, spec in specs.items() if spec[0].is_float}
    return match(
        recipe,
        {
            ModelName(name): checkpoint(name, floats if name[0] == "f" else specs, shards=shards)
            for name in everyone
        },
    )


def least_bytes(outputs: Outputs) -> int:
    sizes = [memory.tile_bytes(tensor, plan.CANONICAL_BLOCK) for tensor in outputs.tensors]
    return memory.FOOTPRINT_BYTES + max(sizes)


def planned(recipe: Recipe, outputs: Outputs, memory_bytes: int, cpus: int = 1) -> Plan:
    return make_plan(recipe, outputs, "OUT", memory_bytes=memory_bytes, cpus=cpus, identity={})


shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 3)),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.tuples(st.integers(0, 40 * BLOCK)),
)


@st.composite
def specs_of_models(draw) -> dict[str, tuple[DType, tuple[int, ...]]]:
    kinds = st.sampled_from((*FLOATS, DType.BF16, DType.I64, DType.BOOL))
    found = draw(st.lists(st.tuples(kinds, shapes), min_size=1, max_size=8))
    assume(any(dtype.is_float for dtype, _ in found))
    return {f"t.{i}.weight": spec for i, spec in enumerate(found)}


@st.composite
def cases(draw) -> tuple[Recipe, Outputs, int, int]:
    """A recipe, its outputs, memory from the least that fits to plenty, and CPUs."""
    recipe = recipe_of(WAYS[draw(st.sampled_from(sorted(WAYS)))])
    outputs = outputs_of(recipe, draw(specs_of_models()), shards=draw(st.integers(1, 3)))
    more = draw(st.one_of(st.just(0), st.integers(0, 60_000), st.integers(0, 64 * MIB)))
    return recipe, outputs, least_bytes(outputs) + more, draw(st.integers(1, 4))


@pytest.fixture
def small_engine(monkeypatch):
    support.shrink(monkeypatch.setattr)


small = pytest.mark.usefixtures("small_engine")


# --- laws ---------------------------------------------------------------------------------------


def check_writes(made: Plan) -> None:
    """Every part is written by one task, and parts are all there is."""
    merges = [task for task in made.tasks if isinstance(task, MergeTask)]
    written = [part for task in merges for part in task.parts]
    assert len(written) == len(set(written))
    assert set(written) == {part for shard in made.shards for part in shard.parts}
    assert sum(task.write_bytes for task in made.tasks) == made.output_bytes
    units = {unit.parts for shard in made.shards for unit in shard.units}
    for task in merges:
        assert task.parts in units if task.resident else len(task.parts) == 1


def passes_of(made: Plan, tensor: int) -> int:
    """How often a tensor's inputs are read at most."""
    method = made.tensors[tensor].method
    if method is None:
        return 1
    levels = levels_of(method)
    measures = [step for step in info_of(method).passes if step.kind is Kind.MEASURE]
    return 1 + sum(levels[step.name] is not None for step in measures)


def check_reads(made: Plan) -> None:
    """No more bytes than passes times input; of a resident tensor those over the model only."""
    most = sum(
        passes_of(made, number) * sum(ref.nbytes for ref in inputs_of(tensor))
        for number, tensor in enumerate(made.tensors)
    )
    assert made.read_bytes <= most
    once = sum(ref.nbytes for tensor in made.tensors for ref in inputs_of(tensor))
    merges = [task for task in made.tasks if isinstance(task, MergeTask)]
    assert sum(task.read_bytes for task in merges) == once


def check_measures(made: Plan) -> None:
    """A measured scope is measured whole, in pieces that begin a canonical block."""
    seen: dict[tuple[int, str], list[tuple[int, int, int]]] = {}
    for task in made.tasks:
        if isinstance(task, MeasureTask):
            pieces = [(piece.tensor, piece.start, piece.stop) for piece in task.pieces]
            seen.setdefault((task.scope, task.step), []).extend(pieces)
            assert sum(stop - start for _, start, stop in pieces) <= plan.MEASURE_ELEMENTS
            assert all(start % plan.CANONICAL_BLOCK == 0 for _, start, _ in pieces)
    for (scope, _), pieces in seen.items():
        expected = {
            (tensor, start, min(start + plan.MEASURE_ELEMENTS, numel))
            for tensor in made.scopes[scope].tensors
            for numel in [memory.tensor_numel(made.tensors[tensor])]
            for start in range(0, max(1, numel), plan.MEASURE_ELEMENTS)
        }
        assert sorted(pieces) == sorted(expected)


def check_order(made: Plan) -> None:
    """What a task waits for is decided by tasks with smaller numbers; none waits for nothing."""
    assert [task.number for task in made.tasks] == list(range(len(made.tasks)))
    last: dict[tuple[str, str], int] = {}
    for task in made.tasks:
        if isinstance(task, MeasureTask):
            last[made.scopes[task.scope].key, task.step] = task.number
    for task in made.tasks:
        for key in task.needs:
            scope, _, step = key.rpartition("/")
            for measure in measures_behind(made, scope, step):
                assert last[scope, measure] < task.number, (task, key)


def measures_behind(made: Plan, scope: str, step: str) -> set[str]:
    """The measuring passes that a decision follows from."""
    method = next(s.method for s in made.scopes if s.key == scope)
    passes = {p.name: p for p in info_of(method).passes}
    found: set[str] = set()
    for need in passes[step].needs:
        found |= {need} if passes[need].kind is Kind.MEASURE else measures_behind(made, scope, need)
    assert found
    return found


def check_memory(made: Plan, cpus: int) -> None:
    assert 1 <= made.workers <= 2 * cpus and made.kernels == cpus
    assert memory.FOOTPRINT_BYTES + made.workers * made.worker_bytes <= made.memory_bytes
    assert all(task.memory_bytes <= made.worker_bytes for task in made.tasks)
    assert made.peak_bytes <= made.memory_bytes


def check_all(made: Plan, cpus: int) -> None:
    check_writes(made)
    check_reads(made)
    check_measures(made)
    check_order(made)
    check_memory(made, cpus)


@small
@many
@given(cases())
def test_laws_of_plans(case):
    recipe, outputs, memory_bytes, cpus = case
    made = planned(recipe, outputs, memory_bytes, cpus)
    check_all(made, cpus)
    assert planned(recipe, outputs, memory_bytes, cpus).tasks == made.tasks
    assert planned(recipe, outputs, GIB, 4).shards == made.shards


@small
@many
@given(cases())
def test_with_plenty_of_memory_what_is_measured_is_read_once(case):
    recipe, outputs, _, cpus = case
    made = planned(recipe, outputs, GIB, cpus)
    check_all(made, cpus)
    levels = [
        level
        for tensor in outputs.tensors
        if tensor.method is not None
        for level in levels_of(tensor.method).values()
    ]
    measured = any(isinstance(task, MeasureTask) for task in made.tasks)
    assert measured == (Over.MODEL in levels)
    assert any(t.resident for t in made.tasks if isinstance(t, MergeTask)) == (
        Over.TENSOR in levels
    )


@small
@many
@given(cases())
def test_a_budget_that_is_too_small_is_refused_with_one_that_is_enough(case):
    recipe, outputs, _, cpus = case
    least = least_bytes(outputs)
    check_all(planned(recipe, outputs, least, cpus), cpus)
    with pytest.raises(MemoryBudgetError) as caught:
        planned(recipe, outputs, least - 1, cpus)
    message = str(caught.value)
    found = re.search(r"Give --memory (\d+)MiB or more", message)
    assert found is not None, message
    check_all(planned(recipe, outputs, int(found[1]) * MIB, cpus), cpus)
    with pytest.raises(MemoryBudgetError):
        planned(recipe, outputs, (int(found[1]) - 1) * MIB, cpus)
    assert any(tensor.name in message for tensor in outputs.tensors)
    assert f"the budget is {(least - 1) / MIB:,.1f} MiB" in message
    assert f"{memory.FOOTPRINT_BYTES / MIB:,.1f} MiB" in message


@small
def test_tensors_without_elements_are_decided_too():
    """They share a unit with one that is too large to be resident."""
    specs = {"t.empty": (DType.F32, (0, 8)), "t.large": (DType.F32, (100, 64))}
    for name in ("slerp", "ties", "dare_linear"):
        recipe = recipe_of(WAYS[name])
        outputs = outputs_of(recipe, specs)
        made = planned(recipe, outputs, least_bytes(outputs))
        check_all(made, 1)
        scopes = {t.scope for t in made.tasks if isinstance(t, MeasureTask)}
        assert scopes == {0, 1}, name


# --- the real constants ---------------------------------------------------------------------------

LLAMA: Specs = {
    "model.embed_tokens.weight": (DType.BF16, (128_256, 4096)),
    **{
        f"model.layers.{i}.{name}.weight": (DType.BF16, shape)
        for i in range(4)
        for name, shape in (
            ("input_layernorm", (4096,)),
            ("mlp.down_proj", (4096, 14_336)),
            ("mlp.up_proj", (14_336, 4096)),
            ("self_attn.k_proj", (1024, 4096)),
            ("self_attn.q_proj", (4096, 4096)),
        )
    },
    "lm_head.weight": (DType.BF16, (128_256, 4096)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("memory_bytes", [400 * MIB, 4 * GIB, 64 * GIB])
@pytest.mark.parametrize("cpus", [2, 64])
def test_a_real_model(way, memory_bytes, cpus):
    recipe = recipe_of(WAYS[way])
    made = planned(recipe, outputs_of(recipe, LLAMA), memory_bytes, cpus)
    check_all(made, cpus)
    sizes = [part.nbytes for shard in made.shards for part in shard.parts[:-1]]
    assert min(sizes) >= layout.LEAST_PART_BYTES
    if memory_bytes >= 4 * GIB and cpus <= 2:
        assert made.workers == 2 * cpus


@pytest.mark.parametrize("way", ["slerp", "ties", "ties over the model", "dare_linear"])
def test_what_is_measured_is_fused_where_it_fits(way):
    """With 4 GiB on 2 CPUs, all but the embeddings are read once."""
    recipe = recipe_of(WAYS[way])
    outputs = outputs_of(recipe, LLAMA)
    made = planned(recipe, outputs, 4 * GIB, 2)
    resident = {
        made.tensors[piece.tensor].name
        for task in made.tasks
        if isinstance(task, MergeTask) and task.resident
        for part in task.parts
        for piece in part.pieces
    }
    expected = {name for name in LLAMA if "layers" in name}
    assert resident == (set() if "model" in way else expected)


def test_one_decision_for_different_parameters_is_refused():
    text = yaml.safe_dump(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [{"model": "m0"}, {"model": "m1"}],
            "parameters": {
                "weight": 1.0,
                "trim": "model",
                "density": [{"filter": "mlp", "value": 0.5}, {"value": 0.25}],
            },
        }
    )
    recipe = Recipe.parse(text)
    with pytest.raises(RecipeError, match="'density' must be the same"):
        planned(recipe, outputs_of(recipe, LLAMA), 4 * GIB)


# --- what many tensors share, and what a worker is sent -------------------------------------------


def sizes(tensor: OutputTensor, memory_bytes: int, device: str) -> tuple[int, ...]:
    elements = memory.tile_elements(tensor, memory_bytes, device)
    resident = memory.resident_bytes(tensor, device)
    return elements, memory.tile_bytes(tensor, elements), resident


@many
@given(cases(), st.sampled_from([CPU, CUDA]))
def test_tensors_that_are_alike_take_as_much(case, device):
    _, outputs, memory_bytes, _ = case
    tensors = outputs.tensors
    for tensor, first in zip(tensors, memory.alike(tensors), strict=True):
        assert len({sizes(alike, memory_bytes, device) for alike in (tensor, tensors[first])}) == 1


def test_layers_are_alike():
    specs = {f"layers.{i}.{n}": (DType.BF16, (8, n)) for i in range(50) for n in (4, 8)}
    outputs = outputs_of(recipe_of(WAYS["ties"]), specs)
    assert memory.alike(outputs.tensors) == [0, 1] * 50


@small
@many
@given(cases(), st.data())
def test_an_excerpt_answers_as_the_plan(case, data):
    recipe, outputs, memory_bytes, cpus = case
    made = planned(recipe, outputs, memory_bytes, cpus)
    numbers = data.draw(st.sets(st.sampled_from([task.number for task in made.tasks])))
    found = pickle.loads(pickle.dumps(excerpt(made, numbers)))
    for name in ("seed", "device", "kernels", "readers", "worker_bytes"):
        assert getattr(found, name) == getattr(made, name)
    assert found.tasks == {number: made.tasks[number] for number in numbers}
    for task in found.tasks.values():
        if isinstance(task, MeasureTask):
            assert found.scopes[task.scope].method == made.scopes[task.scope].method
        else:
            for part in task.parts:
                if part.number == 0:
                    assert found.shards[part.shard].header == made.shards[part.shard].header
        for piece in pieces_of(task):
            tensor = made.tensors[piece.tensor]
            assert found.tensors[piece.tensor] == tensor
            for step, over in levels_of(tensor.method).items() if tensor.method else ():
                if over is not None:
                    keys = {part.key(piece.tensor, step, over) for part in (made, found)}
                    assert len(keys) == 1


@pytest.mark.parametrize("way", ["linear", "ties", "ties over the model"])
def test_an_excerpt_does_not_grow_with_the_plan(way):
    specs = {f"layers.{i}.weight": (DType.BF16, (4096, 4096)) for i in range(1000)}
    recipe = recipe_of(WAYS[way])
    made = planned(recipe, outputs_of(recipe, specs, shards=2), 4 * GIB)
    for task in made.tasks[-20:]:
        nbytes = len(pickle.dumps(excerpt(made, [task.number])))
        assert nbytes <= 2048 * len({piece.tensor for piece in pieces_of(task)})
