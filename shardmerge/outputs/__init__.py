"""Places that a checkpoint is published at. ``open_output`` finds the one that OUT names."""

from __future__ import annotations

import re
from pathlib import Path

from shardmerge.errors import OutputError, UsageError
from shardmerge.outputs.api import Output
from shardmerge.outputs.local import LocalOutput
from shardmerge.stores import Stores
from shardmerge.stores.api import scheme_of

__all__ = ["Output", "open_output"]


def open_output(out: str, stores: Stores) -> Output:
    """The place that OUT names; nothing is touched there.

    Raises:
        UsageError: for a scheme that nothing can be written to.
        OutputError: for a path that no file can have.
    """
    if not out:
        raise UsageError("OUT is empty. Give the folder of the new checkpoint.")
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.]+):/(?!/)", out):
        raise UsageError(f"{out}: did you mean {match[1]}://{out[match.end() :]}?")
    if scheme_of(out) == "s3":
        if {".", ".."} & set(out.split("/")):
            raise UsageError(
                f"{out}: many tools cannot reach a key with '.' or '..' between slashes. "
                "Write the place without them."
            )
        from shardmerge.outputs.s3 import S3Output  # a local merge does not need botocore

        return S3Output(out, stores)
    if "://" in out:
        raise UsageError(
            f"{out}: an output can be written to a local folder, given as a path, or to s3://."
        )
    try:
        path = Path(out).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise OutputError(f"cannot write to {out}: {reason}. Give another path.") from problem
    return LocalOutput(path)
