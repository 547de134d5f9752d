"""OUT before it is published: may it be written, who writes it, what is there already.

Everything unfinished lies in one folder inside OUT: shards, the ledger, the lock. A reader of
checkpoints sees nothing of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from shardmerge.errors import OutputError, UsageError
from shardmerge.ledger import LEDGER, LOCK, Ledger, Lock, fingerprint
from shardmerge.plan import Plan
from shardmerge.publish import CLEARED, INDEX, PROVENANCE, occupants
from shardmerge.recipe import ModelName
from shardmerge.shards import STAGING, ShardWriter, opened, staged, write_failed
from shardmerge.sources.tensor import Checkpoint

_SPARE_BYTES = 16 * 2**20
"""Disk kept free for the ledger and the small files."""
_SPARE_FILES = 64
"""Files kept free, likewise."""


def output_folder(out: str) -> Path:
    """OUT as a path.

    Raises:
        UsageError: for what is no local path; a URL would become folders named after it.
        OutputError: for a path that no file can have.
    """
    if not out:
        raise UsageError("OUT is empty. Give the folder of the new checkpoint.")
    if "://" in out:
        raise UsageError(
            f"{out}: the output can only be written to a local folder. Give its path, without ://."
        )
    try:
        path = Path(out).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise OutputError(f"cannot write to {out}: {reason}. Give another path.") from problem
    return path


def refuse_sources(out: Path, sources: Mapping[ModelName, Checkpoint]) -> None:
    """Refuse to write where a source lies."""
    for name, checkpoint in sources.items():
        folder = Path(checkpoint.url)
        folder = folder if folder.is_dir() else folder.parent
        if out.exists() and folder.exists() and out.samefile(folder):
            raise OutputError(
                f"{out} is where the source {name} lies. Give another place for the output."
            )


def is_published(out: Path, plan: Plan) -> bool:
    """Whether OUT holds exactly what this plan makes, complete."""
    last = out / (INDEX if len(plan.shards) > 1 else plan.shards[0].name)
    if (out / STAGING).exists() or not last.exists():
        return False
    try:
        record = json.loads((out / PROVENANCE).read_bytes())
        shards = record["shards"]
        return bool(
            record["fingerprint"] == fingerprint(plan.identity)
            and all(
                (out / shard.name).stat().st_size == shards[shard.name]["bytes"]
                for shard in plan.shards
            )
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def staging(
    out: Path, plan: Plan, files: Sequence[str], *, overwrite: bool, fresh: bool
) -> Iterator[tuple[Ledger, ShardWriter]]:
    """The folder of the unfinished run: locked, with its ledger and the space for every shard."""
    folder = out / STAGING
    if not (folder / LEDGER).exists():  # nothing is left behind where nothing was begun
        _refuse_occupied(out, plan, files, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise write_failed(folder, problem) from problem
    with Lock(folder):
        if fresh:
            _forget(folder)
        ledger = Ledger(folder / LEDGER, plan.identity)
        writer = ShardWriter(out, plan.shards)
        try:
            done = _recover(out, plan, ledger)
            if CLEARED not in ledger.events:
                _refuse_occupied(out, plan, files, overwrite=overwrite)
            _refuse_full(out, plan, done)
            with opened(writer):
                writer.reserve(done)
                yield ledger, writer
        finally:
            ledger.close()


def _forget(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _recover(out: Path, plan: Plan, ledger: Ledger) -> set[int]:
    """Shards that already have their names; forgets the receipts of shards whose bytes are gone."""
    done: set[int] = set()
    gone: set[int] = set()
    for number, shard in enumerate(plan.shards):
        if not staged(out, shard).exists():
            (done if CLEARED in ledger.events and (out / shard.name).exists() else gone).add(number)
        elif staged(out, shard).stat().st_size != shard.nbytes:
            gone.add(number)
    ledger.forget_shards(gone)
    return done


def _refuse_occupied(out: Path, plan: Plan, files: Sequence[str], *, overwrite: bool) -> None:
    planned = [*files, INDEX, PROVENANCE, *(shard.name for shard in plan.shards)]
    found = occupants(out, planned)
    if found and not overwrite:
        raise OutputError(
            f"{out} holds another checkpoint: {', '.join(found[:5])}"
            f"{', ...' if len(found) > 5 else ''}.\n"
            "  Give --overwrite to replace it once the new one is complete, or another place."
        )


def _refuse_full(out: Path, plan: Plan, done: set[int]) -> None:
    """Refuse a disk that cannot hold the output, before anything is read."""
    needed = _SPARE_BYTES
    for number, shard in enumerate(plan.shards):
        if number not in done:
            part = staged(out, shard)
            needed += shard.nbytes - (part.stat().st_blocks * 512 if part.exists() else 0)
    room = os.statvfs(out)
    if room.f_bavail * room.f_frsize < needed:
        raise OutputError(
            f"{out} has {room.f_bavail * room.f_frsize:,} bytes free; the output needs "
            f"{needed:,} more.\n  Free some, or give another place."
        )
    if room.f_files > 0 and room.f_favail < len(plan.shards) + _SPARE_FILES:
        raise OutputError(f"{out} has room for {room.f_favail} more files; that is too few.")
