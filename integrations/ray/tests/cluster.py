"""A Ray cluster of processes on this machine, each of which counts as a machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# `.ci/ray` says where these are.
PROGRAM = os.environ["SLUICE"]
MODEL = os.environ["SLUICE_MODEL"]
# What each machine has for objects; here they are small.
OBJECT_BYTES = 100 << 20
# Not 127.0.0.1, which Ray replaces by an address that other machines reach.
LOOPBACK = "127.0.0.2"

# Ray reads these when it is imported, and what it starts inherits them.
os.environ.update(
    {
        # Nobody but this machine reaches the cluster, and a token would be written to the user's home.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        # Memory that other programs use is not this one's business.
        "RAY_memory_monitor_refresh_ms": "0",
        # Machines that are busy with other things answer late.
        "RAY_agent_register_timeout_ms": "300000",
        "PYTHONPATH": os.pathsep.join(str(HERE.parent / name) for name in ("src", "examples")),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
)

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in sockets]


def machine(**options: Any) -> dict[str, Any]:
    """How a machine is started. Its agents get ports: a machine whose agents choose waits for that, and not long."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    return {"object_store_memory": OBJECT_BYTES, "node_ip_address": LOOPBACK, "num_cpus": 1, **ports, **options}


@contextmanager
def cluster(machines: int) -> Iterator[tuple[Cluster, list[Any]]]:
    """A cluster whose first machine has the driver, and serves nothing; the others have a copy of the model each."""
    made = Cluster()
    try:
        made.add_node(**machine(num_cpus=1, include_dashboard=False))
        nodes = [made.add_node(**machine(resources={"sluice": 1})) for _ in range(machines)]
        ray.init(address=made.address, _node_ip_address=LOOPBACK, log_to_driver=True)
        yield made, nodes
    finally:
        ray.shutdown()
        made.shutdown()
