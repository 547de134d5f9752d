"""The semantics of S3 that the engine relies on, in each server that the tests use."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.servers.api import S3Server

PART_BYTES = 5 * 2**20
"""The least that S3 takes as a part that is not the last."""


class Bucket:
    """Calls of a client, with the bucket and one key filled in."""

    def __init__(self, server: S3Server, key: str = "folder/a key") -> None:
        self.client = server.client()
        self.where = {"Bucket": server.make_bucket(), "Key": key}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self.client, name)
        return lambda **arguments: call(**self.where, **arguments)

    def read(self) -> bytes:
        return bytes(self.get_object()["Body"].read())


@pytest.fixture(params=["swift", "rgw"])
def there(request: pytest.FixtureRequest) -> Bucket:
    return Bucket(request.getfixturevalue(request.param))


def refused(call: Callable[..., Any], **arguments: Any) -> tuple[int, str]:
    """Status and code of a call that must fail."""
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as error:
        call(**arguments)
    answer = error.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def send(
    method: str, url: str, body: bytes | None = None, **headers: str
) -> tuple[int, Any, bytes]:
    """A plain HTTP request: status, headers and body of the answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"{parts.path}?{parts.query}", body, named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_a_range_is_answered_with_206(there: Bucket):
    there.put_object(Body=b"0123456789")
    answer = there.get_object(Range="bytes=2-5")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert answer["ContentRange"] == "bytes 2-5/10"
    assert answer["Body"].read() == b"2345"
    assert refused(there.get_object, Range="bytes=10-11")[0] == 416


def test_if_match_refuses_another_version(there: Bucket):
    etag = there.put_object(Body=b"one")["ETag"]
    assert there.get_object(IfMatch=etag, Range="bytes=0-1")["Body"].read() == b"on"
    there.put_object(Body=b"two")
    assert refused(there.get_object, IfMatch=etag, Range="bytes=0-1")[0] == 412


def test_if_none_match_keeps_what_is_there(there: Bucket):
    there.put_object(Body=b"one", IfNoneMatch="*")
    assert refused(there.put_object, Body=b"two", IfNoneMatch="*")[0] == 412
    assert there.read() == b"one"


def test_parts_may_be_uneven_disordered_and_repeated(there: Bucket):
    upload = {"UploadId": there.create_multipart_upload()["UploadId"]}
    bodies = {1: b"a" * PART_BYTES, 2: b"b" * (PART_BYTES + 12345), 3: b"c" * 7}
    there.upload_part(**upload, PartNumber=2, Body=b"x" * PART_BYTES)
    for number in (3, 1, 2):
        there.upload_part(**upload, PartNumber=number, Body=bodies[number])
    listed = there.list_parts(**upload)["Parts"]
    assert {p["PartNumber"]: p["Size"] for p in listed} == {n: len(b) for n, b in bodies.items()}
    parts = [{"PartNumber": p["PartNumber"], "ETag": p["ETag"]} for p in listed]
    assert there.client.list_objects_v2(Bucket=there.where["Bucket"])["KeyCount"] == 0
    there.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    assert there.read() == b"".join(bodies.values())


def test_a_part_list_with_a_wrong_etag_is_refused(there: Bucket):
    upload = {"UploadId": there.create_multipart_upload()["UploadId"]}
    there.upload_part(**upload, PartNumber=1, Body=b"one")
    parts = [{"PartNumber": 1, "ETag": '"' + "0" * 32 + '"'}]
    answer = refused(there.complete_multipart_upload, **upload, MultipartUpload={"Parts": parts})
    assert answer == (400, "InvalidPart")


def test_an_upload_is_listed_until_it_is_aborted(there: Bucket):
    def uploads() -> list[tuple[str, str]]:
        found = there.client.list_multipart_uploads(Bucket=there.where["Bucket"], Prefix="folder/")
        return [(each["Key"], each["UploadId"]) for each in found.get("Uploads", [])]

    upload = {"UploadId": there.create_multipart_upload()["UploadId"]}
    there.upload_part(**upload, PartNumber=1, Body=b"one")
    assert uploads() == [(there.where["Key"], upload["UploadId"])]
    there.abort_multipart_upload(**upload)
    assert uploads() == []
    # RGW says NoSuchKey here, so that the engine must go by the status.
    assert refused(there.list_parts, **upload)[0] == 404
    late = refused(there.upload_part, **upload, PartNumber=2, Body=b"two")
    assert late == (404, "NoSuchUpload")


def test_a_presigned_get_takes_a_range_that_is_not_signed(there: Bucket):
    there.put_object(Body=b"0123456789")
    url = there.client.generate_presigned_url("get_object", Params=there.where, ExpiresIn=60)
    status, headers, body = send("GET", url, Range="bytes=2-5")
    assert (status, headers["Content-Range"], body) == (206, "bytes 2-5/10", b"2345")
    status, _, _ = send("GET", url.replace("X-Amz-Signature=", "X-Amz-Signature=0"))
    assert status == 403


def test_a_part_can_be_put_by_who_has_only_its_url(there: Bucket):
    upload = {"UploadId": there.create_multipart_upload()["UploadId"]}
    url = there.client.generate_presigned_url(
        "upload_part", Params={**there.where, **upload, "PartNumber": 1}, ExpiresIn=60
    )
    body = bytes(range(256)) * 4096
    status, headers, _ = send("PUT", url, body, X_Amz_Content_Sha256="UNSIGNED-PAYLOAD")
    assert status == 200
    parts = [{"PartNumber": 1, "ETag": headers["ETag"]}]
    there.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    assert there.read() == body


def test_a_body_damaged_on_its_way_is_refused(there: Bucket):
    upload = {"UploadId": there.create_multipart_upload()["UploadId"]}
    wrong = "AAAAAAAAAAAAAAAAAAAAAA=="
    part = refused(there.upload_part, **upload, PartNumber=1, Body=b"one", ContentMD5=wrong)
    assert part == (400, "BadDigest")
    assert refused(there.put_object, Body=b"one", ContentMD5=wrong) == (400, "BadDigest")


def test_a_deleted_object_is_gone(there: Bucket):
    there.put_object(Body=b"one")
    there.delete_object()
    assert refused(there.get_object) == (404, "NoSuchKey")
    there.delete_object()
