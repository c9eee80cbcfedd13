"""Wait until exactly the expected nodes of a Ray are alive.

    python -P -m launcher.job.ray_ready HEAD:PORT SECONDS ADDRESS...

This is a process of its own, because a client whose connection is refused or lost may end its process. It exits with 0
as soon as the nodes that are alive have exactly these addresses, and with 1 and a message if they do not in time.
"""

import sys
import time

from ray._raylet import GcsClient  # takes a second, which passes while Ray starts
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from cluster.nodes.rendezvous import is_listening
from cluster.processes.awake import AwakeClock

POLL_SECONDS = 0.1
REPLY_SECONDS = 10.0


def alive_addresses(head: str) -> set[str]:
    """Addresses of the nodes that the Ray at `head` counts as alive."""
    nodes = GcsClient(address=head).get_all_node_info(timeout=REPLY_SECONDS).values()
    return {node.node_manager_address for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE}


def await_nodes(head: str, expected: set[str], timeout_seconds: float) -> str:
    """Return an empty string when the nodes are alive, or an error message at the deadline."""
    clock = AwakeClock()
    host, port = head.rsplit(":", 1)
    alive: set[str] = set()
    while clock() < timeout_seconds:
        if is_listening(host, int(port)):
            alive = alive_addresses(head)
        if alive == expected:
            return ""
        time.sleep(POLL_SECONDS)
    missing, foreign = sorted(expected - alive), sorted(alive - expected)
    return (
        f"the Ray at {head} is not complete after {timeout_seconds:g} s. Missing: {', '.join(missing) or 'none'}; "
        f"nodes of other jobs: {', '.join(foreign) or 'none'}."
    )


if __name__ == "__main__":
    message = await_nodes(sys.argv[1], set(sys.argv[3:]), float(sys.argv[2]))
    print(message)
    sys.exit(bool(message))
