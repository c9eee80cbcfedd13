"""Wait until a Ray has exactly the nodes that it should have.

    python -P -m launcher.job.ray_ready HEAD:PORT SECONDS ADDRESS...

A process of its own, as a client that is refused or cut off may take its process along. Exits with 0 once the nodes
that are alive are those of the given addresses, and with 1 and a message where they are not in time. A node that was
there and died does not count.
"""

import socket
import sys
import time

from ray._raylet import GcsClient  # takes a second, which passes while Ray starts
from ray.core.generated.gcs_pb2 import GcsNodeInfo

POLL_SECONDS = 0.1
REPLY_SECONDS = 10.0


def alive_addresses(head: str) -> set[str]:
    """Addresses of the nodes that the Ray at `head` counts as alive."""
    nodes = GcsClient(address=head).get_all_node_info(timeout=REPLY_SECONDS).values()
    return {node.node_manager_address for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE}


def await_nodes(head: str, expected: set[str], timeout_seconds: float) -> str:
    """Empty once the nodes are there, else what is wrong."""
    deadline = time.monotonic() + timeout_seconds
    host, port = head.rsplit(":", 1)
    alive: set[str] = set()
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=REPLY_SECONDS).close()
            alive = alive_addresses(head)
        except OSError:  # not listening yet
            pass
        if alive == expected:
            return ""
        time.sleep(POLL_SECONDS)
    missing, strange = sorted(expected - alive), sorted(alive - expected)
    return (
        f"the Ray at {head} has not become complete in {timeout_seconds:g} s: missing {', '.join(missing) or 'none'}, "
        f"not of this job {', '.join(strange) or 'none'}."
    )


if __name__ == "__main__":
    wrong = await_nodes(sys.argv[1], set(sys.argv[3:]), float(sys.argv[2]))
    print(wrong)
    sys.exit(bool(wrong))
