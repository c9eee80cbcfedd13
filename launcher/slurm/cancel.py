"""Ending a run's jobs for good: none may be followed by another, and none may find its parent over and start."""

import time
from pathlib import Path

from cluster.errors import TunesmithError
from cluster.files import write_json
from launcher.slurm.client import Queued, Slurm
from launcher.slurm.submitted import read_jobs
from launcher.status import read_run

DEADLINE_SECONDS = 30.0
POLL_SECONDS = 0.5


def cancel_run(folder: Path, slurm: Slurm) -> list[str]:
    """Cancel every job of the run that waits or runs, and return their ids. Running ones may take a while to save.

    Raises TunesmithError if jobs that wait are still there after the deadline: someone keeps submitting.
    """
    _, run = read_run(folder)
    cancelled: list[str] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    while live := live_jobs(slurm, [job.job_id for job in read_jobs(run)]):
        if not cancelled:
            write_json(run.cancelled, {"time": round(time.time(), 3), "job_ids": [job.job_id for job in live]})
        fresh = [job.job_id for job in live if job.job_id not in cancelled]
        slurm.cancel(fresh)
        cancelled += fresh
        if not fresh and all(job.state != "PENDING" for job in live):
            break  # what still runs was asked to end, and saves
        if time.monotonic() > deadline:
            waiting = ", ".join(job.job_id for job in live)
            raise TunesmithError(f"{folder}: jobs {waiting} are still in the queue. Look with squeue, and try again.")
        time.sleep(POLL_SECONDS)
    if cancelled:
        run.event("slurm", "cancelled", jobs=cancelled)
    return cancelled


def live_jobs(slurm: Slurm, job_ids: list[str]) -> list[Queued]:
    """Jobs that are not over, those submitted last first; those that wait before those that run."""
    known = slurm.queue(job_ids)
    live = [known[job_id] for job_id in reversed(job_ids) if job_id in known and not known[job_id].is_over]
    return sorted(live, key=lambda job: job.state != "PENDING")
