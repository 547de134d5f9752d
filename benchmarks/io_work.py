"""One transfer in a process of its own, so that its CPU time is the client's alone.

    python -m benchmarks.io_work raw|engine|read-all|write-all ARGUMENTS...

Prints one JSON line with the seconds of the transfer, without the start of the interpreter and of
the S3 client.
"""

from __future__ import annotations

import argparse
import http.client
import json
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

from shardmerge.layout import Part, Spec, lay_out
from shardmerge.numerics import DType
from shardmerge.outputs import open_output
from shardmerge.stores import Range, Stores
from shardmerge.stores.s3 import S3Store, bucket_and_key

Transfer = Callable[[], int]
"""Does it, and gives the bytes."""

RANGE_BYTES = 64 << 20
AT_A_TIME = 8


def raw(url: str) -> Transfer:
    """Read an object by ranges into reused buffers: ``readinto``, and nothing is checked."""
    stores = Stores()
    store = stores.open(url)
    assert isinstance(store, S3Store)
    found = store.stat(url)
    assert found is not None
    signed = store.bucket(url).signed("get_object", Key=bucket_and_key(url)[1])
    parts = urlsplit(signed)

    def read(offsets: Sequence[int]) -> None:
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        buffer = memoryview(bytearray(RANGE_BYTES))
        for offset in offsets:
            stop = min(offset + RANGE_BYTES, found.size)
            headers = {"Range": f"bytes={offset}-{stop - 1}"}
            connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
            response = connection.getresponse()
            done = 0
            while done < stop - offset:
                done += response.readinto(buffer[done : stop - offset])
            response.read()
        connection.close()

    def transfer() -> int:
        offsets = range(0, found.size, RANGE_BYTES)
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(read, [offsets[i::AT_A_TIME] for i in range(AT_A_TIME)]))
        return found.size

    return transfer


def engine(*urls: str) -> Transfer:
    """Read objects as the engine does: large ranges, cut and checked, into reused buffers."""
    stores = Stores()
    objects = {url: stores.open(url).stat(url) for url in urls}

    def transfer() -> int:
        buffers = [memoryview(bytearray(RANGE_BYTES)) for _ in range(AT_A_TIME)]
        waiting: list[Range] = []
        total = 0
        for url, found in objects.items():
            assert found is not None
            total += found.size
            for offset in range(0, found.size, RANGE_BYTES):
                view = buffers[len(waiting)][: min(RANGE_BYTES, found.size - offset)]
                waiting.append(Range(url, offset, view, found.version))
                if len(waiting) == AT_A_TIME:
                    stores.read(waiting)
                    waiting = []
        stores.read(waiting)
        return total

    return transfer


def read_all(*folders: str) -> Transfer:
    """Read every shard of some checkpoints, and do nothing with it."""
    store = Stores()
    names = [(folder, name) for folder in folders for name in store.open(folder).names(folder)]
    return engine(*(f"{folder}/{name}" for folder, name in names if name.endswith("tensors")))


def write_all(out: str, nbytes: str) -> Transfer:
    """Write one shard of so many bytes, part by part, as a merge does."""
    output = open_output(out, Stores())
    elements = int(nbytes) // 2
    shards = lay_out([Spec("a", DType.BF16, (elements,))], [0], None, part_bytes=output.part_bytes)
    handles = dict(output.begin(shards, [0]))
    block = bytes(1 << 20)

    def transfer() -> int:
        with closing(output.writer(shards, handles)) as writer:

            def write(part: Part) -> None:
                sink = writer.part(part)
                for start in range(0, part.nbytes, len(block)):
                    sink.write(memoryview(block)[: part.nbytes - start])
                sink.finish([])

            with ThreadPoolExecutor(AT_A_TIME) as pool:
                list(pool.map(write, shards[0].parts))
        output.forget()
        return shards[0].nbytes

    return transfer


ACTIONS: dict[str, Callable[..., Transfer]] = {
    "raw": raw,
    "engine": engine,
    "read-all": read_all,
    "write-all": write_all,
}


def main() -> None:
    """Time one transfer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("arguments", nargs="+")
    args = parser.parse_args()
    transfer = ACTIONS[args.action](*args.arguments)
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    nbytes = transfer()
    wall_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures = {
        "wall_s": round(wall_s, 4),
        "cpu_s": round(cpu_s, 4),
        "bytes": nbytes,
        "gb_per_s": round(nbytes / wall_s / 1e9, 3),
        "cpu_s_per_gib": round(cpu_s / (nbytes / 2**30), 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
