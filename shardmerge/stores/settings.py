"""What a user may say about stores, beyond what AWS's and Hugging Face's own variables say."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from shardmerge.errors import UsageError

CHECKSUMS = ("crc32", "md5", "none")
_ADDRESSING = ("auto", "path", "virtual")


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Settings of one bucket. Credentials, endpoint and region come from where AWS's tools look.

    Args:
        anonymous: ask without a signature, for public buckets.
        profile: of ``~/.aws/config``; else ``AWS_PROFILE``.
        endpoint_url: of another server than AWS; else ``AWS_ENDPOINT_URL``.
        region: else ``AWS_REGION``, the profile's, or the bucket's own.
        addressing: how the bucket is named: in the ``path``, as a ``virtual`` host, or ``auto``.
        request_payer: pay for requests to another's bucket.
        checksum: sent with every part, for the server to check.
        sse: server-side encryption, ``AES256`` or ``aws:kms``.
        sse_kms_key_id: the key of ``aws:kms``.
        acl: canned ACL of what is written.
        storage_class: of what is written.
    """

    anonymous: bool = False
    profile: str | None = None
    endpoint_url: str | None = None
    region: str | None = None
    addressing: str = "auto"
    request_payer: bool = False
    checksum: str = "crc32"
    sse: str | None = None
    sse_kms_key_id: str | None = None
    acl: str | None = None
    storage_class: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of all stores; plain values, so that they can go to other processes.

    Args:
        patience_minutes: that a request may fail before the run does.
        s3: (bucket or "" for all, name, value), later ones count.
    """

    patience_minutes: float = 10.0
    s3: tuple[tuple[str, str, str], ...] = ()

    def for_bucket(self, bucket: str) -> S3Settings:
        """The settings of one bucket; its own count more than those for all."""
        chosen = {name: value for place, name, value in self.s3 if not place}
        chosen |= {name: value for place, name, value in self.s3 if place == bucket}
        values = {name: _value(name, value) for name, value in chosen.items()}
        return S3Settings(**values)  # type: ignore[arg-type]


def parse_s3(texts: Iterable[str]) -> tuple[tuple[str, str, str], ...]:
    """The settings that ``[BUCKET:]NAME=VALUE`` texts give.

    Raises:
        UsageError: for a name or value that no setting has.
    """
    found = []
    for text in texts:
        before, equals, value = text.partition("=")
        bucket, _, name = before.rpartition(":")
        if not equals or not name:
            raise UsageError(f"--s3 {text}: write it as NAME=VALUE or BUCKET:NAME=VALUE.")
        _value(name, value)
        found.append((bucket, name, value))
    return tuple(found)


def _value(name: str, value: str) -> bool | str:
    """A setting's value, checked."""
    types = {field.name: field.type for field in dataclasses.fields(S3Settings)}
    if name not in types:
        near = difflib.get_close_matches(name, types, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--s3: unknown setting {name!r} (there are {', '.join(types)}).{hint}")
    choices: tuple[str, ...] | None = {"checksum": CHECKSUMS, "addressing": _ADDRESSING}.get(name)
    if types[name] == "bool":
        choices = ("true", "false")
    if choices is not None and value not in choices:
        raise UsageError(f"--s3: {name} is {value!r}; it is one of {', '.join(choices)}.")
    return value == "true" if types[name] == "bool" else value
