"""What PEFT's ``adapter_config.json`` says of an adapter's tensors; refused where it is not known.

Pure; written for PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.errors import CheckpointError

_EVERY_LINEAR = "all-linear"
MERGE_FIRST = "Merge it into its base model first (peft: `merge_and_unload`, `save_pretrained`)"

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


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What a configuration says about every matrix.

    Args:
        ranks, alphas: by patterns of module names.
        transposed: whether weights are stored as [in, out], where nothing else tells.
        saved: ends of the names of modules that were trained whole.
        targets: which modules are adapted, as PEFT reads it: ends of names, or a pattern; None
            where it is not said.
        all_targets: whether every such module is, and no other setting leaves some out.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    transposed: bool
    ranks: tuple[tuple[re.Pattern[str], float], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    saved: tuple[str, ...]
    targets: Callable[[str], bool] | None
    all_targets: bool

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Rank of a module's factors, and what their product is multiplied with."""
        rank = _first(self.ranks, module, self.rank)
        alpha = _first(self.alphas, module, self.alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _first(patterns: Sequence[tuple[re.Pattern[str], float]], module: str, other: float) -> float:
    """The value of the first pattern that a module's name ends with, as PEFT takes it."""
    return next((value for pattern, value in patterns if pattern.match(module)), other)


def read_settings(config: Mapping[str, object], place: str) -> AdapterSettings:
    """The settings; refused where they would change values in a way that is not known here."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{place}: peft_type is {kind!a}; only LORA is read. {MERGE_FIRST}.")
    for key, value in config.items():
        if value and key not in _NO_EFFECT:
            why = _MEANS.get(key, "what it means for the weights is not known here")
            raise CheckpointError(
                f"{place}: {key} is set: {why}, which is not supported.\n  {MERGE_FIRST}."
            )
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{place}: init_lora_weights is {start!a}: it changes the base model's own weights "
            f"before training, which is not supported.\n  {MERGE_FIRST}."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not _is_number(alpha):
        raise CheckpointError(f"{place}: r is {rank!a} and lora_alpha {alpha!a}; correct them.")
    return AdapterSettings(
        rank=rank,
        alpha=float(alpha),  # type: ignore[arg-type]
        rank_stabilised=config.get("use_rslora") is True,
        transposed=config.get("fan_in_fan_out") is True,
        ranks=_patterns(config, "rank_pattern", place),
        alphas=_patterns(config, "alpha_pattern", place),
        saved=tuple(_texts(config.get("modules_to_save"))),
        targets=_targets(config.get("target_modules"), place),
        all_targets=isinstance(config.get("target_modules"), list)
        and not any(config.get(key) for key in ("exclude_modules", "layers_to_transform")),
    )


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _targets(given: object, place: str) -> Callable[[str], bool] | None:
    """Whether a module is adapted, by its name."""
    if isinstance(given, str):
        if given == _EVERY_LINEAR:
            return None
        try:
            return lambda name, pattern=re.compile(given): pattern.fullmatch(name) is not None  # type: ignore[misc]
        except re.error as problem:
            raise CheckpointError(f"{place}: target_modules: {problem}. Correct it.") from None
    ends = tuple(_texts(given))
    return (lambda name: f".{name}".endswith(tuple(f".{end}" for end in ends))) if ends else None


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
