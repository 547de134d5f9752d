"""DeepSpeed in a virtual environment of its own: real ZeRO checkpoints, trained on CPUs.

python -m tests.servers.deepspeed --install
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.servers import install as installs
from tests.servers.processes import free_ports, run

NAME = "DeepSpeed"
FOLDER = installs.VENVS / "deepspeed"
DEEPSPEED = "deepspeed==0.19.8"
REQUIREMENTS = (
    "torch==2.13.0",
    "numpy==2.4.6",
    "psutil==7.2.2",
    "py-cpuinfo==9.0.0",
    "tqdm==4.70.1",
    "packaging==26.3",
    "ninja==1.13.2",
    "msgpack==1.2.4",
    "einops==0.8.2",
    "hjson==3.1.0",
    "pydantic==2.14.3",
    "setuptools==84.2.1",
    "wheel==0.48.0",
    "accelerate==1.15.0",
    "transformers==5.23.0",
    "safetensors==0.8.0",
    "llvmlite==0.50.0",
    "pyyaml==6.0.3",
    "botocore==1.44.5",
    "fsspec==2026.9.0",
    "huggingface_hub==2.4.0",
    "pyarrow==26.0.1",
    "threadpoolctl==3.8.0",
)
"""What it imports, and shardmerge; its own list has more, for devices that tests do not use."""
CONTENT = "\n".join((*REQUIREMENTS, DEEPSPEED))
INSTALL_TIMEOUT_S = 1800.0
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent.parent / "deepspeed_train.py"
RUN_TIMEOUT_S = 280.0
CASES = ("1-bf16", "2-bf16", "2-fp32", "3-bf16", "3-fp16", "3-fp32")
"""Stages and dtypes that tests compare."""


def train(out: Path, cases: Sequence[str], folder: Path = FOLDER) -> None:
    """Train on two processes and write checkpoints, as ``deepspeed_train.py`` says.

    Raises:
        ServerError: it failed, with what it wrote.
    """
    launch(str(SCRIPT), str(out), *cases, folder=folder)


def launch(*program: str, folder: Path = FOLDER) -> str:
    """Run a script, or ``-m`` and a module, on two processes; gives what it writes to stdout.

    Raises:
        ServerError: it failed, with what it wrote.
    """
    command, env = launching(*program, folder=folder)
    return run(command, timeout_s=RUN_TIMEOUT_S, env=env)


def launching(*program: str, folder: Path = FOLDER) -> tuple[list[str], dict[str, str]]:
    """The command that runs it on two processes, and its environment."""
    env = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",  # ninja
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }
    (port,) = free_ports(1)
    count = ["--nproc-per-node", "2", "--master-port", str(port)]
    python = str(folder / "bin" / "python")
    return [python, "-m", "torch.distributed.run", *count, *program], env


def missing() -> str:
    """Why it cannot be run; empty if it can."""
    if installs.is_installed(FOLDER, CONTENT):
        return ""
    return f"{NAME} is not installed: make servers"


def install() -> None:
    """Install it, unless it is there, and use it once: it then compiles what tests need."""

    def fill(folder: Path) -> None:
        run([sys.executable, "-m", "venv", folder], timeout_s=INSTALL_TIMEOUT_S)
        pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, *REQUIREMENTS], timeout_s=INSTALL_TIMEOUT_S)
        build = [*pip, "--no-deps", "--no-build-isolation", DEEPSPEED]
        run(build, timeout_s=INSTALL_TIMEOUT_S, env={**os.environ, "DS_BUILD_OPS": "0"})
        with tempfile.TemporaryDirectory() as out:
            train(Path(out), ["2-bf16"], folder)

    installs.install(FOLDER, CONTENT, fill)


if __name__ == "__main__":
    installs.main(NAME, install)
