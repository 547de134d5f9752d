"""LoRA adapters as PEFT writes them, over a base checkpoint: no merged copy is ever made.

Each adapted matrix keeps the base's stored bytes and gets its two factors (``LowRank``); modules
that were trained whole are read from the adapter. What would change a value in another way, as
DoRA does, is refused by name.

Reference: Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022.
    arXiv:2106.09685. Kalajdzievski. A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA.
    2023. arXiv:2312.03732 (``use_rslora``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardmerge.architectures import HEADS, is_transposed, model_type, task_type
from shardmerge.errors import CheckpointError
from shardmerge.layers import input_embedding, is_tied, output_embeddings
from shardmerge.sources.adapter_settings import MERGE_FIRST, AdapterSettings, read_settings
from shardmerge.sources.folder import few, read_small
from shardmerge.sources.hf import open_hf
from shardmerge.sources.tensor import Checkpoint, LowRank, TensorRef
from shardmerge.sources.torch_bin import open_bin
from shardmerge.stores.api import Store

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])(?:\.default)?\.weight|embedding_([AB])(?:\.default)?)")
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
_COPY = ".original_module."
"""In names of what a module was before it was trained whole: PEFT does not read it either."""
_BASE_LAYER = ".base_layer."
_HEAD = "lm_head.weight"
_UNTIED = {"tie_word_embeddings": False}
_TASK_HEADS = frozenset(head for heads in HEADS.values() for head in heads)


def open_adapter(base: Checkpoint, url: str, store: Store) -> Adapted:
    """A checkpoint with the adapter in the folder ``url`` added to it.

    Raises:
        CheckpointError: for a folder that is no LoRA adapter, for one that does not fit the base,
            and for all that is not ``W + scale * B @ A`` or a module that was trained whole.
    """
    config, files = _read(url, store)
    settings = read_settings(config, store.join(url, ADAPTER_CONFIG))
    found = _sorted_out(files.tensors, url)
    head = _untied(base, found, settings, url)
    names = _names_in(base, [*found.modules, *found.whole], url)
    tensors = dict(base.tensors)
    for name, ref in found.whole.items():
        tensors[names[name]] = _instead(tensors[names[name]], ref, url)
    for weight, factors in _oriented(found.modules, names, tensors, base.config, settings, url):
        tensors[weight] = _adapted(tensors[weight], factors, url)
    doubt = _uncovered(found.modules, names, base, settings)
    declared = config.get("base_model_name_or_path")
    adapted = replace(_with_head(base, head), tensors=tensors | head, adapter=files)
    return Adapted(adapted, declared if isinstance(declared, str) else "", doubt)


@dataclass(frozen=True, slots=True)
class Adapted:
    """A checkpoint with an adapter.

    Args:
        declared: the base model that the adapter's own files name; empty where they do not.
        doubt: why it may have been trained on another; empty where nothing says so.
    """

    checkpoint: Checkpoint
    declared: str
    doubt: str


# --- what is in the folder ------------------------------------------------------------------------


def _read(url: str, store: Store) -> tuple[Mapping[str, object], Checkpoint]:
    """The configuration and the tensors of an adapter."""
    if not store.is_folder(url):
        raise CheckpointError(
            f"{url}: an adapter is a folder with {ADAPTER_CONFIG} and {_WEIGHTS[0]}; there is no "
            "such folder. Check the path."
        )
    names = store.names(url)
    weights = next((name for name in _WEIGHTS if name in names), None)
    if ADAPTER_CONFIG not in names or weights is None:
        raise CheckpointError(
            f"{url}: no LoRA adapter: that is a folder with {ADAPTER_CONFIG} and {_WEIGHTS[0]} (or "
            f"{_WEIGHTS[1]}). It holds {few(names) or 'nothing'}."
        )
    versions: dict[str, str] = {}
    place = store.join(url, ADAPTER_CONFIG)
    try:
        config = json.loads(read_small(url, store, ADAPTER_CONFIG, versions))
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{place} is not JSON: {problem}. Download it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{place} is not a JSON object. Download it again.")
    opened = (open_hf if weights == _WEIGHTS[0] else open_bin)(store.join(url, weights), store)
    return config, replace(opened, url=url, versions={**opened.versions, **versions})


# --- what the tensors are -------------------------------------------------------------------------


@dataclass(slots=True)
class _Factors:
    """The factors of one module."""

    a: TensorRef | None = None
    b: TensorRef | None = None
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class _Found:
    """An adapter's tensors, by names without PEFT's prefix.

    Args:
        modules: factors, by the name of the weight that they are added to.
        whole: what takes the place of a tensor of the base.
    """

    modules: dict[str, _Factors] = field(default_factory=dict)
    whole: dict[str, TensorRef] = field(default_factory=dict)


def _sorted_out(tensors: Mapping[str, TensorRef], url: str) -> _Found:
    found, unknown = _Found(), []
    for name, ref in tensors.items():
        inner = _SAVED.sub("", name.removeprefix(_PREFIX).replace(_BASE_LAYER, "."))
        factor = _FACTOR.fullmatch(inner)
        if not name.startswith(_PREFIX) or (factor is None and "lora_" in inner):
            unknown.append(name)
        elif factor is not None:
            module = found.modules.setdefault(f"{factor[1]}.weight", _Factors())
            module.embedding |= factor[2] is None
            setattr(module, (factor[2] or factor[3]).lower(), ref)
        elif _COPY not in inner:
            found.whole[inner] = ref
    if unknown:
        raise CheckpointError(
            f"{url}: tensors whose meaning is not known ({len(unknown):,}): {few(unknown)}.\n"
            f"  {MERGE_FIRST}."
        )
    lone = [name for name, factors in found.modules.items() if not (factors.a and factors.b)]
    if lone:
        raise CheckpointError(
            f"{url}: only one of the two factors of {few(lone)}. Download the adapter again."
        )
    if not tensors:
        raise CheckpointError(f"{url}: the adapter has no tensors. Download it again.")
    return found


def _names_in(base: Checkpoint, names: Sequence[str], url: str) -> dict[str, str]:
    """The name that each tensor has in the base checkpoint.

    A checkpoint may have been saved from the model with its head or from the one inside of it: then
    all names differ by one prefix.
    """
    names = list(dict.fromkeys(names))
    if not names:
        return {}

    def lacking(rename: Callable[[str], str]) -> list[str]:
        return [name for name in names if rename(name) not in base.tensors]

    ways = list(_renamings(names, base.tensors))
    rename = min(ways, key=lambda way: len(lacking(way)))
    if left := lacking(rename):
        raise CheckpointError(
            f"{url}: adapts {len(left):,} of {len(names):,} tensors that {base.url} does not have: "
            f"{few(left)}.\n  {_why_lacking(left, base)}\n"
            f"  Name the model that it belongs to, or {MERGE_FIRST[0].lower()}{MERGE_FIRST[1:]}."
        )
    return {name: rename(name) for name in names}


def _why_lacking(names: Sequence[str], base: Checkpoint) -> str:
    heads = output_embeddings(names)
    if len(heads) == len(names) and is_tied(base.config):
        return "The output embedding is tied to the input embedding there."
    if all(name.partition(".")[0] in _TASK_HEADS for name in names):
        return "The adapter has a head of its own: its base is a checkpoint that was saved with it."
    return "It was trained on another model, or transformers gives its layers other names."


def _renamings(
    names: Sequence[str], there: Mapping[str, TensorRef]
) -> Iterator[Callable[[str], str]]:
    """Ways to make names those of the base, the likely ones first."""
    yield lambda name: name
    for first in dict.fromkeys(f"{name.partition('.')[0]}." for name in names):
        yield lambda name, first=first: name.removeprefix(first)  # type: ignore[misc]
    known = names[0]
    prefixes = {name.removesuffix(known) for name in there if name.endswith(f".{known}")}
    for prefix in sorted(prefixes):
        yield lambda name, prefix=prefix: prefix + name  # type: ignore[misc]


# --- tied embeddings ------------------------------------------------------------------------------


def _untied(
    base: Checkpoint, found: _Found, settings: AdapterSettings, url: str
) -> dict[str, TensorRef]:
    """The output embedding of a base that ties it, where the adapter has made it another.

    PEFT puts a module that is trained whole in the place of one of two that are tied; the other
    stays as it was. What it stores of embeddings besides is a copy, which both are.

    Raises:
        CheckpointError: where it is not known what becomes of the other, or one was adapted.
    """
    if not is_tied(base.config) or output_embeddings(base.tensors):
        return {}
    heads = output_embeddings([*found.whole, *found.modules])
    if adapted := [head for head in heads if head in found.modules]:
        raise CheckpointError(
            f"{url}: adapts {adapted[0]}, which is tied to the input embedding in {base.url}: PEFT "
            f"changes both.\n  {MERGE_FIRST}."
        )
    given = {head: found.whole.pop(head) for head in heads}
    embedding = input_embedding(base.tensors)
    trained = [name for name in found.whole if embedding and _is_same(name, embedding)]
    saved = [name for name in (*given, *trained) if _is_saved(name, settings)]
    task = task_type(base.config)
    if not saved or embedding is None or task in HEADS:
        return {}
    if task != "CAUSAL_LM" or is_tied({**base.config, **_UNTIED}):
        raise CheckpointError(
            f"{url}: {saved[0]} was trained whole, and is tied to other embeddings in {base.url}, "
            f"which stay as they were.\n  That is read for causal language models only. "
            f"{MERGE_FIRST}."
        )
    head = next((ref for name, ref in given.items() if name in saved), None)
    own = base.tensors[embedding]
    return {_HEAD: replace(own, name=_HEAD) if head is None else _instead(own, head, url, _HEAD)}


def _is_same(name: str, other: str) -> bool:
    """Whether two names are the same but for a prefix of one."""
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def _is_saved(name: str, settings: AdapterSettings) -> bool:
    return name.removesuffix(".weight").endswith(settings.saved) if settings.saved else False


def _with_head(base: Checkpoint, head: Mapping[str, TensorRef]) -> Checkpoint:
    """A base whose output embedding is stored by itself, where it has become another."""
    if not head:
        return base
    embedding = input_embedding(base.tensors)
    assert embedding is not None
    shard_of = {**base.shard_of, **dict.fromkeys(head, base.shard_of[embedding])}
    return replace(base, shard_of=shard_of, config={**base.config, **_UNTIED})


# --- values ---------------------------------------------------------------------------------------


def _instead(own: TensorRef, whole: TensorRef, url: str, name: str | None = None) -> TensorRef:
    """A tensor of the base that was trained whole, under its own name or another."""
    if whole.shape != own.shape:
        resized = whole.shape[1:] == own.shape[1:]
        why = "the vocabulary was resized" if resized else "it was trained on another model"
        raise CheckpointError(
            f"{url}: {own.name} has shape {list(whole.shape)} there and {list(own.shape)} in the "
            f"base model: {why}.\n  {MERGE_FIRST}."
        )
    return replace(whole, name=name or own.name)


def _oriented(
    modules: Mapping[str, _Factors],
    names: Mapping[str, str],
    tensors: Mapping[str, TensorRef],
    base: Mapping[str, object],
    settings: AdapterSettings,
    url: str,
) -> Iterator[tuple[str, LowRank]]:
    """The factors of each matrix, which is stored as [out, in] or [in, out].

    Shapes tell; for square matrices the type of the base model does, where it is known, else what
    all other matrices of the adapter have in common, else the configuration. That is the last to
    ask: PEFT goes by the class of a layer, and writes down what it did with the last one.

    Args:
        base: its config.
    """
    told: dict[str, bool] = {}
    for name, factors in modules.items():
        shape = _check_rank(name, factors, settings, url)
        stored = tensors[names[name]].shape
        if factors.embedding or shape == stored[::-1] != stored:
            told[name] = True
        elif shape == stored != stored[::-1]:
            told[name] = False
        elif shape != stored:
            raise CheckpointError(
                f"{url}: adapts {names[name]} as {list(shape)}, but it is {list(stored)} in the "
                "base model.\n  It was trained on another model; name that one."
            )
        elif model_type(base):
            told[name] = is_transposed(_module(name), base)
    others = {told[name] for name in told if not modules[name].embedding}
    default = others.pop() if len(others) == 1 else settings.transposed
    for name, factors in modules.items():
        assert factors.a is not None and factors.b is not None
        transposed, scale = told.get(name, default), settings.rank_and_scale(_module(name))[1]
        left, right = (factors.a, factors.b) if transposed else (factors.b, factors.a)
        yield names[name], LowRank(left, right, scale, transposed)


def _uncovered(
    modules: Mapping[str, _Factors],
    names: Mapping[str, str],
    base: Checkpoint,
    settings: AdapterSettings,
) -> str:
    """What the adapter says it adapts and does not, or does and does not say; empty if neither."""
    if settings.targets is None:
        return ""
    beyond = [name for name in modules if not settings.targets(_module(name))]
    if beyond:
        return f"it holds factors of modules that its target_modules do not name: {few(beyond)}"
    adapted = {names[name] for name in modules}
    left = [
        name
        for name, ref in base.tensors.items()
        if len(ref.shape) == 2
        and name.endswith(".weight")
        and name not in adapted
        and settings.targets(_module(name))
        and not _is_saved(name, settings)
    ]
    if left and settings.all_targets:
        return (
            f"it has no factors of {len(left):,} matrices that its target_modules name: {few(left)}"
        )
    return ""


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _check_rank(
    name: str, factors: _Factors, settings: AdapterSettings, url: str
) -> tuple[int, ...]:
    """The shape of the product of two factors."""
    assert factors.a is not None and factors.b is not None
    a, b = factors.a, factors.b
    rank = settings.rank_and_scale(_module(name))[0]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(
            f"{url}: the factors of {name} have shapes {list(a.shape)} and {list(b.shape)}; only "
            f"linear layers and embeddings are read, no convolutions.\n  {MERGE_FIRST}."
        )
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{url}: the factors of {name} have shapes {list(a.shape)} and {list(b.shape)}, but "
            f"{ADAPTER_CONFIG} says rank {rank}.\n  They belong to different adapters; download it "
            "again."
        )
    return b.shape[0], a.shape[1]


def _adapted(own: TensorRef, factors: LowRank, url: str) -> TensorRef:
    """A matrix of the base with its factors."""
    for ref in (own, factors.left, factors.right):
        if not ref.dtype.is_float or ref.dtype.is_fp8 or ref.decode is not None:
            raise CheckpointError(
                f"{url}: {own.name} is adapted, and {ref.name} is stored as "
                f"{ref.dtype.torch_name}: adapters of quantised tensors are not supported.\n"
                "  Name the model that it was quantised from, or dequantise it first."
            )
    return replace(own, decode=factors)
