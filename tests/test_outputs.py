"""Outputs: what all promise, and what S3's adds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing

import pytest

from shardmerge.errors import OutputError
from shardmerge.outputs import Output, open_output
from shardmerge.outputs.api import STAGING
from shardmerge.outputs.local import LocalOutput
from shardmerge.stores import Stores
from shardmerge.testing.outputs import OutputSuite, content_of, two_shards


class TestLocalOutput(OutputSuite):
    @pytest.fixture
    def outputs(self, tmp_path) -> Iterator[Output]:
        return (LocalOutput(tmp_path / "out") for _ in itertools.count())


class TestS3Output(OutputSuite):
    @pytest.fixture
    def outputs(self, bucket) -> Iterator[Output]:
        return (open_output(f"{bucket}/some/out", Stores()) for _ in itertools.count())


def test_only_begin_makes_a_shard(tmp_path):
    """A worker that comes late must not leave what looks like one that is not named yet."""
    output = LocalOutput(tmp_path / "out")
    shards = two_shards()
    with output.locked():
        handles = dict(output.begin(shards, range(len(shards))))
        receipts = TestLocalOutput().write(output, shards, handles)
        output.seal(shards, receipts, handles)
        with closing(output.writer(shards, handles)) as writer:
            with pytest.raises(OutputError, match="cannot write"):
                writer.part(shards[0].parts[0])
            with pytest.raises(OutputError, match="cannot write"):
                writer.sync([0])
        # And what is of another size is never taken for one, wherever it comes from.
        (tmp_path / "out" / STAGING / f"{shards[0].name}.part").touch()
        output.seal(shards, receipts, handles)
    assert [output.read(shard.name) for shard in shards] == [content_of(s) for s in shards]
