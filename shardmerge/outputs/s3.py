"""A prefix in a bucket as the place of the output.

Shards are multipart uploads until they are whole. Nobody sees an upload before it is completed, so
nothing is copied or renamed. The ledger lies beside the shards as numbered objects, one for each
commit, so that a run goes on from any machine.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

from shardmerge.errors import OutputError
from shardmerge.layout import Part, Shard
from shardmerge.outputs.api import KEPT, LEDGER, LOCK, STAGING, PartKey, Receipt, Survey
from shardmerge.outputs.s3_lock import S3Lock
from shardmerge.stores import Stores
from shardmerge.stores.api import Range
from shardmerge.stores.http import RefusedError
from shardmerge.stores.s3 import Bucket, MissingError, S3Store, bucket_and_key
from shardmerge.stores.settings import S3Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

PART_BYTES = 16 * 2**20
"""Smaller than in a file: little is left to send when the last input was read."""
_EVEN_PARTS = ".r2.cloudflarestorage.com"
_AT_A_TIME = 16
_PROBE = f"{STAGING}/probe"
_OURS = re.compile(
    rf"({re.escape(KEPT)}/)?((adapter_)?model(-\d+-of-\d+)?\.safetensors|{re.escape(_PROBE)})"
)


class S3Output:
    """A prefix, which need not have keys yet."""

    part_bytes: int | None = PART_BYTES
    buffers_parts = True
    whole_shards = False

    def __init__(self, url: str, stores: Stores) -> None:
        self.url = url.rstrip("/")
        self._stores = stores
        self._store = cast(S3Store, stores.open(url))
        self._bucket = self._store.bucket(self.url)
        folder = bucket_and_key(self.url)[1]
        self._prefix = f"{folder}/" if folder else ""
        self._locks: dict[str, S3Lock] = {}

    # --- what readers see -----------------------------------------------------------------------

    def names(self, folder: str = "") -> list[str]:
        """Names directly in OUT, or in a folder in it, in name order; folders end with ``/``."""
        url = f"{self.url}/{folder}"
        return self._store.names(url) if self._store.is_folder(url) else []

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        found = self._store.stat(f"{self.url}/{name}")
        return None if found is None else found.size

    def read(self, name: str, nbytes: int | None = None) -> bytes:
        """The first bytes of a file, or all."""
        url = f"{self.url}/{name}"
        if nbytes is None:
            return self._store.read(url)
        data = bytearray(min(nbytes, self.size(name) or 0))
        self._store.read_ranges([Range(url, 0, memoryview(data))])
        return bytes(data)

    def write(self, name: str, content: bytes) -> None:
        """Make a small file, whole or not at all."""
        checked = _checksum(self._bucket.settings.checksum, content, zlib.crc32(content))
        self._bucket.call(
            "put_object",
            Key=self._key(name),
            Body=content,
            **checked,
            **_settings(self._bucket.settings),
        )

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are gone already are no error."""
        self._each(lambda name: self._bucket.call("delete_object", Key=self._key(name)), names)

    def clear(self) -> None:
        """Remove every key below the prefix, and abort uploads."""
        self._abort_all()
        keys = _listed(self._bucket, self._prefix)
        self._each(lambda key: self._bucket.call("delete_object", Key=key), keys)

    # --- the unfinished run ---------------------------------------------------------------------

    def is_unfinished(self) -> bool:
        """Whether a journal is there."""
        return bool(_listed(self._bucket, self._key(f"{STAGING}/{LEDGER}/")))

    def prove(self, shards: Sequence[Shard], sealed: frozenset[int]) -> None:
        """Begin an upload, send a part, and abort it: all that a run needs to be allowed."""
        if _EVEN_PARTS in self._bucket.endpoint:
            raise OutputError(
                f"{self.url}: this server wants all parts of an upload to be of one size; ours "
                "end where tensors do.\n"
                "  Publish to a local folder, and copy it there."
            )
        key = self._key(_PROBE)
        upload = self._begin(key)
        try:
            send_part(self._bucket, key, upload, 1, b"probe")
        finally:
            self._abort(key, upload)
        # What only publishing needs; that must not fail then.
        self._uploads()
        self._bucket.call("delete_object", Key=key)

    def locked(self, slice: str = "") -> AbstractContextManager[None]:
        """The right to write, as an object that is renewed while the process lives."""
        return self._lock(slice).held()

    def check_lock(self) -> None:
        """LockedError where another process has taken the lock from this one."""
        self._lock().check()

    def _lock(self, slice: str = "") -> S3Lock:
        if slice not in self._locks:
            key = self._key(f"{STAGING}/{LOCK}-{slice}" if slice else f"{STAGING}/{LOCK}")
            self._locks[slice] = S3Lock(self._bucket, key, self.url)
        return self._locks[slice]

    def forget(self) -> None:
        """Remove everything unfinished but the lock."""
        self._abort_all()
        self._delete_staged(but=LOCK)

    def journal(self, slice: str = "") -> S3Journal:
        """The journal."""
        name = f"{LEDGER}-{slice}" if slice else LEDGER
        return S3Journal(self._bucket, self._key(f"{STAGING}/{name}/"), self._lock(slice).check)

    def slices(self) -> list[str]:
        """Names of the slices that have a journal."""
        begin = f"{LEDGER}-"
        names = self.names(f"{STAGING}/")
        return [name[len(begin) : -1] for name in names if name.startswith(begin)]

    def survey(
        self,
        shards: Sequence[Shard],
        receipts: Mapping[PartKey, Receipt],
        handles: Mapping[int, str],
        *,
        cleared: bool,
    ) -> Survey:
        """What is there of shards; the server's own list of parts is what counts."""

        def look(number: int) -> dict[int, tuple[int, str]] | None:
            handle = handles.get(number)
            if handle is None or handle.partition(" ")[0] != self._bucket.settings.checksum:
                return None  # parts of one upload have one kind of checksum
            return self._parts(shards[number].name, _upload_of(handle))

        listed = dict(enumerate(self._each(look, range(len(shards)))))
        sealed: set[int] = set()
        if cleared:
            # Some servers list the parts of an upload that was completed, so this counts more.
            sizes = self._each(lambda shard: self.size(shard.name), shards)
            sealed = {n for n, size in enumerate(sizes) if size == shards[n].nbytes}
        lost = {
            key
            for key, receipt in receipts.items()
            if key[0] not in sealed
            and (listed[key[0]] or {}).get(key[1] + 1) != (receipt.nbytes, receipt.tag)
        }
        still = {
            n: handles[n] for n, parts in listed.items() if parts is not None and n not in sealed
        }
        return Survey(frozenset(sealed), frozenset(lost), still)

    def begin(self, shards: Sequence[Shard], numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Begin an upload for each shard; its handle is the upload's id."""
        uploads = self._each(lambda number: self._begin(self._key(shards[number].name)), numbers)
        kind = self._bucket.settings.checksum
        yield from ((n, f"{kind} {upload}") for n, upload in zip(numbers, uploads, strict=True))

    def writer(self, shards: Sequence[Shard], handles: Mapping[int, str]) -> S3Writer:
        """A writer of shards that were begun."""
        keys = {number: self._key(shards[number].name) for number in handles}
        return S3Writer(self.url, self._stores, keys, handles)

    def seal(
        self,
        shards: Sequence[Shard],
        receipts: Mapping[PartKey, Receipt],
        handles: Mapping[int, str],
    ) -> None:
        """Complete the uploads; a shard that has its name already stays."""

        def complete(number: int) -> None:
            shard = shards[number]
            if number in handles:
                parts = [receipts[number, part.number] for part in shard.parts]
                self._complete(shard, _upload_of(handles[number]), parts)
            if self.size(shard.name) != shard.nbytes:
                raise OutputError(
                    f"{self.url}/{shard.name} is not there, or not of {shard.nbytes:,} bytes. "
                    "Someone removed its upload;\n"
                    "  run the same command again: what is lost is done again."
                )

        self._each(complete, range(len(shards)))

    def tidy(self) -> None:
        """Remove everything unfinished, the lock last."""
        self._abort_all()
        self._delete_staged(but=LOCK)
        self._bucket.call("delete_object", Key=self._key(f"{STAGING}/{LOCK}"))

    def leftovers(self) -> list[str]:
        """What an unfinished run has left, in words."""
        uploads = [f"upload of {self._bucket.url(key)}" for key, _ in self._uploads()]
        return [*uploads, *_listed(self._bucket, self._key(f"{STAGING}/"))]

    # --- calls ----------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _each(self, call: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """The result of a call for each item, several at a time."""
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            return list(pool.map(call, items))

    def _begin(self, key: str) -> str:
        settings = self._bucket.settings
        algorithm = "CRC32" if settings.checksum == "crc32" else None
        answer = self._bucket.call(
            "create_multipart_upload",
            Key=key,
            **({"ChecksumAlgorithm": algorithm} if algorithm else {}),
            **_settings(settings),
        )
        return str(answer["UploadId"])

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._bucket.call("abort_multipart_upload", Key=key, UploadId=upload)
        except MissingError:
            log.debug("%s: the upload had ended already", key)

    def _complete(self, shard: Shard, upload: str, receipts: Sequence[Receipt]) -> None:
        parts: list[dict[str, object]] = []
        for receipt in receipts:
            part: dict[str, object] = {"PartNumber": receipt.number + 1, "ETag": receipt.tag}
            if self._bucket.settings.checksum == "crc32":
                part["ChecksumCRC32"] = crc32_text(receipt.crc32)
            parts.append(part)
        try:
            self._bucket.call(
                "complete_multipart_upload",
                Key=self._key(shard.name),
                UploadId=upload,
                MultipartUpload={"Parts": parts},
            )
        except MissingError:
            # Completed already, and the answer was lost: ``seal`` looks whether the shard is there.
            log.debug("%s: the upload had ended already", shard.name)

    def _parts(self, name: str, upload: str) -> dict[int, tuple[int, str]] | None:
        """Size and tag of every part that the server has; None where the upload has ended."""
        found: dict[int, tuple[int, str]] = {}
        try:
            for page in self._bucket.pages("list_parts", Key=self._key(name), UploadId=upload):
                for part in page.get("Parts", ()):
                    found[int(part["PartNumber"])] = (int(part["Size"]), str(part["ETag"]))
        except MissingError:
            return None
        return found

    def _abort_all(self) -> None:
        self._each(lambda upload: self._abort(*upload), self._uploads())

    def _uploads(self) -> list[tuple[str, str]]:
        """Key and id of unfinished uploads of what a run uploads: shards, by their names."""
        return [
            (item["Key"], item["UploadId"])
            for page in self._bucket.pages("list_multipart_uploads", Prefix=self._prefix)
            for item in page.get("Uploads", ())
            if _OURS.fullmatch(item["Key"].removeprefix(self._prefix))
        ]

    def _delete_staged(self, *, but: str) -> None:
        kept = self._key(f"{STAGING}/{but}")
        keys = _listed(self._bucket, self._key(f"{STAGING}/"))
        self._each(
            lambda key: self._bucket.call("delete_object", Key=key),
            [key for key in keys if key != kept],
        )


def _upload_of(handle: str) -> str:
    """The id of the upload that ``begin`` made."""
    return handle.partition(" ")[2]


def _listed(bucket: Bucket, prefix: str) -> list[str]:
    """Every key below a prefix, in order."""
    pages = bucket.pages("list_objects_v2", Prefix=prefix)
    return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))


def _settings(settings: S3Settings) -> dict[str, object]:
    """What a new object is made with."""
    values = {
        "ACL": settings.acl,
        "StorageClass": settings.storage_class,
        "ServerSideEncryption": settings.sse or ("aws:kms" if settings.sse_kms_key_id else None),
        "SSEKMSKeyId": settings.sse_kms_key_id,
    }
    return {name: value for name, value in values.items() if value is not None}


# --- parts ----------------------------------------------------------------------------------------


def crc32_text(crc32: int) -> str:
    """A CRC-32 as S3 writes it."""
    return base64.b64encode(crc32.to_bytes(4, "big")).decode()


def _checksum(kind: str, data: bytes | memoryview, crc32: int) -> dict[str, object]:
    """The parameter that lets the server check what it gets."""
    if kind == "crc32":
        return {"ChecksumCRC32": crc32_text(crc32)}
    if kind == "md5":
        digest = hashlib.md5(data, usedforsecurity=False).digest()
        return {"ContentMD5": base64.b64encode(digest).decode()}
    return {}


_HEADERS = {
    "ChecksumCRC32": "x-amz-checksum-crc32",
    "ContentMD5": "Content-MD5",
}


def send_part(
    bucket: Bucket, key: str, upload: str, number: int, data: bytes | memoryview
) -> tuple[str, int]:
    """Send one part, as often as it takes; gives what the server calls it, and its CRC-32."""
    crc32 = zlib.crc32(data)
    checked = _checksum(bucket.settings.checksum, data, crc32)
    headers = {_HEADERS[name]: str(value) for name, value in checked.items()}
    headers |= {"Content-Length": str(len(data)), **bucket.headers}
    url = bucket.url(key)

    def attempt() -> str:
        address = bucket.signed(
            "upload_part", Key=key, UploadId=upload, PartNumber=number, **checked
        )
        try:
            with bucket.http.answer("PUT", address, headers, data) as response:
                response.read()
                return str(response.headers["ETag"])
        except RefusedError as problem:
            raise bucket.refusal("upload_part", url, problem) from None

    return bucket.patience.run(attempt, f"writing part {number} of {url}"), crc32


class S3Writer:
    """Sends parts to their uploads."""

    def __init__(
        self, url: str, stores: Stores, keys: Mapping[int, str], handles: Mapping[int, str]
    ) -> None:
        self._url = url
        self._stores = stores
        self._keys = dict(keys)
        self._handles = dict(handles)
        self._bucket = cast(S3Store, stores.open(url)).bucket(url)

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process opens its own connections."""
        return (S3Writer, (self._url, self._stores, self._keys, self._handles))

    def part(self, part: Part) -> S3Part:
        """A writer of one part."""
        upload = _upload_of(self._handles[part.shard])
        return S3Part(self._bucket, self._keys[part.shard], upload, part)

    def sync(self, shards: Iterable[int]) -> None:
        """A part that the server has acknowledged is durable."""

    def close(self) -> None:
        """Connections are their threads'."""


class S3Part:
    """Gathers one part and sends it when it is whole: a request that fails is made again."""

    def __init__(self, bucket: Bucket, key: str, upload: str, part: Part) -> None:
        self._bucket = bucket
        self._key = key
        self._upload = upload
        self._part = part
        self._data = memoryview(bytearray(part.nbytes))
        self._filled = 0

    def write(self, data: memoryview | bytes) -> None:
        """Take the next bytes."""
        self._data[self._filled : self._filled + len(data)] = data
        self._filled += len(data)

    def finish(self, non_finite: Sequence[tuple[int, int]]) -> Receipt:
        """Send the part."""
        part = self._part
        if self._filled != part.nbytes:
            raise AssertionError(
                f"part {part.number} of {self._key}: {self._filled} of {part.nbytes} bytes"
            )
        number = part.number + 1
        tag, crc32 = send_part(self._bucket, self._key, self._upload, number, self._data)
        return Receipt(
            shard=part.shard,
            number=part.number,
            nbytes=part.nbytes,
            crc32=crc32,
            tag=tag,
            non_finite=tuple(non_finite),
        )


class S3Journal:
    """Lines in numbered objects; each is written once."""

    def __init__(self, bucket: Bucket, prefix: str, check: Callable[[], None]) -> None:
        self.name = bucket.url(prefix)
        self._bucket = bucket
        self._prefix = prefix
        self._check = check
        self._next = 0

    def lines(self) -> list[str]:
        """All lines, in order."""
        keys = _listed(self._bucket, self._prefix)
        if keys:
            self._next = int(keys[-1].removeprefix(self._prefix).partition("-")[0]) + 1

        def read(key: str) -> str:
            return self._bucket.read_object(key).decode()

        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            return [line for text in pool.map(read, keys) for line in text.splitlines()]

    def append(self, lines: Sequence[str]) -> None:
        """Add lines in one object."""
        self._check()
        # A run that lost its lock without knowing must not write over ours.
        key = f"{self._prefix}{self._next:08d}-{uuid.uuid4().hex[:8]}.jsonl"
        text = "".join(f"{line}\n" for line in lines)
        self._bucket.call("put_object", Key=key, Body=text.encode())
        self._next += 1

    def close(self) -> None:
        """Nothing is open."""
