"""OUT before it is published: may it be written, who writes it, what is there already.

Everything unfinished lies in one folder inside OUT: shards, the ledger, the lock. A reader of
checkpoints sees nothing of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from shardmerge.errors import OutputError, UsageError
from shardmerge.ledger import LEDGER, LOCK, Ledger, Lock, fingerprint
from shardmerge.plan import Plan
from shardmerge.publish import CLEARED, INDEX, PROVENANCE, occupants, remove_staging
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
        # The folders that are read, whatever way the recipe names them.
        files = {Path(s.url) for tensor in checkpoint.tensors.values() for s in tensor.segments}
        folders = {file.parent for file in files}
        if out.exists() and any(path.exists() and out.samefile(path) for path in folders):
            raise OutputError(
                f"{out} is where the source {name} lies. Give another place for the output."
            )


def is_published(out: Path, plan: Plan, files: Sequence[str]) -> bool:
    """Whether OUT holds what this plan makes, complete as far as names, sizes and headers tell.

    Args:
        files: names of the output's other files.
    """
    last = out / (INDEX if len(plan.shards) > 1 else plan.shards[0].name)
    if (out / STAGING / LEDGER).exists() or not last.exists():
        return False
    try:
        record = json.loads((out / PROVENANCE).read_bytes())
        shards = record["shards"]
        return bool(
            record["fingerprint"] == fingerprint(plan.identity)
            and (plan.recipe.allow_non_finite or not record["non_finite_tensors"])
            and all((out / name).exists() for name in files)
            and all(
                (out / shard.name).stat().st_size == shards[shard.name]["bytes"]
                and _starts_with(out / shard.name, shard.header)
                for shard in plan.shards
            )
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _starts_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


@contextmanager
def staging(
    out: Path, plan: Plan, files: Sequence[str], *, overwrite: bool, fresh: bool
) -> Iterator[tuple[Ledger, ShardWriter]]:
    """The folder of the unfinished run: locked, with its ledger and the space for every shard."""
    folder = out / STAGING
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise write_failed(folder, problem) from problem
    with Lock(folder):
        if fresh:
            _forget(folder)
        with closing(Ledger(folder / LEDGER, plan.identity)) as ledger:
            done = _checked(out, plan, files, ledger, overwrite=overwrite)
            with opened(ShardWriter(out, plan.shards)) as writer:
                writer.reserve(done)
                yield ledger, writer


def sweep(out: Path) -> None:
    """Remove what a run has left that published and was killed before it had tidied up."""
    folder = out / STAGING
    if folder.exists():
        with Lock(folder):
            if not (folder / LEDGER).exists():
                remove_staging(out)


def _forget(folder: Path) -> None:
    # The ledger first: it must not outlive what it says is written.
    for path in sorted(folder.iterdir(), key=lambda path: path.name != LEDGER):
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _checked(
    out: Path, plan: Plan, files: Sequence[str], ledger: Ledger, *, overwrite: bool
) -> set[int]:
    """Refuse a place that cannot be used; gives the shards that already have their names."""
    try:
        done = _recover(out, plan, ledger)
        refuse_occupied(out, plan, files, ledger, overwrite=overwrite)
        _refuse_full(out, plan, done)
    except OutputError:
        if ledger.is_new:  # nothing was done, so nothing is left in somebody else's folder
            remove_staging(out)
        raise
    return done


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


def refuse_occupied(
    out: Path, plan: Plan, files: Sequence[str], ledger: Ledger, *, overwrite: bool
) -> None:
    """Refuse a place where a checkpoint lies that this run did not put there.

    Args:
        files: names of the output's other files.
    """
    if CLEARED in ledger.events:
        return
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
