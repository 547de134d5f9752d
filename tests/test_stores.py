"""What every store promises, checked for the local one."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from shardmerge.errors import StoreError
from shardmerge.stores import LocalStore, Store, open_store

# --- the suite; it moves to shardmerge.testing unchanged ------------------------------------------


class StoreRoot(Protocol):
    """An empty folder of a store, which the suite can fill by other means than the store."""

    url: str

    def put(self, name: str, data: bytes) -> None:
        """Create or replace ``name``, which may be ``folder/name``."""

    def remove(self, name: str) -> None:
        """Remove the object ``name``."""


class StoreSuite:
    """The promises of ``stores.api``. A subclass gives the fixtures ``store`` and ``root``."""

    def test_a_range_fills_the_whole_buffer(self, store: Store, root: StoreRoot) -> None:
        data = bytes(range(256)) * 40
        root.put("x", data)
        url = store.join(root.url, "x")
        for offset, count in ((0, len(data)), (0, 1), (1, 255), (len(data) - 1, 1), (4095, 4098)):
            buffer = bytearray(b"\xaa" * (count + 2))
            store.read_into(url, offset, memoryview(buffer)[1:-1])
            assert buffer[1:-1] == data[offset : offset + count]
            assert buffer[:1] + buffer[-1:] == b"\xaa\xaa"

    def test_a_buffer_of_any_element_type_is_filled(self, store: Store, root: StoreRoot) -> None:
        numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
        root.put("x", numbers.tobytes())
        buffer = np.zeros((3, 4), np.float32)
        store.read_into(store.join(root.url, "x"), 0, memoryview(buffer))
        assert (buffer == numbers).all()

    def test_no_bytes_are_no_read(self, store: Store, root: StoreRoot) -> None:
        root.put("x", b"ab")
        url = store.join(root.url, "x")
        store.read_into(url, 2, memoryview(b""))
        store.read_into(url, 0, memoryview(np.empty((0, 3), np.float32)))

    def test_fewer_bytes_than_asked_for_are_an_error(self, store: Store, root: StoreRoot) -> None:
        root.put("short", b"abc")
        root.put("empty", b"")
        for name, offset, count in (("short", 0, 4), ("short", 3, 1), ("short", 9, 1)):
            with pytest.raises(StoreError, match=name):
                store.read_into(store.join(root.url, name), offset, memoryview(bytearray(count)))
        with pytest.raises(StoreError, match="empty"):
            store.read_into(store.join(root.url, "empty"), 0, memoryview(bytearray(1)))

    def test_what_is_not_there_is_a_store_error(self, store: Store, root: StoreRoot) -> None:
        root.put("folder/x", b"a")
        for name in ("gone", "gone/too", "folder"):
            url = store.join(root.url, name)
            assert store.stat(url) is None
            with pytest.raises(StoreError, match=name):
                store.read_into(url, 0, memoryview(bytearray(1)))
            with pytest.raises(StoreError, match=name):
                store.read(url)
        with pytest.raises(StoreError, match="gone"):
            store.names(store.join(root.url, "gone"))

    def test_names_are_in_name_order_with_folders_marked(
        self, store: Store, root: StoreRoot
    ) -> None:
        for name in ("b", "a.txt", "a/inner/x", "é 日", "Z", "a b%20c#d?e", ".hidden"):
            root.put(name, b"1")
        expected = sorted(["b", "a.txt", "a", "é 日", "Z", "a b%20c#d?e", ".hidden"])
        found = store.names(root.url)
        assert [name.rstrip("/") for name in found] == expected
        assert [name for name in found if name.endswith("/")] == ["a/"]
        assert store.names(store.join(root.url, "a")) == ["inner/"]
        for name in found:
            if not name.endswith("/"):
                assert store.read(store.join(root.url, name)) == b"1"

    def test_folders_are_told_from_objects(self, store: Store, root: StoreRoot) -> None:
        root.put("folder/x", b"a")
        assert store.is_folder(root.url)
        assert store.is_folder(store.join(root.url, "folder"))
        assert not store.is_folder(store.join(root.url, "folder/x"))
        assert not store.is_folder(store.join(root.url, "gone"))

    def test_the_version_changes_with_the_content(self, store: Store, root: StoreRoot) -> None:
        url = store.join(root.url, "x")
        versions = set()
        for data in (b"1", b"2", b"33", b""):
            root.put("x", data)
            found = store.stat(url)
            assert found is not None
            assert found.size == len(data)
            assert store.stat(url) == found
            versions.add(found.version)
            # A read after a stat never sees an older object than the stat did.
            assert store.read(url) == data
            buffer = bytearray(len(data))
            store.read_into(url, 0, memoryview(buffer))
            assert buffer == data
        assert len(versions) == 4
        root.remove("x")
        assert store.stat(url) is None
        with pytest.raises(StoreError):
            store.read_into(url, 0, memoryview(bytearray(1)))

    def test_many_threads_read_at_once(self, store: Store, root: StoreRoot) -> None:
        contents = {f"shard-{number}": os.urandom(5000 + number) for number in range(12)}
        for name, data in contents.items():
            root.put(name, data)

        def read(step: int) -> bool:
            name = f"shard-{step * 7 % 12}"
            buffer = bytearray(3000)
            store.read_into(store.join(root.url, name), step, memoryview(buffer))
            return buffer == contents[name][step : step + 3000]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(400)))


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
        store.read_into(str(tmp_path / str(step % 6)), 20, memoryview(buffer))
        return buffer == bytes([step % 6]) * 50

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))
    assert most[0] <= 2


def test_a_failed_open_frees_its_place(tmp_path):
    store = LocalStore(max_open=1)
    for _ in range(3):
        with pytest.raises(StoreError, match="No such file"):
            store.read_into(str(tmp_path / "gone"), 0, memoryview(bytearray(1)))
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
        store.read_into(url, 1, memoryview(bytearray(1)))
    monkeypatch.setattr(os, "preadv", real_preadv)
    store.read_into(url, 1, memoryview(bytearray(1)))
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
        lambda u: store.read_into(u, 0, memoryview(bytearray(1))),
    ):
        with pytest.raises(StoreError):
            call(url)


def test_an_offset_that_cannot_be_is_a_store_error(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    for offset in (-1, 2**63 - 1, 2**64):
        with pytest.raises(StoreError):
            LocalStore().read_into(str(tmp_path / "x"), offset, memoryview(bytearray(1)))


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


def test_a_forked_process_has_a_store_of_its_own(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    url = str(tmp_path / "x")
    store = open_store(url)
    with store._files._changed:  # as if another thread were opening a file just now
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if open_store(url).read(url) == b"1" else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def test_open_store_knows_local_paths_and_says_what_it_does_not_know(tmp_path):
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    assert open_store("relative/path") is open_store(tmp_path.as_uri())
    for url in ("s3://bucket/key", "hf://org/name", "https://host/x"):
        scheme = url.split(":")[0]
        with pytest.raises(StoreError, match=f"{scheme}:// is not supported yet") as caught:
            open_store(url)
        assert "Download the checkpoint" in str(caught.value)
