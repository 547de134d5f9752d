"""Make a finished run visible, all at once: check coverage, name the shards, write the index last.

Until the index (for one shard: the shard) has its name, a reader sees no checkpoint. Every step may
be repeated after a crash: it finds what is already done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from shardmerge.errors import LedgerMismatchError
from shardmerge.header import write_index
from shardmerge.layout import SINGLE_SHARD, Shard
from shardmerge.ledger import Ledger
from shardmerge.numerics import crc32_combine
from shardmerge.outputs.api import Output, PartKey, Receipt
from shardmerge.records import TASKS
from shardmerge.sources.folder import ADAPTER

INDEX = "model.safetensors.index.json"
PROVENANCE = "shardmerge.json"
RECIPE = "shardmerge_recipe.yml"
CLEARING = "clearing"
"""Ledger event: the named files, of an older checkpoint, are being removed."""
CLEARED = "cleared"
"""Ledger event: nothing of an older checkpoint is left; shards that have their names are ours."""
_READ_WITH_WEIGHTS = re.compile(
    r"(tokenizer|vocab|special_tokens_map|added_tokens|chat_template"
    r"|(adapter|generation|tokenizer|(video_)?(pre)?processor|image_processor)_config)\.json"
    r"|(vocab|merges)\.txt|chat_template\.jinja|additional_chat_templates/.*"
    r"|.*\.(model|tiktoken|spm|bpe|codes)"
    r"|((configuration|modeling|tokenization|processing)_|image_processing).*\.py"
)
"""Files that are read together with the weights: another checkpoint's would be misread as ours."""
_TEMPLATES = "additional_chat_templates/"
_ONLY_FILES = frozenset({SINGLE_SHARD, "pytorch_model.bin", ADAPTER})
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
        requests: for ranges, that were made to servers.
        requested_bytes: in their answers.
    """

    out: str
    shards: tuple[str, ...]
    nbytes: int
    tensors: int
    already: bool = False
    notes: tuple[str, ...] = ()
    requests: int = 0
    requested_bytes: int = 0


def shard_checksums(
    shards: Sequence[Shard], receipts: Mapping[PartKey, Receipt]
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
    output: Output,
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
    output.check_lock()
    if CLEARED not in ledger.events:
        clear(output, ledger)
    for name, content in files.items():
        output.write(name, content)
    output.check_lock()
    output.seal(shards, ledger.receipts, ledger.handles)
    if len(shards) > 1:
        weight_map = {tensor_names[t]: shard.name for shard in shards for t in shard.tensors}
        total = sum(shard.nbytes - len(shard.header) for shard in shards)
        output.write(INDEX, write_index(weight_map, total))
    output.check_lock()
    output.tidy()


def occupants(output: Output, planned: Iterable[str]) -> list[str]:
    """Names in OUT that belong to another checkpoint: weights, and files that would be replaced."""
    wanted = {name.partition("/")[0] for name in planned}
    names = (name.rstrip("/") for name in output.names())
    return sorted(name for name in names if name in wanted or _WEIGHTS.fullmatch(name))


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or their index."""
    return _WEIGHTS.fullmatch(name) is not None


def clear(output: Output, ledger: Ledger) -> None:
    """Remove the checkpoint that is at OUT: what makes it one first, its shards last."""
    # On record, because of a checkpoint that is half removed nobody knows what belonged to it.
    names = {*ledger.events.get(CLEARING, ()), *_belonging(output)}
    if names:
        ledger.mark(CLEARING, sorted(names))
    for _, group in groupby(sorted(names, key=_rank), key=_rank):
        output.remove(group)
    ledger.mark(CLEARED)


def _belonging(output: Output) -> set[str]:
    """Names of the files of the checkpoint at OUT; none where there are no weights.

    Other files stay, whoever put them there: notes, logs, results of evaluations.
    """
    names = set(output.names())
    weights = set(filter(_WEIGHTS.fullmatch, names))
    if not weights:
        return set()
    if _TEMPLATES in names:
        names |= {_TEMPLATES + name for name in output.names(_TEMPLATES)}
    read = set(filter(_READ_WITH_WEIGHTS.fullmatch, names))
    return weights | read | {"config.json", "README.md", RECIPE, PROVENANCE, TASKS}


def _rank(name: str) -> int:
    """Place in the order of removal: without its index or only file a checkpoint is none.

    Shards are the last: while they are there, what was read with them is known to be theirs.
    """
    if name.endswith(".index.json"):
        return 0
    if name in _ONLY_FILES:
        return 1
    return 3 if _WEIGHTS.fullmatch(name) else 2
