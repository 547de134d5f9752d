"""Quantised checkpoints: fp8 with block scales is joined to its scales, all else is refused."""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import CheckpointError
from shardmerge.numerics import DType
from shardmerge.sources.tensor import BlockScale, TensorRef

SCALE_SUFFIX = "_scale_inv"
_DEFAULT_BLOCK = (128, 128)
_DEQUANTISE = (
    "Merging needs the values themselves. Dequantise it first (load it with transformers,\n"
    "  `model.dequantize()`, `save_pretrained`), or take the checkpoint that it was made from"
)
_PACKED = (  # suffix of a companion, suffix of the tensor that is packed if both exist, method
    (".qzeros", ".qweight", "GPTQ or AWQ"),
    (".scales", ".qweight", "GPTQ or AWQ"),
    (".scales", ".weight", "MLX"),
    ("_scales", "_blocks", "mxfp4"),
    (".weight_packed", ".weight_packed", "compressed-tensors"),
    (".bitsandbytes__nf4", ".bitsandbytes__nf4", "bitsandbytes, 4 bits"),
    (".bitsandbytes__fp4", ".bitsandbytes__fp4", "bitsandbytes, 4 bits"),
    (".SCB", ".weight", "bitsandbytes, 8 bits"),
    (".W_q", ".W_q", "HQQ"),
    ("._scale", "._data", "quanto"),
    (".weight_scale", ".weight", "8 or 4 bits with a scale per tensor, channel or group"),
    (".scale_weight", ".weight", "fp8 with a scale per tensor"),
)
_COMPANIONS = tuple({companion for companion, _, _ in _PACKED})


def block_size(config: Mapping[str, object], place: str) -> tuple[int, int] | None:
    """Rows and columns of a block of the fp8 that ``config`` declares; None for plain tensors.

    Raises:
        CheckpointError: for every other way of quantising.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            declared = part.get(key)
            if isinstance(declared, dict) and declared:
                return _block_size_of(declared, place)
            if declared:
                raise CheckpointError(f"{place}: {key} is not an object. Correct it.")
    return None


def _block_size_of(declared: Mapping[str, object], place: str) -> tuple[int, int]:
    method = declared.get("quant_method") or declared.get("quant_algo")
    if method is None:
        loaded = declared.get("load_in_4bit") or declared.get("load_in_8bit")
        method = "bitsandbytes" if loaded else "an unnamed method"
    if method != "fp8":
        raise CheckpointError(f"{place}: the tensors are quantised by {method}.\n  {_DEQUANTISE}.")
    block = declared.get("weight_block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
        or declared.get("activation_scheme", "dynamic") != "dynamic"
    ):
        raise CheckpointError(
            f"{place}: the tensors are quantised by fp8 with weight_block_size {block!r} and\n"
            f"  activation_scheme {declared.get('activation_scheme')!r}; only blocks of\n"
            f"  [rows, columns] with 'dynamic' are read. {_DEQUANTISE}."
        )
    return block[0], block[1]


def decode(
    tensors: dict[str, TensorRef], block: tuple[int, int] | None, url: str
) -> dict[str, TensorRef]:
    """The tensors, each block-scaled fp8 weight joined to its scales, which disappear.

    Args:
        tensors: as the headers have them.
        block: rows and columns of a block as ``config.json`` declares them; None where it does not.
        url: the checkpoint, as messages name it.

    Raises:
        CheckpointError: for scales that do not fit, and for packed tensors.
    """
    _refuse_packed(tensors, url)
    scales = {name for name in tensors if name.endswith(SCALE_SUFFIX)}
    if block is None and not scales:
        return tensors
    problems = []
    joined: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        if name in scales:
            weight = tensors.get(name.removesuffix(SCALE_SUFFIX))
            if weight is None or not weight.dtype.is_fp8:
                problems.append(f"scales {name!r} without an fp8 tensor that they belong to")
        elif tensor.dtype.is_fp8:
            found = _scaled(tensor, tensors.get(name + SCALE_SUFFIX), block or _DEFAULT_BLOCK)
            if isinstance(found, str):
                problems.append(found)
            else:
                joined[name] = found
        else:
            joined[name] = tensor
    if problems:
        known = "" if block else f" (no quantization_config: blocks of {_DEFAULT_BLOCK} tried)"
        raise CheckpointError(
            f"{url}: block-scaled fp8 that does not fit together{known}:\n  "
            + ";\n  ".join(problems[:3])
            + (f";\n  and {len(problems) - 3:,} more" if len(problems) > 3 else "")
            + ".\n  Download the checkpoint again, or dequantise it first."
        )
    return joined


def _scaled(tensor: TensorRef, scale: TensorRef | None, block: tuple[int, int]) -> TensorRef | str:
    """An fp8 tensor with its block scales, or why they do not fit."""
    if scale is None:
        return f"fp8 tensor {tensor.name!r} without scales {tensor.name + SCALE_SUFFIX!r}"
    if len(tensor.shape) != 2:
        return f"fp8 tensor {tensor.name!r} of shape {list(tensor.shape)} is not a matrix"
    needed = tuple(-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
    if scale.shape != needed:
        return (
            f"scales {scale.name!r} of shape {list(scale.shape)}: {list(tensor.shape)} in blocks "
            f"of {list(block)} needs {list(needed)}"
        )
    if scale.dtype not in (DType.F32, DType.BF16):
        return f"scales {scale.name!r} are {scale.dtype.value}; F32 or BF16 are read"
    # Not ``replace``, which takes several times as long: there are 45,000 in a large checkpoint.
    decode = BlockScale(scale, *block)
    return TensorRef(tensor.name, tensor.dtype, tensor.shape, tensor.segments, decode)


def _refuse_packed(tensors: Mapping[str, TensorRef], url: str) -> None:
    """Refuse tensors whose names tell that the stored elements are not the values."""
    for name in tensors:
        if not name.endswith(_COMPANIONS):
            continue
        for companion, packed, method in _PACKED:
            weight = tensors.get(name.removesuffix(companion) + packed)
            if name.endswith(companion) and weight is not None and _is_packed(weight.dtype):
                raise CheckpointError(
                    f"{url}: the tensors are quantised ({method}): {weight.name!r} is "
                    f"{weight.dtype.value}, with {name!r}.\n  {_DEQUANTISE}."
                )


def _is_packed(dtype: DType) -> bool:
    return not dtype.is_float or dtype.is_fp8
