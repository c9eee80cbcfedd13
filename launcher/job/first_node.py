"""The end of a job whose first node is lost.

A job that may lose nodes (sbatch --no-kill) outlives its first node, with the supervisor that would have ended the job:
Slurm takes the node out of the job, which keeps its other nodes until its time limit. So each of them checks.
"""

import contextlib
import os
import time
from collections.abc import Callable

from cluster.errors import TunesmithError
from cluster.nodes.rendezvous import is_listening
from cluster.nodes.topology import restart_count
from launcher.slurm.client import Slurm, SlurmError

CHECK_SECONDS = 10.0
LINGER_SECONDS = 900.0  # Slurm takes a silent node for dead after 300 s, unless SlurmdTimeout says otherwise


class FirstNodeLost(TunesmithError):
    """Slurm has taken the first node out of this job, which was requeued or cancelled."""


class FirstNode:
    """The job's first node, as the other nodes see it."""

    def __init__(self, host: str, address: str) -> None:
        """`host` is its name in Slurm. `address` is the HOST:PORT where the head of Ray listens on it."""
        self._slurm = Slurm()
        self._job_id = os.environ["SLURM_JOB_ID"]
        self._host = host
        name, _, port = address.rpartition(":")
        self._address = (name, int(port))
        self._next_check = time.monotonic() + CHECK_SECONDS

    def check(self) -> None:
        """End the job and raise FirstNodeLost if the node is lost. Checks every CHECK_SECONDS.

        A node that does not answer from here may be up: Slurm alone decides.
        """
        if time.monotonic() < self._next_check:
            return
        if not is_listening(*self._address) and self._end_job_if_lost():
            raise FirstNodeLost(f"the job's first node {self._host} is lost, so the job was ended.")
        self._next_check = time.monotonic() + CHECK_SECONDS

    def await_result(self, is_over: Callable[[], bool]) -> None:
        """As `check`, until the node answers or `is_over`: Ray ends here before Slurm knows that a node is dead.

        `is_over` may wait a moment.
        """
        deadline = time.monotonic() + LINGER_SECONDS
        while not is_over() and not is_listening(*self._address) and time.monotonic() < deadline:
            self.check()

    def _end_job_if_lost(self) -> bool:
        """Requeue the job, or cancel it if it may not be requeued. False if the node is not lost, or if Slurm gives no
        answer."""
        with contextlib.suppress(SlurmError):
            fields = self._slurm.job_fields(self._job_id)
            is_ours = fields["JobState"] == "RUNNING" and int(fields["Restarts"]) == restart_count()
            if not is_ours or self._host in self._slurm.host_names(fields["NodeList"]):
                return False
            if fields["Requeue"] == "1":
                self._slurm.requeue(self._job_id)
            else:
                self._slurm.cancel([self._job_id])
            return True
        return False
