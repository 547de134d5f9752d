"""Checkpoints of real shapes without elements: headers, then a hole as long as they say.

For what reads headers alone. A hole takes no disk, so a checkpoint of 700 GB takes some megabytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import INDEX

BLOCK = 128
SHARD_BYTES = 43 * 10**8
_ITEMSIZE = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Hollow:
    """A tensor of a header: its dtype as the format names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class DeepSeek:
    """DeepSeek-V3, as its own checkpoint names and shapes it, but for the layer that predicts
    further tokens.

    Args:
        experts: of a layer beside the shared one.
        fp8: whether matrices are fp8 with block scales, each a tensor of its own.
    """

    layers: int = 61
    dense: int = 3
    experts: int = 256
    fp8: bool = True
    hidden: int = 7168
    vocab: int = 129280

    def tensors(self) -> Iterator[Hollow]:
        """Every tensor, in the order of the model."""
        yield Hollow("model.embed_tokens.weight", "BF16", (self.vocab, self.hidden))
        for layer in range(self.layers):
            for name, shape in self._layer(dense=layer < self.dense):
                yield from self._stored(f"model.layers.{layer}.{name}", shape)
        yield Hollow("model.norm.weight", "BF16", (self.hidden,))
        yield Hollow("lm_head.weight", "BF16", (self.vocab, self.hidden))

    def _layer(self, *, dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, heads = self.hidden, 128
        yield "input_layernorm.weight", (hidden,)
        yield "self_attn.q_a_proj.weight", (1536, hidden)
        yield "self_attn.q_a_layernorm.weight", (1536,)
        yield "self_attn.q_b_proj.weight", (heads * 192, 1536)
        yield "self_attn.kv_a_proj_with_mqa.weight", (576, hidden)
        yield "self_attn.kv_a_layernorm.weight", (512,)
        yield "self_attn.kv_b_proj.weight", (heads * 256, 512)
        yield "self_attn.o_proj.weight", (hidden, heads * 128)
        yield "post_attention_layernorm.weight", (hidden,)
        if dense:
            yield from _feed_forward("mlp", hidden, 18432)
            return
        yield "mlp.gate.weight", (self.experts, hidden)
        yield "mlp.gate.e_score_correction_bias", (self.experts,)
        yield from _feed_forward("mlp.shared_experts", hidden, 2048)
        for expert in range(self.experts):
            yield from _feed_forward(f"mlp.experts.{expert}", hidden, 2048)

    def _stored(self, name: str, shape: tuple[int, ...]) -> Iterator[Hollow]:
        if name.endswith("bias"):
            yield Hollow(name, "F32", shape)
        elif self.fp8 and name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            yield Hollow(name, "F8_E4M3", shape)
            yield Hollow(f"{name}_scale_inv", "F32", tuple(-(-size // BLOCK) for size in shape))
        else:
            yield Hollow(name, "BF16", shape)

    def config(self) -> dict[str, object]:
        """What is read of its config."""
        config: dict[str, object] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "n_routed_experts": self.experts,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        if self.fp8:
            config["quantization_config"] = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
            }
        return config


def _feed_forward(name: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.gate_proj.weight", (inner, hidden)
    yield f"{name}.up_proj.weight", (inner, hidden)
    yield f"{name}.down_proj.weight", (hidden, inner)


def write(folder: Path, tensors: Sequence[Hollow], config: dict[str, object]) -> None:
    """Write shards of headers and holes, the index and the config of a checkpoint."""
    folder.mkdir(parents=True)
    shards = _shards(tensors)
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):06d}.safetensors"
        _write_shard(folder / file, sorted(shard, key=lambda tensor: tensor.name))
        weight_map.update({tensor.name: file for tensor in shard})
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _shards(tensors: Sequence[Hollow]) -> list[list[Hollow]]:
    shards: list[list[Hollow]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: Sequence[Hollow]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
