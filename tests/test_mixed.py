"""One recipe over models as people have them, on an S3 server: safetensors, ZeRO-3, LoRA, .bin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from shardmerge.cli import main
from shardmerge.numerics import DType
from tests.support import read_tensors, upload

CASE = "3-fp32"
LORA = LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down"], init_lora_weights=False)


class Tiny(torch.nn.Module):
    """What is adapted of the model that ``deepspeed_train.py`` trains."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.up = torch.nn.Linear(17, 29)
        self.down = torch.nn.Linear(29, 17, bias=False)
        own = {name: tensors[name] for name in self.state_dict()}
        self.load_state_dict(own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


@pytest.fixture
def models(zero_runs: Path, tmp_path: Path, bucket: str) -> dict[str, str]:
    """The URL of each kind, and of the adapter."""
    with np.load(zero_runs / f"{CASE}.npz") as found:
        trained = {name: torch.from_numpy(value.copy()) for name, value in found.items()}
    generator = torch.Generator().manual_seed(0)

    def another() -> dict[str, torch.Tensor]:
        return {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in trained.items()
        }

    base = another()
    for name in ("hf", "bin"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    save_file(base, tmp_path / "hf" / "model.safetensors")
    torch.save(another(), tmp_path / "bin" / "pytorch_model.bin")
    get_peft_model(Tiny(base), LORA).save_pretrained(tmp_path / "lora")
    urls = {name: upload(bucket, tmp_path / name, name) for name in ("hf", "bin", "lora")}
    return {**urls, "zero": upload(bucket, zero_runs / CASE, "zero")}


def in_float64(tmp_path: Path, zero_runs: Path) -> dict[str, np.ndarray]:
    """The merge, from the files on disk, with nothing of ours."""
    from safetensors.torch import load_file

    base = load_file(tmp_path / "hf" / "model.safetensors")
    torn = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    found = {}
    with np.load(zero_runs / f"{CASE}.npz") as zero:
        for name, value in base.items():
            start = value.double()
            delta = (torch.from_numpy(zero[name]).double() - start) + (torn[name].double() - start)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in factors:
                a, b = (factors[f"{module}.lora_{x}.weight"].double() for x in "AB")
                delta += 2 * (b @ a)
            found[name] = (start + 0.3 * delta).numpy()
    return found


def test_one_command_merges_them_all(models, zero_runs, tmp_path, bucket, capsys):
    listed = [models["zero"], f"{models['hf']}+{models['lora']}", models["bin"]]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": models["hf"],
        "models": [{"model": url, "parameters": {"weight": 0.3}} for url in listed],
        "rules": [{"tensors": "*", "missing": "base"}],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    out = f"{bucket}/out"
    assert main(["merge", str(tmp_path / "recipe.yml"), out]) == 0, capsys.readouterr().err
    assert main(["verify", out]) == 0
    copy = {"merge_method": "passthrough", "models": [{"model": out}]}
    (tmp_path / "copy.yml").write_text(yaml.safe_dump(copy))
    assert main(["merge", str(tmp_path / "copy.yml"), str(tmp_path / "out")]) == 0
    found, want = read_tensors(tmp_path / "out"), in_float64(tmp_path, zero_runs)
    assert set(found) == set(want)
    for name, (dtype, shape, data) in found.items():
        assert dtype is DType.F32 and shape == want[name].shape
        value = np.frombuffer(data, np.float32).reshape(shape)
        assert np.allclose(value, want[name], rtol=1e-6, atol=1e-6), name
