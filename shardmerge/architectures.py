"""What a config tells of a model's architecture: its task, its head, how its layers store weights.

Pure. Written for transformers 5 and PEFT 0.21; what is used of them is in the docstrings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)
HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT saves and loads whole for a task, whatever the adapter says."""
_OWN_NAMES = ("lm_head", "embed_out", "cls", "classifier", "score", "qa_outputs", "predictions")
"""Modules that lie beside the base model in a model with a head."""
_PREFIXES = {
    **dict.fromkeys(("gpt2", "bloom", "falcon", "gptj", "gpt_neo", "codegen"), "transformer"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), "model"),
    **dict.fromkeys(("phi", "phi3", "olmo", "olmo2", "starcoder2", "stablelm", "opt"), "model"),
    **dict.fromkeys(("bert", "distilbert", "electra", "albert", "mpnet"), ""),
    **{"roberta": "roberta", "xlm-roberta": "roberta", "gpt_neox": "gpt_neox"},
}
"""By ``model_type``, the name of the base model in a model with a head; empty: the type itself."""
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Types of models whose linear layers are ``Conv1D``: their weights are stored as [in, out]."""
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def model_type(config: Mapping[str, object]) -> str:
    """The type of a model as transformers names it; empty where nothing tells."""
    return str(config.get("model_type", ""))


def architecture(config: Mapping[str, object]) -> str:
    """The class of a model in transformers; empty where nothing tells."""
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else ""


def task_type(config: Mapping[str, object]) -> str | None:
    """PEFT's name for what a model does; None for what it has no name for."""
    name = architecture(config)
    if name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    if _is_headless(name):
        return "FEATURE_EXTRACTION"
    return next((task for ending, task in _TASKS if name.endswith(ending)), None)


def _is_headless(name: str) -> bool:
    return name.endswith("Model") and not name.endswith(("LMHeadModel", "HeadsModel"))


def added_prefix(config: Mapping[str, object], names: Iterable[str]) -> str:
    """What transformers puts before the names of a checkpoint of a base model without a head.

    Such a checkpoint (the published gpt2: ``h.0.attn.c_attn.weight``) says in its config that it is
    of a model with a head, in which the base model is a module (``transformer``).
    """
    kind = model_type(config)
    if kind not in _PREFIXES or not architecture(config) or _is_headless(architecture(config)):
        return ""
    prefix = f"{_PREFIXES[kind] or kind}."
    return "" if any(name.startswith(prefix) for name in names) else prefix


def loaded_name(name: str, prefix: str) -> str:
    """The name of a tensor or module in the model that transformers loads."""
    return name if name.partition(".")[0] in _OWN_NAMES else f"{prefix}{name}"


def is_transposed(module: str, config: Mapping[str, object]) -> bool:
    """Whether a linear layer's weight is stored as [in, out]."""
    return model_type(config) in _TRANSPOSED and module.rpartition(".")[2] in _CONV1D


_MEDIA = re.compile(r"(vision|audio|image|speech)_config|image_size|patch_size")


def is_of_media(config: Mapping[str, object]) -> bool:
    """Whether a model, or a part of it, is for images or sound: transformers renames modules."""
    return any(_MEDIA.fullmatch(key) for key in config)
