"""Synthetic families: a base model and fine-tunes of it, the same bytes for the same seed.

A family looks like llamas on the Hugging Face hub: sharded bfloat16 safetensors with an index, a
config that transformers loads, a tokenizer. Base elements are drawn from N(0, 0.02), task vectors
from N(0, 0.002), and each fine-tune leaves one tensor in ten as it was. A checkpoint depends only
on the seed and its position, so a family of 8 models begins with the bytes of a family of 3.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.checkpoint import NamedShape, write_small_files, write_weights

log = logging.getLogger("benchmarks")

VERSION = 1  # raised when the same settings give other bytes: cached families are then made again


@dataclass(frozen=True, slots=True)
class Llama:
    """The sizes of a llama, as its config names them."""

    hidden: int
    layers: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int

    def tensors(self) -> tuple[NamedShape, ...]:
        """Name and shape of every tensor, in the order of the model."""
        kv = self.hidden // self.heads * self.kv_heads
        layer: list[NamedShape] = [
            ("input_layernorm.weight", (self.hidden,)),
            ("self_attn.q_proj.weight", (self.hidden, self.hidden)),
            ("self_attn.k_proj.weight", (kv, self.hidden)),
            ("self_attn.v_proj.weight", (kv, self.hidden)),
            ("self_attn.o_proj.weight", (self.hidden, self.hidden)),
            ("post_attention_layernorm.weight", (self.hidden,)),
            ("mlp.gate_proj.weight", (self.intermediate, self.hidden)),
            ("mlp.up_proj.weight", (self.intermediate, self.hidden)),
            ("mlp.down_proj.weight", (self.hidden, self.intermediate)),
        ]
        return (
            ("model.embed_tokens.weight", (self.vocab, self.hidden)),
            *((f"model.layers.{i}.{n}", shape) for i in range(self.layers) for n, shape in layer),
            ("model.norm.weight", (self.hidden,)),
            ("lm_head.weight", (self.vocab, self.hidden)),
        )

    def config(self) -> dict[str, object]:
        """What transformers needs to build the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True, slots=True)
class Design:
    """What a family is made from, but for the seed and the number of models."""

    name: str
    tensors: tuple[NamedShape, ...]
    config: dict[str, object]
    shard_bytes: int


@dataclass(frozen=True, slots=True)
class Family:
    """A family on disk; ``bytes_each`` counts the elements of one checkpoint, without headers."""

    name: str
    base: Path
    models: tuple[Path, ...]
    bytes_each: int

    def checkpoints(self) -> tuple[Path, ...]:
        """All folders, the base model's first."""
        return (self.base, *self.models)

    def first(self, models: int) -> Family:
        """The same family with only its first ``models``."""
        return replace(self, models=self.models[:models])


LLAMAS = {
    "tiny": (Llama(128, 4, 352, 1024, 4, 2), 1 << 20),
    "0.3B": (Llama(1024, 22, 2816, 32000, 16, 4), 1 << 28),
    "1.1B": (Llama(2048, 22, 5632, 32000, 32, 4), 10**9),
}


def llama(name: str) -> Design:
    """The design of a family of llamas: a key of ``LLAMAS``."""
    sizes, shard_bytes = LLAMAS[name]
    return Design(name, sizes.tensors(), sizes.config(), shard_bytes)


def huge(tensor_bytes: int) -> Design:
    """A design of one tensor of ``tensor_bytes``, rounded up to a whole row of 4096 elements."""
    rows = -(-tensor_bytes // 8192)
    tensors: tuple[NamedShape, ...] = (("model.embed_tokens.weight", (rows, 4096)),)
    config = Llama(4096, 0, 4096, rows, 32, 32).config()
    return Design(f"huge-{rows * 8192}", tensors, config, rows * 8192)


def make(design: Design, root: Path, *, models: int, seed: int = 0) -> Family:
    """The family under ``root``; checkpoints already there with the same settings are kept."""
    folder = root / f"{design.name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    base, *others = (folder / name for name in ("base", *(f"model{k + 1}" for k in range(models))))
    _ensure(design, base, base=None, key=(seed, 0))
    for k, path in enumerate(others):
        _ensure(design, path, base=base, key=(seed, k + 1))
    return Family(design.name, base, tuple(others), _bytes_each(design))


def _ensure(design: Design, path: Path, *, base: Path | None, key: tuple[int, int]) -> None:
    settings = json.dumps(
        {
            "version": VERSION,
            "seed": key[0],
            "position": key[1],
            "shard_bytes": design.shard_bytes,
            "tensors": [[name, list(shape)] for name, shape in design.tensors],
        }
    )
    # The marker lies beside the checkpoint, not in it: merges copy small files from a base model.
    marker = path.with_name(path.name + ".made.json")
    if path.is_dir() and marker.exists() and marker.read_text() == settings:
        return
    log.info("making %s, %.1f MB", path, _bytes_each(design) / 1e6)
    marker.unlink(missing_ok=True)
    part = path.with_name(path.name + ".part")
    for old in (part, path):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    write_weights(part, design.tensors, shard_bytes=design.shard_bytes, key=key, base=base)
    write_small_files(part, design.config)
    part.rename(path)
    marker.write_text(settings)


def _bytes_each(design: Design) -> int:
    return 2 * sum(math.prod(shape) for _, shape in design.tensors)


def main() -> None:
    """Make a family and say where it is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--dir", type=Path, default=Path(".bench"), help="made in DIR/families")
    parser.add_argument("--family", choices=LLAMAS, default="1.1B")
    parser.add_argument("--huge-bytes", type=int, help="one tensor of this size instead")
    parser.add_argument("--models", type=int, default=3, help="besides the base model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    design = huge(args.huge_bytes) if args.huge_bytes else llama(args.family)
    family = make(design, args.dir / "families", models=args.models, seed=args.seed)
    models = [str(path) for path in family.models]
    fields = {"family": family.name, "bytes_each": family.bytes_each, "base": str(family.base)}
    print(json.dumps({**fields, "models": models}))


if __name__ == "__main__":
    main()
