"""Merges from and to a real S3 server, through a proxy that loses, cuts and falsifies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shardmerge.continual import State
from shardmerge.errors import (
    CheckpointError,
    LockedError,
    OutputError,
    SourceChangedError,
    StateError,
    Stopped,
    StoreError,
    UsageError,
)
from shardmerge.merge import merge
from shardmerge.numerics import DType
from shardmerge.outputs import open_output, s3_lock
from shardmerge.outputs.s3 import S3Output
from shardmerge.prepare import Where
from shardmerge.progress import Quiet
from shardmerge.publish import Published
from shardmerge.sources import open_checkpoint
from shardmerge.state import RECORD
from shardmerge.stores import Settings, Stores, retry
from shardmerge.stores.settings import parse_s3
from shardmerge.verify import verify
from tests.servers.api import S3Server
from tests.servers.proxy import Asked, FaultProxy, Script, seeded
from tests.support import Specs, read_tensors, recipe_of, tree, write_checkpoint, write_recipe

MIB = 2**20
SPECS: Specs = {
    "model.embed_tokens.weight": (DType.BF16, (1024, 1500)),
    **{
        f"model.layers.{i}.{name}.weight": (DType.BF16, shape)
        for i in range(4)
        for name, shape in (
            ("input_layernorm", (1024,)),
            ("mlp.down_proj", (1024, 2100)),
            ("mlp.up_proj", (2100, 1024)),
            ("post_attention_layernorm", (1024,)),
        )
    },
    "model.norm.weight": (DType.BF16, (1024,)),
}
FAULTS = (
    "503",
    "500",
    "429",
    "reset",
    "trunc",
    "short",
    "full200",
    "stall",
    "lost",
    "error200",
    "nosuch",
    "expired",
    "drop",
)
METHODS = {
    "linear": {"weight": 0.4},
    "ties": {"weight": 0.4, "density": 0.3},
    "dare_ties": {"weight": 0.4, "density": 0.3},
    "opcm": {},
}


class Family:
    """A base model and two fine-tunes on this machine and, the same bytes, in a bucket."""

    def __init__(self, folder: Path, server: S3Server) -> None:
        self.folder = folder
        self.server = server
        self.url = f"s3://{server.make_bucket()}"
        for seed, name in enumerate(("base", "a", "b")):
            here = write_checkpoint(folder / name, SPECS, seed=seed, shards=2)
            for path in here.iterdir():
                self.put(f"{name}/{path.name}", path.read_bytes())
        self._quiet: dict[str, dict[str, bytes]] = {}

    def put(self, key: str, data: bytes) -> None:
        self.server.client().put_object(Bucket=self.url[5:], Key=key, Body=data)

    def recipe(self, method: str, place: str, file: Path) -> str:
        """The path of a recipe of models at ``place``."""
        models = {f"{place}/{name}": dict(METHODS[method]) for name in ("a", "b")}
        base = None if method == "linear" else f"{place}/base"
        text = recipe_of(method, base, models, dtype="bfloat16")
        return write_recipe(file, text)

    def quiet(self, method: str) -> dict[str, bytes]:
        """Shards and index of the local merge."""
        if method not in self._quiet:
            out = self.folder / f"quiet-{method}"
            recipe = self.recipe(method, str(self.folder), self.folder / f"{method}.yml")
            merge(recipe, str(out), threads=2)
            self._quiet[method] = weights(tree(out))
        return self._quiet[method]

    def published(self, out: str) -> dict[str, bytes]:
        """What a reader sees at OUT."""
        bucket, _, prefix = out[5:].partition("/")
        client = self.server.client()
        listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", ())
        return {
            item["Key"].removeprefix(f"{prefix}/"): client.get_object(
                Bucket=bucket, Key=item["Key"]
            )["Body"].read()
            for item in listed
        }

    def uploads(self, out: str) -> list[str]:
        """Keys of the unfinished uploads at OUT."""
        listed = self.server.client().list_multipart_uploads(Bucket=self.url[5:])
        keys = [item["Key"] for item in listed.get("Uploads", ())]
        return [key for key in keys if f"{self.url}/{key}".startswith(f"{out}/")]


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if "safetensors" in name}


@pytest.fixture(scope="module")
def family(tmp_path_factory, swift) -> Family:
    return Family(tmp_path_factory.mktemp("family"), swift)


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Small parts and short waits; real sizes are for the command line below."""
    monkeypatch.setattr(S3Output, "part_bytes", 6 * MIB)
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(s3_lock, "_CONFIRM_S", 0.0)


@pytest.fixture
def place(family, monkeypatch, tmp_path) -> Iterator[Callable[..., FaultProxy]]:
    """Starts a proxy before the server that the environment then names."""
    for name, value in family.server.env().items():
        monkeypatch.setenv(name, value)
    opened: list[FaultProxy] = []

    def start(script: Script | None = None, **options: Any) -> FaultProxy:
        proxy = FaultProxy(family.server.endpoint_url, script, **{"stall_s": 0.2, **options})
        opened.append(proxy.__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        return proxy

    yield start
    for proxy in opened:
        proxy.__exit__(None, None, None)


def run(
    family: Family, method: str, out: str, folder: Path, **options: Any
) -> tuple[Published, dict[str, bytes]]:
    recipe = family.recipe(method, family.url, folder / "r.yml")
    published = merge(recipe, out, threads=2, **options)
    return published, family.published(out)


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_as_a_local_merge(family, place, tmp_path, method):
    proxy = place()
    out = f"{family.url}/out-{method}"
    published, found = run(family, method, out, tmp_path)
    assert weights(found) == family.quiet(method)
    assert not any(name.startswith(".shardmerge") for name in found)
    assert family.uploads(out) == []
    report = verify(out)
    assert report.problems == () and report.checksums
    assert run(family, method, out, tmp_path)[0].already
    # Neighbours are joined: fewer requests than tensors of inputs, headers included.
    tensors = {"linear": 2, "opcm": 5}.get(method, 3)  # opcm: the base model again, and the sum
    assert 0 < published.requests < len(SPECS) * tensors
    ranges = [line for line in proxy.log if line[1] == "GET" and ".safetensors" in line[2]]
    # The inputs of a matrix are asked for one by one, as it is one at a time that is in memory.
    assert len(ranges) < (150 if method == "opcm" else 100)


def test_ceph_as_well(family, rgw, tmp_path, monkeypatch):
    for name, value in rgw.env().items():
        monkeypatch.setenv(name, value)
    other = Family(tmp_path / "family", rgw)
    out = f"{other.url}/out"
    with FaultProxy(rgw.endpoint_url, seeded(3, 0.1, FAULTS), stall_s=0.2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        _, found = run(other, "ties", out, tmp_path)
        assert weights(found) == family.quiet("ties")
        assert other.uploads(out) == []
        assert verify(out).problems == ()


def test_places_may_be_mixed(family, place, tmp_path):
    place()
    recipe = tmp_path / "r.yml"
    family.recipe("ties", family.url, recipe)
    recipe.write_text(recipe.read_text().replace(f"{family.url}/b", f"{family.folder}/b"))
    merge(str(recipe), str(tmp_path / "out"), threads=1)
    assert weights(tree(tmp_path / "out")) == family.quiet("ties")
    merge(str(recipe), f"{family.url}/mixed", threads=1, memory_bytes=300 * MIB)
    assert weights(family.published(f"{family.url}/mixed")) == family.quiet("ties")


@pytest.mark.parametrize("seed", range(3))
def test_one_request_in_ten_fails(family, place, tmp_path, seed):
    proxy = place(seeded(seed, 0.1, FAULTS))
    out = f"{family.url}/faulty-{seed}"
    _, found = run(family, "ties", out, tmp_path)
    assert weights(found) == family.quiet("ties")
    assert family.uploads(out) == []
    assert not any(name.startswith(".shardmerge") for name in found)
    assert sum(proxy.counts().values()) > 5


@pytest.mark.parametrize("fault", FAULTS)
def test_a_storm_passes(family, place, tmp_path, fault):
    """Every third request from the first to the last, each at most three times."""

    def script(number: int, asked: Asked) -> str | None:
        return fault if number % 3 == 0 and asked.tries < 3 else None

    proxy = place(script)
    out = f"{family.url}/storm-{fault}"
    _, found = run(family, "linear", out, tmp_path)
    assert weights(found) == family.quiet("linear")
    assert family.uploads(out) == []
    assert proxy.counts()


# --- what will not pass ---------------------------------------------------------------------------


def impatient(**settings: str) -> Settings:
    return Settings(0.02, tuple(("", name, value) for name, value in settings.items()))


@pytest.mark.parametrize("fault", ["short", "full200"])
def test_a_server_that_always_answers_wrongly_is_not_asked_for_long(family, place, tmp_path, fault):
    proxy = place(lambda number, asked: fault if "range" in asked.headers else None)
    recipe = family.recipe("linear", family.url, tmp_path / "r.yml")
    with pytest.raises(StoreError, match=r"(?s)cannot be used like this"):
        merge(recipe, str(tmp_path / "out"), settings=Settings(10))
    asked = [line for line in proxy.log if line[3] == fault]
    assert len(asked) <= 5 * 4  # headers of four shards, some at a time
    assert not (tmp_path / "out").exists()


def test_patience_ends(family, place, tmp_path):
    place(lambda number, asked: "503" if number > 10 else None)
    recipe = family.recipe("linear", family.url, tmp_path / "r.yml")
    with pytest.raises(StoreError, match=r"(?s)(503|SlowDown).*--patience"):
        merge(recipe, f"{family.url}/impatient", settings=impatient())


def test_what_is_not_there_or_not_allowed_fails_at_once(family, place, tmp_path, monkeypatch):
    proxy = place()
    recipe = family.recipe("linear", family.url, tmp_path / "r.yml")
    with pytest.raises(StoreError, match="there is no bucket 'nowhere-at-all'"):
        merge(recipe, "s3://nowhere-at-all/out")
    reads = [line for line in proxy.log if line[1] == "GET" and "mlp" in line[2]]
    assert reads == []
    text = Path(recipe).read_text().replace(f"{family.url}/a", f"{family.url}/missing")
    Path(recipe).write_text(text)
    before = len(proxy.log)
    with pytest.raises(Exception, match=r"missing: no such folder or file"):
        merge(recipe, f"{family.url}/out-x")
    assert len(proxy.log) - before < 20
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match=r"(?s)SignatureDoesNotMatch.*AWS_PROFILE"):
        merge(recipe, f"{family.url}/out-x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match=r"(?s)credentials.*anonymous=true"):
        merge(recipe, f"{family.url}/out-x")


def test_a_place_that_cannot_be_written_is_found_before_the_first_read(family, place, tmp_path):
    def script(number: int, asked: Asked) -> str | None:
        return "503" if asked.method in ("PUT", "POST") and "probe" in asked.path else None

    proxy = place(script)
    recipe = family.recipe("linear", family.url, tmp_path / "r.yml")
    with pytest.raises(StoreError):
        merge(recipe, f"{family.url}/unwritable", settings=impatient())
    first = next(n for n, line in enumerate(proxy.log) if line[3] == "503")
    ranges = [line for line in proxy.log[first:] if "/a/model-" in line[2]]
    assert ranges == []


def test_a_server_that_wants_even_parts_is_refused_before_the_first_read(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://account.r2.cloudflarestorage.com")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(OutputError, match="parts of an upload to be of one size"):
        open_output("s3://bucket/out", Stores()).prove((), frozenset())


def test_urls_that_are_nearly_right_are_told(tmp_path):
    recipe = write_recipe(tmp_path / "r.yml", recipe_of("linear", None, {"a": {"weight": 1}}))
    with pytest.raises(UsageError, match=r"did you mean s3://bucket/x\?"):
        merge(recipe, "s3:/bucket/x")
    with pytest.raises(CheckpointError, match=r"did you mean s3://bucket/a\?"):
        open_checkpoint("s3:/bucket/a")
    with pytest.raises(StoreError) as caught:
        open_checkpoint("s3://user:secret@bucket/a")
    assert "secret" not in str(caught.value) and "AWS_PROFILE" in str(caught.value)
    with pytest.raises(UsageError, match=r"many tools"):
        merge(recipe, "s3://bucket/../x")


def test_a_run_that_waited_for_the_same_merge_has_nothing_to_do(family, place, tmp_path):
    place()
    out = f"{family.url}/twice"
    recipe = family.recipe("linear", family.url, tmp_path / "r.yml")
    output = open_output(out, Stores())
    with ThreadPoolExecutor(1) as pool:
        with output.locked():  # another run, which publishes meanwhile
            waiting = pool.submit(merge, recipe, out)
            time.sleep(0.5)
            merge(recipe, str(tmp_path / "here"))
            for name, data in tree(tmp_path / "here").items():
                output.write(name, data)
        assert waiting.result().already
    assert weights(family.published(out)) == family.quiet("linear")


class Once(Quiet):
    """Does something when the first task has ended."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act: Callable[[], None] | None = act

    def task(self, *arguments: Any) -> None:
        super().task(*arguments)
        if self._act:
            act, self._act = self._act, None
            act()


def test_a_source_that_changes_is_an_error(family, place, tmp_path):
    place()
    name = "a/model-00002-of-00002.safetensors"
    data = (family.folder / name).read_bytes()
    recipe = family.recipe("linear", family.url, tmp_path / "r.yml")
    try:
        with pytest.raises(SourceChangedError, match="changed while it was being"):
            merge(
                recipe,
                f"{family.url}/changed",
                threads=1,
                memory_bytes=300 * MIB,
                progress=Once(lambda: family.put(name, data[:-2] + b"\1\2")),
            )
        assert weights(family.published(f"{family.url}/changed")) == {}
    finally:
        family.put(name, data)


def test_a_stop_does_not_wait_for_a_server(family, place, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 60.0)
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 60.0)
    stop = threading.Event()
    down = threading.Event()

    def script(number: int, asked: Asked) -> str | None:
        return "503" if down.is_set() and ".safetensors" in asked.path else None

    def act() -> None:
        down.set()
        threading.Timer(0.3, stop.set).start()

    place(script)
    recipe = family.recipe("linear", family.url, tmp_path / "r.yml")
    out = f"{family.url}/stopped"
    began = time.monotonic()
    with pytest.raises(Stopped):
        merge(recipe, out, threads=1, progress=Once(act), stop=stop)
    assert time.monotonic() - began < 30
    down.clear()
    merge(recipe, out, threads=1)
    assert weights(family.published(out)) == family.quiet("linear")


# --- one writer -----------------------------------------------------------------------------------


def test_a_silent_owner_is_replaced_and_finds_out(family, place, monkeypatch):
    place()
    monkeypatch.setattr(s3_lock, "STALE_S", 0.3)
    monkeypatch.setattr(s3_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(s3_lock, "_process_space", lambda: "another machine")
    out = f"{family.url}/locked"
    first, second = open_output(out, Stores()), open_output(out, Stores())
    with first.locked():
        monkeypatch.setattr(s3_lock, "_process_space", lambda: "this machine")
        with pytest.raises(LockedError, match="is being written by process"), second.locked():
            pass  # it lives: it changes the lock again and again
    monkeypatch.setattr(s3_lock, "BEAT_S", 1.0)
    monkeypatch.setattr(s3_lock, "_process_space", lambda: "another machine")
    with first.locked():  # silent for longer than others wait
        monkeypatch.setattr(s3_lock, "_process_space", lambda: "this machine")
        with second.locked():
            until = time.monotonic() + 20
            with pytest.raises(LockedError, match="has taken over"):
                while time.monotonic() < until:
                    first.check_lock()
                    time.sleep(0.02)
            second.check_lock()


def test_a_server_without_conditions_keeps_one_writer(family, place, monkeypatch):
    """A lock that another process wrote at the same moment is seen before anything is done."""
    place()
    monkeypatch.setattr(s3_lock, "STALE_S", 0.2)
    out = f"{family.url}/raced"
    output = open_output(out, Stores())
    real = s3_lock.S3Lock._put

    def put(lock: s3_lock.S3Lock, beat: int, *, first: bool) -> None:
        real(lock, beat, first=first)
        key = f"{out[5:].partition('/')[2]}/.shardmerge/lock"
        family.put(key, json.dumps({"name": "other", "host": "h", "process": 1}).encode())

    monkeypatch.setattr(s3_lock.S3Lock, "_put", put)
    with pytest.raises(LockedError, match="process 1 on h"), output.locked():
        pass


# --- settings and secrets -------------------------------------------------------------------------


def test_settings_reach_the_server(family, place, tmp_path):
    seen: list[Asked] = []

    def script(number: int, asked: Asked) -> str | None:
        seen.append(asked)
        return None

    def proved(*texts: str) -> None:
        settings = Settings(10, parse_s3(texts))
        output = open_output(f"{family.url}/set", Stores(settings))
        with output.locked():
            output.prove((), frozenset())

    place(script)
    bucket = family.url[5:]
    # Swift has one storage class and no keys; it says so, and was asked.
    with pytest.raises(StoreError, match="create_multipart_upload is refused"):
        proved(
            "storage_class=GLACIER_IR",
            "acl=bucket-owner-full-control",
            f"{bucket}:sse_kms_key_id=key-1",
            "other:sse_kms_key_id=key-2",
        )
    (begun,) = [asked for asked in seen if asked.method == "POST" and "uploads" in asked.query]
    assert begun.headers["x-amz-storage-class"] == "GLACIER_IR"
    assert begun.headers["x-amz-acl"] == "bucket-owner-full-control"
    assert begun.headers["x-amz-server-side-encryption"] == "aws:kms"
    assert begun.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "key-1"
    seen.clear()
    proved("request_payer=true", "checksum=md5")
    (part,) = [asked for asked in seen if asked.method == "PUT" and "partNumber" in asked.query]
    assert part.headers["content-md5"]
    assert all("x-amz-request-payer" in asked.headers for asked in seen)
    seen.clear()
    proved()
    assert any("x-amz-checksum-crc32" in asked.headers for asked in seen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("storage_clas=X", "Did you mean 'storage_class'"),
        ("anonymous=maybe", "one of true, false"),
        ("checksum=crc", "one of crc32, md5, none"),
        ("anonymous", "NAME=VALUE"),
    ],
)
def test_settings_that_are_none(text, message):
    with pytest.raises(UsageError, match=message):
        parse_s3([text])


def test_a_public_bucket_needs_no_credentials(rgw, monkeypatch, tmp_path):
    bucket = rgw.make_bucket()
    client = rgw.client()
    client.put_bucket_acl(Bucket=bucket, ACL="public-read")
    for path in write_checkpoint(tmp_path / "a", {"w": (DType.F32, (5,))}).iterdir():
        client.put_object(
            Bucket=bucket, Key=f"a/{path.name}", Body=path.read_bytes(), ACL="public-read"
        )
    monkeypatch.setenv("AWS_ENDPOINT_URL", rgw.endpoint_url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    recipe = write_recipe(
        tmp_path / "r.yml",
        {"merge_method": "passthrough", "models": [{"model": f"s3://{bucket}/a"}]},
    )
    merge(recipe, str(tmp_path / "out"), settings=Settings(10, parse_s3(["anonymous=true"])))
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "a")
    with pytest.raises(StoreError, match="access denied"):
        merge(recipe, f"s3://{bucket}/out", settings=Settings(10, parse_s3(["anonymous=true"])))


def test_credentials_are_nowhere(family, place, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(retry, "_QUIET_S", 0.0)
    place(seeded(5, 0.2, ("503", "reset", "trunc", "lost")))
    out = f"{family.url}/secret"
    stop = threading.Event()
    recipe = family.recipe("linear", family.url, tmp_path / "r.yml")
    with pytest.raises(Stopped):
        merge(recipe, out, threads=1, progress=Once(stop.set), stop=stop)
    written = b"".join(family.published(out).values())
    run(family, "linear", out, tmp_path)
    written += b"".join(family.published(out).values())
    said = "".join(capfd.readouterr()).encode()
    for secret in (b"testing", b"X-Amz-Signature", b"X-Amz-Credential", b"AWS4-HMAC"):
        assert secret not in written and secret not in said


# --- killed ---------------------------------------------------------------------------------------


def command(family: Family, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shardmerge", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def parts_sent(proxy: FaultProxy, shard: str) -> int:
    return sum(method == "PUT" and shard in path for _, method, path, _ in list(proxy.log))


def test_killed_twice_resumed_elsewhere_one_request_in_ten_failing(family, place, tmp_path):
    proxy = place(seeded(11, 0.1, FAULTS))
    out = f"{family.url}/killed"
    for number, parts in enumerate((1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        recipe = family.recipe("ties", family.url, folder / "recipe.yml")
        before = parts_sent(proxy, "killed/model-")
        # Slow enough that the kill comes in the middle: one worker, little memory.
        process = command(family, folder, "merge", recipe, out, "--threads", "1", "--quiet")
        until = time.monotonic() + 60
        while parts_sent(proxy, "killed/model-") - before < parts and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not {INDEX} & family.published(out).keys()
    folder = tmp_path / "last"
    folder.mkdir()
    recipe = family.recipe("ties", family.url, folder / "recipe.yml")
    process = command(family, folder, "merge", recipe, out)
    said, complained = process.communicate(timeout=200)
    assert process.returncode == 0, complained
    assert "merged" in said and "per GiB" in complained
    found = family.published(out)
    assert weights(found) == family.quiet("ties")
    assert not any(name.startswith(".shardmerge") for name in found)
    assert family.uploads(out) == []


def test_what_an_abandoned_run_left_is_listed_and_removed(family, place, tmp_path):
    proxy = place()
    out = f"{family.url}/abandoned"
    recipe = family.recipe("linear", family.url, tmp_path / "r.yml")
    process = command(family, tmp_path, "merge", recipe, out, "--threads", "1", "--quiet")
    until = time.monotonic() + 60
    while not parts_sent(proxy, "abandoned/model-") and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(family.uploads(out)) == 2
    listed, _ = command(family, tmp_path, "clean", out, "--dry-run").communicate()
    assert "upload of" in listed and "ledger" in listed
    assert len(family.uploads(out)) == 2
    done = command(family, tmp_path, "clean", out)
    listed, _ = done.communicate()
    assert done.returncode == 0 and "removed" in listed
    assert family.uploads(out) == [] and family.published(out) == {}
    listed, _ = command(family, tmp_path, "clean", out).communicate()
    assert "no unfinished run" in listed


INDEX = "model.safetensors.index.json"


# --- states of continual merging ------------------------------------------------------------------


def sums_in(files: dict[str, bytes]) -> dict[str, bytes]:
    """The shards of the sums of a state, by step: their folders are named by where models lie."""
    return {
        re.sub(r"-[0-9a-f]{8}/", "/", name): data
        for name, data in files.items()
        if name.endswith(".safetensors")
    }


def test_a_state_in_a_bucket(family, place, tmp_path):
    """The same sums as of a local state; what is dropped leaves no object and no upload."""
    place()
    where = Where(threads=2)
    local, remote = State(str(tmp_path / "state")), State(f"{family.url}/state")
    local.init(str(family.folder / "base"))
    remote.init(f"{family.url}/base")
    for name in ("a", "b"):
        local.add(str(family.folder / name), where)
        remote.add(f"{family.url}/{name}", where)
    with pytest.raises(StateError, match="is in"):
        remote.add(f"{family.url}/a", where)
    found = family.published(remote.url)
    assert sums_in(found) == sums_in(tree(tmp_path / "state"))
    assert not any(".shardmerge/" in name for name in found)
    local.publish(str(tmp_path / "out"), where)
    remote.publish(f"{family.url}/of-state", where)
    assert weights(family.published(f"{family.url}/of-state")) == weights(tree(tmp_path / "out"))
    remote.undo()
    remote.undo()
    assert sorted(family.published(remote.url)) == [RECORD]
    assert family.uploads(remote.url) == []


def test_a_step_that_is_stopped_goes_on(family, place, tmp_path):
    place()
    url = f"{family.url}/state-stopped"
    State(url).init(f"{family.url}/base")
    State(url).add(f"{family.url}/a", Where(threads=1))
    stopped = State(url)
    stopped._stop.set()
    with pytest.raises(Stopped):
        stopped.add(f"{family.url}/b", Where(threads=1))
    assert len(State(url).record().steps) == 1
    assert State(url).add(f"{family.url}/b", Where(threads=1)).number == 2
    State(url).publish(str(tmp_path / "out"), Where(threads=1), dtype="bfloat16")
    recipe = family.recipe("opcm", str(family.folder), tmp_path / "r.yml")
    merge(recipe, str(tmp_path / "all"), threads=1)
    assert weights(tree(tmp_path / "out")) == weights(tree(tmp_path / "all"))
