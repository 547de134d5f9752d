"""Ceph's RADOS gateway with its objects in memory: a monitor, an OSD and the gateway; no root.

    python -m tests.servers.rgw --install

unpacks Debian's packages into a folder, which needs apt, and starts nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from tests.servers import install as installs
from tests.servers.api import S3Server
from tests.servers.processes import (
    Processes,
    Running,
    ServerError,
    free_ports,
    listens,
    run,
    wait_for_s3,
    write_ini,
)

NAME = "Ceph RGW"
FOLDER = installs.VENVS / "rgw"
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common", "ceph-base")
STORE_BYTES = 8 * 2**30
"""What the OSD takes before it is full; all of it is memory."""
START_TIMEOUT_S = 90.0
COMMAND_TIMEOUT_S = 60.0
INSTALL_TIMEOUT_S = 900.0

PREPARE = """
import json, sys, time, rados
cluster = rados.Rados(conffile=sys.argv[1])
cluster.connect(timeout=30)
end = time.monotonic() + 30
# A new connection may not know the cluster's id yet; what it sends until then is refused.
while cluster.get_fsid() != sys.argv[3] and time.monotonic() < end:
    time.sleep(0.01)
for command in json.loads(sys.argv[2]):
    status, _, reason = cluster.mon_command(json.dumps(command), b"")
    if status:
        sys.exit(f"{command['prefix']}: {status} {reason}")
"""
"""Run by Debian's Python: one connection in place of one run of ``ceph`` for each command."""

POOLS = (
    ".rgw.root",
    "default.rgw.log",
    "default.rgw.control",
    "default.rgw.meta",
    "default.rgw.buckets.index",
    "default.rgw.buckets.data",
    "default.rgw.buckets.non-ec",
)
"""Made before the gateway makes them, with few placement groups: this is one OSD."""


class Rgw(Running):
    """A gateway that runs."""

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be started; empty if it can."""
        if installs.is_installed(FOLDER, "\n".join(PACKAGES)):
            return ""
        return f"{NAME} is not installed: make servers"

    @classmethod
    def start(cls, folder: Path) -> Rgw:
        """Start a new, empty server and wait until it answers.

        Args:
            folder: for its configuration and logs.

        Raises:
            ServerError: it is not installed, or does not answer.
        """
        if reason := cls.missing():
            raise ServerError(reason)
        folder = folder.resolve()
        mon_port, port = free_ports(2)
        server = S3Server(f"http://127.0.0.1:{port}", "testkey", "testsecret")
        processes = Processes(folder / "log")
        try:
            cluster = _Cluster(folder, mon_port, port)
            cluster.start_monitor(processes)
            cluster.start_osd(processes)
            cluster.start_gateway(processes, server)
            wait_for_s3(processes, server, START_TIMEOUT_S)
        except BaseException:
            processes.stop()
            raise
        return cls(server, processes)


class _Cluster:
    """The steps of a start; each needs the one before."""

    def __init__(self, folder: Path, mon_port: int, port: int) -> None:
        self._folder = folder
        self._mon_port = mon_port
        self._env = _env()
        self._fsid = str(uuid.uuid4())
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir(parents=True)
        self._config = write_ini(folder / "ceph.conf", self._sections(port))

    def start_monitor(self, processes: Processes) -> None:
        keyring = self._folder / "keyring"
        monmap = self._folder / "monmap"
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.")
        # Clients hang if the map also offers version 2 of the protocol, which is switched off.
        address = f"[v1:127.0.0.1:{self._mon_port}]"
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", address, monmap)
        make: list[str | Path] = ["--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring]
        self._run("ceph-mon", "-c", self._config, *make)
        self._start(processes, "ceph-mon", "-i", "a")
        processes.wait_until("the monitor", lambda: listens(self._mon_port), START_TIMEOUT_S)

    def start_osd(self, processes: Processes) -> None:
        osd = str(uuid.uuid4())
        self._run("ceph-osd", "-c", self._config, "--mkfs", "-i", "0", "--osd-uuid", osd)
        place = {"id": 0, "weight": 1.0, "args": ["root=default", "host=localhost"]}
        commands = [
            {"prefix": "osd new", "uuid": osd, "id": 0},
            {"prefix": "osd crush add", **place},
            *({"prefix": "osd pool create", "pool": pool, "pg_num": 4} for pool in POOLS),
        ]
        python = shutil.which("python3", path=f"{FOLDER}/usr/bin:/usr/bin")
        if python is None:
            raise ServerError("Ceph's Python module needs Debian's python3")
        script: list[str | Path] = [python, "-c", PREPARE, self._config]
        script += [json.dumps(commands), self._fsid]
        run(script, timeout_s=COMMAND_TIMEOUT_S, env=self._env)
        self._start(processes, "ceph-osd", "-i", "0")

    def start_gateway(self, processes: Processes, server: S3Server) -> None:
        keys = ["--access-key", server.access_key, "--secret-key", server.secret_key]
        user = ["user", "create", "--uid", "test", "--display-name", "test", *keys]
        self._run("radosgw-admin", "-c", self._config, "-n", "client.rgw.a", *user)
        self._start(processes, "radosgw", "-n", "client.rgw.a")

    def _run(self, program: str, *arguments: str | Path) -> None:
        run([_program(program), *arguments], timeout_s=COMMAND_TIMEOUT_S, env=self._env)

    def _start(self, processes: Processes, program: str, *arguments: str) -> None:
        command: list[str | Path] = [_program(program), "-f", "-c", self._config, *arguments]
        processes.start(program, command, self._env)

    def _sections(self, port: int) -> dict[str, dict[str, object]]:
        libraries = _libraries()
        return {
            "global": {
                "fsid": self._fsid,
                "mon_host": f"v1:127.0.0.1:{self._mon_port}",
                "mon_initial_members": "a",
                "public_addr": "127.0.0.1",
                "ms_bind_msgr2": False,
                **{f"auth_{who}_required": "none" for who in ("cluster", "service", "client")},
                **{f"osd_pool_default_{which}": 1 for which in ("size", "min_size")},
                "osd_pool_default_pg_num": 4,
                "osd_pool_default_pg_autoscale_mode": "off",
                "osd_crush_chooseleaf_type": 0,
                "mon_allow_pool_size_one": True,
                "mon_max_pg_per_osd": 1000,
                # Every step of the start waits for the monitor to agree with itself.
                "paxos_propose_interval": 0.05,
                "run_dir": self._folder,
                "pid_file": "",
                "log_file": "",
                "log_to_stderr": True,
                # A socket in a test's folder may have a longer path than sockets can.
                "admin_socket": "",
                "keyring": self._folder / "keyring",
                "plugin_dir": libraries / "ceph",
                "erasure_code_dir": libraries / "ceph" / "erasure-code",
                "osd_class_dir": libraries / "rados-classes",
            },
            "mon.a": {
                "mon_data": self._folder / "mon",
                # By default a monitor ends where less than 5 % of the disk is free.
                "mon_data_avail_crit": 0,
                "mon_data_avail_warn": 0,
                "mon_addr": f"127.0.0.1:{self._mon_port}",
                "mon_cluster_log_file": self._folder / "log" / "cluster.log",
            },
            "osd": {
                "osd_data": self._folder / "osd",
                "osd_objectstore": "memstore",
                "memstore_device_bytes": STORE_BYTES,
                # It has its place already; to ask for one it may send the monitor a wrong fsid.
                "osd_class_update_on_start": False,
                "osd_crush_update_on_start": False,
            },
            "client.rgw.a": {
                "rgw_data": self._folder / "rgw",
                "rgw_frontends": f"beast endpoint=127.0.0.1:{port}",
                "debug_rgw": 0,
                # Memory of deleted objects comes back in seconds, not in two hours.
                "rgw_gc_obj_min_wait": 10,
                "rgw_gc_processor_max_time": 10,
                "rgw_gc_processor_period": 10,
            },
        }


def install() -> None:
    """Unpack Ceph, and what it needs that this machine lacks, unless that was done."""
    installs.install(FOLDER, "\n".join(PACKAGES), _unpack)


def _unpack(folder: Path) -> None:
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise ServerError(f"it comes as Debian packages, and there is no {program} here")
    downloads = folder / "downloads"
    downloads.mkdir()
    try:
        names = _needed()
    except ServerError:
        run(["apt-get", "-q", "update"], timeout_s=INSTALL_TIMEOUT_S)
        names = _needed()
    if names:
        run(["apt-get", "-q", "download", *names], timeout_s=INSTALL_TIMEOUT_S, cwd=downloads)
    for package in sorted(downloads.glob("*.deb")):
        run(["dpkg", "-x", package, folder], timeout_s=INSTALL_TIMEOUT_S)
    shutil.rmtree(downloads)


def _needed() -> list[str]:
    simulate = ["apt-get", "install", "--simulate", "--no-install-recommends"]
    plan = run([*simulate, *PACKAGES], timeout_s=INSTALL_TIMEOUT_S)
    return [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]


def _libraries() -> Path:
    """The folder that has Ceph's plugins: unpacked, or the machine's own."""
    for root in (FOLDER, Path("/")):
        if found := sorted(root.glob("usr/lib/*-linux-gnu/rados-classes")):
            return found[0].parent
    raise ServerError(f"no Ceph libraries in {FOLDER}; remove it, then make servers")


def _program(name: str) -> str:
    found = shutil.which(name, path=_env()["PATH"])
    if found is None:
        raise ServerError(f"no {name} in {FOLDER}; remove it, then make servers")
    return found


def _env() -> dict[str, str]:
    libraries = _libraries()
    folders = [FOLDER / "lib" / libraries.name, libraries, libraries / "ceph"]
    programs = [FOLDER / "usr" / "bin", FOLDER / "usr" / "sbin"]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, folders)),
        "PATH": os.pathsep.join([*map(str, programs), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": str(FOLDER / "usr" / "lib" / "python3" / "dist-packages"),
    }


if __name__ == "__main__":
    installs.main(NAME, install)
