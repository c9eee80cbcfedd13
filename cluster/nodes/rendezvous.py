"""How the nodes of a job find each other: each writes its address into the run folder, and all read the head's.

    own, head = meet(topology, run)  # node 0, the head, listens at head.address and head.port

No node resolves another's name. A `127.0.1.1` in a node's /etc/hosts would turn a job of N nodes into N jobs that wait
for each other.
"""

import contextlib
import ipaddress
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import InputError, TunesmithError
from cluster.files import write_json
from cluster.nodes.topology import Topology
from cluster.run.rundir import RunDir

MEET_SECONDS = 300  # nodes of a job start within seconds, but NFS may show a new file a minute later
POLL_SECONDS = 0.2
CONNECT_SECONDS = 5.0
FIRST_PORT, NUM_PORTS = 20000, 10000  # below 32768, the first port that Linux assigns by itself
NUM_PORT_TRIES = 16  # also the distance between jobs with adjacent ids, so two jobs on a node try different ports


@dataclass(frozen=True)
class NodeAddress:
    """What a node publishes. `port` is where the head (node 0) will listen. None means another node."""

    host: str
    address: str
    interface: str
    port: int | None
    step_id: int


def local_addresses() -> dict[str, str]:
    """IPv4 address -> interface, for the interfaces that are up, without loopback and link-local addresses."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if name in up and entry.family == socket.AF_INET:
                address = ipaddress.IPv4Address(entry.address)
                if not (address.is_loopback or address.is_link_local):
                    found[entry.address] = name
    return found


def choose_address(local: Mapping[str, str], own_name_resolves_to: Iterable[str], interface: str | None) -> str:
    """The address of this node, among `local` (address -> interface), at which the other nodes reach it.

    It is the address of `interface` if that is set, else the one that the node's name resolves to, else the only one.
    Otherwise raises InputError, because a wrong guess would hang the job.
    """
    listing = ", ".join(f"{name} {address}" for address, name in local.items()) or "none"
    if interface is not None:
        for address, name in local.items():
            if name == interface:
                return address
        raise InputError(f"GLOO_SOCKET_IFNAME={interface}: not an interface with an address. This node has: {listing}.")
    for address in own_name_resolves_to:
        if address in local:
            return address
    if len(local) == 1:
        return next(iter(local))
    raise InputError(
        f"it is not clear at which address the other nodes reach {socket.gethostname()} (it has: {listing}). "
        "Set GLOO_SOCKET_IFNAME to the name of the interface."
    )


def _resolve_own_name() -> list[str]:
    try:
        return socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:  # a node without an entry for itself is common
        return []


def own_address() -> tuple[str, str]:
    """This node's address and its interface. Honors GLOO_SOCKET_IFNAME."""
    local = local_addresses()
    address = choose_address(local, _resolve_own_name(), os.environ.get("GLOO_SOCKET_IFNAME"))
    return address, local[address]


def is_free(port: int) -> bool:
    """Whether this node can listen on a port now."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", port))
        return True
    return False


def free_port(job_id: str) -> int:
    """A port on which this node can listen now: the first free one from a start that depends on the job id."""
    start = int(job_id) * NUM_PORT_TRIES
    for offset in range(NUM_PORT_TRIES):
        port = FIRST_PORT + (start + offset) % NUM_PORTS
        if is_free(port):
            return port
    first = FIRST_PORT + start % NUM_PORTS
    raise TunesmithError(f"{socket.gethostname()}: port {first} and the {NUM_PORT_TRIES - 1} after it are all taken.")


def is_listening(address: str, port: int) -> bool:
    """Whether a process answers at this address now."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def read_json(path: Path, step_id: int | None = None) -> Any:
    """The content of a file that another process writes. None means that it is not there yet.

    With `step_id` a file of another step is ignored: it is of an earlier srun in the same allocation.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return content if step_id is None or content["step_id"] == step_id else None


def await_json(path: Path, deadline: float, step_id: int | None = None, writer: str = "another node") -> Any:
    """`read_json` as soon as the file is there. Raises TunesmithError naming `writer` at `deadline` (monotonic)."""
    while (content := read_json(path, step_id)) is None:
        if time.monotonic() > deadline:
            raise TunesmithError(
                f"{writer} did not write {path} in time. Its error is in the log above; otherwise the run folder is "
                "not on a file system that all nodes share."
            )
        time.sleep(POLL_SECONDS)
    return content


def meet(topology: Topology, run: RunDir, timeout_seconds: float = MEET_SECONDS) -> tuple[NodeAddress, NodeAddress]:
    """Publish this node's address, wait for that of the head, and return (own, head's).

    The head waits for all other nodes, and its error names the missing one. If every node waited for every other, a
    thousand nodes would open a million files. Honors GLOO_SOCKET_IFNAME. Raises TunesmithError after the timeout.
    """
    folder = topology.attempt_dir(run)
    folder.mkdir(parents=True, exist_ok=True)
    address, interface = own_address()
    port = free_port(topology.job_id) if topology.node_rank == 0 else None
    own = NodeAddress(topology.hosts[topology.node_rank], address, interface, port, topology.step_id)
    write_json(folder / f"node-{topology.node_rank}.json", asdict(own))
    deadline = time.monotonic() + timeout_seconds
    hosts = list(enumerate(topology.hosts))
    nodes = [
        await_json(folder / f"node-{rank}.json", deadline, topology.step_id, f"node {rank} ({host})")
        for rank, host in (hosts if topology.node_rank == 0 else hosts[:1])
    ]
    return own, NodeAddress(**nodes[0])
