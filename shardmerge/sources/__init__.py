"""Checkpoints as maps from names to tensors. ``open_checkpoint`` finds out what is at a URL.

A folder that has several kinds is read by its safetensors, else as ``pytorch_model.bin``, else as
a checkpoint of DeepSpeed, else of ``torch.distributed``. Each kind is one file here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from shardmerge.errors import CheckpointError, StoreError
from shardmerge.header import is_plain_name
from shardmerge.sources.adapter import Adapted, open_adapter
from shardmerge.sources.dcp import holds_dcp, open_dcp
from shardmerge.sources.hf import holds_safetensors, open_hf
from shardmerge.sources.sharded import Twins
from shardmerge.sources.tensor import Checkpoint
from shardmerge.sources.torch_bin import BIN_SUFFIXES, holds_bins, open_bin, open_bins
from shardmerge.sources.zero import holds_zero, is_rank_file, open_zero
from shardmerge.sources.zero_states import SECOND_MOMENT
from shardmerge.stores import Stores, is_remote
from shardmerge.stores.api import Store, scheme_of
from shardmerge.stores.http import shown

if TYPE_CHECKING:
    from shardmerge.stores.hub import HubStore

__all__ = ["Checkpoint", "Twins", "open_adam", "open_adapted", "open_checkpoint"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w-]*(?:\.[\w-]+)*/[A-Za-z0-9][\w.-]*")


_ANY_BASE = "If it is meant so, say in a recipe: {model: ..., lora: ..., any_base: true}."

Opened = Callable[[str, Store], Checkpoint]
"""Opens what lies at a place."""


def open_checkpoint(
    url: str,
    revision: str | None = None,
    stores: Stores | None = None,
    twins: Twins | None = None,
) -> Checkpoint:
    """The checkpoint at ``url``, a folder or a file; only headers are read.

    A path ``org/name`` that does not exist here names a model of the Hugging Face Hub.

    Args:
        revision: a commit, tag or branch of a model of the Hub, or of a folder of its cache
            (``models--org--name``).
        twins: shared by checkpoints of one family, which takes less time and memory.

    Raises:
        CheckpointError: for what is not there, is damaged or of another kind; for a revision of a
            folder that has none.
        StoreError: for what cannot be read.
    """
    return _at(url, revision, stores or Stores(), lambda at, store: _open(at, store, twins))


def open_adapted(
    base: Checkpoint,
    url: str,
    revision: str | None = None,
    stores: Stores | None = None,
    *,
    any_base: bool = False,
) -> Checkpoint:
    """A checkpoint with the LoRA adapter at ``url`` added to it; only headers are read.

    Args:
        any_base: take the adapter though it was trained on another checkpoint than ``base``.
    Raises:
        CheckpointError: for an adapter that is damaged, that does not fit, or whose own files name
            another model of the Hub.
    """
    found: list[Adapted] = []

    def opened(place: str, store: Store) -> Checkpoint:
        found.append(open_adapter(base, place, store))
        return found[-1].checkpoint

    adapted = _at(url, revision, stores or Stores(), opened)
    if any_base:
        return adapted
    if found[-1].doubt:
        raise CheckpointError(
            f"{url}: {found[-1].doubt}.\n  It was trained on another model than {base.url}, or is "
            f"not complete. {_ANY_BASE}"
        )
    declared = found[-1].declared
    given, named = _model_of(base.url), _model_of(declared)
    if not named or _last(given) == _last(named):
        return adapted
    told = f"{url}: says that it was trained on {shown(declared)}"
    if given != base.url and _HUB_NAME.fullmatch(named):
        raise CheckpointError(
            f"{told}, which is another model than {given}.\n  Name that as its base. {_ANY_BASE}"
        )
    note = f"{told}; {shown(base.url)} was taken for the same model"
    return replace(adapted, notes=(*adapted.notes, note))


def _model_of(url: str) -> str:
    """The name of a model of the Hub or its cache; else the same."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)(/snapshots/|$)", url)
    return f"{cached[1]}/{cached[2]}" if cached else url.removeprefix("hf://").partition("@")[0]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _at(url: str, revision: str | None, stores: Stores, opened: Opened) -> Checkpoint:
    """What ``opened`` finds at ``url``, on the Hub where that is meant."""
    if match := re.match(r"(s3|hf|gs|az|https?):/(?!/)", url):
        raise CheckpointError(f"{url}: did you mean {match[1]}://{url[match.end() :]}?")
    url = stores.public(url)
    if _may_name_hub_model(url, stores):
        try:
            return _open_hub(f"hf://{url}", revision, stores, opened, sure=False)
        except StoreError as problem:
            raise CheckpointError(
                f"{url}: no such folder or file here; taken as a model of the Hub: {problem}"
            ) from None
    store = stores.open(url)
    if scheme_of(url) == "hf":
        return _open_hub(url, revision, stores, opened, sure=True)
    return opened(url if revision is None else _snapshot(store, url, revision), store)


def _open(url: str, store: Store, twins: Twins | None) -> Checkpoint:
    """The checkpoint at a place, of whatever kind it is."""
    if not store.is_folder(url):
        name = url.rpartition("/")[2]
        if not name.endswith(BIN_SUFFIXES) or store.stat(url) is None:
            return open_hf(url, store, twins)
        if is_rank_file(name):
            raise CheckpointError(
                f"{url}: one of the files of a DeepSpeed checkpoint. Give the folder they lie in."
            )
        return open_bin(url, store)
    names = store.names(url)
    if not holds_safetensors(names):
        for holds, opened in (
            (holds_bins, open_bins),
            (holds_zero, open_zero),
            (holds_dcp, open_dcp),
        ):
            if holds(names):
                return opened(url, store)
    return open_hf(url, store, twins)


def open_adam(url: str, stores: Stores) -> tuple[Checkpoint, Checkpoint]:
    """The weights in the folder of a training, and Adam's second moments of those it trained.

    Raises:
        CheckpointError: for another kind of checkpoint, one that is not whole, and one without
            these moments.
        StoreError: for what cannot be read.
    """
    url = stores.public(url)
    store = stores.open(url)
    names = store.names(url) if store.is_folder(url) else []
    for holds, opened in ((holds_zero, open_zero), (holds_dcp, open_dcp)):
        if holds(names):
            return opened(url, store), opened(url, store, SECOND_MOMENT)
    raise CheckpointError(
        f"{url}: not the folder of a training, which holds the states of its optimizer: neither "
        "global_stepN\n  of DeepSpeed nor .metadata of torch.distributed is there. Give that "
        "folder, or take the squared\n  task vector instead: --from task-vector."
    )


def _may_name_hub_model(url: str, stores: Stores) -> bool:
    if is_remote(url) or not _HUB_NAME.fullmatch(url):
        return False
    here = stores.open(url)
    folder = url.partition("/")[0]
    return not here.is_folder(folder) and here.stat(url) is None


def _open_hub(
    url: str, revision: str | None, stores: Stores, opened: Opened, *, sure: bool
) -> Checkpoint:
    hub = cast("HubStore", stores.open(url))
    cached = hub.cached(url, revision)
    if cached is not None:
        try:
            return opened(cached, stores.open(cached))
        except CheckpointError:
            if hub.offline:
                raise
    return opened(hub.pinned(url, revision, sure=sure), hub)


def _snapshot(store: Store, url: str, revision: str) -> str:
    """The folder of one revision in a Hugging Face cache: ``snapshots/<commit>``."""
    commit = revision
    if is_plain_name(revision):
        reference = store.join(store.join(url, "refs"), revision)
        if store.stat(reference) is not None:
            commit = store.read(reference).decode().strip()
        folder = store.join(store.join(url, "snapshots"), commit)
        if is_plain_name(commit) and store.is_folder(folder):
            return folder
    raise CheckpointError(
        f"{url} has no revision '{revision}': a checkpoint has revisions only on the Hugging Face "
        "Hub, or as a folder of its cache (models--org--name, with snapshots/ in it).\n"
        "  Give the path of the checkpoint itself, without '@'."
    )
