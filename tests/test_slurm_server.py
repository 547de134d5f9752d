"""The Slurm that the tests start: exit codes, preemption, and an end that leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers.processes import ServerError
from tests.servers.slurm import Slurm, left

TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]
GONE_TIMEOUT_S = 60.0


def test_a_job_on_two_nodes_gives_its_exit_code(slurm: Slurm):
    script = '#!/bin/sh\nsrun sh -c \'echo "here is $SLURMD_NODENAME"\'\nexit "$1"\n'
    good = slurm.submit(script, "0", options=TWO_NODES)
    bad = slurm.submit(script, "7", options=TWO_NODES)
    assert slurm.wait(good, "COMPLETED").exit_code == 0
    assert {f"here is {node}" for node in slurm.nodes} <= set(slurm.output(good).splitlines())
    assert slurm.wait(bad, "FAILED").exit_code == 7
    with pytest.raises(ServerError, match="ended as FAILED, not COMPLETED"):
        slurm.wait(bad, "COMPLETED")


PREEMPTED = """#!/bin/sh
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then echo "second run"; exit 0; fi
trap 'echo "told"; scontrol requeue "$SLURM_JOB_ID"; exit 85' USR1
echo "first run"
sleep 600 &
wait
"""


def test_a_preempted_job_is_told_and_can_ask_to_run_again(slurm: Slurm):
    # One that ends by itself in its time of grace has ended; Slurm requeues only what it kills.
    options = ["--requeue", "--open-mode=append", "--signal=B:USR1@60", "--time=30"]
    job = slurm.submit(PREEMPTED, options=[*TWO_NODES, *options])
    slurm.wait_until("the job runs", lambda: "first run" in slurm.output(job), 60)
    slurm.preempt(job)
    slurm.wait_for(job, "is requeued", lambda now: now.restarts == 1)
    slurm.hurry(job)
    slurm.wait(job, "COMPLETED")
    said = [line for line in slurm.output(job).splitlines() if not line.startswith("slurmstepd")]
    assert said == ["first run", "told", "second run"]


def test_nothing_is_left_where_the_tests_are_killed(slurm: Slurm, tmp_path: Path):
    # A job that does what it can to stay: other sessions, other parents, no signal heard.
    stubborn = "#!/bin/sh\\ntrap '' TERM HUP\\nsetsid sleep 601 &\\n(setsid sleep 602 &)\\nwait\\n"
    program = f"""if True:
        import os, signal, sys
        from pathlib import Path
        from tests.servers.slurm import Slurm
        cluster = Slurm.start(Path(sys.argv[1]))
        job = cluster.submit("{stubborn}", options=["--nodes=1"])
        cluster.wait_until("it is there", lambda: len(cluster.processes_of(job)) >= 3, 60)
        print(cluster.env["SLURM_CONF"], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", program, tmp_path]
    env = {**os.environ, "TMPDIR": "/tmp"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=200, env=env)
    assert done.returncode == -signal.SIGKILL
    configuration = Path(done.stdout.strip())
    setting = f"SLURM_CONF={configuration}"
    end = time.monotonic() + GONE_TIMEOUT_S
    while still := left(setting):
        assert time.monotonic() < end, still
        time.sleep(0.05)
    shutil.rmtree(configuration.parent)


def test_a_node_that_is_lost_takes_its_processes_and_stop_the_rest(slurm: Slurm, tmp_path: Path):
    with Slurm.start(tmp_path) as cluster:
        job = cluster.submit(
            "#!/bin/sh\nsrun --wait=0 sh -c 'exec sleep 603'\n", options=[*TWO_NODES, "--no-kill"]
        )

        def sleeps() -> list[str]:
            return [each for each in cluster.processes_of(job) if each.startswith("sleep")]

        cluster.wait_until("both sleep", lambda: len(sleeps()) == 2, 60)
        cluster.lose("node2")
        cluster.wait_until("one sleeps", lambda: len(sleeps()) == 1, 60)
    assert left(f"SLURM_CONF={cluster.env['SLURM_CONF']}") == []
