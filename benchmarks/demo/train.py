"""Fine-tuning the encoder on one task, with a frozen head; reused when nothing has changed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from benchmarks.demo.encoder import Encoder, batches_by_length
from benchmarks.demo.tasks import Example, Task
from shardmerge.estimate.sums import Sums


def checkpoint(work: Path, name: str) -> Path:
    """Return the folder of the base model (``base``) or of a task's fine-tune."""
    return work / "models" / name


def fisher(work: Path, name: str) -> Path:
    """Return the folder of the estimated Fisher information of a task's fine-tune."""
    return work / "fisher" / name


def adam(work: Path, name: str) -> Path:
    """Return the folder of Adam's squared gradients, which stand in for Fisher information."""
    return work / "adam" / name


def _stamp_file(work: Path, name: str) -> Path:
    """Return the file that says how a checkpoint was made; written last, when it is complete."""
    return work / "models" / f"{name}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to fine-tune.

    Args:
        steps: Batches to train on.
        batch_size: Texts in a batch.
        learning_rate: The largest one; it rises over the first tenth and then falls to zero.
        scale: Factor on the cosines, so that the softmax over them can be confident.
        seed: Of the order of the batches, and of the examples that ``fisher_samples`` draws.
        fisher_samples: Training examples whose squared gradients are the Fisher information.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    scale: float = 20.0
    seed: int = 0
    fisher_samples: int = 128

    def rate_at(self, step: int) -> float:
        """Return the share, in (0, 1], of the learning rate which ``step`` uses."""
        warm_up = max(1, self.steps // 10)
        return min((step + 1) / warm_up, (self.steps - step) / self.steps)


def save_base(model: Path, work: Path) -> Encoder:
    """Save the packaged model in ``work`` as the fine-tunes are saved, and return it."""
    base = Encoder(model)
    base.save(checkpoint(work, "base"))
    return base


def fine_tune(
    work: Path,
    task: Task,
    head: Tensor,
    settings: Settings,
    *,
    progress: Callable[[int], None],
) -> bool:
    """Fine-tune the base model on ``task``; save the result and its Fisher information.

    Args:
        work: Folder of all models; a fine-tune there that was made in the same way is kept.
        task: The task; only its training examples are used.
        head: Frozen vectors of the classes, float32 of shape [classes, width].
        settings: How to train.
        progress: Called with the number of steps done.

    Returns:
        Whether there was anything to do.
    """
    stamp: dict[str, object] = {
        "settings": asdict(settings),
        "data": _digest(task),
        **versions(),
    }
    stamp_file = _stamp_file(work, task.name)
    if stamp_file.exists() and json.loads(stamp_file.read_text(encoding="utf-8")) == stamp:
        return False
    stamp_file.unlink(missing_ok=True)
    torch.manual_seed(settings.seed)
    encoder = Encoder(checkpoint(work, "base"))
    # Rare words would hardly move in so few steps, and their table is half of the model.
    encoder.model.embeddings.requires_grad_(False)
    trained = {n: p for n, p in encoder.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate_at)
    for step, batch in enumerate(_batches(task, settings)):
        cosines = encoder.embed([example.text for example in batch]) @ head.T
        targets = torch.tensor([example.target for example in batch])
        loss = functional.cross_entropy(settings.scale * cosines, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step + 1)
    encoder.save(checkpoint(work, task.name))
    _save_fisher(encoder, adam(work, task.name), _adams_squares(trained, optimizer, settings))
    estimated = _fisher_information(encoder, trained, task, head, settings)
    _save_fisher(encoder, fisher(work, task.name), estimated)
    stamp_file.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    return True


def _batches(task: Task, settings: Settings) -> list[list[Example]]:
    """Return the batches, as many epochs as it takes; texts of a batch have similar lengths."""
    shuffled = random.Random(settings.seed)
    batches: list[list[Example]] = []
    while len(batches) < settings.steps:
        examples = list(task.train)
        shuffled.shuffle(examples)
        epoch = batches_by_length(examples, settings.batch_size)
        shuffled.shuffle(epoch)
        batches += epoch
    return batches[: settings.steps]


def _digest(task: Task) -> str:
    content = json.dumps([task.classes, [(e.text, e.target) for e in task.train]])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _fisher_information(
    encoder: Encoder,
    trained: dict[str, torch.nn.Parameter],
    task: Task,
    head: Tensor,
    settings: Settings,
) -> dict[str, Tensor]:
    """Return the mean over examples of the squared gradient of the right class's log-probability.

    What ``shardmerge fisher`` does for transformers' own heads; this one is the demonstration's.
    """
    sums = Sums(trained)
    count = min(settings.fisher_samples, len(task.train))
    for example in random.Random(settings.seed).sample(task.train, count):
        cosines = encoder.embed([example.text]) @ head.T
        log_p = functional.log_softmax(settings.scale * cosines, dim=-1)[0, example.target]
        log_p.backward()  # type: ignore[no-untyped-call]
    wholes = {name: sums.whole(name) for name in trained}
    return {name: whole / count for name, whole in wholes.items() if whole is not None}


def _adams_squares(
    trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, settings: Settings
) -> dict[str, Tensor]:
    """Return Adam's mean of squared gradients: a diagonal Fisher information that costs nothing.

    Adam squares the mean gradient of a batch; the square expected of one example is about
    ``batch_size`` times as large. Its running mean starts at zero, which is corrected as Adam does.
    """
    factor = settings.batch_size / (1 - optimizer.defaults["betas"][1] ** settings.steps)
    return {
        name: optimizer.state[parameter]["exp_avg_sq"] * factor
        for name, parameter in trained.items()
        if parameter in optimizer.state  # the pooler is never used, so it has no gradient
    }


def _save_fisher(encoder: Encoder, folder: Path, information: dict[str, Tensor]) -> None:
    """Save ``information`` as a checkpoint; zeros stand for what was not trained."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: information.get(name, torch.zeros_like(value)).contiguous()
        for name, value in encoder.model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    encoder.model.config.save_pretrained(folder)


def versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
