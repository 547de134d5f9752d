"""OpenStack Swift with its S3 interface: one machine, one copy, no root.

python -m tests.servers.swift --install
"""

from __future__ import annotations

import os
import pwd
import sys
from functools import partial
from pathlib import Path

from tests.servers import install as installs
from tests.servers.api import S3Server
from tests.servers.processes import (
    Processes,
    Running,
    Sections,
    ServerError,
    free_ports,
    listens,
    run,
    wait_for_s3,
    write_ini,
)

NAME = "OpenStack Swift"
FOLDER = installs.VENVS / "swift"
REQUIREMENTS = ("swift==2.38.3", "setuptools<81")
"""Swift imports pkg_resources, which later setuptools do not have."""
START_TIMEOUT_S = 60.0
INSTALL_TIMEOUT_S = 900.0

MIDDLEWARE = (
    "catch_errors",
    "gatekeeper",
    "healthcheck",
    "listing_formats",
    "bulk",
    "s3api",
    "tempauth",
    "slo",
    "dlo",
)
"""In the order in which a request passes them; without versioned_writes, which s3api can miss."""

RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *ports = sys.argv[1:]
for kind, port in zip(("account", "container", "object"), ports):
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port),
                     "device": "disk", "weight": 1, "meta": ""})
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""
"""Run by Swift's Python: one process in place of nine of the ring builder's command."""


class Swift(Running):
    """Swift that runs."""

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be started; empty if it can."""
        if installs.is_installed(FOLDER, "\n".join(REQUIREMENTS)):
            return ""
        return f"{NAME} is not installed: make servers"

    @classmethod
    def start(cls, folder: Path) -> Swift:
        """Start a new, empty server and wait until it answers.

        Args:
            folder: for its objects, configuration and logs; the file system must have extended
                attributes.

        Raises:
            ServerError: it is not installed, or does not answer.
        """
        if reason := cls.missing():
            raise ServerError(reason)
        folder = folder.resolve()
        *ports, proxy_port = free_ports(4)
        _configure(folder, dict(zip(("account", "container", "object"), ports, strict=True)))
        write_ini(folder / "proxy-server.conf", _proxy(folder, proxy_port))
        server = S3Server(f"http://127.0.0.1:{proxy_port}", "test:tester", "testing")
        processes = Processes(folder / "log")
        try:
            for kind in ("account", "container", "object"):
                _start(processes, folder, kind)
            # A proxy that cannot reach a server behind it does not ask that one for a minute.
            for port in ports:
                processes.wait_until(f"port {port}", partial(listens, port), START_TIMEOUT_S)
            _start(processes, folder, "proxy")
            wait_for_s3(processes, server, START_TIMEOUT_S)
        except BaseException:
            processes.stop()
            raise
        return cls(server, processes)


def install() -> None:
    """Install Swift into a virtual environment of its own, unless it is there."""

    def fill(folder: Path) -> None:
        run([sys.executable, "-m", "venv", folder], timeout_s=INSTALL_TIMEOUT_S)
        pip = folder / "bin" / "pip"
        install = ["install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
        run([pip, *install], timeout_s=INSTALL_TIMEOUT_S)

    installs.install(FOLDER, "\n".join(REQUIREMENTS), fill)


def _configure(folder: Path, ports: dict[str, int]) -> None:
    (folder / "devices" / "disk").mkdir(parents=True)
    limits = {"max_file_size": 5 * 2**30 + 2, "max_header_size": 16384}
    write_ini(
        folder / "swift.conf",
        {
            "swift-hash": {"swift_hash_path_suffix": "tests", "swift_hash_path_prefix": "tests"},
            "swift-constraints": limits,
            "storage-policy:0": {"name": "one-copy", "default": True},
        },
    )
    python = FOLDER / "bin" / "python"
    env = _env()
    run([python, "-c", RINGS, folder, *map(str, ports.values())], timeout_s=60, env=env)
    for kind, port in ports.items():
        write_ini(folder / f"{kind}-server.conf", _storage(folder, kind, port))


def _storage(folder: Path, kind: str, port: int) -> Sections:
    return {
        "DEFAULT": {
            **_common(folder, port, workers=2 if kind == "object" else 1),
            "devices": folder / "devices",
            "mount_check": False,
            "disable_fallocate": True,
        },
        "pipeline:main": {"pipeline": f"{kind}-server"},
        f"app:{kind}-server": {
            "use": f"egg:swift#{kind}",
            "network_chunk_size": 2**20,
            "disk_chunk_size": 2**20,
        },
    }


def _proxy(folder: Path, port: int) -> Sections:
    settings: dict[str, dict[str, object]] = {
        "s3api": {
            "location": "us-east-1",
            "check_bucket_owner": False,
            "min_segment_size": 5 * 2**20,
            "max_upload_part_num": 10_000,
        },
        "tempauth": {"user_test_tester": "testing .admin"},
        # By default, small parts after the tenth are served at one part per second.
        "slo": {"max_manifest_segments": 10_000, "rate_limit_after_segment": 10_000},
    }
    return {
        "DEFAULT": _common(folder, port, workers=2),
        "pipeline:main": {"pipeline": " ".join([*MIDDLEWARE, "proxy-server"])},
        "app:proxy-server": {
            "use": "egg:swift#proxy",
            "account_autocreate": True,
            "object_chunk_size": 2**20,
            "client_chunk_size": 2**20,
        },
        **{
            f"filter:{name}": {"use": f"egg:swift#{name}", **settings.get(name, {})}
            for name in MIDDLEWARE
        },
    }


def _common(folder: Path, port: int, *, workers: int) -> dict[str, object]:
    return {
        "bind_ip": "127.0.0.1",
        "bind_port": port,
        "workers": workers,
        "user": pwd.getpwuid(os.geteuid()).pw_name,
        "swift_dir": folder,
        "log_level": "WARNING",
    }


def _start(processes: Processes, folder: Path, kind: str) -> None:
    program = FOLDER / "bin" / f"swift-{kind}-server"
    config = folder / f"{kind}-server.conf"
    processes.start(kind, [program, config, "--verbose"], _env())


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "ignore"}


if __name__ == "__main__":
    installs.main(NAME, install)
