"""Make a finished run visible, all at once: check coverage, name the shards, write the index last.

Until the index (for one shard: the shard) has its name, a reader sees no checkpoint. Every step may
be repeated after a crash: it finds what is already done.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from shardmerge.errors import CheckpointError, LedgerMismatchError, OutputError, StoreError
from shardmerge.header import write_index
from shardmerge.layout import SINGLE_SHARD, Shard
from shardmerge.ledger import LEDGER, LOCK, Ledger
from shardmerge.numerics import crc32_combine
from shardmerge.shards import STAGING, Receipt, staged, write_failed
from shardmerge.sources import open_checkpoint

INDEX = "model.safetensors.index.json"
PROVENANCE = "shardmerge.json"
RECIPE = "shardmerge_recipe.yml"
CLEARING = "clearing"
"""Ledger event: the named files, of an older checkpoint, are being removed."""
CLEARED = "cleared"
"""Ledger event: nothing of an older checkpoint is left; shards that have their names are ours."""
_READ_WITH_WEIGHTS = re.compile(
    r"(tokenizer|vocab|special_tokens_map|added_tokens|chat_template"
    r"|(generation|tokenizer|(video_)?(pre)?processor|image_processor)_config)\.json"
    r"|(vocab|merges)\.txt|chat_template\.jinja|additional_chat_templates/.*"
    r"|.*\.(model|tiktoken|spm|bpe|codes)"
    r"|((configuration|modeling|tokenization|processing)_|image_processing).*\.py"
)
"""Files that are read together with the weights: another checkpoint's would be misread as ours."""
_ONLY_FILES = frozenset({SINGLE_SHARD, "pytorch_model.bin"})
"""Names of a file that is a checkpoint without an index."""
_WEIGHTS = re.compile(
    r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?|model.*\.gguf"
)


@dataclass(frozen=True, slots=True)
class Published:
    """A published checkpoint.

    Args:
        out: its folder.
        shards: names of its shards.
        nbytes: of all shards.
        tensors: their number.
        already: whether an earlier run had published it; nothing was done.
        notes: every default that was used, in words.
    """

    out: str
    shards: tuple[str, ...]
    nbytes: int
    tensors: int
    already: bool = False
    notes: tuple[str, ...] = ()


def shard_checksums(
    shards: Sequence[Shard], receipts: Mapping[tuple[int, int], Receipt]
) -> dict[str, dict[str, object]]:
    """Size and CRC-32 of every shard, from the receipts of its parts.

    Raises:
        LedgerMismatchError: unless the receipts cover every byte of every shard exactly once.
    """
    planned = {(part.shard, part.number) for shard in shards for part in shard.parts}
    if missing := planned - set(receipts):
        raise LedgerMismatchError(
            f"{len(missing)} parts have no receipt, the first is part "
            f"{min(missing)[1]} of {shards[min(missing)[0]].name}. Run the same command again."
        )
    found: dict[str, dict[str, object]] = {}
    for shard in shards:
        crc32, position = 0, 0
        for part in shard.parts:
            receipt = receipts[part.shard, part.number]
            if part.start != position or receipt.nbytes != part.nbytes:
                raise LedgerMismatchError(
                    f"part {part.number} of {shard.name}: {receipt.nbytes} bytes are in the "
                    f"ledger, {part.nbytes} are planned from {part.start}. Start over with --fresh."
                )
            crc32 = crc32_combine(crc32, receipt.crc32, part.nbytes)
            position = part.stop
        if position != shard.nbytes:
            raise LedgerMismatchError(f"{shard.name}: {position} of {shard.nbytes} bytes are there")
        found[shard.name] = {"bytes": shard.nbytes, "crc32": f"{crc32:08x}"}
    return found


def publish(
    out: Path,
    shards: Sequence[Shard],
    tensor_names: Sequence[str],
    ledger: Ledger,
    files: Mapping[str, bytes],
) -> None:
    """Give a finished run its names.

    Args:
        tensor_names: by number.
        files: content of every other file, by its name in OUT (``sub/name`` in a folder).
    Raises:
        OutputError: for a file that cannot be written, renamed or removed.
    """
    try:
        if CLEARED not in ledger.events:
            clear(out, ledger)
        for name, content in files.items():
            _write_file(out / name, content)
        _seal(out, shards, tensor_names)
        remove_staging(out)
    except OSError as problem:
        raise write_failed(Path(str(problem.filename or out)), problem) from problem


def occupants(out: Path, planned: Iterable[str]) -> list[str]:
    """Names in OUT that belong to another checkpoint: weights, and files that would be replaced."""
    if not out.is_dir():
        return []
    wanted = {name.partition("/")[0] for name in planned}
    return sorted(
        path.name for path in out.iterdir() if path.name in wanted or _WEIGHTS.fullmatch(path.name)
    )


def clear(out: Path, ledger: Ledger) -> None:
    """Remove the checkpoint that is at ``out``: what makes it one first, its small files last."""
    # On record, because of a checkpoint that is half removed nobody knows what belonged to it.
    names = {*ledger.events.get(CLEARING, ()), *_belonging(out)}
    if names:
        ledger.mark(CLEARING, sorted(names))
    for _, group in groupby(sorted(names, key=_rank), key=_rank):
        for name in group:
            (out / name).unlink(missing_ok=True)
        _sync_folder(out)
    ledger.mark(CLEARED)


def _belonging(out: Path) -> set[str]:
    """Names of the files of the checkpoint at ``out``; none where there are no weights.

    Other files stay, whoever put them there: notes, logs, results of evaluations.
    """
    names = {path.name for path in out.iterdir() if _WEIGHTS.fullmatch(path.name)}
    if not names:
        return set()
    with contextlib.suppress(CheckpointError, StoreError):
        names.update(filter(_READ_WITH_WEIGHTS.fullmatch, open_checkpoint(str(out)).files))
    return names | {"config.json", "README.md", RECIPE, PROVENANCE}


def _rank(name: str) -> int:
    """Place in the order of removal: without its index or only file a checkpoint is none."""
    if name.endswith(".index.json"):
        return 0
    if name in _ONLY_FILES:
        return 1
    return 2 if _WEIGHTS.fullmatch(name) else 3


def _seal(out: Path, shards: Sequence[Shard], tensor_names: Sequence[str]) -> None:
    for shard in shards:
        source, target = staged(out, shard), out / shard.name
        if source.exists():
            source.rename(target)
        elif not target.exists() or target.stat().st_size != shard.nbytes:
            raise OutputError(
                f"{source} is gone. Someone removed it while the run was being published;\n"
                "  run the same command again with --fresh."
            )
    _sync_folder(out)
    if len(shards) > 1:
        weight_map = {tensor_names[t]: shard.name for shard in shards for t in shard.tensors}
        total = sum(shard.nbytes - len(shard.header) for shard in shards)
        _write_file(out / INDEX, write_index(weight_map, total))


def _write_file(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    _sync_folder(path.parent)


def remove_staging(out: Path) -> None:
    """Remove everything that is not published; the lock must be held."""
    # While the ledger is there, a crash here is finished by the next run; the lock is last, so
    # that no other run begins in a folder that is being removed.
    folder = out / STAGING
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == LOCK, path.name == LEDGER)):
        path.unlink()
    try:
        folder.rmdir()
    except OSError as problem:
        if problem.errno != errno.ENOTEMPTY:  # else another run has just begun there
            raise
    _sync_folder(out)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
