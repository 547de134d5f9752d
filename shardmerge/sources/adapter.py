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
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardmerge.errors import CheckpointError
from shardmerge.sources.folder import few, read_small
from shardmerge.sources.hf import open_hf
from shardmerge.sources.tensor import Checkpoint, LowRank, TensorRef
from shardmerge.sources.torch_bin import open_bin
from shardmerge.stores.api import Store

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
_BASE_LAYER = ".base_layer."
_MERGE_FIRST = "Merge it into its base model first (peft: `merge_and_unload`, `save_pretrained`)"

_NO_EFFECT = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Settings that are read here, or that say how the adapter was trained and not what it means."""
_MEANS = {
    "use_dora": "it is a DoRA adapter, which also scales the norm of each row",
    "lora_bias": "it adds to biases, too",
    "target_parameters": "it adapts parameters that are not the weights of layers",
    "trainable_token_indices": "it trains single rows of embeddings",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it acts on some tokens only",
}
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base model as it is."""


def open_adapter(base: Checkpoint, url: str, store: Store) -> tuple[Checkpoint, str]:
    """A checkpoint with the adapter in the folder ``url`` added to it.

    Returns:
        it, and the base model that the adapter's own files name; empty where they do not.
    Raises:
        CheckpointError: for a folder that is no LoRA adapter, for one that does not fit the base,
            and for all that is not ``W + scale * B @ A`` or a module that was trained whole.
    """
    config, files = _read(url, store)
    settings = _settings(config, store.join(url, ADAPTER_CONFIG))
    found = _sorted_out(files.tensors, url)
    names = _names_in(base, [*found.modules, *found.whole], url)
    tensors = dict(base.tensors)
    for name, ref in found.whole.items():
        tensors[names[name]] = _instead(tensors[names[name]], ref, url)
    for weight, factors in _oriented(found.modules, names, tensors, settings, url):
        tensors[weight] = _adapted(tensors[weight], factors, url)
    declared = config.get("base_model_name_or_path")
    adapted = replace(base, tensors=tensors, adapter=files)
    return adapted, declared if isinstance(declared, str) else ""


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


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a configuration says about every matrix.

    Args:
        ranks, alphas: by patterns of module names.
        transposed: whether weights are stored as [in, out], where shapes do not tell.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    transposed: bool
    ranks: tuple[tuple[re.Pattern[str], float], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Rank of a module's factors, and what their product is multiplied with."""
        rank = _first(self.ranks, module, self.rank)
        alpha = _first(self.alphas, module, self.alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _first(patterns: Sequence[tuple[re.Pattern[str], float]], module: str, other: float) -> float:
    """The value of the first pattern that a module's name ends with, as PEFT takes it."""
    return next((value for pattern, value in patterns if pattern.match(module)), other)


def _settings(config: Mapping[str, object], place: str) -> _Settings:
    """The settings; refused where they would change values in a way that is not known here."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{place}: peft_type is {kind!a}; only LORA is read. {_MERGE_FIRST}.")
    for key, value in config.items():
        if value and key not in _NO_EFFECT:
            why = _MEANS.get(key, "what it means for the weights is not known here")
            raise CheckpointError(
                f"{place}: {key} is set: {why}, which is not supported.\n  {_MERGE_FIRST}."
            )
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{place}: init_lora_weights is {start!a}: it changes the base model's own weights "
            f"before training, which is not supported.\n  {_MERGE_FIRST}."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not _is_number(alpha):
        raise CheckpointError(f"{place}: r is {rank!a} and lora_alpha {alpha!a}; correct them.")
    return _Settings(
        rank=rank,
        alpha=float(alpha),  # type: ignore[arg-type]
        rank_stabilised=config.get("use_rslora") is True,
        transposed=config.get("fan_in_fan_out") is True,
        ranks=_patterns(config, "rank_pattern", place),
        alphas=_patterns(config, "alpha_pattern", place),
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _patterns(
    config: Mapping[str, object], key: str, place: str
) -> tuple[tuple[re.Pattern[str], float], ...]:
    """Values by what module names end with."""
    given = config.get(key) or {}
    try:
        if not isinstance(given, dict) or not all(_is_number(v) and v > 0 for v in given.values()):
            raise ValueError("it must map names to numbers above 0")
        return tuple(
            (re.compile(rf"(?:.*\.)?(?:{name})$"), float(value)) for name, value in given.items()
        )
    except (ValueError, re.error) as problem:
        raise CheckpointError(f"{place}: {key}: {problem}. Correct it.") from None


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
        elif factor is None:
            found.whole[inner] = ref
        else:
            module = found.modules.setdefault(f"{factor[1]}.weight", _Factors())
            module.embedding |= factor[2] is not None
            setattr(module, factor[3].lower(), ref)
    if unknown:
        raise CheckpointError(
            f"{url}: tensors whose meaning is not known ({len(unknown):,}): {few(unknown)}.\n"
            f"  {_MERGE_FIRST}."
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
    for rename in _renamings(names[0], base.tensors):
        if all(rename(name) in base.tensors for name in names):
            return {name: rename(name) for name in names}
    lacking = [name for name in names if name not in base.tensors]
    raise CheckpointError(
        f"{url}: adapts {len(lacking):,} of {len(names):,} tensors that {base.url} does not have: "
        f"{few(lacking)}.\n"
        "  It was trained on another model, or tensors are tied there or named in another way.\n"
        f"  Name the model that it belongs to. Else: {_MERGE_FIRST[0].lower()}{_MERGE_FIRST[1:]}."
    )


def _renamings(name: str, there: Mapping[str, TensorRef]) -> Iterator[Callable[[str], str]]:
    """Ways to make names those of the base, the likely ones first."""
    yield lambda name: name
    first = name.partition(".")[0] + "."
    yield lambda name: name.removeprefix(first)
    prefixes = {other.removesuffix(name) for other in there if other.endswith(f".{name}")}
    for prefix in sorted(prefixes):
        yield lambda name, prefix=prefix: prefix + name  # type: ignore[misc]


# --- values ---------------------------------------------------------------------------------------


def _instead(own: TensorRef, whole: TensorRef, url: str) -> TensorRef:
    """A tensor of the base that was trained whole."""
    if whole.shape != own.shape:
        resized = whole.shape[1:] == own.shape[1:]
        why = "the vocabulary was resized" if resized else "it was trained on another model"
        raise CheckpointError(
            f"{url}: {own.name} has shape {list(whole.shape)} there and {list(own.shape)} in the "
            f"base model: {why}.\n  {_MERGE_FIRST}."
        )
    return replace(whole, name=own.name)


def _oriented(
    modules: Mapping[str, _Factors],
    names: Mapping[str, str],
    tensors: Mapping[str, TensorRef],
    settings: _Settings,
    url: str,
) -> Iterator[tuple[str, LowRank]]:
    """The factors of each matrix, which is stored as [out, in] or [in, out].

    Shapes tell; for square matrices those of the adapter's others do, else the configuration: PEFT
    itself goes by the class of a layer.
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
    others = {told[name] for name in told if not modules[name].embedding}
    default = others.pop() if len(others) == 1 else settings.transposed
    for name, factors in modules.items():
        assert factors.a is not None and factors.b is not None
        transposed, scale = told.get(name, default), settings.rank_and_scale(_module(name))[1]
        left, right = (factors.a, factors.b) if transposed else (factors.b, factors.a)
        yield names[name], LowRank(left, right, scale, transposed)


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _check_rank(name: str, factors: _Factors, settings: _Settings, url: str) -> tuple[int, ...]:
    """The shape of the product of two factors."""
    assert factors.a is not None and factors.b is not None
    a, b = factors.a, factors.b
    rank = settings.rank_and_scale(_module(name))[0]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(
            f"{url}: the factors of {name} have shapes {list(a.shape)} and {list(b.shape)}; only "
            f"linear layers and embeddings are read, no convolutions.\n  {_MERGE_FIRST}."
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
