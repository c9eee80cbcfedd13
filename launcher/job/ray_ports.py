"""The ports of one Ray on one node: a block of them, all pinned, that no other job on the node can have too.

    with claim_block(job_id) as block:
        argv = ["ray", "start", *block.options(is_head)]

A port that Ray chooses by itself falls sooner or later into what another part of Ray, or another job's Ray, was
promised. The first port of a block is Ray's in name only: this process listens there for as long as it holds the block,
and as the kernel lets one process do so, two jobs that start at the same moment get different blocks.
"""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import TunesmithError

FIRST_PORT, BLOCK_SIZE, NUM_BLOCKS = 10000, 250, 40  # up to 19999: below where nodes of a training meet
WORKER_OFFSET = 11  # the rest of a block is for Ray's worker processes: one port for each engine and driver
OFFSETS = {
    "node-manager": 2,
    "object-manager": 3,
    "runtime-env-agent": 4,
    "dashboard-agent-listen": 5,
    "dashboard-agent-grpc": 6,
    "metrics-export": 7,
}
HEAD_OFFSET = 1
HEAD_OFFSETS = {"dashboard": 8, "ray-client-server": 9}  # Ray starts the second whether anybody needs it or not
DASHBOARD_METRICS_OFFSET = 10


@dataclass(frozen=True)
class PortBlock:
    """`BLOCK_SIZE` ports from `first` on."""

    first: int

    @property
    def head(self) -> int:
        """Where the head of a cluster listens."""
        return self.first + HEAD_OFFSET

    def environment(self) -> dict[str, str]:
        """The one port for which `ray start` has no option."""
        return {"DASHBOARD_METRIC_PORT": str(self.first + DASHBOARD_METRICS_OFFSET)}

    def options(self, is_head: bool) -> list[str]:
        """The options of `ray start` for all other ports that it opens."""
        offsets = OFFSETS | (HEAD_OFFSETS if is_head else {})
        options = [f"--{name}-port={self.first + offset}" for name, offset in offsets.items()]
        options += [f"--min-worker-port={self.first + WORKER_OFFSET}"]
        options += [f"--max-worker-port={self.first + BLOCK_SIZE - 1}"]
        return [*options, f"--port={self.head}"] if is_head else options


@contextlib.contextmanager
def claim_block(job_id: int) -> Iterator[PortBlock]:
    """Hold a block whose ports are all free, the first from a place that the job id decides.

    Raises TunesmithError where there is none.
    """
    firsts = (FIRST_PORT + (job_id + number) % NUM_BLOCKS * BLOCK_SIZE for number in range(NUM_BLOCKS))
    claims = ((first, _claim(first)) for first in firsts)
    first, claim = next(((first, claim) for first, claim in claims if claim), (0, None))
    if claim is None:
        last = FIRST_PORT + NUM_BLOCKS * BLOCK_SIZE - 1
        raise TunesmithError(
            f"no {BLOCK_SIZE} ports in a row are free between {FIRST_PORT} and {last} on {socket.gethostname()}, so "
            "Ray cannot start there. `ss -tln` shows who listens."
        )
    with claim:
        yield PortBlock(first)


def _claim(first: int) -> socket.socket | None:
    """Listen on the first port of a block, if that and all others are free."""
    claim = socket.socket()
    try:
        claim.bind(("", first))
        claim.listen(1)
        if all(_is_free(port) for port in range(first + 1, first + BLOCK_SIZE)):
            return claim
    except OSError:  # another job has this block
        pass
    claim.close()
    return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", port))
        return True
    return False
