"""Outputs: what all promise, and what S3's adds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from shardmerge.outputs import Output, open_output
from shardmerge.outputs.local import LocalOutput
from shardmerge.stores import Stores
from shardmerge.testing.outputs import OutputSuite


class TestLocalOutput(OutputSuite):
    @pytest.fixture
    def outputs(self, tmp_path) -> Iterator[Output]:
        return (LocalOutput(tmp_path / "out") for _ in itertools.count())


class TestS3Output(OutputSuite):
    @pytest.fixture
    def outputs(self, bucket) -> Iterator[Output]:
        return (open_output(f"{bucket}/some/out", Stores()) for _ in itertools.count())
