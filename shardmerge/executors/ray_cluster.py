"""A Ray cluster: how it is reached, and which of its nodes can and may work for a merge."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

# Read when Ray is imported or started. Values that a user has set stay.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_task_oom_retries": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray.exceptions import (  # noqa: E402
    NodeDiedError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from shardmerge.errors import ClusterError, UsageError  # noqa: E402
from shardmerge.executors.node import examine, mark_of, versions  # noqa: E402
from shardmerge.executors.placement import (  # noqa: E402
    Need,
    Node,
    different_versions,
    refuse_impossible,
)
from shardmerge.outputs.api import Output  # noqa: E402

log = logging.getLogger(__name__)

EXAMINE_S = 300.0
"""Seconds for all nodes to show that they can work."""
LOOK_S = 3.0
"""Seconds between two looks at which nodes there are."""
_REACH_S = 10.0
_HEALTH_S = 30.0
_QUIET_S = 10.0


def connect(address: str | None) -> bool:
    """Join a cluster, or start one on this machine; gives whether it is to be left at the end.

    Args:
        address: ``auto``, ``host:port`` or ``ray://host:port``; None for the one that
            ``RAY_ADDRESS`` names, else for one that ends with the run.
    Raises:
        UsageError: no cluster answers there.
    """
    if ray.is_initialized():
        return False
    if address == "":
        raise UsageError("--address is empty; give auto, HOST:PORT or ray://HOST:PORT.")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        quiet |= {"include_dashboard": False, "object_store_memory": 256 * 2**20}
    # Ray takes SIGTERM for itself; here it stops the run in order.
    handler = signal.getsignal(signal.SIGTERM)
    patience = threading.Timer(_QUIET_S, log.warning, ("still waiting for Ray at %s", address))
    patience.start()
    try:
        _reach(address)
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError, RayError) as problem:
        reason = str(problem).strip().splitlines()
        raise UsageError(
            f"no Ray cluster answers at {address}: {reason[0] if reason else 'no reason given'}\n"
            "  Start one with 'ray start --head', and give its address, or 'auto' on one of its "
            "nodes."
        ) from problem
    finally:
        patience.cancel()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    return True


def _reach(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would end this process after a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), _REACH_S).close()
        if not address.startswith("ray://"):
            _check_health(address)


def _check_health(address: str) -> None:
    """Raise ConnectionError where something else than Ray's head listens."""
    code = "from ray.scripts.scripts import main; main()"
    command = [sys.executable, "-c", code, "health-check", "--address", address]
    try:
        subprocess.run(command, capture_output=True, check=True, timeout=_HEALTH_S)
    except (subprocess.SubprocessError, OSError) as problem:
        raise ConnectionError("what listens there is no Ray head") from problem


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _examine(job: Sequence[Any], node: str) -> tuple[Mapping[str, str], Sequence[str]]:
    return examine(ray.get(job[0]), node)


def pinned(node: str) -> NodeAffinitySchedulingStrategy:
    """On this node or not at all."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


class Nodes:
    """The nodes that work for a run.

    Args:
        need: of one worker.
        job: a reference to the ``Job``, in a list so that Ray does not fetch it for each call.
    """

    def __init__(self, need: Need, job: Sequence[Any], output: Output) -> None:
        self._need = need
        self._job = job
        self._output = output
        self._working: dict[str, Node] = {}
        self._asked: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._gone: set[str] = set()
        self._looked = time.monotonic()

    @property
    def working(self) -> Sequence[Node]:
        """Those that have shown that they can work, and live."""
        return tuple(self._working.values())

    def name(self, key: str) -> str:
        """Of a node, for messages."""
        return self._names[key]

    def lost(self, key: str) -> None:
        """A node is known to be dead before the list of nodes tells it."""
        self._gone.add(key)
        self._working.pop(key, None)

    def examine_all(self) -> None:
        """Let every node show that it can work, before any task.

        Raises:
            ClusterError: one cannot, or none ever could.
        """
        refuse_impossible(self._alive().values(), self._need)
        found = self._able()
        self._asked = {key: self._ask(node) for key, node in found.items()}
        refs = list(self._asked.values())
        _, late = ray.wait(refs, num_returns=len(refs), timeout=EXAMINE_S)
        problems = []
        for key, ref in self._asked.items():
            told = [f"did not answer in {EXAMINE_S:.0f} s"] if ref in late else self._answer(key)
            problems += [f"  {found[key].name}: {problem}" for problem in told]
        self._asked = {}
        if problems:
            raise ClusterError(
                "these nodes of the cluster cannot work for this merge; nothing was begun:\n"
                + "\n".join(dict.fromkeys(problems))
                + "\n  Mend that, or take them out of the cluster. Sources and OUT must be "
                "reached by the same name from every node."
            )
        self._working = {key: node for key, node in found.items() if key not in self._gone}
        refuse_impossible(self.working, self._need)

    def forget(self) -> None:
        """Nobody waits any more for nodes that have not answered yet."""
        for ref in self._asked.values():
            ray.cancel(ref, force=True)
        self._asked = {}

    def look(self) -> bool:
        """See who is there; gives whether that has changed. Nodes that came later are examined."""
        if time.monotonic() - self._looked < LOOK_S:
            return False
        self._looked = time.monotonic()
        before = set(self._working)
        able = self._able()
        self._working = {key: node for key, node in self._working.items() if key in able}
        for key in able.keys() - self._working.keys() - self._asked.keys():
            self._asked[key] = self._ask(able[key])
        for key, ref in list(self._asked.items()):
            if ray.wait([ref], timeout=0)[0]:
                self._join(key, able.get(key))
        return set(self._working) != before

    def _join(self, key: str, node: Node | None) -> None:
        problems = self._answer(key)
        del self._asked[key]
        if problems and node is not None:
            self._gone.add(key)
            log.warning("%s joined but gets no work: %s", node.name, "; ".join(problems))
        elif node is not None and key not in self._gone:
            self._working[key] = node

    def _ask(self, node: Node) -> Any:
        options = {"scheduling_strategy": pinned(node.key), "num_gpus": self._need.gpus}
        return _examine.options(**options).remote(self._job, node.key)

    def _answer(self, key: str) -> list[str]:
        """What an examined node reports, and what is not the same there as here."""
        mark = mark_of(key)
        try:
            there, problems = ray.get(self._asked[key])
        except (NodeDiedError, TaskUnschedulableError):
            self._gone.add(key)
            return []
        except RayError as problem:
            lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [""]
            told = lines[-1] if isinstance(problem, RayTaskError) else lines[0]
            return [f"cannot run shardmerge: {type(problem).__name__}: {told}"]
        if not problems and self._output.size(mark) is None:
            problems = [f"writes to another place under the name of OUT, {self._output.url}"]
        self._output.remove([mark])
        return [*different_versions(versions(), there), *problems]

    def _able(self) -> dict[str, Node]:
        """Nodes that live and have room for a worker."""
        return {
            key: node
            for key, node in self._alive().items()
            if key not in self._gone and self._need.slots(node)
        }

    def _alive(self) -> dict[str, Node]:
        """The nodes that live, with all their resources."""
        found = {
            node["NodeID"]: Node(
                key=node["NodeID"],
                name=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
                cpus=node["Resources"].get("CPU", 0.0),
                memory_bytes=node["Resources"].get("memory", 0.0),
                gpus=node["Resources"].get("GPU", 0.0),
            )
            for node in ray.nodes()
            if node["Alive"]
        }
        self._names.update({key: node.name for key, node in found.items()})
        return found
