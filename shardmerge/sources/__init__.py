"""Checkpoints as maps from names to tensors. ``open_checkpoint`` finds out what is at a URL."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

from shardmerge.errors import CheckpointError, StoreError
from shardmerge.header import is_plain_name
from shardmerge.sources.hf import Twins, open_hf
from shardmerge.sources.tensor import Checkpoint
from shardmerge.stores import Stores, is_remote
from shardmerge.stores.api import Store, scheme_of

if TYPE_CHECKING:
    from shardmerge.stores.hub import HubStore

__all__ = ["Checkpoint", "Twins", "open_checkpoint"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w-]*(?:\.[\w-]+)*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(
    url: str,
    revision: str | None = None,
    stores: Stores | None = None,
    twins: Twins | None = None,
) -> Checkpoint:
    """The checkpoint at ``url``, a folder or a ``.safetensors`` file; only headers are read.

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
    stores = stores or Stores()
    if match := re.match(r"(s3|hf|gs|az|https?):/(?!/)", url):
        raise CheckpointError(f"{url}: did you mean {match[1]}://{url[match.end() :]}?")
    url = stores.public(url)
    if _may_name_hub_model(url, stores):
        try:
            return _open_hub(f"hf://{url}", revision, stores, twins, sure=False)
        except StoreError as problem:
            raise CheckpointError(
                f"{url}: no such folder or file here; taken as a model of the Hub: {problem}"
            ) from None
    store = stores.open(url)
    if scheme_of(url) == "hf":
        return _open_hub(url, revision, stores, twins, sure=True)
    return open_hf(url if revision is None else _snapshot(store, url, revision), store, twins)


def _may_name_hub_model(url: str, stores: Stores) -> bool:
    if is_remote(url) or not _HUB_NAME.fullmatch(url):
        return False
    here = stores.open(url)
    folder = url.partition("/")[0]
    return not here.is_folder(folder) and here.stat(url) is None


def _open_hub(
    url: str, revision: str | None, stores: Stores, twins: Twins | None, *, sure: bool
) -> Checkpoint:
    hub = cast("HubStore", stores.open(url))
    cached = hub.cached(url, revision)
    if cached is not None:
        try:
            return open_hf(cached, stores.open(cached), twins)
        except CheckpointError:
            if hub.offline:
                raise
    return open_hf(hub.pinned(url, revision, sure=sure), hub, twins)


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
