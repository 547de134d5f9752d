"""The commands as a user meets them: what they print, their exit status, what they promise."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from shardmerge import __version__, methods, progress
from shardmerge.cli import main
from shardmerge.methods.api import Base
from shardmerge.numerics import DType
from shardmerge.progress import size
from shardmerge.records import TASKS
from tests.support import (
    HALVES,
    SEVERAL_DTYPES,
    SINGLE,
    Specs,
    digests,
    least_memory,
    set_element,
    shrink,
    tree,
    write_checkpoint,
    write_grams,
    write_recipe,
)

Capture = pytest.CaptureFixture[str]
MIB = 2**20
LINEAR = {
    "merge_method": "linear",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 0.5},
}


def recipe_for(method: str, folder: str = ".", **top: object) -> dict[str, Any]:
    """A recipe of any method, over ``base``, ``a`` and ``b``; ``f`` holds Fisher information, ``g``
    Gram matrices.
    """
    info = methods.get(method)
    low, high = info.models
    count = min(high or 2, max(low, 2))
    extras = {kind: f"{folder}/{kind[0]}" for kind in info.extras}
    known = {item.key for item in info.parameters}
    given = {item.key: 0.4 for item in info.parameters if item.required}
    given |= {key: 0.5 for key in ("density",) if key in known}
    found: dict[str, Any] = {"merge_method": method}
    if info.base is Base.REQUIRED:
        found["base_model"] = f"{folder}/base"
    found["models"] = [{"model": f"{folder}/{name}", **extras} for name in "ab"[:count]]
    found["parameters"] = given
    return found | top


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes the checkpoints of ``recipe_for`` to the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(specs: Specs = SEVERAL_DTYPES, **options: Any) -> None:
        for seed, name in enumerate(("base", "a", "b")):
            write_checkpoint(Path(name), specs, seed=seed, **options)
        write_checkpoint(Path("f"), specs, seed=9, positive=True, **options)
        write_grams(Path("g"), specs, seed=9)

    return write


def run(capsys: Capture, *arguments: str, status: int = 0) -> tuple[str, str]:
    """What a command prints to stdout and stderr."""
    found = main(arguments)
    out, err = capsys.readouterr()
    assert found == status, err
    assert "Traceback" not in err
    return out, err


def recipe(found: Mapping[str, object], name: str = "recipe.yml") -> str:
    return write_recipe(Path(name), found)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- plan -----------------------------------------------------------------------------------------

PLAN_KEYS = {
    "out",
    "tensors",
    "methods",
    "matrices",
    "projected",
    "tasks",
    "passes",
    "read_bytes",
    "write_bytes",
    "scratch_bytes",
    "disk_bytes",
    "device",
    "workers",
    "memory_bytes",
    "worker_bytes",
    "footprint_bytes",
    "peak_bytes",
    "shards",
    "notes",
}


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("method", methods.names())
def test_a_plan_says_what_the_merge_then_does(
    capsys: Capture,
    family: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    streamed: bool,
) -> None:
    shrink(monkeypatch.setattr)
    family(shards=2)
    path = recipe(recipe_for(method))
    memory = least_memory(path) if streamed else 2**30
    resources = ("--memory", f"{memory}B", "--threads", "1")
    planned = json.loads(run(capsys, "plan", path, "out", *resources, "--json")[0])
    out, err = run(capsys, "merge", path, "out", *resources, "--json")
    events = lines(err)
    starts = [event for event in events if event["event"] == "start"]  # one for each run
    tasks = [event for event in events if event["event"] == "task"]
    published = json.loads(out)

    assert planned["tasks"] == sum(start["tasks"] for start in starts) == len(tasks)
    assert planned["read_bytes"] == sum(task["read_bytes"] for task in tasks)
    assert planned["disk_bytes"] == sum(task["written_bytes"] for task in tasks)
    assert planned["write_bytes"] == published["nbytes"]
    assert planned["disk_bytes"] == planned["write_bytes"] + planned["scratch_bytes"]
    moved = sum(start["all_bytes"] for start in starts)
    assert moved == planned["read_bytes"] + planned["disk_bytes"]
    assert sum(planned["passes"].values()) == len(tasks)
    measured = sum(n for name, n in planned["passes"].items() if name.startswith("measure "))
    fused = planned["passes"]["measure and merge in one read"]
    kinds = [task["kind"] for task in tasks]
    assert kinds.count("measure") == measured - fused
    sums = planned["passes"].get("sum", 0)
    assert kinds.count("merge") == planned["passes"]["merge"] + fused + sums
    assert bool(sums) == bool(planned["scratch_bytes"]) == (method == "opcm")
    assert planned["tensors"] == published["tensors"] == sum(planned["methods"].values())
    assert {s["name"]: s["bytes"] for s in planned["shards"]} == {
        name: Path("out", name).stat().st_size for name in published["shards"]
    }
    assert tuple(planned["notes"]) == tuple(published["notes"])
    assert planned["peak_bytes"] <= planned["memory_bytes"] == memory


def test_the_keys_of_a_plan(capsys: Capture, family: Callable[..., None]) -> None:
    family(HALVES)
    out, err = run(capsys, "plan", recipe(LINEAR), "out", "--json")
    (facts,) = lines(out)  # one object, on one line
    assert facts.keys() == PLAN_KEYS
    assert facts["shards"][0].keys() == {"name", "bytes", "tensors", "parts"}
    assert facts["out"] == "out"
    assert facts["methods"] == {"linear": len(HALVES)}
    assert err == ""


def test_a_plan_in_words(capsys: Capture, family: Callable[..., None]) -> None:
    family(SEVERAL_DTYPES)
    path = recipe({**LINEAR, "parameters": {"weight": 0.5, "int8_mask": True}})
    facts = json.loads(run(capsys, "plan", path, "out", "--json")[0])
    out, err = run(capsys, "plan", path, "out")
    assert err == ""
    told = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert told["tensors"] == "10: 1 copy, 9 linear"
    assert told["read"] == size(facts["read_bytes"])
    assert told["write"] == f"{size(facts['write_bytes'])} in 1 shard"
    assert told["disk"] == f"{size(facts['disk_bytes'])} at out"
    assert told["memory"].startswith(f"at most {size(facts['peak_bytes'])} of 4.0 GiB: ")
    assert told[SINGLE] == f"{size(facts['write_bytes'])}, 10 tensors"
    assert "int8_mask" in told["note:"]
    assert told["note:"] == facts["notes"][0]


def test_many_shards_are_not_all_listed(capsys: Capture, family: Callable[..., None]) -> None:
    specs = {f"model.layers.{i}.weight": (DType.BF16, (64, 64)) for i in range(30)}
    family(specs)
    out, _ = run(capsys, "plan", recipe({**LINEAR, "shard_size": 8192}), "out")
    assert "in 30 shards" in out
    assert len(re.findall(r"^  model-", out, re.MULTILINE)) == 20
    assert "... 10 more shards" in out


def test_a_plan_costs_nothing(capsys: Capture, family: Callable[..., None]) -> None:
    """No file is made, changed or opened for writing, anywhere."""
    family()
    path = recipe(recipe_for("ties"))
    before = [(p, p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(Path().rglob("*"))]
    for out in ("out", "deep/er/out", "recipe.yml/out", "/proc/out", "base"):
        run(capsys, "plan", path, out)
    run(capsys, "plan", path)  # without any
    assert [(p, p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(Path().rglob("*"))] == before
    assert not Path("/proc/out").exists()


def test_memory_and_threads_are_said(capsys: Capture, family: Callable[..., None]) -> None:
    family()
    path = recipe(LINEAR)

    def facts(*options: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run(capsys, "plan", path, "--json", *options)[0])
        return found

    assert facts("--memory", "1.5GiB")["memory_bytes"] == 1.5 * 2**30
    assert facts("--memory", "2GB")["memory_bytes"] == 2 * 10**9
    assert facts("--memory", "500000KiB")["memory_bytes"] == 500_000 * 1024
    assert facts("--memory", "536870912")["memory_bytes"] == 2**29
    assert facts("--memory", " 512 mib ")["memory_bytes"] == 2**29
    assert facts()["memory_bytes"] == 4 * 2**30
    assert facts("--threads", "1")["workers"] < facts("--threads", "3")["workers"]


# --- merge ----------------------------------------------------------------------------------------


def test_a_merge_in_words(capsys: Capture, family: Callable[..., None]) -> None:
    family(HALVES | {"position_ids": (DType.I64, (4,))})
    path = recipe({**LINEAR, "parameters": {"weight": 0.5, "int8_mask": True}})
    out, err = run(capsys, "merge", path, "out")
    assert re.fullmatch(r"out: merged; 7 tensors, \d+\.\d KiB in 1 shard\n", out)
    *bar, note = err.splitlines()
    assert len(bar) == 1 and "1/1 tasks" in bar[0]
    assert note.startswith("note: ") and "int8_mask" in note
    out, err = run(capsys, "merge", path, "out")
    assert "out: was already merged; 7 tensors" in out
    assert err == f"{note}\n"


def test_a_merge_in_json(capsys: Capture, family: Callable[..., None]) -> None:
    family(SEVERAL_DTYPES, shards=2)
    out, err = run(capsys, "merge", recipe(LINEAR), "out", "--json")
    (published,) = lines(out)
    assert published == {
        "out": "out",
        "shards": [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)],
        "nbytes": sum(Path("out", name).stat().st_size for name in published["shards"]),
        "tensors": len(SEVERAL_DTYPES),
        "already": False,
        "notes": published["notes"],
        "requests": 0,
        "requested_bytes": 0,
    }
    start, *tasks = lines(err)
    assert start["event"] == "start" and {task["event"] for task in tasks} == {"task"}
    assert [task["tasks_done"] for task in tasks] == list(range(1, start["tasks"] + 1))
    assert tasks[-1]["left_s"] == 0


def test_an_error_is_json_too(capsys: Capture, family: Callable[..., None]) -> None:
    """Every line of stderr can be parsed, also the last one of a run that failed."""
    family(HALVES)
    set_element(Path("a"), "model.layers.3.weight", 5, float("nan"))
    out, err = run(capsys, "merge", recipe(LINEAR), "out", "--json", status=1)
    *_, error = lines(err)
    assert out == ""
    assert error["event"] == "error" and error["kind"] == "NonFiniteError"
    assert "model.layers.3.weight" in error["message"]


def test_a_quiet_merge(capsys: Capture, family: Callable[..., None]) -> None:
    family(HALVES)
    out, err = run(capsys, "merge", recipe(LINEAR), "out", "--quiet")
    assert err == "" and out.startswith("out: merged")


def test_options_about_what_is_at_out(capsys: Capture, family: Callable[..., None]) -> None:
    family(HALVES)
    run(capsys, "merge", recipe(LINEAR), "out", "--quiet")
    first = digests(Path("out"))
    other = recipe({**LINEAR, "parameters": {"weight": 0.25, "normalize": False}}, "other.yml")
    _, err = run(capsys, "merge", other, "out", status=1)
    assert "--overwrite" in err and digests(Path("out")) == first
    run(capsys, "merge", other, "out", "--overwrite", "--quiet")
    assert digests(Path("out")) != first
    run(capsys, "merge", "recipe.yml", "out", "--overwrite", "--fresh", "--quiet")
    assert digests(Path("out")) == first
    assert run(capsys, "verify", "out")[0].startswith("out: good")


def test_overwriting_replaces_a_checkpoint_and_nothing_else(
    capsys: Capture, family: Callable[..., None]
) -> None:
    """What would be read with the new weights goes; what somebody put beside them stays."""
    family(HALVES)
    stale = ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_x.py")
    kept = ("notes.txt", "train.py", "eval/results.json", "LICENSE", "log.md")
    write_checkpoint(Path("out"), HALVES, shards=3, files=dict.fromkeys(stale, "of before"))
    Path("out/eval").mkdir()
    for name in kept:
        Path("out", name).write_text("mine")
    run(capsys, "merge", recipe(LINEAR), "out", "--quiet", "--overwrite")
    found = set(tree(Path("out")))
    ours = {SINGLE, "config.json", "README.md", "shardmerge.json", "shardmerge_recipe.yml", TASKS}
    assert found == {*kept, *ours}
    assert all(Path("out", name).read_text() == "mine" for name in kept)


def test_the_home_folder_as_shells_write_it(
    capsys: Capture, family: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    family(HALVES)
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    Path("home").mkdir()
    run(capsys, "merge", recipe(LINEAR), "~/out", "--quiet")
    assert Path("home/out", SINGLE).exists() and not Path("~").exists()


# --- stopping -------------------------------------------------------------------------------------


class Stops(progress.Text):
    """Sends a signal to the process after the first task."""

    number = signal.SIGINT

    def task(self, *arguments: Any) -> None:
        super().task(*arguments)
        if self.tasks_done == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_and_going_on(
    capfd: pytest.CaptureFixture[str],
    family: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    shrink(monkeypatch.setattr)
    family(HALVES)
    path = recipe(recipe_for("ties"))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(Stops, "number", number)
        patched.setattr("shardmerge.console.Text", Stops)
        assert main(["merge", path, "out", "--threads", "1"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "\nstopping; again to stop at once\n" in err
    assert err.endswith("Stopped: stopped; run the same command again to go on from here.\n")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert [p for p in Path("out").iterdir() if p.name != ".shardmerge"] == []

    assert main(["merge", path, "out", "--json"]) == 0
    start, *tasks = lines(capfd.readouterr()[1])
    assert 0 < start["tasks_done"] < start["tasks"]
    assert start["tasks_done"] + len(tasks) == start["tasks"]
    assert start["done_bytes"] > 0 and start["written_bytes"] > 0
    assert main(["merge", path, "other", "--quiet"]) == 0
    assert digests(Path("out")) == digests(Path("other"))


def test_stopping_twice_stops_at_once(family: Callable[..., None]) -> None:
    """The second Ctrl-C ends the process by the signal itself; the run can still be resumed."""
    family(HALVES)
    path = recipe(LINEAR)
    script = f"""
import os, signal
from shardmerge import progress
from shardmerge.cli import main
class Twice(progress.Quiet):
    def start(self, **counts):
        super().start(**counts)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
progress.Quiet = Twice
import shardmerge.console
shardmerge.console.Quiet = Twice
main(["merge", {path!r}, "out", "--quiet"])
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == -signal.SIGINT
    assert "Traceback" not in child.stderr
    assert main(["merge", path, "out", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("arguments", "inside"),
    [
        (("plan", "recipe.yml"), "shardmerge.prepare.prepare"),
        (("verify", "a"), "shardmerge.verify.verify"),
        (("diff", "a", "b"), "shardmerge.diff.diff"),
    ],
)
def test_interrupting_other_commands(
    capsys: Capture,
    family: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    inside: str,
) -> None:
    family(HALVES)
    recipe(LINEAR)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inside, interrupted)
    assert run(capsys, *arguments, status=3) == ("", "\nstopped\n")


def test_a_merge_in_another_thread(family: Callable[..., None]) -> None:
    """Where signals cannot be handled."""
    family(HALVES)
    path, found = recipe(LINEAR), []
    thread = threading.Thread(target=lambda: found.append(main(["merge", path, "out", "--quiet"])))
    thread.start()
    thread.join()
    assert found == [0]


# --- verify ---------------------------------------------------------------------------------------


@pytest.fixture
def published(capsys: Capture, family: Callable[..., None]) -> Path:
    family(HALVES, shards=2)
    run(capsys, "merge", recipe(LINEAR), "out", "--quiet")
    return Path("out")


def test_verify(capsys: Capture, published: Path) -> None:
    nbytes = sum(path.stat().st_size for path in published.glob("*.safetensors"))
    out, err = run(capsys, "verify", "out")
    assert (out, err) == (
        f"out: good (every checksum); 6 tensors, {size(nbytes)} in 2 shards\n",
        "",
    )
    (report,) = lines(run(capsys, "verify", "out", "--json")[0])
    assert report == {
        "problems": [],
        "shards": 2,
        "tensors": 6,
        "bytes": nbytes,
        "checksums": True,
    }


def test_verify_finds_one_changed_bit(capsys: Capture, published: Path) -> None:
    shard = sorted(published.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    out, err = run(capsys, "verify", "out", status=1)
    assert out == ""
    assert err.startswith("VerifyError: out: 1 problem\n")
    assert shard.name in err and "CRC-32" in err
    out, err = run(capsys, "verify", "out", "--json", status=1)
    assert json.loads(out)["problems"] and "VerifyError" in err


def test_verify_counts_problems(capsys: Capture, published: Path) -> None:
    for shard in published.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    out, err = run(capsys, "verify", "out", "--json", status=1)
    problems = json.loads(out)["problems"]
    assert len(problems) >= 2
    assert err.startswith(f"VerifyError: out: {len(problems)} problems\n")
    assert all(problem in err for problem in problems)


def test_verify_without_a_record(capsys: Capture, published: Path) -> None:
    (published / "shardmerge.json").unlink()
    assert "structure only: no provenance record" in run(capsys, "verify", "out")[0]


# --- inspect --------------------------------------------------------------------------------------


def test_inspect(capsys: Capture, family: Callable[..., None]) -> None:
    family(SEVERAL_DTYPES)
    out, err = run(capsys, "inspect", "a")
    *listed, total = out.splitlines()
    assert err == ""
    assert listed[0] == "model.embed_tokens.weight  bfloat16  40x24  1.9 KiB"
    assert "model.layers.0.mlp.scale  float32  scalar  4 B" in listed
    assert "model.layers.1.mlp.gate  float16  0x7  0 B" in listed
    assert "model.position_ids  int64  1x17  136 B" in listed
    elements = sum(math.prod(shape) for _, shape in SEVERAL_DTYPES.values())
    nbytes = sum(d.itemsize * math.prod(shape) for d, shape in SEVERAL_DTYPES.values())
    assert total == f"10 tensors, {elements:,} elements, {size(nbytes)} in 1 shard"


def test_inspect_in_json(capsys: Capture, family: Callable[..., None]) -> None:
    family(SEVERAL_DTYPES, shards=3)
    found = lines(run(capsys, "inspect", "a", "--json")[0])
    assert {fact["name"]: (fact["dtype"], tuple(fact["shape"])) for fact in found} == {
        name: (dtype.torch_name, shape) for name, (dtype, shape) in SEVERAL_DTYPES.items()
    }
    first = found[0]
    assert first == {
        "name": "model.embed_tokens.weight",
        "dtype": "bfloat16",
        "shape": [40, 24],
        "bytes": 1920,
        "shard": "model-00001-of-00003.safetensors",
        "block_scaled": False,
    }
    assert len({fact["shard"] for fact in found}) == 3


def test_inspect_a_single_file(capsys: Capture, family: Callable[..., None]) -> None:
    family(HALVES, shards=2)
    shard = "a/model-00002-of-00002.safetensors"
    out, _ = run(capsys, "inspect", shard)
    assert len(out.splitlines()) == 4 and "3 tensors" in out


def test_inspect_names_weights_that_are_not_read(
    capsys: Capture, family: Callable[..., None]
) -> None:
    family(HALVES, shards=2)
    Path("a", SINGLE).write_bytes(b"stray")
    Path("a/pytorch_model.bin").write_bytes(b"other")
    out, _ = run(capsys, "inspect", "a")
    assert out.splitlines()[-1] == f"not read: {SINGLE}, pytorch_model.bin"


# --- diff -----------------------------------------------------------------------------------------


def test_diff(capsys: Capture, family: Callable[..., None]) -> None:
    family(HALVES)
    write_checkpoint(
        Path("c"),
        {
            **{name: spec for name, spec in HALVES.items() if "layers.0" not in name},
            "model.layers.1.weight": (DType.BF16, (31, 24)),
            "model.new": (DType.BF16, (2,)),
        },
        seed=1,
    )
    out, err = run(capsys, "diff", "a", "a")
    assert err == ""
    assert [line.split(": ") for line in out.splitlines()] == [[name, "same"] for name in HALVES]
    told = dict(line.split(": ", 1) for line in run(capsys, "diff", "a", "c")[0].splitlines())
    assert told["model.layers.0.weight"] == "only in a"
    assert told["model.new"] == "only in b"
    assert told["model.layers.1.weight"] == "shapes differ ((24, 31) and (31, 24))"
    assert re.match(r"\d+ differ, max \S+, mean ", told["model.layers.2.weight"])


def test_diff_in_json(capsys: Capture, family: Callable[..., None]) -> None:
    family(HALVES)
    Path("c").mkdir()
    Path("c", SINGLE).write_bytes(Path("a", SINGLE).read_bytes())
    set_element(Path("c"), "model.layers.4.weight", 3, 64.0)
    found = {fact["name"]: fact for fact in lines(run(capsys, "diff", "a", "c", "--json")[0])}
    assert [name for name, fact in found.items() if fact["differing"]] == ["model.layers.4.weight"]
    fact = found["model.layers.4.weight"]
    assert fact["status"] == "compared" and fact["differing"] == 1
    assert fact["max_abs"] == pytest.approx(64, abs=1)
    assert fact["dtype_a"] == fact["dtype_b"] == "BF16"


# --- methods --------------------------------------------------------------------------------------


def test_methods(capsys: Capture) -> None:
    out, err = run(capsys, "methods")
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == list(methods.names())
    found = lines(run(capsys, "methods", "--json")[0])
    assert [fact["method"] for fact in found] == list(methods.names())
    ties = next(fact for fact in found if fact["method"] == "ties")
    assert {"weight", "density", "lambda", "normalize"} <= set(ties["parameters"])
    assert ties["title"].endswith(".")


@pytest.mark.parametrize("method", methods.names())
def test_explain(capsys: Capture, method: str) -> None:
    out, err = run(capsys, "explain", method)
    assert err == ""
    assert out.startswith(f"{method}\n{'=' * len(method)}\n\n")
    page, _, own = out.partition("In a recipe:\n")
    for section in ("merged = ", "Passes:", "Args:", "Raises:", "Example:", "Reference:"):
        assert section in page
    info = methods.get(method)
    for item in info.parameters:
        line = next(line for line in own.splitlines() if line.startswith(f"  {item.key}: "))
        assert ("required" in line) == item.required
        assert ("each model" in line) == item.per_model
        assert f"{item.key}:" in page  # every parameter is explained
    assert all(kind in own for kind in (*info.extras, *info.inert))


# --- a process of its own -------------------------------------------------------------------------


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardmerge", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_as_a_process(family: Callable[..., None]) -> None:
    family(HALVES)
    done = shell("merge", recipe(LINEAR), "out")
    assert (done.returncode, done.stdout) == (0, "out: merged; 6 tensors, 12.7 KiB in 1 shard\n")
    assert done.stderr.startswith("[####") and done.stderr.count("\n") == 1
    failed = shell("merge", "nope.yml", "out")
    assert failed.returncode == 2 and failed.stdout == ""
    assert (
        failed.stderr
        == "RecipeError: nope.yml: cannot read the recipe: No such file or directory\n"
    )


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("shardmerge")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"shardmerge {__version__}\n")


@pytest.mark.parametrize(
    "command", ["", "merge", "plan", "verify", "inspect", "diff", "methods", "explain"]
)
def test_help(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*([command] if command else []), "--help"])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert out.startswith("usage: shardmerge")
    if command in ("", "merge"):
        assert "0 done, 1 failed, 2 bad usage or recipe, 3 stopped but resumable" in out


MANY: Specs = {f"model.layers.{i}.weight": (DType.BF16, (2,)) for i in range(3000)}


def test_a_reader_that_leaves(family: Callable[..., None]) -> None:
    """``inspect | head -1``: more is printed than a pipe holds, and nobody reads it."""
    family(MANY)
    child = subprocess.Popen(
        [sys.executable, "-m", "shardmerge", "inspect", "a"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout and child.stderr
    assert child.stdout.readline() == b"model.layers.0.weight  bfloat16  2  4 B\n"
    child.stdout.close()
    assert child.wait(60) == 1
    assert child.stderr.read() == b""
    child.stderr.close()


def test_a_merge_that_nobody_watches(capsys: Capture, family: Callable[..., None]) -> None:
    """``merge 2>&1 | head -1``: the merge goes on to its end."""
    family(HALVES)
    child = subprocess.Popen(
        [sys.executable, "-m", "shardmerge", "merge", recipe(LINEAR), "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout and child.stderr
    child.stderr.close()
    assert child.stdout.read().startswith(b"out: merged")
    child.stdout.close()
    assert child.wait(60) == 0
    run(capsys, "verify", "out")


def test_a_result_that_cannot_be_written(capsys: Capture, family: Callable[..., None]) -> None:
    """``merge --json > full``: the checkpoint is there, but the user must know what is not."""
    family(HALVES)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "shardmerge", "merge", recipe(LINEAR), "out", "--quiet"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "could not be written to stdout" in done.stderr and "No space left" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    run(capsys, "verify", "out")


def test_names_that_a_terminal_cannot_show(family: Callable[..., None]) -> None:
    family({"größe.weight": (DType.BF16, (2,))})
    plain = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = shell("inspect", "a", env=plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gr\\xf6\\xdfe.weight  bfloat16")


def test_only_what_is_needed_is_imported(family: Callable[..., None]) -> None:
    """A merge needs neither torch nor transformers: also where they are installed."""
    family(HALVES)
    script = (
        "import sys\nfrom shardmerge.cli import main\n"
        f"main(['merge', {recipe(LINEAR)!r}, 'out', '--quiet'])\n"
        "print(*sorted({'torch', 'transformers', 'safetensors', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == [""], done.stderr


def test_an_array_is_several_commands(capsys: Capture, family: Callable[..., None]) -> None:
    family(HALVES)
    assert main(["merge", recipe(LINEAR), "out", "--executor", "slurm-array"]) == 2
    told = capsys.readouterr().err
    assert "sbatch launch/array.sbatch" in told and "publish --plan" in told
    assert not Path("out").exists()


@pytest.mark.parametrize("option", [("--address", "auto"), ("--gpus", "0.5")])
def test_options_of_a_cluster_need_one(
    capsys: Capture, family: Callable[..., None], option: tuple[str, str]
) -> None:
    family(HALVES)
    assert main(["merge", recipe(LINEAR), "out", *option]) == 2
    assert "--executor ray" in capsys.readouterr().err


def test_more_memory_than_there_is(capsys: Capture, family: Callable[..., None]) -> None:
    family(HALVES)
    assert main(["merge", recipe(LINEAR), "out", "--memory", "900000TiB", "--threads", "1"]) == 1
    assert "Give a --memory that it has" in capsys.readouterr().err
