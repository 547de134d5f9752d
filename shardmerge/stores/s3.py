"""S3 and servers that speak its protocol: ``s3://bucket/key``.

botocore finds credentials and endpoints, signs, and makes the small calls. Ranges and parts travel
on our own connections to URLs that are signed right before use: with botocore's bodies, a gibibyte
costs more processor time, and an answer that breaks the protocol passes unseen.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import Any
from xml.etree import ElementTree

from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from botocore.exceptions import (
    ConnectionError as NoConnectionError,
)
from botocore.parsers import ResponseParserError
from botocore.session import Session
from urllib3.exceptions import HTTPError

from shardmerge.errors import StoreError
from shardmerge.stores.api import Stat, changed, in_name_order
from shardmerge.stores.http import (
    STALL_S,
    Http,
    RefusedError,
    passing,
    range_headers,
    receive,
)
from shardmerge.stores.remote import CONNECTIONS, RemoteStore, Request
from shardmerge.stores.retry import Patience, TransientError
from shardmerge.stores.settings import S3Settings, Settings

_URL = re.compile(r"s3://(arn:[^/]+/[^/]+|[^/]+)(?:/(.*))?", re.DOTALL | re.IGNORECASE)
_SIGNED_S = 900
_TRANSIENT = frozenset(
    {
        "BandwidthLimitExceeded",
        "InternalError",
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
_MISSING = frozenset({"404", "NoSuchKey", "NoSuchUpload", "NotFound"})
_RIGHTS = {
    "head_object": "s3:GetObject",
    "get_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_parts": "s3:ListMultipartUploadParts",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "delete_object": "s3:DeleteObject",
}
_MARKERS = {
    "list_objects_v2": {"ContinuationToken": "NextContinuationToken"},
    "list_parts": {"PartNumberMarker": "NextPartNumberMarker"},
    "list_multipart_uploads": {
        "KeyMarker": "NextKeyMarker",
        "UploadIdMarker": "NextUploadIdMarker",
    },
}
"""How the next page is asked for, and what in this one tells it."""
_RENEW_S = 5.0

Answer = Mapping[str, Any]
"""What botocore gives back."""


class MissingError(StoreError):
    """There is no such key or upload."""


class ConflictError(StoreError):
    """A condition of a request does not hold."""


def bucket_and_key(url: str) -> tuple[str, str]:
    """The bucket (or the ARN of an access point) and the key that a URL names."""
    match = _URL.fullmatch(url)
    if match is None:
        raise StoreError(f"{url}: no bucket. Write it as s3://bucket/folder.")
    if "@" in match[1]:
        raise StoreError(
            f"s3://...@{match[1].rpartition('@')[2]}: an s3:// URL holds no login. "
            "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return match[1], match[2] or ""


class Bucket:
    """Calls to one bucket, repeated while they fail for what may pass. Threads share it."""

    def __init__(self, name: str, settings: S3Settings, patience: Patience, http: Http) -> None:
        self.name = name
        self.settings = settings
        self.patience = patience
        self.http = http
        self._lock = threading.Lock()
        self._made: Any = None
        self._made_at = 0.0
        self._region = settings.region

    # --- calls ----------------------------------------------------------------------------------

    def call(self, operation: str, **parameters: object) -> Answer:
        """The answer to a small call of S3.

        Raises:
            MissingError: for a key, or an upload, that is not there.
            ConflictError: for ``IfMatch`` or ``IfNoneMatch`` that does not hold.
            StoreError: for everything else that will not pass.
        """
        url = self.url(str(parameters.get("Key", parameters.get("Prefix", ""))))
        return self.patience.run(
            lambda: self._answer(operation, url, parameters), f"{operation} {url}"
        )

    def pages(self, operation: str, **parameters: object) -> Iterator[Answer]:
        """The answers to a call that lists, one after the other."""
        markers: dict[str, object] = {}
        while True:
            page = self.call(operation, **parameters, **markers)
            yield page
            if not page.get("IsTruncated"):
                return
            markers = {asked: page[told] for asked, told in _MARKERS[operation].items()}

    def read_object(self, key: str) -> bytes:
        """All bytes of a small object that is written and read by us alone."""

        def attempt() -> bytes:
            answer = self._answer("get_object", self.url(key), {"Key": key})
            body = answer["Body"]
            try:
                data: bytes = body.read()
            except (BotoCoreError, HTTPError, HTTPException, OSError) as problem:
                raise TransientError(f"{type(problem).__name__}: {problem}") from None
            if len(data) != answer["ContentLength"]:
                raise TransientError("the answer ended before its last byte")
            return data

        return self.patience.run(attempt, f"reading {self.url(key)}")

    def _answer(self, operation: str, url: str, parameters: Mapping[str, object]) -> Answer:
        """One call."""
        try:
            answer: Answer = getattr(self._client(), operation)(**self._with(parameters))
            return answer
        except ClientError as problem:
            status = problem.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if operation == "head_object" and status in (400, 403):
                # An answer to HEAD has no body, which would say why; one to GET has.
                self._answer("get_object", url, {**parameters, "Range": "bytes=0-0"})
                raise TransientError(f"the server answers {status} to HEAD, not to GET") from None
            raise self._refused(operation, url, problem.response) from None
        except BotoCoreError as problem:
            raise _trouble(url, problem) from None
        except (HTTPError, HTTPException, OSError) as problem:  # which botocore lets through
            raise TransientError(f"{type(problem).__name__}: {problem}") from None

    def signed(self, operation: str, **parameters: object) -> str:
        """A URL for one request, valid for some minutes. It is a credential: never show it."""
        try:
            signed: str = self._client().generate_presigned_url(
                operation, Params=self._with(parameters), ExpiresIn=_SIGNED_S
            )
        except BotoCoreError as problem:
            raise _trouble(self.url(str(parameters["Key"])), problem) from None
        return signed

    def refusal(self, operation: str, url: str, problem: RefusedError) -> Exception:
        """What to raise for a refused request to a signed URL."""
        error = {"Code": "", "Message": ""}
        try:
            root = ElementTree.fromstring(problem.body)
            for field in root.iter():
                tag = field.tag.rpartition("}")[2]
                if tag in error and not error[tag]:
                    error[tag] = field.text or ""
        except ElementTree.ParseError:
            error["Code"] = str(problem.status)
        metadata = {
            "HTTPStatusCode": problem.status,
            "HTTPHeaders": {name.lower(): value for name, value in problem.headers.items()},
        }
        if not error["Code"] and (temporary := passing(problem)):
            return temporary
        return self._refused(operation, url, {"Error": error, "ResponseMetadata": metadata})

    @property
    def headers(self) -> dict[str, str]:
        """What a request to a signed URL has to say besides."""
        return {"x-amz-request-payer": "requester"} if self.settings.request_payer else {}

    @property
    def endpoint(self) -> str:
        """The server that is asked."""
        return str(self._client().meta.endpoint_url)

    def url(self, key: str) -> str:
        """The URL of a key, for messages."""
        return f"s3://{self.name}/{key}"

    def _with(self, parameters: Mapping[str, object]) -> dict[str, object]:
        payer = {"RequestPayer": "requester"} if self.settings.request_payer else {}
        return {"Bucket": self.name, **payer, **parameters}

    # --- what went wrong ------------------------------------------------------------------------

    def _refused(self, operation: str, url: str, answer: Answer) -> Exception:
        code, message = str(answer["Error"].get("Code", "")), answer["Error"].get("Message", "")
        metadata = answer.get("ResponseMetadata", {})
        status = metadata.get("HTTPStatusCode", 0)
        region = metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region")
        words = f"{code}: {message}" if message else code or f"status {status}"
        if code in _EXPIRED or (status == 403 and "has expired" in str(message)):
            self._renew()
            return TransientError(f"the credentials have expired ({code})", wait_s=1.0)
        if region and region != self._region and status in (301, 307, 400):
            self._move(region)
            return TransientError(f"the bucket is in {region}")
        if code in _TRANSIENT or status in (429, 500, 502, 503, 504):
            return TransientError(f"the server answers {words}")
        if status in (409, 412):
            return ConflictError(
                f"{url}: {operation} is refused: {words}. Check the server and the credentials."
            )
        if code == "InvalidPart":
            return StoreError(
                f"{url}: a part is not what was sent last ({words}).\n"
                "  Run the same command again: such parts are found, and done again."
            )
        if code == "NoSuchBucket":
            return StoreError(f"{url}: there is no bucket {self.name!r}. Check its name.")
        if status == 404 or code in _MISSING:
            return MissingError(f"{url}: there is no such object.")
        if status in (401, 403):
            return StoreError(self._denied(operation, url, code, words))
        return StoreError(
            f"{url}: {operation} is refused: {words}.\n"
            "  Check the names and settings that it tells of, the server (AWS_ENDPOINT_URL) and "
            "the credentials."
        )

    def _denied(self, operation: str, url: str, code: str, words: str) -> str:
        bucket, key = bucket_and_key(url)
        if code == "RequestTimeTooSkewed":
            return f"{url}: this machine's clock is wrong ({words}). Set it, and run again."
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
            return f"{url}: the credentials are wrong ({words}). Check the keys, or AWS_PROFILE."
        right = _RIGHTS.get(operation, "s3:PutObject")
        how = (
            "the request was anonymous; leave --s3 anonymous=true out to sign it"
            if self.settings.anonymous
            else "without s3:ListBucket, what does not exist is denied too"
        )
        return (
            f"{url}: access denied ({words}).\n"
            f"  It needs {right} on bucket {bucket!r}, key {key!r}; {how}."
        )

    # --- the client -----------------------------------------------------------------------------

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._new_client()
                self._made_at = time.monotonic()
            return self._made

    def _renew(self) -> None:
        """Let the next request look for credentials anew; files and roles may have others."""
        with self._lock:
            if time.monotonic() - self._made_at > _RENEW_S:
                self._made = None

    def _move(self, region: str) -> None:
        with self._lock:
            self._region, self._made = region, None

    def _new_client(self) -> Any:
        try:
            session = Session(profile=self.settings.profile)
            client = self._client_of(session, self.settings.addressing)
            ours = ".amazonaws.com"
            if self.settings.addressing == "auto" and ours not in client.meta.endpoint_url:
                # Other servers rarely have a host name for each bucket.
                client = self._client_of(session, "path")
        except (BotoCoreError, ValueError) as problem:
            raise StoreError(
                f"s3://{self.name}: {problem}. Check AWS_PROFILE, AWS_ENDPOINT_URL and ~/.aws."
            ) from None
        return client

    def _client_of(self, session: Session, addressing: str) -> Any:
        return session.create_client(
            "s3",
            region_name=self._region,
            endpoint_url=self.settings.endpoint_url,
            config=Config(
                signature_version=UNSIGNED if self.settings.anonymous else "s3v4",
                connect_timeout=10,
                read_timeout=STALL_S,
                retries={"total_max_attempts": 1},  # ours are longer, and say why they wait
                max_pool_connections=CONNECTIONS,
                tcp_keepalive=True,
                s3={"addressing_style": addressing},
                # A server that is not AWS's may refuse checksums that it does not know.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )


def _trouble(url: str, problem: BotoCoreError) -> Exception:
    """A failure on the way to the server, as one that may pass, or not."""
    if isinstance(problem, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
        return StoreError(
            f"{url}: {problem}.\n"
            "  Set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --s3 "
            "anonymous=true for a public bucket."
        )
    if isinstance(problem, SSLError):
        return StoreError(
            f"{url}: no secure connection: {problem}.\n"
            "  Check that the server is https:// and not http:// (AWS_ENDPOINT_URL), and its "
            "certificate (AWS_CA_BUNDLE)."
        )
    if isinstance(problem, EndpointConnectionError):
        return TransientError(str(problem), reached=False)
    passing_kinds = (
        NoConnectionError,
        HTTPClientError,
        IncompleteReadError,
        ResponseParserError,
        CredentialRetrievalError,
    )
    if isinstance(problem, passing_kinds):
        return TransientError(f"{type(problem).__name__}: {problem}")
    return StoreError(f"{url}: {problem}")


class S3Store(RemoteStore):
    """Objects of buckets; a folder is what has keys below it."""

    def __init__(self, settings: Settings, patience: Patience, http: Http) -> None:
        super().__init__(patience)
        self._settings = settings
        self._http = http
        self._buckets: dict[str, Bucket] = {}
        self._making = threading.Lock()

    def bucket(self, url: str) -> Bucket:
        """The bucket that a URL names."""
        name, _ = bucket_and_key(url)
        with self._making:
            if name not in self._buckets:
                settings = self._settings.for_bucket(name)
                patience = self.patience.for_server()
                self._buckets[name] = Bucket(name, settings, patience, self._http)
            return self._buckets[name]

    def stat(self, url: str) -> Stat | None:
        """Size and version of the object at ``url``; None where there is none (or a folder)."""
        _, key = bucket_and_key(url)
        if not key or key.endswith("/"):
            return None
        try:
            found = self.bucket(url).call("head_object", Key=key)
        except MissingError:
            return None
        return Stat(int(found["ContentLength"]), str(found["ETag"]))

    def is_folder(self, url: str) -> bool:
        """Whether there are keys below ``url``."""
        found = self.bucket(url).call("list_objects_v2", Prefix=_prefix(url), MaxKeys=1)
        return bool(found.get("KeyCount", len(found.get("Contents", ()))))

    def names(self, url: str) -> list[str]:
        """Names directly in the folder ``url``, in name order; folders end with ``/``."""
        prefix = _prefix(url)
        found: set[str] = set()
        for page in self.bucket(url).pages("list_objects_v2", Prefix=prefix, Delimiter="/"):
            found.update(item["Key"] for item in page.get("Contents", ()))
            found.update(item["Prefix"] for item in page.get("CommonPrefixes", ()))
        if not found:
            raise StoreError(f"{url}: there is no such folder. Check the name.")
        return in_name_order(name.removeprefix(prefix) for name in found if name != prefix)

    def _get(self, request: Request) -> None:
        bucket = self.bucket(request.url)
        _, key = bucket_and_key(request.url)
        address = bucket.signed("get_object", Key=key)
        try:
            headers = {**range_headers(request), **bucket.headers}
            with self._http.answer("GET", address, headers) as response:
                receive(response, request)
        except RefusedError as problem:
            if problem.status == 412:
                raise changed(request.url) from None
            if problem.status == 416:
                raise StoreError(
                    f"{request.url}: ends before byte {request.stop:,}.\n"
                    "  It is cut off, or became shorter. Copy or upload it again."
                ) from None
            raise bucket.refusal("get_object", request.url, problem) from None


def _prefix(url: str) -> str:
    _, key = bucket_and_key(url)
    return key if not key or key.endswith("/") else f"{key}/"
