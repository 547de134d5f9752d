"""Checkpoints as maps from names to tensors. ``open_checkpoint`` finds out what is at a URL."""

from __future__ import annotations

from shardmerge.errors import CheckpointError
from shardmerge.header import is_plain_name
from shardmerge.sources.hf import open_hf
from shardmerge.sources.tensor import Checkpoint
from shardmerge.stores import open_store
from shardmerge.stores.api import Store

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(url: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint at ``url``, a folder or a ``.safetensors`` file; only headers are read.

    Args:
        revision: a commit or branch of a model in a Hugging Face cache (``models--org--name``).

    Raises:
        CheckpointError: for what is not there, is damaged or of another kind; for a revision of a
            folder that has none.
        StoreError: for what cannot be read.
    """
    store = open_store(url)
    return open_hf(url if revision is None else _snapshot(store, url, revision), store)


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
        f"{url} has no revision '{revision}': a local checkpoint has revisions only as a folder of "
        "a Hugging Face cache (models--org--name, with snapshots/ in it).\n"
        "  Give the path of the checkpoint itself, without '@'."
    )
