"""What PEFT and transformers call the modules of a checkpoint, and what an adapter says. Pure.

Written for PEFT 0.21 and transformers 5; what is used of them is in the docstrings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from shardmerge.architectures import is_transposed, task_type
from shardmerge.assets import public_text
from shardmerge.stores.api import scheme_of

ROOT = "base_model.model."
"""What PEFT's names of tensors begin with: its own two wrappers."""


def base_name(url: str) -> tuple[str, str | None]:
    """What an adapter says of its base model: name and revision, without credentials."""
    public = public_text(url)
    if scheme_of(public) != "hf":
        return public, None
    name, _, revision = public.removeprefix("hf://").partition("@")
    return name, revision or None


def adapter_config(
    ranks: Mapping[str, int],
    modules: Sequence[str],
    saved: Sequence[str],
    config: Mapping[str, object],
    base_url: str,
) -> dict[str, object]:
    """What ``adapter_config.json`` says.

    PEFT takes a module as a target whose name is listed or ends with ``.`` and a listed name; a key
    of a pattern is a regular expression for the end of a name, so keys here begin with ``^``.
    alpha is the rank, so that the product of the factors is added as it is.

    Args:
        ranks: by module, as transformers names it; at least one.
        modules: all that hold tensors of two dimensions.
        saved: modules that are stored whole.
        config: of the base model.
        base_url: of the base model, as it was given.
    """
    counts = Counter(ranks.values())
    rank = max(counts, key=lambda each: (counts[each], each))
    pattern = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
    name, revision = base_name(base_url)
    return {
        "peft_type": "LORA",
        "task_type": task_type(config),
        "base_model_name_or_path": name,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _targets(list(ranks), modules),
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": any(is_transposed(module, config) for module in ranks),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _targets(wanted: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """The modules as a list; as a regular expression where the end of another has such a name."""
    known = set(wanted)
    ends = {m[i + 1 :] for m in modules if m not in known for i, c in enumerate(m) if c == "."}
    if known.isdisjoint(ends):
        return sorted(wanted)
    return "|".join(map(re.escape, sorted(wanted)))
