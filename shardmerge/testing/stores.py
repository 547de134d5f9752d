"""What every store promises; for pytest."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pytest

from shardmerge.errors import SourceChangedError, StoreError
from shardmerge.stores.api import Range, Store


class StoreRoot(Protocol):
    """An empty folder of a store, which the suite can fill by other means than the store."""

    url: str

    def put(self, name: str, data: bytes) -> None:
        """Create or replace ``name``, which may be ``folder/name``."""

    def remove(self, name: str) -> None:
        """Remove the object ``name``."""


class StoreSuite:
    """The promises of ``stores.api``.

    A subclass ``TestMine`` gives the fixtures ``store``, and ``root``: a ``StoreRoot``.
    """

    def test_a_range_fills_the_whole_buffer(self, store: Store, root: StoreRoot) -> None:
        data = bytes(range(256)) * 40
        root.put("x", data)
        url = store.join(root.url, "x")
        for offset, count in ((0, len(data)), (0, 1), (1, 255), (len(data) - 1, 1), (4095, 4098)):
            buffer = bytearray(b"\xaa" * (count + 2))
            store.read_ranges([Range(url, offset, memoryview(buffer)[1:-1])])
            assert buffer[1:-1] == data[offset : offset + count]
            assert buffer[:1] + buffer[-1:] == b"\xaa\xaa"

    def test_a_buffer_of_any_element_type_is_filled(self, store: Store, root: StoreRoot) -> None:
        numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
        root.put("x", numbers.tobytes())
        buffer = np.zeros((3, 4), np.float32)
        store.read_ranges([Range(store.join(root.url, "x"), 0, memoryview(buffer.data))])
        assert (buffer == numbers).all()

    def test_no_bytes_are_no_read(self, store: Store, root: StoreRoot) -> None:
        root.put("x", b"ab")
        url = store.join(root.url, "x")
        store.read_ranges([Range(url, 2, memoryview(b""))])
        store.read_ranges([Range(url, 0, np.empty((0, 3), np.float32).data)])

    def test_fewer_bytes_than_asked_for_are_an_error(self, store: Store, root: StoreRoot) -> None:
        root.put("short", b"abc")
        root.put("empty", b"")
        for name, offset, count in (("short", 0, 4), ("short", 3, 1), ("short", 9, 1)):
            with pytest.raises(StoreError, match=name):
                store.read_ranges(
                    [Range(store.join(root.url, name), offset, memoryview(bytearray(count)))]
                )
        with pytest.raises(StoreError, match="empty"):
            store.read_ranges([Range(store.join(root.url, "empty"), 0, memoryview(bytearray(1)))])

    def test_what_is_not_there_is_a_store_error(self, store: Store, root: StoreRoot) -> None:
        root.put("folder/x", b"a")
        for name in ("gone", "gone/too", "folder"):
            url = store.join(root.url, name)
            assert store.stat(url) is None
            with pytest.raises(StoreError, match=name):
                store.read_ranges([Range(url, 0, memoryview(bytearray(1)))])
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
            store.read_ranges([Range(url, 0, memoryview(buffer))])
            assert bytes(buffer) == data
        assert len(versions) == 4
        root.remove("x")
        assert store.stat(url) is None
        with pytest.raises(StoreError):
            store.read_ranges([Range(url, 0, memoryview(bytearray(1)))])

    def test_bytes_of_another_version_are_never_given(self, store: Store, root: StoreRoot) -> None:
        """What was planned with one version is never mixed with another."""
        url = store.join(root.url, "x")
        root.put("x", b"before")
        found = store.stat(url)
        assert found is not None
        buffer = bytearray(3)
        store.read_ranges([Range(url, 1, memoryview(buffer), found.version)])
        assert buffer.decode() == "efo"
        root.put("x", b"after!")
        # A store that still holds the old object may give its bytes.
        with contextlib.suppress(SourceChangedError):
            store.read_ranges([Range(url, 1, memoryview(buffer), found.version)])
        assert buffer.decode() == "efo"
        assert store.stat(url) != found
        with pytest.raises(SourceChangedError, match="changed"):
            store.read_ranges([Range(url, 1, memoryview(buffer), found.version)])

    def test_ranges_of_several_objects_at_once(self, store: Store, root: StoreRoot) -> None:
        contents = {name: os.urandom(300_000) for name in ("a", "b")}
        for name, data in contents.items():
            root.put(name, data)
        wanted = [
            (name, offset, count)
            for name in ("b", "a")
            for offset, count in ((5, 7), (12, 100_000), (150_000, 3), (0, 2), (299_999, 1), (9, 0))
        ]
        buffers = [bytearray(count) for _, _, count in wanted]
        store.read_ranges(
            [
                Range(store.join(root.url, name), offset, memoryview(buffer))
                for (name, offset, _), buffer in zip(wanted, buffers, strict=True)
            ]
        )
        for (name, offset, count), buffer in zip(wanted, buffers, strict=True):
            assert buffer == contents[name][offset : offset + count]

    def test_many_threads_read_at_once(self, store: Store, root: StoreRoot) -> None:
        contents = {f"shard-{number}": os.urandom(5000 + number) for number in range(12)}
        for name, data in contents.items():
            root.put(name, data)

        def read(step: int) -> bool:
            name = f"shard-{step * 7 % 12}"
            buffer = bytearray(3000)
            store.read_ranges([Range(store.join(root.url, name), step, memoryview(buffer))])
            return buffer == contents[name][step : step + 3000]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(400)))
