"""Files of ``torch.save``: what is in them, and where the elements of their tensors lie.

A file is a zip archive of stored entries: a pickle that describes values, and one entry for each
storage. Nothing of it is run (``pickles``), and no element is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from shardmerge.errors import CheckpointError
from shardmerge.header import MAX_DIMENSIONS, MAX_INTEGER
from shardmerge.numerics import DTYPE_BY_TORCH_NAME, DType
from shardmerge.sources.pickles import Broken, Maker, Name, check_size, load_pickle, make
from shardmerge.sources.tensor import Segment, TensorRef
from shardmerge.sources.zips import LOCAL_MARK, Entry, Window, fetch, locate, read_directory
from shardmerge.stores.api import Store

FIRST_BYTES = 64 << 10
"""Read from both ends of a file at first: mostly all that is needed of it."""
MAX_RUNS = 4096
"""Pieces that a tensor may be in; each is a range of its own to be read."""

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_DTYPES = {
    "DoubleStorage": DType.F64,
    "FloatStorage": DType.F32,
    "HalfStorage": DType.F16,
    "BFloat16Storage": DType.BF16,
    "LongStorage": DType.I64,
    "IntStorage": DType.I32,
    "ShortStorage": DType.I16,
    "CharStorage": DType.I8,
    "ByteStorage": DType.U8,
    "BoolStorage": DType.BOOL,
}
_STORAGES: Mapping[str, DType | None] = {
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    "torch.storage.UntypedStorage": None,
}
_STARTS = {
    b"version ": "a Git LFS pointer, not the file itself. Run `git lfs pull`",
    b"<!DOCTYP": "a web page, not the file itself. Download it again",
    b"GGUF": "a GGUF file. Load it with transformers, and write it with `save_pretrained`",
    b"\x89HDF": "an HDF5 file. Load it with transformers, and write it with `save_pretrained`",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """Elements in an entry of the archive.

    Args:
        dtype: of them; None for bytes that each tensor names a dtype for.
        key: of the entry ``data/<key>``.
        count: of elements, or of bytes where there is no dtype.
    """

    dtype: DType | None
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file of torch.

    Args:
        storage: that holds its elements.
        dtype: of them.
        offset: of the first, in elements.
        shape: ``()`` for a scalar.
        stride: elements between neighbours along each dimension.
    """

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A file of torch: its value, with ``StoredTensor`` for every tensor, and its entries."""

    window: Window
    value: object
    root: str
    entries: Mapping[str, Entry]


def window_of(url: str, store: Store) -> Window:
    """A whole file.

    Raises:
        CheckpointError: for a file that is not there.
    """
    found = store.stat(url)
    if found is None:
        raise CheckpointError(
            f"{url}: no such file, or a link to a file that is gone. Download or copy it again."
        )
    return Window(url, 0, found.size, found.version, store, url)


def read_torch(window: Window, first_bytes: int = FIRST_BYTES) -> TorchFile:
    """What is in a file of torch.

    Raises:
        CheckpointError: for a file of another kind, an old or damaged one, and one whose pickle
            names something that weights do not need.
    """
    ends([window], first_bytes)
    _refuse_other_kinds(window)
    entries = read_directory(window, first_bytes)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in entries):
        raise CheckpointError(
            f"{window.what}: a zip archive, but not one of torch.save: it holds "
            f"{len(pickles)} files data.pkl of its own, and may be a TorchScript program.\n"
            "  Save the state dict of the model with torch.save."
        )
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and _content(window, order) != b"little":
        raise CheckpointError(
            f"{window.what}: its elements are not little-endian. Save it again on a machine of "
            "this kind."
        )
    described = entries[pickles[0]]
    check_size(described.nbytes, window.what)
    value = load_pickle(_content(window, described), window.what, NAMES, _storage)
    return TorchFile(window, value, root, entries)


def ends(windows: Iterable[Window], first_bytes: int) -> None:
    """Fetch the first and last bytes of windows of one store, by one call."""
    wanted = []
    for window in windows:
        if window.pieces:
            continue
        count = min(first_bytes, window.size)
        wanted.append((window, 0, count))
        if count < window.size:
            rest = min(first_bytes, window.size - count)
            wanted.append((window, window.size - rest, rest))
    fetch(wanted)


def _content(window: Window, entry: Entry) -> bytes:
    (start,) = locate(window, [entry])
    return window.read(start, entry.nbytes)


def _refuse_other_kinds(window: Window) -> None:
    first = window.read(0, min(window.size, 512))
    if first.startswith(LOCAL_MARK):
        return
    if first.startswith(_LEGACY) or first[257:262] == b"ustar":
        raise CheckpointError(
            f"{window.what}: a file of torch.save in the format from before torch 1.6, whose "
            "tensors\n  cannot be read in place. Write it again: "
            "`torch.save(torch.load(OLD, weights_only=True), NEW)`."
        )
    for start, kind in _STARTS.items():
        if first.startswith(start):
            raise CheckpointError(f"{window.what}: {kind}.")
    raise CheckpointError(
        f"{window.what}: {window.size:,} bytes that do not begin as torch's files do.\n"
        "  It is damaged, or of another kind. Copy or download it again."
    )


# --- what pickles of weights may name -------------------------------------------------------------


def _storage(identity: object) -> Storage:
    """The value of a persistent id: ``("storage", type, key, device, count)``."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise Broken("it refers to something that is no storage")
    kind, key, count = identity[1], identity[2], identity[4]
    if not isinstance(kind, Name) or kind.text not in _STORAGES:
        raise Broken("a storage is of no known type")
    if not isinstance(key, str) or not _is_size(count):
        raise Broken("a storage has no key or no size")
    return Storage(_STORAGES[kind.text], key, count)


def _tensor(arguments: tuple[object, ...]) -> StoredTensor:
    """``_rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks, metadata)``."""
    return _stored(arguments, None)


def _tensor_of_dtype(arguments: tuple[object, ...]) -> StoredTensor:
    """``_rebuild_tensor_v3(storage, offset, shape, stride, requires_grad, hooks, dtype, ...)``."""
    dtype = arguments[6] if len(arguments) > 6 else None
    if not isinstance(dtype, Name) or dtype_named(dtype) is None:
        raise Broken("a tensor is of no dtype that is read")
    return _stored(arguments, dtype_named(dtype))


def dtype_named(name: object) -> DType | None:
    """The dtype that ``torch.<name>`` is; None for anything else."""
    if not isinstance(name, Name):
        return None
    return DTYPE_BY_TORCH_NAME.get(name.text.removeprefix("torch."))


def _stored(arguments: tuple[object, ...], dtype: DType | None) -> StoredTensor:
    if len(arguments) < 4:
        raise Broken("a tensor lacks its shape")
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage) or not _is_size(offset):
        raise Broken("a tensor lacks its storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise Broken("a tensor lacks its dtype")
    sizes, steps = sizes_of(shape), sizes_of(stride)
    if sizes is None or steps is None or len(sizes) != len(steps):
        raise Broken("the shape of a tensor is no list of sizes")
    return StoredTensor(storage, dtype, offset, sizes, steps)


def sizes_of(shape: object) -> tuple[int, ...] | None:
    """A shape, if it is one."""
    if not isinstance(shape, tuple | list) or len(shape) > MAX_DIMENSIONS:
        return None
    sizes = tuple([size for size in shape if _is_size(size)])
    return sizes if len(sizes) == len(shape) and math.prod(sizes) <= MAX_INTEGER else None


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def _first(arguments: tuple[object, ...]) -> object:
    """Of ``_rebuild_parameter(tensor, ...)``."""
    if not arguments:
        raise Broken("a parameter lacks its tensor")
    return arguments[0]


def _of_type(arguments: tuple[object, ...]) -> object:
    """Of ``_rebuild_from_type_v2(function, type, arguments, state)``: a tensor with attributes."""
    if len(arguments) != 4:
        raise Broken("a tensor lacks what makes it")
    return make(arguments[0], arguments[2], NAMES)


def _size(arguments: tuple[object, ...]) -> tuple[object, ...]:
    return () if not arguments else _items(arguments[0])


def _ordered(arguments: tuple[object, ...]) -> dict[object, object]:
    if arguments and arguments[0] not in ([], ()):
        raise Broken("an OrderedDict is made of items")
    return {}


def _members(arguments: tuple[object, ...]) -> set[object]:
    members = () if not arguments else _items(arguments[0])
    if not all(isinstance(item, str | int) for item in members):
        raise Broken("a set holds more than plain values")
    return set(members)


def _items(found: object) -> tuple[object, ...]:
    if not isinstance(found, tuple | list):
        raise Broken("a collection is made of what is no list")
    return tuple(found)


_INERT = (
    "_codecs.encode",
    "argparse.Namespace",
    "collections.Counter",
    "collections.defaultdict",
    "datetime.timedelta",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.filesystem._StoragePrefix",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
)
"""Names of values that are beside the weights: described, and then left alone."""
_DTYPE_NAMES = (*DTYPE_BY_TORCH_NAME, "complex64", "complex128")
NAMES: dict[str, Maker | None] = {
    **dict.fromkeys(_INERT),
    **dict.fromkeys(f"torch.{name}" for name in _DTYPE_NAMES),
    **dict.fromkeys(_STORAGES),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "builtins.set": _members,
    "__builtin__.set": _members,
}


# --- where elements lie ---------------------------------------------------------------------------


def segments(file: TorchFile, tensors: Mapping[str, StoredTensor]) -> dict[str, list[Segment]]:
    """The bytes of each tensor in flat element order, neighbours together.

    Args:
        tensors: by the names that messages use.

    Raises:
        CheckpointError: for tensors that reach out of their storage, or are in too many pieces.
    """
    what = file.window.what
    needed: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        entry = file.entries.get(f"{file.root}data/{tensor.storage.key}")
        if entry is None:
            raise CheckpointError(
                f"{what}: the elements of {name!a} are missing: there is no entry "
                f"data/{tensor.storage.key}.\n  It is damaged. Copy or download it again."
            )
        _check_storage(tensor, entry, ascii(name), what)
        needed[tensor.storage.key] = entry
    starts = dict(zip(needed, locate(file.window, list(needed.values())), strict=True))
    found = {}
    for name, tensor in tensors.items():
        start, itemsize = starts[tensor.storage.key], tensor.dtype.itemsize
        found[name] = [
            file.window.segment(start + first * itemsize, count * itemsize)
            for first, count in _runs(tensor, ascii(name), what)
        ]
    return found


def reference(
    name: str, dtype: DType, shape: Sequence[int], pieces: Sequence[Segment]
) -> TensorRef:
    """A tensor of such pieces; those that follow each other in a file become one."""
    joined: list[Segment] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and last.url == piece.url and last.offset + last.nbytes == piece.offset:
            joined[-1] = Segment(last.url, last.offset, last.nbytes + piece.nbytes, last.version)
        elif piece.nbytes:
            joined.append(piece)
    return TensorRef(name, dtype, tuple(shape), tuple(joined or pieces[:1]))


def _check_storage(tensor: StoredTensor, entry: Entry, name: str, what: str) -> None:
    storage = tensor.storage
    needed = storage.count * (1 if storage.dtype is None else storage.dtype.itemsize)
    if entry.nbytes != needed:
        raise CheckpointError(
            f"{what}: the storage of {name} should have {needed:,} bytes, and has "
            f"{entry.nbytes:,}.\n  It is damaged. Copy or download it again."
        )
    last = tensor.offset + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True)
    )
    if tensor.numel and (last + 1) * tensor.dtype.itemsize > entry.nbytes:
        raise CheckpointError(
            f"{what}: {name} of shape {list(tensor.shape)} ends after "
            f"{(last + 1) * tensor.dtype.itemsize:,} bytes of its storage, which has "
            f"{entry.nbytes:,}.\n  It is damaged. Copy or download it again."
        )


def _runs(tensor: StoredTensor, name: str, what: str) -> list[tuple[int, int]]:
    """First element and count of each run of neighbours, in flat order."""
    if tensor.numel == 0:
        return [(tensor.offset if tensor.storage.count else 0, 0)]
    run, inner = 1, len(tensor.shape)
    while inner and (tensor.shape[inner - 1] == 1 or tensor.stride[inner - 1] == run):
        inner -= 1
        run *= tensor.shape[inner]
    count = tensor.numel // run
    if count > MAX_RUNS:
        raise CheckpointError(
            f"{what}: {name} of shape {list(tensor.shape)} is stored with strides "
            f"{list(tensor.stride)}: in {count:,}\n  pieces; at most {MAX_RUNS:,} are read. Make "
            "it contiguous and save it again."
        )
    firsts = [tensor.offset]
    for size, step in zip(tensor.shape[:inner], tensor.stride[:inner], strict=True):
        firsts = [first + i * step for first in firsts for i in range(size)]
    return [(first, run) for first in firsts]
