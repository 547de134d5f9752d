"""Tiny checkpoints and recipes, and an engine whose blocks, tiles and parts are as tiny."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import yaml
from botocore.session import Session

from shardmerge import arrays, execute, layout, memory, plan, runs, work
from shardmerge.header import parse_header, write_header, write_index
from shardmerge.kernels import compile as kernel_compile
from shardmerge.kernels import cuda, cuda_code, cuda_driver, cuda_memory
from shardmerge.kernels.device import Cpu, Device
from shardmerge.kernels.trace import Kernels
from shardmerge.layout import Shard
from shardmerge.numerics import DType
from shardmerge.outputs.api import STAGING
from shardmerge.outputs.local import LEDGER_FILE as LEDGER
from shardmerge.plan import Plan
from shardmerge.prepare import Where, prepare
from shardmerge.progress import Quiet
from shardmerge.records import TASKS, TaskRecord
from shardmerge.sources import Checkpoint
from shardmerge.sources.tensor import reads
from shardmerge.stores import Stores

if TYPE_CHECKING:
    import pytest

LACKING = cuda_driver.lacking
"""The real one: conftest puts another in its place."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

Specs = Mapping[str, tuple[DType, tuple[int, ...]]]
"""Dtype and shape of each tensor, by name."""
Raw = npt.NDArray[np.generic]
"""Stored elements; bfloat16 as uint16."""

BLOCK = 64
"""Elements of a canonical block in a shrunk engine."""
RAN = work.Ran(node="here", process=1, attempt=1, began=0.0, ended=1.0, peak_bytes=2**20)
"""Of a task that only a test has run."""
RECORD = TaskRecord(
    task=0,
    step="merge",
    tensor="t",
    tensors=1,
    shard=SINGLE,
    read_bytes=3,
    write_bytes=1,
    read_s=1.0,
    kernel_s=2.0,
    write_s=3.0,
    wall_s=7.0,
    began=100.0,
    peak_bytes=5,
    promised_bytes=6,
    node="here",
    process=1,
    attempt=1,
)
"""Of such a task."""
PLENTY_BYTES = 2**30
"""Memory in which every tiny tensor is resident."""

SEVERAL_DTYPES: Specs = {
    "model.embed_tokens.weight": (DType.BF16, (40, 24)),
    "model.layers.0.mlp.up_proj.weight": (DType.BF16, (24, 31)),
    "model.layers.0.mlp.scale": (DType.F32, ()),
    "model.layers.0.norm.weight": (DType.F32, (24,)),
    "model.layers.1.mlp.up_proj.weight": (DType.F16, (24, 31)),
    "model.layers.1.mlp.gate": (DType.F16, (0, 7)),
    "model.layers.1.norm.weight": (DType.F32, (1,)),
    "model.layers.1.attn.weight": (DType.F32, (3, 7, 29)),
    "model.position_ids": (DType.I64, (1, 17)),
    "model.norm.weight": (DType.F64, (5, 33)),
}
"""Tensors of every kind: many blocks, a scalar, no elements, one element, integers, float64."""
HALVES: Specs = {f"model.layers.{i}.weight": (DType.BF16, (24, 31)) for i in range(6)}
"""Tensors of one shape and dtype, so that a run compiles few kernels."""


# --- checkpoints --------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    specs: Specs = SEVERAL_DTYPES,
    *,
    seed: int = 0,
    shards: int = 1,
    positive: bool = False,
    files: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint of random values; integers are the same whatever the seed is.

    Args:
        shards: number of files; with 1 there is no index.
        positive: as Fisher information is.
        files: text of further files, by name.
    """
    rng = np.random.default_rng(seed)
    tensors = {name: values(rng, *spec, positive=positive) for name, spec in specs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "hidden_size": 24}))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    names = list(specs)
    each = math.ceil(len(names) / shards)
    weight_map, total = {}, 0
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else SINGLE
        own = names[number * each : (number + 1) * each]
        total += write_shard(folder / shard, specs, {name: tensors[name] for name in own})
        weight_map.update(dict.fromkeys(own, shard))
    if shards > 1:
        (folder / INDEX).write_bytes(write_index(weight_map, total))
    return folder


def write_grams(
    folder: Path, specs: Specs, *, seed: int = 0, tokens: int = 100, rows: Sequence[str] = ()
) -> Path:
    """Gram matrices of the inputs of every matrix but tables of embeddings, float32.

    Args:
        tokens: that they are the mean of; as many inputs are seen, or all.
        rows: weights whose inputs are their rows; config.json says so.
    """
    rng, found = np.random.default_rng(seed), {}
    for name, (_, shape) in specs.items():
        if len(shape) not in (2, 3) or 0 in shape or "embed" in name or "position" in name:
            continue
        side = shape[-2] if name in rows else shape[-1]
        inputs = rng.standard_normal((*shape[:-2], tokens, side)) * np.exp(
            rng.standard_normal(side)
        )
        found[name] = (np.swapaxes(inputs, -1, -2) @ inputs / tokens).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"gram": {"rows": list(rows)}}))
    write_shard(folder / SINGLE, {n: (DType.F32, g.shape) for n, g in found.items()}, found)
    return folder


def write_shard(path: Path, specs: Specs, tensors: Mapping[str, Raw]) -> int:
    """One file of a checkpoint; gives the bytes of its tensors."""
    header = write_header([(name, *specs[name]) for name in tensors], align=8)
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(header + data)
    return len(data)


def values(
    rng: np.random.Generator, dtype: DType, shape: tuple[int, ...], *, positive: bool
) -> Raw:
    """Stored elements of one tensor."""
    if not dtype.is_float:
        return np.arange(math.prod(shape), dtype=dtype.torch_name)
    found = rng.standard_normal(math.prod(shape)) * 0.1
    return stored(np.abs(found) if positive else found, dtype)


def stored(floats: npt.ArrayLike, dtype: DType) -> Raw:
    """Floats as they are stored; bfloat16 by cutting off what does not fit."""
    if dtype is DType.BF16:
        return (np.asarray(floats, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.asarray(floats, dtype=dtype.torch_name)


def loaded(raw: bytes | Raw, dtype: DType) -> npt.NDArray[np.float64]:
    """Stored elements as float64."""
    data = raw if isinstance(raw, bytes) else raw.tobytes()
    if dtype is DType.BF16:
        wide = np.frombuffer(data, dtype=np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).astype(np.float64)
    return np.frombuffer(data, dtype=dtype.torch_name).astype(np.float64)


def read_tensors(folder: Path) -> dict[str, tuple[DType, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint: dtype, shape and stored bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        for name, tensor in parse_header(data, len(data), path.name).tensors.items():
            content = data[tensor.offset : tensor.offset + tensor.nbytes]
            found[name] = (tensor.dtype, tensor.shape, content)
    return found


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The elements of every tensor, in whatever pieces it lies, as they are stored."""
    data = {name: bytearray(tensor.nbytes) for name, tensor in checkpoint.tensors.items()}
    Stores().read(
        item
        for name, tensor in checkpoint.tensors.items()
        for item in reads(tensor, 0, tensor.numel, memoryview(data[name]))
    )
    return {name: bytes(found) for name, found in data.items()}


def upload(bucket: str, folder: Path, prefix: str) -> str:
    """The URL of a copy of a folder in a bucket that the environment leads to."""
    client = Session().create_client("s3")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder)}"
            client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=path.read_bytes())
    return f"{bucket}/{prefix}"


def set_element(folder: Path, name: str, index: int, value: float) -> None:
    """Overwrite one element of a tensor of a single-file checkpoint."""
    path = folder / SINGLE
    data = bytearray(path.read_bytes())
    tensor = parse_header(data, len(data), path.name).tensors[name]
    content = stored([value], tensor.dtype).tobytes()
    at = tensor.offset + index * tensor.dtype.itemsize
    data[at : at + len(content)] = content
    path.write_bytes(data)


# --- recipes ------------------------------------------------------------------------------------


def recipe_of(
    method: str, base: Path | None, models: Mapping[Path, Mapping[str, object]], **top: object
) -> dict[str, object]:
    """A recipe; ``models`` maps each to its parameters, ``top`` holds everything else."""
    found: dict[str, object] = {"merge_method": method}
    if base is not None:
        found["base_model"] = str(base)
    found["models"] = [
        {"model": str(model), **({"parameters": dict(own)} if own else {})}
        for model, own in models.items()
    ]
    return found | top


def write_recipe(path: Path, recipe: Mapping[str, object]) -> str:
    """The path of a recipe's file."""
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    return str(path)


# --- what is in a folder ------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder, by its path there; of the tasks' times, none."""
    return {
        str(path.relative_to(folder)): b"" if path.name == TASKS else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def visible(folder: Path) -> dict[str, bytes]:
    """The same without the staging folder."""
    return {
        name: content
        for name, content in tree(folder).items()
        if not name.startswith(f"{STAGING}/")
    }


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


# --- a small engine -----------------------------------------------------------------------------

Set = Callable[[ModuleType, str, object], None]


def shrink(set_: Set, *, part_bytes: int = 1024, tile_blocks: int = 4, measure_blocks: int = 8):
    """Give the engine blocks of 64 elements, and parts and tiles to match.

    Args:
        set_: ``monkeypatch.setattr``, or ``setattr`` in a process of its own.
        part_bytes: at least 8 bytes for each element of a block.
    """
    for module in (
        kernel_compile,
        cuda_code,
        cuda_memory,
        cuda,
        runs,
        memory,
        plan,
        layout,
        arrays,
    ):
        set_(module, "CANONICAL_BLOCK", BLOCK)
    set_(layout, "PART_BYTES", part_bytes)
    set_(layout, "LEAST_PART_BYTES", part_bytes // 12)
    set_(memory, "TILE_ELEMENTS", tile_blocks * BLOCK)
    set_(memory, "REMOTE_TILE_ELEMENTS", tile_blocks * BLOCK)
    set_(memory, "CUDA_TILE_ELEMENTS", tile_blocks * BLOCK)
    set_(cuda_memory, "CHUNK_ELEMENTS", 2 * BLOCK)
    set_(plan, "MEASURE_ELEMENTS", measure_blocks * BLOCK)
    set_(memory, "COMFORTABLE_BYTES", 0)
    set_(memory, "CUDA_COMFORTABLE_BYTES", 0)
    set_(execute, "COMMIT_BYTES", 4096)
    set_(execute, "COMMIT_S", 0.02)
    set_(work, "Kernels", _shared_kernels)
    set_(arrays, "_KERNELS", _shared_kernels())


_KERNELS: dict[str, Kernels] = {}


def _shared_kernels(device: Device | None = None) -> Kernels:
    """Kernels of the shrunk engine, compiled once per process: all that a tiny merge costs."""
    device = device or Cpu()
    return _KERNELS.setdefault(device.name, Kernels(device))


def plan_of(
    recipe: str, out: Path | str = "OUT", *, memory_bytes: int = PLENTY_BYTES, threads: int = 1
) -> Plan:
    """The plan of a recipe."""
    return prepare(recipe, str(out), Where(memory_bytes=memory_bytes, threads=threads)).plan


def least_memory(recipe: str, *, workers: int = 1) -> int:
    """The smallest budget in which so many workers fit: tensors that are measured are streamed."""
    ready = prepare(recipe, "OUT", Where(memory_bytes=PLENTY_BYTES, threads=1))
    plans = [ready.plan, *([ready.first.plan] if ready.first else [])]
    least = max(memory.least_bytes(tensor) for plan in plans for tensor in plan.tensors)
    return memory.FOOTPRINT_BYTES + workers * least


class StopsWhenPlanned(Quiet):
    """Stops a run when its ledger has begun, before the first task."""

    def __init__(self) -> None:
        super().__init__()
        self.stop = threading.Event()

    def start(self, **counts: int) -> None:
        super().start(**counts)
        self.stop.set()


# --- what is written ----------------------------------------------------------------------------


def path_of(*arguments: Any, **more: Any) -> str:
    """What a call of ``os`` is about: a path, or that of an open file."""
    if isinstance(arguments[0], int):
        return str(Path(f"/proc/self/fd/{arguments[0]}").readlink())
    folder = more.get("dir_fd")
    path = os.fspath(arguments[0])
    return path if folder is None else str(Path(f"/proc/self/fd/{folder}").readlink() / path)


def receipts(out: Path) -> set[tuple[int, int]]:
    """Parts that the ledger of an unfinished run holds."""
    ledger = out / STAGING / LEDGER
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return {tuple(record["part"]) for record in map(json.loads, lines) if "part" in record}


def all_parts(shards: Sequence[Shard]) -> set[tuple[int, int]]:
    """Every part, by the key of its receipt."""
    return {(part.shard, part.number) for shard in shards for part in shard.parts}


class Pwrites:
    """Collects what is written to shards, from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._found: list[tuple[str, int]] = []
        real = os.pwrite

        def pwrite(file: int, data: bytes, offset: int) -> int:
            self._found.append((Path(path_of(file)).name, offset))
            return real(file, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)

    def parts(self, shards: Sequence[Shard]) -> set[tuple[int, int]]:
        """Parts of which something was written."""
        return {
            (part.shard, part.number)
            for shard in shards
            for part in shard.parts
            for name, offset in self._found
            if name == f"{shard.name}.part" and part.start <= offset < part.stop
        }
