"""From and to S3: the engine's reader beside a plain one, and how far reading and writing overlap.

The server is a real one (Ceph RGW, objects in memory) on this machine, so client and server share
its processors: ratios mean something, rates do not. For the overlap, a proxy in between bounds the
network to some megabytes per second each way; a merge should then take little longer than the
longer of reading its inputs and writing its output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks import harness
from benchmarks.families import Family, llama, make
from benchmarks.harness import Report, Workplace, median
from benchmarks.recipes import recipe
from tests.servers.api import S3Server
from tests.servers.rgw import Rgw

OBJECT_BYTES = 1 << 30
MB = 1_000_000


def transfer(action: str, *arguments: str, env: Mapping[str, str]) -> dict[str, float]:
    """What one transfer in a process of its own took."""
    command = [sys.executable, "-m", "benchmarks.io_work", action, *arguments]
    figures: dict[str, float] = json.loads(harness.run(command, env=env).stdout)
    return figures


def upload(server: S3Server, bucket: str, key: str, data: bytes) -> None:
    server.client().put_object(Bucket=bucket, Key=key, Body=data)


def compare_readers(server: S3Server, bucket: str, report: Report, runs: int) -> list[object]:
    """The engine's reader and the plain one on the same object, in turn."""
    upload(server, bucket, "object", os.urandom(1 << 20) * (OBJECT_BYTES >> 20))
    url = f"s3://{bucket}/object"
    found: dict[str, list[dict[str, float]]] = {"raw": [], "engine": []}
    for number in range(runs + 1):
        for action in found:
            figures = transfer(action, url, env=server.env())
            report.line("transfer", action=action, run=number, **figures)
            if number:  # run 0 warms the server up
                found[action].append(figures)

    def middle(action: str, figure: str) -> float:
        return median([figures[figure] for figures in found[action]])

    rate = middle("engine", "gb_per_s") / middle("raw", "gb_per_s")
    cpu = middle("engine", "cpu_s_per_gib") / middle("raw", "cpu_s_per_gib")
    report.line("readers", runs=runs, rate_ratio=round(rate, 3), cpu_ratio=round(cpu, 3))
    return [
        "reader",
        middle("raw", "gb_per_s"),
        middle("engine", "gb_per_s"),
        f"{rate:.2f}",
        middle("raw", "cpu_s_per_gib"),
        middle("engine", "cpu_s_per_gib"),
        f"{cpu:.2f}",
    ]


def compare_overlap(
    server: S3Server,
    bucket: str,
    family: Family,
    place: Workplace,
    report: Report,
    *,
    rate: int,
    runs: int,
) -> list[object]:
    """A merge through a bounded network beside its reading and its writing alone."""
    folders = {path: f"s3://{bucket}/{path.name}" for path in family.checkpoints()}
    for path, url in folders.items():
        for file in path.iterdir():
            upload(server, bucket, f"{url.rpartition('/')[2]}/{file.name}", file.read_bytes())
    chosen = recipe("linear", family)
    file = chosen.write(place.file("linear.yaml"))
    text = file.read_text()
    for path, url in folders.items():
        text = text.replace(str(path), url)
    file.write_text(text)
    shards = family.base.glob("*.safetensors")
    output_bytes = sum(path.stat().st_size for path in shards)
    ratios, rows = [], []
    with bounded(server.endpoint_url, rate * MB) as url:
        env = {**server.env(), "AWS_ENDPOINT_URL": url}
        for number in range(runs):
            read = transfer("read-all", *folders.values(), env=env)
            write = transfer("write-all", f"s3://{bucket}/w{number}", str(output_bytes), env=env)
            out = f"s3://{bucket}/merged-{number}"
            command = [sys.executable, "-m", "shardmerge", "merge", file, out, "--quiet"]
            merged = harness.run(command, env=env)
            ratio = merged.wall_s / max(read["wall_s"], write["wall_s"])
            ratios.append(ratio)
            rows.append((read["wall_s"], write["wall_s"], merged.wall_s, merged.cpu_s))
            report.line(
                "overlap",
                run=number,
                mb_per_s=rate,
                read=read,
                write=write,
                merge=merged.figures(),
                ratio=round(ratio, 3),
            )
    read_s, write_s, merge_s, cpu_s = (median(column) for column in zip(*rows, strict=True))
    return ["overlap", read_s, write_s, merge_s, cpu_s, f"{median(ratios):.2f}"]


@contextmanager
def bounded(upstream: str, bytes_per_s: int) -> Iterator[str]:
    """The URL of a proxy in a process of its own that passes so many bytes a second each way."""
    limits = ["--down", str(bytes_per_s), "--up", str(bytes_per_s)]
    command = [sys.executable, "-m", "tests.servers.proxy", upstream, *limits]
    proxy = subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True)
    assert proxy.stdout is not None
    try:
        yield json.loads(proxy.stdout.readline())["url"]
    finally:
        proxy.kill()
        proxy.wait()


def main() -> None:
    """Run both."""
    parser = harness.arguments(__doc__, family="0.3B")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", type=int, default=150, help="MB/s of the bounded network")
    parser.add_argument("--only", choices=["readers", "overlap"])
    args = parser.parse_args()
    place = Workplace(args.dir, "io")
    report = Report("io", args.family)
    if reason := Rgw.missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder, Rgw.start(Path(folder)) as server:
        bucket = server.make_bucket()
        if args.only != "overlap":
            row = compare_readers(server, bucket, report, args.runs)
            heads = ["", "plain GB/s", "ours GB/s", "ratio", "plain CPU s/GiB", "ours", "ratio"]
            report.table(heads, [row])
        if args.only != "readers":
            family = make(llama(args.family), place.families, seed=args.seed, models=3)
            row = compare_overlap(
                server, bucket, family, place, report, rate=args.rate, runs=args.runs
            )
            heads = ["", "read s", "write s", "merge s", "CPU s", "ratio to the longer"]
            report.table(heads, [row])


if __name__ == "__main__":
    main()
