"""Ending the jobs of a run for good. A job that was cancelled is not requeued: see launcher/job/requeue.py."""

import contextlib
import time
from pathlib import Path

from cluster.errors import TunesmithError
from launcher.slurm.client import Slurm
from launcher.slurm.submitted import read_jobs
from launcher.status import read_run

DEADLINE_SECONDS = 30.0
POLL_SECONDS = 0.5


def cancel_run(folder: Path, slurm: Slurm) -> list[str]:
    """Cancel every job of the run that waits or runs, and return their ids. A running job may take a while to save.

    Raises TunesmithError if waiting jobs are still there after the deadline.
    """
    _, run = read_run(folder)
    cancelled: list[str] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    job_ids = [job.job_id for job in read_jobs(run)]
    # Jobs that wait come before jobs that run, and within both the last one first.
    while live := sorted(reversed(slurm.live(job_ids)), key=lambda job: job.state != "PENDING"):
        new = [job.job_id for job in live if job.job_id not in cancelled]
        slurm.cancel(new)
        cancelled += new
        if not new and all(job.state != "PENDING" for job in live):
            break  # the jobs that still run were asked to end, and save
        if time.monotonic() > deadline:
            waiting = ", ".join(job.job_id for job in live)
            raise TunesmithError(f"{folder}: jobs {waiting} are still in the queue. Look with squeue, and try again.")
        time.sleep(POLL_SECONDS)
    if cancelled:
        with contextlib.suppress(TunesmithError, OSError):  # a full disk must not hide that the jobs are cancelled
            run.event("slurm", "cancelled", jobs=cancelled)
    return cancelled
