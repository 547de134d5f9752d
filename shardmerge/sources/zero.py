"""Checkpoints that DeepSpeed writes while it trains: the float32 master weights of all ranks.

ZeRO-1, 2 and 3 (``zero_layout``), and universal checkpoints, whose parameters are files of their
own. Whatever is not data-parallel alone is refused: tensor and pipeline parallelism, experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shardmerge.errors import CheckpointError
from shardmerge.header import is_plain_name
from shardmerge.sources.folder import AT_A_TIME, CONFIG, beside, few, home_of, read_config
from shardmerge.sources.pickles import Made
from shardmerge.sources.tensor import Checkpoint, TensorRef
from shardmerge.sources.torch_bin import tensors_of
from shardmerge.sources.torch_file import (
    StoredTensor,
    TorchFile,
    read_torch,
    reference,
    segments,
    sizes_of,
    window_of,
)
from shardmerge.sources.zero_layout import (
    Partition,
    Shapes,
    check_dtype,
    frozen,
    gathered,
    joined,
)
from shardmerge.sources.zero_states import flat_states, fragments, paddings
from shardmerge.stores.api import Store

_LATEST = ("latest", "latest_universal")
_STEP = re.compile(r"global_step.*/")
_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")
_ALL_RANKS = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_STATES = re.compile(r".*(optim|model)_states\.pt")
_FOREIGN = (
    (r".*_expert_.*_states\.pt|expp_rank_.*", "files of experts", "mixtures of experts"),
    (r"layer_\d+-.*_states\.pt", "files of single layers", "pipeline parallelism"),
)
_CONVERT = "Convert it with DeepSpeed's own tools (zero_to_fp32.py or ds_to_universal.py) first"


def holds_zero(names: Sequence[str]) -> bool:
    """Whether a folder is such a checkpoint, or has one in it."""
    return any(
        name in _LATEST or is_rank_file(name) or _STEP.fullmatch(name) is not None for name in names
    )


def is_rank_file(name: str) -> bool:
    """Whether a file holds one rank's part of such a checkpoint."""
    return _STATES.fullmatch(name) is not None


def open_zero(url: str, store: Store, state: str | None = None) -> Checkpoint:
    """The checkpoint in ``url``, a folder of a training or of one of its steps.

    Args:
        state: of the optimizer (``exp_avg_sq``), which is given in place of the weights, of the
            parameters that were trained only.
    Raises:
        CheckpointError: for a checkpoint that is not whole, or of a kind that is not supported; for
            one without this state.
    """
    place, names = _step(url, store)
    files = _files(names, place)
    if files.optim:
        found = _partitioned(place, store, files, state)
    elif "zero/" in names:
        found = _universal(place, store, files, state)
    else:
        raise CheckpointError(
            f"{place}: no *_optim_states.pt, which hold DeepSpeed's float32 weights.\n"
            "  They were removed, or it was trained without ZeRO. Copy them too, or save the\n"
            "  model with `save_16bit_model`."
        )
    home, prefix = home_of(place, store, names)
    inside = names if home == place else store.names(home)
    own = frozenset({prefix} if prefix else {name for name in names if _STATES.fullmatch(name)})
    versions = {prefix + name: version for name, version in found.versions.items()}
    config = read_config(home, store, versions) if CONFIG in inside else {}
    copied, ignored = beside(home, store, inside, own | {"zero/"})
    shards = sorted(prefix + name for name in found.versions)
    number_of = {store.join(home, shard): number for number, shard in enumerate(shards)}
    return Checkpoint(
        url=home,
        tensors=found.tensors,
        shard_of={name: number_of[ref.segments[0].url] for name, ref in found.tensors.items()},
        shards=tuple(shards),
        config=config,
        files=copied,
        ignored=ignored,
        versions=versions,
        cut=True,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    tensors: dict[str, TensorRef]
    versions: dict[str, str]


# --- which files ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Files:
    """Names by rank; ``model`` has only rank 0 where one file serves all ranks."""

    model: Mapping[int, str]
    optim: Mapping[int, str]


def _step(url: str, store: Store) -> tuple[str, list[str]]:
    """The folder of the step that ``url`` means, and what is in it.

    ``latest`` is not among the versions: a training that goes on changes it, and the step stays.
    """
    names = store.names(url)
    if any(map(_STATES.fullmatch, names)):
        return url, names
    steps = [name.rstrip("/") for name in names if _STEP.fullmatch(name)]
    latest = next((name for name in _LATEST if name in names), None)
    if latest is not None:
        wanted = store.read(store.join(url, latest)).decode(errors="replace").strip()
        if not is_plain_name(wanted) or f"{wanted}/" not in names:
            raise CheckpointError(
                f"{url}: {latest} names the step {wanted!a}, which is not there. It holds "
                f"{few(steps) or 'no step'}.\n  Copy that folder too, or give the path of one."
            )
        steps = [wanted]
    if len(steps) != 1:
        raise CheckpointError(
            f"{url}: {len(steps)} DeepSpeed checkpoints ({few(steps)}), and no file `latest` that "
            "says which.\n  Give the path of one of these folders."
        )
    place = store.join(url, steps[0])
    return place, store.names(place)


def _files(names: Sequence[str], place: str) -> _Files:
    """The files of each rank, by their names.

    Raises:
        CheckpointError: for files of another kind of parallelism, and for ranks that are missing.
    """
    for pattern, what, kind in _FOREIGN:
        foreign = [name for name in names if re.fullmatch(pattern, name)]
        if foreign:
            raise CheckpointError(
                f"{place}: {what} ({few(foreign)}): a DeepSpeed checkpoint of {kind}, which is not "
                f"supported.\n  {_CONVERT}."
            )
    found: dict[str, dict[int, str]] = {"optim": {}, "model": {}}
    for name in names:
        match = _RANK.fullmatch(name)
        single = _ALL_RANKS.fullmatch(name)
        if match is None and single is None:
            continue
        rank, tensor_rank = (match[1], match[2]) if match else ("0", single[1] if single else "")
        if int(tensor_rank):
            raise CheckpointError(
                f"{place}: {name}: tensor parallel rank {int(tensor_rank)}: a DeepSpeed checkpoint "
                f"of tensor parallelism, which is not supported.\n  {_CONVERT}."
            )
        of_kind = found[match[3] if match else "model"]
        if int(rank) in of_kind:
            raise CheckpointError(
                f"{place}: {of_kind[int(rank)]} and {name} are both of rank {int(rank)}: two "
                "checkpoints lie in one folder.\n  Give a folder that holds one."
            )
        of_kind[int(rank)] = name
    if 0 not in found["model"]:
        raise CheckpointError(
            f"{place}: the model states of rank 0 are missing (mp_rank_00_model_states.pt or\n"
            "  zero_pp_rank_0_mp_rank_00_model_states.pt), which hold names and shapes. Copy them "
            "too."
        )
    return _Files(found["model"], found["optim"])


def _all_ranks(files: Mapping[int, str], count: int, kind: str, place: str) -> list[str]:
    """The files of ranks 0 to ``count``; refused where they are not just these."""
    missing = sorted(set(range(count)).difference(files))
    if missing:
        raise CheckpointError(
            f"{place}: {kind} of {count} ranks are needed, and {len(files)} are there; missing: "
            f"rank {few(map(str, missing))}.\n  The copy is not complete; run it again."
        )
    if len(files) > count:
        extra = [files[rank] for rank in sorted(files)[count:]]
        raise CheckpointError(
            f"{place}: it was written by {count} ranks, and {len(files)} have {kind}: "
            f"{few(extra)}.\n  Files of an older checkpoint lie there too. Remove them."
        )
    return [files[rank] for rank in range(count)]


# --- model states ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Model:
    """What the model states of a rank say.

    Args:
        names: all names of the state dict, in its order.
        groups: names and shapes of the trained parameters of each group.
        frozen: names and shapes of the others.
        fragments: what this rank holds of those.
        whole: buffers; in ZeRO-1 and 2 also what is not trained and not listed as frozen.
        shared: for each tied parameter, the name of the one that it is.
        version: of the file.
    """

    names: tuple[str, ...]
    groups: tuple[Shapes, ...]
    frozen: Shapes
    fragments: Mapping[str, TensorRef]
    whole: Mapping[str, TensorRef]
    shared: Mapping[str, str]
    version: str


def _read_model(place: str, store: Store) -> _Model:
    file = read_torch(window_of(place, store))
    value = file.value
    if not isinstance(value, dict) or "param_shapes" not in value:
        raise CheckpointError(
            f"{place}: no param_shapes in it: it is not of ZeRO, or of a DeepSpeed before 0.5.\n"
            f"  {_CONVERT}."
        )
    if value.get("autoep_layers"):
        raise CheckpointError(
            f"{place}: experts in partitions of their own, which are not supported.\n  {_CONVERT}."
        )
    listed = value["param_shapes"]
    groups = listed if isinstance(listed, list) else [listed]
    trained = tuple(_shapes(group, place) for group in groups)
    untrained = _shapes(value.get("frozen_param_shapes") or {}, place)
    listed = value.get("shared_params")
    shared = {
        name: other
        for name, other in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(name, str) and isinstance(other, str)
    }
    module, buffers = value.get("module"), value.get("buffer_names")
    # One file for all ranks holds the whole model; that of one rank holds only buffers whole.
    is_whole = _ALL_RANKS.fullmatch(place.rpartition("/")[2]) is not None
    taken = set(shared).union(untrained, *trained)
    whole = {
        name: tensor
        for name, tensor in tensors_of(module).items()
        if name not in taken and (is_whole or (isinstance(buffers, list) and name in buffers))
    }
    return _Model(
        names=tuple(tensors_of(module)),
        groups=trained,
        frozen=untrained,
        fragments=_references(file, tensors_of(value.get("frozen_param_fragments"))),
        whole=_references(file, whole),
        shared=shared,
        version=file.window.version or "",
    )


def _shapes(listed: object, what: str) -> Shapes:
    if isinstance(listed, dict):
        found = {
            name: sizes
            for name, shape in listed.items()
            if isinstance(name, str) and (sizes := sizes_of(shape)) is not None
        }
        if len(found) == len(listed):
            return found
    raise CheckpointError(
        f"{what}: its lists of names and shapes are none. It is damaged, or of a DeepSpeed that "
        f"is not\n  known here. {_CONVERT}."
    )


def _references(file: TorchFile, tensors: Mapping[str, StoredTensor]) -> dict[str, TensorRef]:
    found = segments(file, tensors)
    return {
        name: reference(name, tensor.dtype, tensor.shape, found[name])
        for name, tensor in tensors.items()
    }


# --- ZeRO-1, 2 and 3 ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rank:
    """One rank's optimizer states: stage, number of ranks, and its partition."""

    stage: int
    count: int
    partition: Partition
    paddings: tuple[tuple[int, ...], ...] | None
    version: str


def _partitioned(place: str, store: Store, files: _Files, state: str | None) -> _Found:
    def read(name: str) -> _Rank:
        return _read_rank(store.join(place, name), store, state)

    first = read(files.optim[min(files.optim)])
    optim = _all_ranks(files.optim, first.count, "optimizer states", place)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        ranks = list(pool.map(read, optim))
        model = _read_model(store.join(place, files.model[0]), store)
        names = [files.model[0]]
        if first.stage == 3 and model.frozen:
            names = _all_ranks(files.model, first.count, "model states", place)
        others = pool.map(lambda name: _read_model(store.join(place, name), store), names[1:])
        models = [model, *others]
    for rank in ranks:
        if (rank.stage, rank.count) != (first.stage, first.count):
            raise CheckpointError(
                f"{rank.partition.what}: of stage {rank.stage} and {rank.count} ranks; "
                f"{first.partition.what}\n  of stage {first.stage} and {first.count}: files of two "
                "checkpoints lie together. Copy one again."
            )
    partitions = [rank.partition for rank in ranks]
    if first.stage == 3:
        found = list(gathered(partitions, model.groups))
    else:
        found = list(joined(partitions, model.groups, first.paddings, place))
    tensors = _complete(found, models, place, state)
    versions = {name: rank.version for name, rank in zip(optim, ranks, strict=True)}
    versions |= {name: each.version for name, each in zip(names, models, strict=True)}
    return _Found(tensors, versions)


def _read_rank(place: str, store: Store, state: str | None) -> _Rank:
    file = read_torch(window_of(place, store))
    states = file.value.get("optimizer_state_dict") if isinstance(file.value, dict) else None
    stage = states.get("zero_stage") if isinstance(states, dict) else None
    if isinstance(stage, Made) and stage.arguments:
        stage = stage.arguments[0]
    if not isinstance(states, dict) or stage not in (1, 2, 3):
        raise CheckpointError(
            f"{place}: no optimizer states of ZeRO-1, 2 or 3 in it (stage "
            f"{stage if isinstance(stage, int) else 'unknown'}).\n  {_CONVERT}."
        )
    assert isinstance(stage, int)
    listed = states.get("partition_count")
    counts = {
        count if isinstance(count, int) else 0
        for count in (listed if isinstance(listed, list) else [listed])
    }
    if len(counts) != 1 or min(counts) < 1:
        raise CheckpointError(
            f"{place}: its groups of parameters are cut into different numbers of partitions, as "
            f"with experts,\n  which is not supported. {_CONVERT}."
        )
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    listed = states.get(key)
    held = listed if isinstance(listed, list) else []
    masters = [item for item in held if isinstance(item, StoredTensor)]
    if not held or len(masters) != len(held):
        raise CheckpointError(
            f"{place}: no tensors in {key}: the float32 weights are not in the file, as when they "
            f"are\n  offloaded to a disk. {_CONVERT}."
        )
    flats = masters if state is None else flat_states(states, stage, masters, state, place)
    groups = {f"{state or key}[{n}]": item for n, item in enumerate(flats)}
    partition = Partition(
        place, tuple(_references(file, groups).values()), fragments(states, len(held))
    )
    check_dtype(partition)
    gaps = paddings(states.get("param_alignment_paddings"))
    return _Rank(stage, counts.pop(), partition, gaps, file.window.version or "")


def _complete(
    found: Sequence[TensorRef], models: Sequence[_Model], place: str, state: str | None
) -> dict[str, TensorRef]:
    """All tensors, in the order of the model: parameters, frozen and tied ones, buffers.

    Of a state of the optimizer there are only parameters that are trained, and those tied to them.

    Raises:
        CheckpointError: for a tensor of the model that is none of them.
    """
    model = models[0]
    if state is not None:
        return _with_tied(found, model)
    tensors = {tensor.name: tensor for tensor in found}
    for name, shape in model.frozen.items():
        fragments = [each.fragments[name] for each in models if name in each.fragments]
        if len(fragments) != len(models):
            raise CheckpointError(
                f"{place}: the frozen parameter {name!r} is in the model states of "
                f"{len(fragments)} ranks of {len(models)}.\n  Copy the checkpoint again."
            )
        tensors[name] = frozen(name, shape, fragments, place)
    tensors = _with_tied([*tensors.values(), *model.whole.values()], model)
    lost = [name for name in model.names if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{place}: tensors of the model that are neither trained, frozen, tied nor buffers "
            f"({len(lost):,}): {few(lost)}.\n  {_CONVERT}."
        )
    ordered = {name: tensors[name] for name in model.names}
    return ordered | {name: ref for name, ref in tensors.items() if name not in ordered}


def _with_tied(found: Sequence[TensorRef], model: _Model) -> dict[str, TensorRef]:
    """Tensors by name, also under the names that are tied to theirs."""
    tensors = {tensor.name: tensor for tensor in found}
    for name, other in model.shared.items():
        if other in tensors:
            tied = tensors[other]
            tensors[name] = TensorRef(name, tied.dtype, tied.shape, tied.segments)
    return tensors


# --- universal checkpoints ------------------------------------------------------------------------


def _universal(place: str, store: Store, files: _Files, state: str | None) -> _Found:
    model = _read_model(store.join(place, files.model[0]), store)
    count = len(files.model) if model.frozen else 1
    names = _all_ranks(files.model, count, "model states", place)
    shapes = {name: shape for group in model.groups for name, shape in group.items()}
    folder = store.join(place, "zero")
    there = {name.rstrip("/") for name in store.names(folder) if name.endswith("/")}
    lost, extra = sorted(shapes.keys() - there), sorted(there - shapes.keys())
    if lost or extra:
        raise CheckpointError(
            f"{folder}: parameters missing ({len(lost)}): {few(lost) or 'none'}; not listed in the "
            f"model states ({len(extra)}): {few(extra) or 'none'}.\n"
            "  The copy is not complete, or of two checkpoints. Copy it again."
        )
    paths = {name: f"zero/{name}/{state or 'fp32'}.pt" for name in shapes}

    def read(name: str) -> tuple[TensorRef, str]:
        return _read_parameter(store.join(place, paths[name]), store, name, shapes[name])

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        read_all = list(pool.map(read, shapes))
        others = pool.map(lambda name: _read_model(store.join(place, name), store), names[1:])
        models = [model, *others]
    tensors = _complete([tensor for tensor, _ in read_all], models, place, state)
    versions = {path: each for path, (_, each) in zip(paths.values(), read_all, strict=True)}
    versions |= {name: each.version for name, each in zip(names, models, strict=True)}
    return _Found(tensors, versions)


def _read_parameter(
    place: str, store: Store, name: str, shape: tuple[int, ...]
) -> tuple[TensorRef, str]:
    """One parameter: a flat tensor, or a dict that has it as ``param``."""
    file = read_torch(window_of(place, store))
    value = file.value.get("param") if isinstance(file.value, dict) else file.value
    if not isinstance(value, StoredTensor) or value.numel != math.prod(shape):
        held = f"{value.numel:,} elements" if isinstance(value, StoredTensor) else "no tensor"
        raise CheckpointError(
            f"{place}: {held}; {name!r} of shape {list(shape)} needs {math.prod(shape):,}.\n"
            "  It is damaged, or was cut by tensor parallelism. Convert it again."
        )
    (pieces,) = segments(file, {name: value}).values()
    return reference(name, value.dtype, shape, pieces), file.window.version or ""
