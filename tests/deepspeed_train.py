"""Trains a tiny model with DeepSpeed and writes ZeRO checkpoints: a script of its own environment.

python -m torch.distributed.run --nproc-per-node 2 deepspeed_train.py OUT STAGE-DTYPE...

For each case, OUT/STAGE-DTYPE is a training folder, OUT/STAGE-DTYPE.npz holds what DeepSpeed's own
converter makes of it, and, of ZeRO-3, OUT/STAGE-DTYPE-universal is the universal checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

STEPS = 2
CONVERT = "deepspeed.checkpoint.ds_to_universal"
DTYPES = {"bf16": {"bf16": {"enabled": True}}, "fp32": {}, "fp16": {"fp16": {"enabled": True}}}


class Tiny(torch.nn.Module):
    """Odd sizes, so that partitions cut tensors; tied, frozen, scalar and buffered ones."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(101, 17)
        self.frozen = torch.nn.Linear(17, 17)
        self.frozen.requires_grad_(False)
        self.up = torch.nn.Linear(17, 29)
        self.norm = torch.nn.LayerNorm(29)
        self.down = torch.nn.Linear(29, 17, bias=False)
        self.gate = torch.nn.Parameter(torch.ones(1))
        self.head = torch.nn.Linear(17, 101, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("scale", torch.arange(5, dtype=torch.float32) / 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.emb(ids))
        x = self.down(torch.relu(self.norm(self.up(x)))) * self.gate + x
        return self.head(x)


def groups(model: torch.nn.Module) -> list[dict[str, object]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train(folder: Path, stage: int, dtype: str) -> None:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 900 if dtype == "fp32" else 10**9,  # several flat groups per group
        },
        "zero_allow_untested_optimizer": True,
        **DTYPES[dtype],
    }
    model = Tiny()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.randint(0, 101, (2, 8), generator=torch.Generator().manual_seed(engine.global_rank))
    for _ in range(STEPS):
        logits = engine(ids).float()
        engine.backward(torch.nn.functional.cross_entropy(logits.view(-1, 101), ids.view(-1)))
        engine.step()
    engine.save_checkpoint(str(folder))
    if engine.global_rank == 0:
        found = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        np.savez(
            folder.with_suffix(".npz"), **{k: v.detach().float().numpy() for k, v in found.items()}
        )
        if stage == 3 and dtype == "bf16":
            into = ["--output_folder", f"{folder}-universal"]
            step = ["--input_folder", str(folder / (folder / "latest").read_text())]
            subprocess.run([sys.executable, "-m", CONVERT, *step, *into], check=True)
    torch.distributed.barrier()


def main() -> None:
    out, *cases = sys.argv[1:]
    deepspeed.init_distributed(dist_backend="gloo")
    # DeepSpeed refuses half precision on CPUs for its speed; here only its files matter.
    get_accelerator().is_fp16_supported = lambda: True
    for case in cases:
        stage, _, dtype = case.partition("-")
        train(Path(out, case), int(stage), dtype)


if __name__ == "__main__":
    main()
