"""Real servers and CUDA devices for the tests that ask for one; servers start once in a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmerge.kernels import cuda_driver
from tests.servers import deepspeed
from tests.servers.api import S3Server
from tests.servers.rgw import Rgw
from tests.servers.slurm import Slurm
from tests.servers.swift import Swift
from tests.support import LACKING

REQUIRED = frozenset(os.environ.get("SHARDMERGE_REQUIRE", "").split(","))
"""Components whose tests must not be skipped: a comma-separated list of fixtures' names."""
# For the whole process: Ray reads it once, and clusters of tests have no token.
os.environ["RAY_AUTH_MODE"] = "disabled"
MISSING_CUDA = LACKING()
# What a test merges does not depend on the machine: "auto" means the CPU.
cuda_driver.lacking = lambda: "tests use no CUDA device unless they ask for one"


@pytest.fixture
def real_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a CUDA device, and the test may use it."""
    must_have("cuda", MISSING_CUDA or "")
    monkeypatch.setattr(cuda_driver, "lacking", lambda: None)


def must_have(component: str, reason: str) -> None:
    """Skip a test if there is a reason to; fail where that is not allowed."""
    if reason:
        if component in REQUIRED:
            pytest.fail(f"{reason} (SHARDMERGE_REQUIRE has {component})")
        pytest.skip(reason)


def running(
    component: str, kind: type[Swift] | type[Rgw], folders: pytest.TempPathFactory
) -> Iterator[S3Server]:
    must_have(component, kind.missing())
    with kind.start(folders.mktemp(component)) as server:
        yield server


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    yield from running("swift", Swift, tmp_path_factory)


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    yield from running("rgw", Rgw, tmp_path_factory)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of two CPUs and 8000 MiB each."""
    must_have("slurm", Slurm.missing())
    with Slurm.start(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def zero_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of DeepSpeed, trained once; tests copy what they change."""
    must_have("deepspeed", deepspeed.missing())
    folder = tmp_path_factory.mktemp("deepspeed")
    deepspeed.train(folder, deepspeed.CASES)
    return folder


@pytest.fixture
def bucket(swift: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new bucket; the environment says where it is and who may use it."""
    for name, value in swift.env().items():
        monkeypatch.setenv(name, value)
    return f"s3://{swift.make_bucket()}"


_STATUS: list[int] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    _STATUS.append(int(exitstatus))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End at once where Ray was used in this process, when all that is to be told was told.

    Its calls outlive ``ray.shutdown``: threads of gRPC have jumped into freed memory while the
    interpreter ended (the kernel's log had an address in the text of a request of Ray's), and a
    run whose tests had all ended was one that had crashed.
    """
    if _STATUS and "ray" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_STATUS[-1])
