"""The ports of one Ray on one node: a block of fixed ports that no other job on the node has.

    with claim_block(job_id) as block:
        argv = ["ray", "start", *block.options(is_head)]

A port that Ray chooses by itself may be one that another part of Ray, or the Ray of another job, is about to use. The
first port of a block is not for Ray: this process listens there as long as it holds the block. The kernel lets only one
process listen on a port, so two jobs that start at the same moment get different blocks.
"""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import TunesmithError
from cluster.nodes.rendezvous import is_free

FIRST_PORT, BLOCK_SIZE, NUM_BLOCKS = 10000, 250, 40  # up to 19999: below the ports of cluster/nodes/rendezvous.py
# The ports of a block in their order: the one that holds it, the head, the one without an option, and these.
HEAD_OFFSET, DASHBOARD_METRICS_OFFSET, FIRST_OFFSET = 1, 2, 3
NODE_PORTS = (
    "node-manager", "object-manager", "runtime-env-agent", "dashboard-agent-listen", "dashboard-agent-grpc",
    "metrics-export",
)  # fmt: skip
HEAD_PORTS = ("dashboard", "ray-client-server")  # Ray always starts the client server
WORKER_OFFSET = 11  # the rest of a block is for Ray's worker processes: one port per engine and driver


@dataclass(frozen=True)
class PortBlock:
    """`BLOCK_SIZE` ports, beginning with `first`."""

    first: int

    @property
    def head(self) -> int:
        """The port of the cluster's head."""
        return self.first + HEAD_OFFSET

    def environment(self) -> dict[str, str]:
        """The one port for which `ray start` has no option."""
        return {"DASHBOARD_METRIC_PORT": str(self.first + DASHBOARD_METRICS_OFFSET)}

    def options(self, is_head: bool) -> list[str]:
        """The options of `ray start` for all other ports that it opens."""
        names = NODE_PORTS + HEAD_PORTS if is_head else NODE_PORTS
        options = [f"--{name}-port={port}" for port, name in enumerate(names, self.first + FIRST_OFFSET)]
        options += [f"--min-worker-port={self.first + WORKER_OFFSET}"]
        options += [f"--max-worker-port={self.first + BLOCK_SIZE - 1}"]
        return [*options, f"--port={self.head}"] if is_head else options


@contextlib.contextmanager
def claim_block(job_id: int) -> Iterator[PortBlock]:
    """Hold the first block whose ports are all free. The job id decides where the search begins.

    Raises TunesmithError if there is no such block.
    """
    for number in range(NUM_BLOCKS):
        first = FIRST_PORT + (job_id + number) % NUM_BLOCKS * BLOCK_SIZE
        if claim := _claim(first):
            with claim:
                yield PortBlock(first)
            return
    raise TunesmithError(
        f"Ray cannot start on {socket.gethostname()}: it needs {BLOCK_SIZE} free ports in a row between {FIRST_PORT} "
        f"and {FIRST_PORT + NUM_BLOCKS * BLOCK_SIZE - 1}, and there are none. `ss -tln` lists the ports in use."
    )


def _claim(first: int) -> socket.socket | None:
    """Listen on the first port of a block if all its ports are free."""
    claim = socket.socket()
    try:
        claim.bind(("", first))
        claim.listen(1)
        if all(is_free(port) for port in range(first + 1, first + BLOCK_SIZE)):
            return claim
    except OSError:  # another job has this block
        pass
    claim.close()
    return None
