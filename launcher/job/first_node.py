"""The end of a job whose first node is lost.

A job that may lose nodes (sbatch --no-kill) outlives its first one too, with the supervisor that would have ended it:
Slurm takes the node out of the job, and the job holds the others until its time limit. So each of them looks.
"""

import os
import socket
import time
from collections.abc import Callable

from cluster.errors import TunesmithError
from cluster.nodes.topology import expand_host_list
from launcher.job.chain import SlurmSilent, ask

CHECK_SECONDS = 10.0
ANSWER_SECONDS = 3.0
LINGER_SECONDS = 900.0  # Slurm takes a silent node for dead after 300 s, unless SlurmdTimeout says otherwise


class FirstNodeLost(TunesmithError):
    """Slurm has taken the first node out of this job, which has been cancelled."""


class FirstNode:
    """The job's first node, as the others see it."""

    def __init__(self, host: str, address: str) -> None:
        """`host`: its name in Slurm. `address`: HOST:PORT where the head of Ray listens on it."""
        self._job_id = os.environ["SLURM_JOB_ID"]
        self._host = host
        name, _, port = address.rpartition(":")
        self._address = (name, int(port))
        self._next_check = time.monotonic() + CHECK_SECONDS

    def check(self) -> None:
        """Now and then look for it. Cancels the job and raises FirstNodeLost if it is lost.

        A node that does not answer from here may well be there: Slurm alone decides.
        """
        if time.monotonic() < self._next_check:
            return
        if not self._answers() and self._is_taken_out() and self._cancel():
            raise FirstNodeLost(f"the job's first node {self._host} is lost, so the job is cancelled.")
        self._next_check = time.monotonic() + CHECK_SECONDS

    def await_result(self, is_over: Callable[[], bool]) -> None:
        """As `check`, for as long as it does not answer: Ray ends here before Slurm has seen that a node is dead.

        Not longer than until `is_over`, which may wait a moment.
        """
        deadline = time.monotonic() + LINGER_SECONDS
        while not is_over() and not self._answers() and time.monotonic() < deadline:
            self.check()

    def _answers(self) -> bool:
        try:
            socket.create_connection(self._address, timeout=ANSWER_SECONDS).close()
        except OSError:
            return False
        return True

    def _is_taken_out(self) -> bool:
        try:
            hosts = ask(["squeue", "--noheader", f"--job={self._job_id}", "--states=RUNNING", "--format=%N"]).strip()
        except SlurmSilent:  # nothing is known
            return False
        return bool(hosts) and self._host not in expand_host_list(hosts)

    def _cancel(self) -> bool:
        """Whether Slurm has heard of it; if not, the next check tries again."""
        try:
            ask(["scancel", self._job_id])
        except SlurmSilent:
            return False
        return True
