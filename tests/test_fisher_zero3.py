"""Fisher information of a model that two processes share, against that of one device."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardmerge.cli import main
from tests.conftest import must_have
from tests.servers import deepspeed
from tests.servers.processes import run
from tests.support import SINGLE, tree
from tests.tiny_models import write_data, write_model

CHILD = "tests.fisher_child"


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    must_have("deepspeed", deepspeed.missing())


def shared(model: Path, out: Path, *options: object, **order: object) -> str:
    """What the command prints when two processes share the work."""
    command, env = launching(model, out, options, order)
    return run(command, env=env, timeout_s=deepspeed.RUN_TIMEOUT_S)


def failure(model: Path, out: Path, *options: object, **order: object) -> str:
    """What all processes and their launcher say when they fail."""
    command, env = launching(model, out, options, order)
    done = subprocess.run(
        command, env=env, timeout=deepspeed.RUN_TIMEOUT_S, capture_output=True, text=True
    )
    assert done.returncode == 1
    return done.stderr


def launching(
    model: Path, out: Path, options: Sequence[object], order: Mapping[str, object]
) -> tuple[list[str], dict[str, str]]:
    arguments = ["fisher", model, out, "--deepspeed", "zero3", *options]
    text = json.dumps({"arguments": [str(argument) for argument in arguments], **order})
    return deepspeed.launching("-m", CHILD, text)


def alone(model: Path, out: Path, *options: object) -> None:
    assert main(["fisher", str(model), str(out), "--quiet", *map(str, options)]) == 0


def agree(a: Path, b: Path) -> None:
    """To the accuracy of float32, of the largest element of each tensor."""
    found, wanted = (load_file(folder / SINGLE) for folder in (a, b))
    assert list(found) == list(wanted)
    largest = max(float(value.max()) for value in wanted.values())
    for name, value in wanted.items():
        scale = max(float(value.max()), 1e-8 * largest)
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", ()),  # tied
        ("mixtral", ("--samples", 8)),  # stacked experts
        ("bert-mlm", ()),
        ("bert", ("--exact",)),
    ],
)
def test_two_processes_find_what_one_does(tmp_path, kind, options):
    """Of eleven examples; the last one is of one process alone."""
    model = write_model(tmp_path / "model", kind, dtype="bfloat16")
    options = ("--data", write_data(tmp_path / "data.jsonl", 11), *options)
    printed = shared(model, tmp_path / "shared", *options)
    assert printed.count(": estimated; ") == 1
    alone(model, tmp_path / "alone", *options)
    agree(tmp_path / "shared", tmp_path / "alone")
    assert main(["verify", str(tmp_path / "shared")]) == 0


def test_processes_that_were_killed_go_on_to_the_same_bytes(tmp_path):
    model = write_model(tmp_path / "model", "llama")
    options = ("--data", write_data(tmp_path / "data.jsonl", 11), "--quiet")
    shared(model, tmp_path / "whole", *options)
    out = tmp_path / "out"
    assert "SIGKILL" in failure(model, out, *options, replace=2, when="torn")
    assert not (out / SINGLE).exists()
    said = failure(model, out, *options, signal="SIGTERM", example=6)
    assert "stopped after 8 of 11 examples; the same command goes on from there" in said
    assert main(["fisher", str(model), str(out), *map(str, options)]) == 1  # of one process
    shared(model, out, *options)
    assert tree(out) == tree(tmp_path / "whole")


def test_no_process_holds_the_model(tmp_path):
    """Each has its half of every parameter, and of every sum, whatever is not in use."""
    model = write_model(tmp_path / "model", "llama")
    data = write_data(tmp_path / "data.jsonl", 3)
    printed = deepspeed.launch("-m", "tests.fisher_zero3_memory", str(model), data)
    for line in printed.splitlines():
        held = json.loads(line)
        assert held["parameters"] == 0
        assert held["partitions"] * 2 == held["sums"] * 2 == held["all"]
    assert len(printed.splitlines()) == 2


def test_every_process_ends_where_one_cannot_go_on(tmp_path):
    model = write_model(tmp_path / "model", "llama")
    data = write_data(tmp_path / "data.jsonl", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SINGLE).write_bytes(b"another")
    assert "holds another checkpoint" in failure(model, tmp_path / "out", "--data", data)
    said = failure(model, tmp_path / "new", "--data", data, "--task", "classification")
    assert "no tensor for 1 of 21 parameters" in said
    assert not (tmp_path / "new").exists()
    alone(model, tmp_path / "new", "--data", data)
