"""Checkpoints as maps from names to tensors. ``open_checkpoint`` finds out what is at a URL."""

from __future__ import annotations

from shardmerge.sources.hf import open_hf
from shardmerge.sources.tensor import Checkpoint
from shardmerge.stores import open_store

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(url: str) -> Checkpoint:
    """The checkpoint at ``url``, a folder or a single ``.safetensors`` file. Reads headers only.

    Raises:
        CheckpointError: for a checkpoint that is missing, damaged or of an unsupported kind.
        StoreError: for bytes that could not be read, and for a scheme that is not supported.
    """
    return open_hf(url, open_store(url))
