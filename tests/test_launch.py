"""The launch scripts: on a real Slurm, with a stand-in for the merge; and what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardmerge import arguments, errors
from shardmerge.merge import merge
from shardmerge.numerics import DType
from shardmerge.outputs.local import LEDGER_FILE
from shardmerge.report import read_records
from shardmerge.stores import Stores
from tests import launch_standin, support
from tests.conftest import must_have
from tests.launch_standin import lines
from tests.servers.slurm import Slurm
from tests.support import digests, recipe_of, write_checkpoint, write_recipe

LAUNCH = Path(__file__).parent.parent / "launch"
STANDIN = Path(launch_standin.__file__)
SLOW = STANDIN.with_name("slow_shardmerge.py")
RUN_TIMEOUT_S = 240.0
"""Ray takes 20 seconds to start on two nodes that share two busy cores; be patient."""


class Ray:
    """A job of ``ray.sbatch`` whose merge is the stand-in."""

    def __init__(
        self,
        slurm: Slurm,
        folder: Path,
        *,
        tasks: int,
        seconds: float,
        nodes: int = 2,
        restarts: int = 5,
    ) -> None:
        self.slurm = slurm
        self.out = folder / "out"
        # Ray's sockets are in there, and their paths must be short.
        self.temporary = Path(tempfile.mkdtemp(prefix="sm-"))
        recipe = folder / "recipe.json"
        recipe.write_text(json.dumps({"nodes": nodes, "tasks": tasks, "seconds": seconds}))
        options = [f"--nodes={nodes}", "--cpus-per-task=2", "--mem=4000", "--time=30"]
        ray = Path(sys.executable).parent / "ray"
        env = {
            "SHARDMERGE": f"{sys.executable} {STANDIN}",
            "SHARDMERGE_TMP": str(self.temporary),
            "SHARDMERGE_RESTARTS": str(restarts),
            "RAY": str(ray),
            "RAY_AUTH_MODE": "token",
            # How long a merge waits for a head that is gone.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        }
        script = LAUNCH / "ray.sbatch"
        self.job = slurm.submit(script, recipe, self.out, options=options, env=env)
        self.folder = slurm.folder / f".shardmerge-{self.job}"

    def wait_for_tasks(self, count: int) -> None:
        self.slurm.wait_for(
            self.job, f"{count} tasks", lambda _: len(lines(self.out)) >= count, RUN_TIMEOUT_S
        )

    def finish(self) -> list[dict[str, Any]]:
        """Wait until the job is done and has left nothing but its output."""
        self.slurm.wait(self.job, "COMPLETED", RUN_TIMEOUT_S)
        self.gone()
        assert not self.folder.exists()
        self.temporary.rmdir()  # it is empty
        return lines(self.out)

    def gone(self) -> None:
        def clean() -> bool:
            return not self.slurm.processes_of(self.job)

        self.slurm.wait_until("no process is left", clean, 60)

    def facts(self) -> list[dict[str, Any]]:
        """What each run of the stand-in saw when it began."""
        text = self.slurm.output(self.job).splitlines()
        return [json.loads(line[9:]) for line in text if line.startswith("standin: ")]


@pytest.fixture
def with_ray() -> None:
    must_have("ray", "" if importlib.util.find_spec("ray") else "Ray is not installed")


slow = pytest.mark.timeout(600)


@slow
def test_a_merge_runs_on_all_nodes_of_a_job(slurm: Slurm, tmp_path: Path, with_ray: None):
    job = Ray(slurm, tmp_path, tasks=12, seconds=0.3)
    done = job.finish()
    assert sorted(each["task"] for each in done) == list(range(12))
    assert {each["node"] for each in done} == set(slurm.nodes)
    [facts] = job.facts()
    # Of 4000 MiB each, the worker keeps 1024 for Ray itself, the head 1024 more for the driver.
    offered = (4000 - 1024 + 4000 - 2048) * 2**20
    assert facts == {"nodes": 2, "cpus": 4.0, "memory": offered, "todo": 12}


@slow
def test_a_preempted_merge_drains_and_goes_on(slurm: Slurm, tmp_path: Path, with_ray: None):
    job = Ray(slurm, tmp_path, tasks=24, seconds=0.7)
    job.wait_for_tasks(3)
    token = job.folder / "token"
    assert (token.stat().st_mode & 0o777, job.folder.stat().st_mode & 0o777) == (0o600, 0o700)
    slurm.preempt(job.job)
    slurm.wait_for(job.job, "is requeued", lambda now: now.restarts == 1, RUN_TIMEOUT_S)
    job.gone()
    assert not token.exists()
    first = lines(job.out)
    assert 3 <= len(first) < 24
    slurm.hurry(job.job)
    done = job.finish()
    assert sorted(each["task"] for each in done) == list(range(24))
    assert {each["restart"] for each in done[len(first) :]} == {"1"}
    assert [each["todo"] for each in job.facts()] == [24, 24 - len(first)]


@slow
def test_a_merge_goes_on_without_a_node_that_is_lost(tmp_path: Path, with_ray: None):
    must_have("slurm", Slurm.missing())
    (tmp_path / "slurm").mkdir()
    with Slurm.start(tmp_path / "slurm") as slurm:
        job = Ray(slurm, tmp_path, tasks=20, seconds=0.5)
        job.wait_for_tasks(4)
        slurm.lose("node2")
        slurm.wait_until(
            "the merge is done", lambda: "ended with 0" in slurm.output(job.job), RUN_TIMEOUT_S
        )
        assert sorted(each["task"] for each in lines(job.out)) == list(range(20))
    shutil.rmtree(job.temporary)  # of the node that is lost


@slow
def test_a_cancelled_merge_leaves_nothing_and_is_not_requeued(
    slurm: Slurm, tmp_path: Path, with_ray: None
):
    job = Ray(slurm, tmp_path, tasks=1000, seconds=0.2)
    job.wait_for_tasks(1)
    slurm.cancel(job.job)
    assert slurm.wait(job.job, "CANCELLED", RUN_TIMEOUT_S).restarts == 0
    job.gone()
    assert not (job.folder / "token").exists()
    shutil.rmtree(job.temporary)


@slow
def test_a_merge_whose_ray_is_told_to_end_can_be_resumed_and_restarts_are_limited(
    slurm: Slurm, tmp_path: Path, with_ray: None
):
    # So Slurm tells of a preemption where it is not set up to send the user's signal.
    job = Ray(slurm, tmp_path, tasks=1000, seconds=0.2, nodes=1, restarts=0)
    job.wait_for_tasks(1)
    slurm.run("scancel", "--signal=TERM", str(job.job))
    ended = slurm.wait(job.job, "FAILED", RUN_TIMEOUT_S)
    assert (ended.exit_code, ended.restarts) == (3, 0)
    assert "not requeued" in slurm.output(job.job)
    job.gone()
    job.temporary.rmdir()  # it is empty


@slow
def test_a_preempted_merge_gives_the_same_bytes(slurm: Slurm, tmp_path: Path, with_ray: None):
    """The real program: it drains, is requeued, and goes on from its ledger."""
    recipe, expected = real_merge(tmp_path)
    out, temporary = tmp_path / "out", Path(tempfile.mkdtemp(prefix="sm-"))
    job = real_job(slurm, recipe, out, temporary)
    slurm.wait_for(job, "some tasks", lambda _: len(receipts(out)) > 3, RUN_TIMEOUT_S)
    slurm.preempt(job)
    slurm.wait_for(job, "is requeued", lambda now: now.restarts == 1, RUN_TIMEOUT_S)
    before = receipts(out)
    assert not (out / "model.safetensors.index.json").exists()
    slurm.hurry(job)
    slurm.wait(job, "COMPLETED", RUN_TIMEOUT_S)
    assert digests(out) == expected
    rows = read_records(str(out), Stores())
    assert {row.process for row in rows} != {rows[0].process}
    assert len(before) < len(rows) < len(before) + len(rows)
    temporary.rmdir()


@slow
@pytest.mark.parametrize("victim", ["the driver", "the head"])
def test_any_process_may_be_killed(slurm: Slurm, tmp_path: Path, with_ray: None, victim: str):
    """Workers and nodes are killed in the tests of the executor."""
    recipe, expected = real_merge(tmp_path)
    out, temporary = tmp_path / "out", Path(tempfile.mkdtemp(prefix="sm-"))
    job = real_job(slurm, recipe, out, temporary)
    slurm.wait_for(job, "some tasks", lambda _: len(receipts(out)) > 3, RUN_TIMEOUT_S)
    wanted = {"the driver": "slow_shardmerge.py merge", "the head": "gcs_server"}[victim]
    commands = subprocess.run(
        ["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True
    ).stdout
    [process] = [
        int(line.split()[0])
        for line in commands.splitlines()
        if wanted in line and (victim == "the driver" or str(temporary) in line)
    ]
    os.kill(process, signal.SIGKILL)
    slurm.wait_for(job, "is requeued", lambda now: now.restarts == 1, RUN_TIMEOUT_S)
    assert not (out / "model.safetensors.index.json").exists()
    slurm.hurry(job)
    slurm.wait(job, "COMPLETED", RUN_TIMEOUT_S)
    assert digests(out) == expected
    shutil.rmtree(temporary)


def real_job(slurm: Slurm, recipe: str, out: Path, temporary: Path) -> int:
    """Submit ``ray.sbatch`` with the real program on two nodes."""
    env = {
        "SHARDMERGE": f"{sys.executable} {SLOW}",
        "SHARDMERGE_TMP": str(temporary),
        "RAY": str(Path(sys.executable).parent / "ray"),
        "RAY_AUTH_MODE": "token",
        # Workers import the project as the driver does.
        "PYTHONPATH": str(LAUNCH.parent),
    }
    options = ["--nodes=2", "--cpus-per-task=2", "--mem=6000", "--time=30"]
    script, more = LAUNCH / "ray.sbatch", ("--memory=1GiB", "--json")
    return slurm.submit(script, recipe, out, *more, options=options, env=env)


def real_merge(folder: Path) -> tuple[str, dict[str, str]]:
    """A recipe of some thirty parts, and the digests of its shards."""
    specs = {f"model.layers.{i}.weight": (DType.BF16, (128, 1024)) for i in range(32)}
    base, *models = (write_checkpoint(folder / f"m{i}", specs, seed=i, shards=4) for i in range(3))
    given = {model: {"weight": 1.0, "density": 0.5} for model in models}
    recipe = write_recipe(folder / "r.yml", recipe_of("ties", base, given))
    merge(recipe, str(folder / "expected"))
    return recipe, digests(folder / "expected")


def receipts(out: Path) -> set[tuple[int, int]]:
    return support.receipts(out) if (out / ".shardmerge" / LEDGER_FILE).exists() else set()


def array(
    slurm: Slurm, recipe: str, out: Path, elements: int, *, by_sbatch: bool = False
) -> list[int]:
    """Submit a merge by an array; numbers of its three jobs."""
    env = {
        "SHARDMERGE": f"{sys.executable} {SLOW}",
        "SHARDMERGE_SBATCH": "--cpus-per-task=1 --mem=1500 --time=30",
        "SHARDMERGE_TEST_PAUSE": "0.7",
    }
    script, options = LAUNCH / "array.sbatch", ["--cpus-per-task=1", "--mem=100", "--time=30"]
    if by_sbatch:
        job = slurm.submit(script, recipe, out, str(elements), options=options, env=env)
        slurm.wait(job, "COMPLETED")
        said = slurm.output(job)
    else:
        said = slurm.run(str(script), recipe, out, str(elements), env=env)
    return [int(each) for each in re.findall(r"(?:job|array) (\d+)", said)]


@slow
def test_an_array_plans_works_and_publishes(slurm: Slurm, tmp_path: Path):
    recipe, expected = real_merge(tmp_path)
    out = tmp_path / "out"
    _, elements, publish = array(slurm, recipe, out, 3, by_sbatch=True)
    element = f"{elements}_1"
    ledger = out / ".shardmerge" / "ledger-1-of-3.jsonl"
    slurm.wait_for(
        element, "has begun", lambda _: ledger.exists() and '"part"' in ledger.read_text()
    )
    slurm.run("scancel", "--batch", "--signal=USR1", element)
    slurm.wait_for(element, "is requeued", lambda now: now.restarts == 1)
    slurm.wait(f"{elements}_0", "COMPLETED")
    slurm.wait(f"{elements}_2", "COMPLETED")
    assert slurm.job(publish).state == "PENDING"
    assert not list(out.glob("*.safetensors"))
    slurm.hurry(element)
    slurm.wait(publish, "COMPLETED")
    assert digests(out) == expected


@slow
def test_an_array_whose_plan_fails_ends(slurm: Slurm, tmp_path: Path):
    recipe = write_recipe(tmp_path / "r.yml", {"merge_method": "nearly_linear"})
    plan, elements, publish = array(slurm, recipe, tmp_path / "out", 2)
    assert slurm.wait(plan, "FAILED").exit_code == 2
    slurm.wait(publish, "CANCELLED")
    assert slurm.job(elements).state == "CANCELLED"


# --- what the files say -------------------------------------------------------------------------

SCRIPTS = ["ray.sbatch", "array.sbatch"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name: str):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join(folders))
    must_have("shellcheck", "" if shellcheck else "shellcheck is not installed")
    assert shellcheck is not None
    done = subprocess.run([shellcheck, LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_requeued_and_end_only_what_is_theirs(name: str):
    lines = (LAUNCH / name).read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
    assert "#SBATCH --signal=B:USR1@120" in lines
    assert not [line for line in lines if re.search(r"^[^#]*ray stop", line)]


def test_scripts_say_how_they_are_used():
    for name in SCRIPTS:
        done = subprocess.run(["bash", LAUNCH / name], capture_output=True, text=True)
        assert (done.returncode, done.stderr[:7]) == (2, "usage: ")


def used() -> set[tuple[str, str]]:
    """Commands of shardmerge in the files, each alone and with each of its options."""
    command = r'(?:shardmerge|\$SHARDMERGE|"\$\{shardmerge\[@\]\}") ([a-z]+)\b'
    more = r"([^\n]*(?:\n +--[^\n]*)*)"
    found = {("plan", "--memory")}  # array.sbatch puts it together
    for path in LAUNCH.iterdir():
        for name, rest in re.findall(command + more, path.read_text()):
            if name in COMMANDS:
                found |= {(name, ""), *((name, each) for each in re.findall(r"--[a-z0-9-]+", rest))}
    return found


COMMANDS = {"merge", "plan", "worker", "publish", "verify", "clean"}


def test_the_files_use_what_the_command_line_has():
    commands: Any = next(
        action for action in arguments.parser()._actions if isinstance(action.choices, dict)
    )
    there = {
        (name, option)
        for name, parser in commands.choices.items()
        for option in ["", *parser._option_string_actions]
    }
    assert {(name, "") for name in ("merge", "plan", "worker", "publish")} < used()
    assert used() <= there


def test_a_rayjob_asks_for_what_it_uses():
    job = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= 120
        [container] = pod["containers"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        limit = int(resources["limits"]["memory"].removesuffix("Gi")) * 2**30
        params = {name: int(value) for name, value in group["rayStartParams"].items()}
        shm = {volume["name"]: volume for volume in pod["volumes"]}["shm"]["emptyDir"]
        assert shm == {"medium": "Memory", "sizeLimit": "1Gi"}
        assert params["object-store-memory"] < 2**30
        assert params.get("memory", 0) + 2 * 2**30 <= limit
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"recipe": "/recipe", "shm": "/dev/shm"}
        names = {each["name"] for each in container["env"]}
        assert "RAY_task_oom_retries" in names
        assert not {name for name in names if "SECRET" in name or "ACCESS_KEY" in name}


def test_a_sky_task_resumes_and_holds_no_secret():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [errors.Stopped.exit_code]
    assert task["resources"]["use_spot"]
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}
    # In YAML, a bare 0 would be a number, and SkyPilot wants text.
    given = {name: value for name, value in task["envs"].items() if value is not None}
    assert all(isinstance(value, str) for value in given.values())
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
