"""Checkpoints that one process computes tensor after tensor: published like a merge, resumable.

What is estimated on data (``estimate``) or decomposed (``extract``) comes from no plan of tasks. It
is laid out, written in parts with receipts, and given its names in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shardmerge import __version__
from shardmerge.assets import as_json, checksums, public_text
from shardmerge.errors import NonFiniteError
from shardmerge.layout import Shard, Spec, lay_out
from shardmerge.ledger import Ledger, fingerprint
from shardmerge.numerics import to_floats, to_stored
from shardmerge.outputs.api import Output, ShardWriter
from shardmerge.publish import PROVENANCE, Published, publish, shard_checksums
from shardmerge.staging import is_published, refuse_occupied, staging, sweep

SHARD_BYTES = 5 * 10**9

Compute = Callable[[Sequence[str]], Iterator[npt.NDArray[np.floating]]]
"""Called with names of tensors; gives the values of each, in that order and of its shape."""


@dataclass(frozen=True, slots=True)
class _Laid:
    """Shards, and all that their bytes depend on."""

    shards: tuple[Shard, ...]
    identity: Mapping[str, str]


def write_computed(
    output: Output,
    tensors: Sequence[Spec],
    compute: Compute,
    *,
    identity: Mapping[str, str],
    files: Mapping[str, bytes],
    shard_bytes: int = SHARD_BYTES,
    single: str | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    notes: Sequence[str] = (),
) -> Published:
    """Compute a checkpoint and publish it; go on from where an earlier call stopped.

    Args:
        tensors: float32, float64, float16 or bfloat16, which values are rounded to.
        compute: called once, with the names of the tensors that are not all written yet, in the
            order in which they are written.
        identity: what the values depend on, in words; a run of another one is not gone on with.
        files: content of every other file.
        shard_bytes: the most bytes of tensors in a shard; one tensor may exceed it alone.
        single: name of the only file, whatever its size.
        overwrite: replace another checkpoint there, once the new one is complete.
        fresh: forget an unfinished run.
    Raises:
        NonFiniteError: values that are NaN or infinite.
        OutputError: another checkpoint lies there, or it cannot be written.
    """
    identity = {"shardmerge": __version__, **identity}
    limit = shard_bytes if single is None else max(1, sum(tensor.nbytes for tensor in tensors))
    shards = lay_out(tensors, (), limit, part_bytes=output.part_bytes)
    if single is not None:
        shards = (replace(shards[0], name=single),)
    laid, names = _Laid(shards, identity), [*files, PROVENANCE]

    def published(*, already: bool) -> Published:
        nbytes = sum(shard.nbytes for shard in shards)
        known = tuple(shard.name for shard in shards)
        return Published(output.url, known, nbytes, len(tensors), already, tuple(notes))

    if not fresh and is_published(output, laid, names):
        sweep(output)
        return published(already=True)
    with output.locked():
        if not fresh and is_published(output, laid, names):  # by a run that was waited for
            output.tidy()
            return published(already=True)
        with staging(output, laid, names, overwrite=overwrite, fresh=fresh) as (ledger, writer):
            _write(laid, tensors, compute, ledger, writer)
            refuse_occupied(output, laid, names, ledger, overwrite=overwrite)  # by now, perhaps
            record = _provenance(laid, ledger, files, notes)
            specs = [tensor.name for tensor in tensors]
            publish(output, shards, specs, ledger, {**files, PROVENANCE: record})
    return published(already=False)


def _write(
    laid: _Laid,
    tensors: Sequence[Spec],
    compute: Compute,
    ledger: Ledger,
    writer: ShardWriter,
) -> None:
    """Write the parts that have no receipt."""
    every = [part for shard in laid.shards for part in shard.parts]
    parts = [part for part in every if (part.shard, part.number) not in ledger.receipts]
    needed = list(dict.fromkeys(piece.tensor for part in parts for piece in part.pieces))
    values = compute([tensors[number].name for number in needed])
    held, stored = -1, np.empty(0, dtype=np.uint8)
    for part in parts:
        sink = writer.part(part)
        if part.number == 0:
            sink.write(laid.shards[part.shard].header)
        for piece in part.pieces:
            if piece.tensor != held:
                held, stored = piece.tensor, _stored(next(values), tensors[piece.tensor])
            size = tensors[held].dtype.itemsize
            sink.write(stored[piece.start * size : piece.stop * size].data)
        receipt = sink.finish(())
        writer.sync([part.shard])
        ledger.record([receipt])


def _stored(values: npt.NDArray[np.floating], tensor: Spec) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor, flat.

    Raises:
        NonFiniteError: values that are NaN or infinite, also by rounding.
    """
    if values.shape != tensor.shape:
        raise AssertionError(f"{tensor.name}: {values.shape} was computed, not {tensor.shape}")
    stored = to_stored(values, tensor.dtype)
    if not np.isfinite(to_floats(stored, tensor.dtype)).all():
        raise NonFiniteError(
            f"{tensor.name}: NaN or infinity was computed, as {tensor.dtype.torch_name}; nothing "
            "was published."
        )
    return stored


def _provenance(
    laid: _Laid, ledger: Ledger, files: Mapping[str, bytes], notes: Sequence[str]
) -> bytes:
    """What ``shardmerge.json`` says; ``assets.provenance`` is that of a merge."""
    return as_json(
        {
            "shardmerge": __version__,
            "fingerprint": fingerprint(laid.identity),
            "made": {key: public_text(text) for key, text in laid.identity.items()},
            "shards": shard_checksums(laid.shards, ledger.receipts),
            "files": checksums(files),
            "non_finite_tensors": 0,
            "notes": [public_text(note) for note in notes],
        }
    )
