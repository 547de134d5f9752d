"""What every store promises, checked for the local one."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shardmerge.errors import StoreError
from shardmerge.stores import Range, Stores
from shardmerge.stores.local import LocalStore
from shardmerge.testing.stores import StoreSuite

# --- the local store ------------------------------------------------------------------------------


@dataclass
class LocalRoot:
    url: str
    folder: Path

    def put(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(data)
        temporary.replace(path)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


class TestLocalStore(StoreSuite):
    @pytest.fixture(params=["path", "file URL", "one open file"])
    def kind(self, request):
        return request.param

    @pytest.fixture
    def store(self, kind):
        return LocalStore(max_open=1) if kind == "one open file" else LocalStore()

    @pytest.fixture
    def root(self, kind, tmp_path):
        folder = tmp_path / "a folder %41 é"
        folder.mkdir()
        return LocalRoot(folder.as_uri() if kind == "file URL" else str(folder), folder)


def open_descriptors(folder: Path) -> int:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(entry))  # noqa: PTH115
        except OSError:  # the listing's own
            continue
    return sum(link.startswith(str(folder)) for link in links)


def test_open_files_are_bounded_and_the_least_used_is_closed(tmp_path):
    store = LocalStore(max_open=3)
    for number in range(10):
        (tmp_path / str(number)).write_bytes(bytes([number]))
        assert store.read(str(tmp_path / str(number))) == bytes([number])
        assert open_descriptors(tmp_path) <= 3
    store.close()
    assert open_descriptors(tmp_path) == 0
    assert store.read(str(tmp_path / "3")) == b"\3"


def test_more_threads_than_open_files_wait_and_none_is_closed_under_a_reader(tmp_path, monkeypatch):
    for number in range(6):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    store = LocalStore(max_open=2)
    preadv, most, lock = os.preadv, [0], threading.Lock()

    def slow(descriptor, buffers, offset):
        with lock:
            most[0] = max(most[0], open_descriptors(tmp_path))
        threading.Event().wait(0.001)
        os.fstat(descriptor)
        return preadv(descriptor, [buffers[0][:7]], offset)  # short reads are not the end

    monkeypatch.setattr(os, "preadv", slow)

    def read(step):
        buffer = bytearray(50)
        store.read_ranges([Range(str(tmp_path / str(step % 6)), 20, memoryview(buffer))])
        return buffer == bytes([step % 6]) * 50

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))
    assert most[0] <= 2


def test_a_failed_open_frees_its_place(tmp_path):
    store = LocalStore(max_open=1)
    for _ in range(3):
        with pytest.raises(StoreError, match="No such file"):
            store.read_ranges([Range(str(tmp_path / "gone"), 0, memoryview(bytearray(1)))])
    (tmp_path / "x").write_bytes(b"x")
    assert store.read(str(tmp_path / "x")) == b"x"


def test_a_failed_read_names_the_place_and_opens_the_file_again(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"abc")
    store, url = LocalStore(), str(tmp_path / "x")
    opened = []
    real_open, real_preadv = os.open, os.preadv
    monkeypatch.setattr(os, "open", lambda *a: opened.append(a) or real_open(*a))

    def broken(*arguments):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StoreError, match=r"x: cannot be read at byte 1: Stale file handle\. Check"):
        store.read_ranges([Range(url, 1, memoryview(bytearray(1)))])
    monkeypatch.setattr(os, "preadv", real_preadv)
    store.read_ranges([Range(url, 1, memoryview(bytearray(1)))])
    assert len(opened) == 2


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "blob").write_bytes(b"abc")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("blob")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "broken").symlink_to("gone")
    store = LocalStore()
    assert store.names(str(tmp_path)) == ["blob", "broken", "folder/", "link", "real/"]
    assert store.read(str(tmp_path / "link")) == b"abc"
    assert store.stat(str(tmp_path / "broken")) is None


@pytest.mark.parametrize("url", ["", "a\0b", "\ud800", "x" * 5000])
def test_a_path_that_cannot_be_is_a_store_error(url):
    store = LocalStore()
    for call in (
        store.names,
        store.read,
        lambda u: store.read_ranges([Range(u, 0, memoryview(bytearray(1)))]),
    ):
        with pytest.raises(StoreError):
            call(url)


def test_an_offset_that_cannot_be_is_a_store_error(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    for offset in (-1, 2**63 - 1, 2**64):
        with pytest.raises(StoreError):
            LocalStore().read_ranges([Range(str(tmp_path / "x"), offset, memoryview(bytearray(1)))])


def test_other_than_ordinary_files_are_not_there(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert LocalStore().stat(str(tmp_path / "pipe")) is None


def test_relative_paths_become_absolute_and_home_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_bytes(b"1")
    store = LocalStore()
    assert store.join(".", "x") == str(tmp_path / "x")
    assert store.join("~", "x") == str(tmp_path / "x")
    assert store.join("/", "x") == "/x"
    assert store.join("file:///", "x") == "file:///x"
    assert store.read("~/x") == b"1"


def test_file_urls_name_this_machine_only(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    assert LocalStore().read(f"file://localhost{tmp_path}/x") == b"1"
    with pytest.raises(StoreError, match=r"(?s)host 'server'.*three slashes"):
        LocalStore().stat("file://server/x")


def test_a_store_can_be_sent_to_a_process(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    assert pickle.loads(pickle.dumps(LocalStore())).read(str(tmp_path / "x")) == b"1"


def test_stores_know_what_a_scheme_is(tmp_path):
    stores = Stores()
    assert isinstance(stores.open(str(tmp_path)), LocalStore)
    assert stores.open("relative/path") is stores.open(tmp_path.as_uri())
    with pytest.raises(StoreError, match="no such kind of place is known"):
        stores.open("nowhere://bucket/key")


# --- other stores ---------------------------------------------------------------------------------


@dataclass
class S3Root:
    url: str
    client: Any

    def _key(self, name: str) -> dict[str, str]:
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": f"{prefix}/{name}"}

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(**self._key(name), Body=data)

    def remove(self, name: str) -> None:
        self.client.delete_object(**self._key(name))


class TestS3Store(StoreSuite):
    @pytest.fixture
    def store(self, bucket):
        return Stores().open(bucket)

    @pytest.fixture
    def root(self, bucket, swift):
        return S3Root(f"{bucket}/a folder %41 é", swift.client())


@dataclass
class MemoryRoot:
    url: str

    def put(self, name: str, data: bytes) -> None:
        fsspec.filesystem("memory").pipe_file(f"{self.url.partition('://')[2]}/{name}", data)

    def remove(self, name: str) -> None:
        fsspec.filesystem("memory").rm_file(f"{self.url.partition('://')[2]}/{name}")


class TestPortableStore(StoreSuite):
    @pytest.fixture
    def store(self):
        return Stores().open("memory://")

    @pytest.fixture
    def root(self):
        yield MemoryRoot("memory://root")
        fsspec.filesystem("memory").store.clear()


def test_a_listing_of_several_pages_is_read_to_its_end(bucket, swift):
    root = S3Root(f"{bucket}/folder", swift.client())
    for number in range(5):
        root.put(f"x{number}", b"1")
    pages = list(Stores().open(bucket).bucket(bucket).pages("list_objects_v2", MaxKeys=2))
    keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    assert keys == [f"folder/x{number}" for number in range(5)]
    assert len(pages) == 3
