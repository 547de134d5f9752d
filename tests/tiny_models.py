"""Tiny transformers models of random weights, their tokenizer, and texts for them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SPECIAL = ("[PAD]", "[UNK]", "[MASK]")
WORDS = tuple(f"w{i}" for i in range(40))
VOCABULARY = len(SPECIAL) + len(WORDS)
POSITIONS = 24
LABELS = ("no", "perhaps", "yes")

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": POSITIONS,
}
_BERT = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": POSITIONS,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {
            **_BERT,
            "id2label": dict(enumerate(LABELS)),
            "label2id": {name: number for number, name in enumerate(LABELS)},
        },
    ),
    "roberta": ("RobertaForCausalLM", "RobertaConfig", {**_BERT, "is_decoder": True}),
    "llama-cls": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_LLAMA, "num_labels": 2, "pad_token_id": 0},
    ),
}
"""Class of the model, class of its config, arguments of that."""


def write_model(
    folder: Path, kind: str, *, seed: int = 0, dtype: str = "float32", **config: Any
) -> Path:
    """A model with a tokenizer; its weights are large enough for gradients that differ."""
    model_class, config_class, arguments = KINDS[kind]
    torch.manual_seed(seed)
    made = getattr(transformers, config_class)(**{**arguments, **config})
    model = getattr(transformers, model_class)(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, *, mask: bool = True) -> None:
    """A token for each word."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"mask_token": "[MASK]"} if mask else {}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", **special
    ).save_pretrained(folder)


def texts(count: int, *, seed: int = 0, longest: int = 12) -> list[str]:
    """Random sentences of at least two words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(2, longest))) for _ in range(count)]


def write_jsonl(path: Path, records: Sequence[object]) -> str:
    """The path of a file with an object in each line."""
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def write_data(path: Path, count: int, *, seed: int = 0) -> str:
    """A file of texts with labels."""
    return write_jsonl(
        path,
        [{"text": text, "label": i % 2} for i, text in enumerate(texts(count, seed=seed))],
    )
