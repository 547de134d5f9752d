"""OUT before it is published: may it be written, who writes it, what is there already."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

from shardmerge.errors import LockedError, OutputError, StoreError
from shardmerge.layout import Shard
from shardmerge.ledger import Ledger, fingerprint
from shardmerge.outputs.api import Output, ShardWriter
from shardmerge.publish import CLEARED, INDEX, PROVENANCE, is_weights, occupants
from shardmerge.recipe import ModelName
from shardmerge.sources.tensor import Checkpoint
from shardmerge.stores import is_remote


class Laid(Protocol):
    """What is to be published: a plan, or a checkpoint that is computed."""

    @property
    def shards(self) -> Sequence[Shard]:
        """In the order of their numbers."""

    @property
    def identity(self) -> Mapping[str, str]:
        """All that their bytes depend on."""


def refuse_sources(output: Output, sources: Mapping[ModelName, Checkpoint]) -> None:
    """Refuse to write where a source lies."""
    for name, checkpoint in sources.items():
        # The folders that are read, whatever way the recipe names them.
        urls = {s.url for tensor in checkpoint.tensors.values() for s in tensor.all_segments}
        folders = {url.rpartition("/")[0] for url in urls}
        if any(_same_place(folder, output.url) for folder in folders):
            raise OutputError(
                f"{output.url} is where the source {name} lies. Give another place for the output."
            )


def _same_place(a: str, b: str) -> bool:
    if is_remote(a) or is_remote(b):
        return a.rstrip("/") == b.rstrip("/")
    here, there = Path(a), Path(b)
    return here.exists() and there.exists() and here.samefile(there)


def is_published(
    output: Output, laid: Laid, files: Sequence[str], *, allow_non_finite: bool = False
) -> bool:
    """Whether OUT holds what this plan makes, complete as far as names, sizes and headers tell.

    Args:
        files: names of the output's other files.
        allow_non_finite: whether NaN and infinity may be in it.
    """
    try:
        last = INDEX if len(laid.shards) > 1 else laid.shards[0].name
        if output.size(last) is None:
            return False
        record = json.loads(output.read(PROVENANCE))
        shards = record["shards"]
        return bool(
            record["fingerprint"] == fingerprint(laid.identity)
            and (allow_non_finite or not record["non_finite_tensors"])
            and all(output.size(name) is not None for name in files)
            and all(
                output.size(shard.name) == shards[shard.name]["bytes"]
                and output.read(shard.name, len(shard.header)) == shard.header
                for shard in laid.shards
            )
        )
    except (OSError, StoreError, OutputError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def staging(
    output: Output,
    laid: Laid,
    files: Sequence[str],
    *,
    overwrite: bool = False,
    fresh: bool = False,
    alone: bool = True,
) -> Iterator[tuple[Ledger, ShardWriter]]:
    """The unfinished run at OUT, whose lock is held: its ledger, and room for every shard.

    Args:
        alone: whether nobody else may be at work there; what slices have done is taken over.
    Raises:
        LockedError: a slice is at work.
    """
    if fresh:
        _start_over(output, laid, files, overwrite=overwrite)
    with closing(Ledger(output.journal(), laid.identity)) as ledger:
        if alone:
            _take_over(output, laid, ledger)
        _recover(output, laid, files, ledger, overwrite=overwrite)
        with closing(output.writer(laid.shards, ledger.handles)) as writer:
            yield ledger, writer


def sweep(output: Output) -> None:
    """Remove what a run has left that published and was killed before it had tidied up."""
    if output.leftovers():
        with output.locked():
            output.tidy()


def _take_over(output: Output, laid: Laid, ledger: Ledger) -> None:
    """Write what slices have in ledgers of their own into that of the run."""
    for name in output.slices():
        with (
            output.locked(name),
            closing(Ledger(output.journal(name), laid.identity)) as slice_ledger,
        ):
            receipts = slice_ledger.receipts
            decisions = slice_ledger.decisions
            known = set(ledger.tasks)
            ledger.record(
                [receipt for key, receipt in receipts.items() if key not in ledger.receipts],
                {key: d for key, d in decisions.items() if key not in ledger.decisions},
                [task for task in slice_ledger.tasks if task not in known],
            )


def _recover(
    output: Output, laid: Laid, files: Sequence[str], ledger: Ledger, *, overwrite: bool
) -> None:
    """Refuse a place that cannot be used; make room for every shard that is not there."""
    try:
        found = output.survey(
            laid.shards, ledger.receipts, ledger.handles, cleared=CLEARED in ledger.events
        )
        ledger.forget(found.lost)
        refuse_occupied(output, laid, files, ledger, overwrite=overwrite)
        output.prove(laid.shards, found.sealed)
    except LockedError:
        raise
    except (OutputError, StoreError):
        # Nothing was done, so nothing is left in somebody else's folder.
        if ledger.is_new and not output.slices():
            output.tidy()
        raise
    missing = [n for n in range(len(laid.shards)) if n not in found.sealed | found.open.keys()]
    ledger.begin(output.begin(laid.shards, missing))


def refuse_occupied(
    output: Output, laid: Laid, files: Sequence[str], ledger: Ledger, *, overwrite: bool
) -> None:
    """Refuse a place where a checkpoint lies that this run did not put there.

    Args:
        files: names of the output's other files.
    """
    if CLEARED not in ledger.events:
        _refuse_others(output, laid, files, overwrite=overwrite)


def _start_over(output: Output, laid: Laid, files: Sequence[str], *, overwrite: bool) -> None:
    """Forget an unfinished run, with the shards that it had already given their names."""
    for name in output.slices():
        with output.locked(name):  # refused while it is at work
            continue
    with closing(output.journal()) as journal:
        cleared = any(f'"{CLEARED}"' in line for line in journal.lines())
    if cleared:
        output.remove(name for name in output.names() if is_weights(name))
    else:
        _refuse_others(output, laid, files, overwrite=overwrite)
    output.forget()


def _refuse_others(output: Output, laid: Laid, files: Sequence[str], *, overwrite: bool) -> None:
    planned = [*files, INDEX, PROVENANCE, *(shard.name for shard in laid.shards)]
    found = occupants(output, planned)
    if found and not overwrite:
        raise OutputError(
            f"{output.url} holds another checkpoint: {', '.join(found[:5])}"
            f"{', ...' if len(found) > 5 else ''}.\n"
            "  Give --overwrite to replace it once the new one is complete, or another place."
        )
