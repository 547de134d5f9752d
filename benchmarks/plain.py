"""The least a merge can do: read every byte of all inputs, write one model and make it durable.

    python -m benchmarks.plain OUT BASE [MODEL ...]

Prints one JSON line with the seconds of the loop, without the start of the interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BUFFER = 8 << 20


def read_and_write(inputs: Sequence[Path], out: Path) -> tuple[float, int, int]:
    """Read the shards of ``inputs``, summing their bytes; write those of the first to ``out``.

    Returns:
        Seconds, bytes read and bytes written.
    """
    buffer = memoryview(bytearray(BUFFER))
    out.mkdir(parents=True)
    read = written = 0
    started = time.perf_counter()
    for k, folder in enumerate(inputs):
        for path in sorted(folder.glob("*.safetensors")):
            copy = out / path.name if k == 0 else None
            n_bytes = _pass(path, copy, buffer)
            read += n_bytes
            written += n_bytes if copy else 0
    return time.perf_counter() - started, read, written


def _pass(path: Path, copy: Path | None, buffer: memoryview) -> int:
    source = os.open(path, os.O_RDONLY)
    target = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644) if copy else None
    at = 0
    try:
        while count := os.preadv(source, [buffer], at):
            # The sum brings every byte through the CPU, as any merge must.
            np.frombuffer(buffer[: count & ~7], np.uint64).sum()
            if target is not None and os.pwrite(target, buffer[:count], at) != count:
                raise OSError(f"short write to {copy}")
            at += count
        if target is not None:
            os.fsync(target)
    finally:
        os.close(source)
        if target is not None:
            os.close(target)
    return at


def main() -> None:
    """Time one pass."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("inputs", type=Path, nargs="+")
    args = parser.parse_args()
    wall_s, read, written = read_and_write(args.inputs, args.out)
    print(json.dumps({"wall_s": round(wall_s, 4), "read_bytes": read, "written_bytes": written}))


if __name__ == "__main__":
    main()
