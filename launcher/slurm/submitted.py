"""The jobs of a run, as `<run>/jobs.jsonl` lists them: one line for each submitted job, appended and never changed.

A job that was cancelled is not requeued: see launcher/job/requeue.py.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError, TunesmithError
from cluster.files import read_jsonl
from cluster.run.rundir import RunDir
from launcher.slurm.client import Slurm

DEADLINE_SECONDS = 30.0
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class SubmittedJob:
    """One line of jobs.jsonl. Slurm runs the job again under the same id if an attempt does not finish its stage."""

    time: float
    stage: str
    job_id: str
    parent_job_ids: tuple[str, ...]
    argv: tuple[str, ...]  # the sbatch command

    def option(self, name: str) -> str | None:
        """The value of an option `--name=value` of the sbatch command, or None."""
        prefix = f"--{name}="
        return next((word.removeprefix(prefix) for word in self.argv if word.startswith(prefix)), None)

    @property
    def log(self) -> Path:
        """Where the job writes what it prints, in all its attempts."""
        return Path((self.option("output") or "").replace("%j", self.job_id))


def read_jobs(run: RunDir) -> list[SubmittedJob]:
    """Every job of the run in the order of submission. A run on one machine has none."""
    if not run.jobs.is_file():
        return []
    jobs = []
    for number, row in enumerate(read_jsonl(run.jobs), 1):
        try:
            parents, argv = tuple(map(str, row["parent_job_ids"])), tuple(row["argv"])
            jobs.append(SubmittedJob(row["time"], row["stage"], str(row["job_id"]), parents, argv))
        except (KeyError, TypeError) as error:
            raise InputError(f"{run.jobs}:{number}: not a submitted job ({error}). Fix or remove this line.") from error
    return jobs


def cancel_run(run: RunDir, slurm: Slurm) -> list[str]:
    """Cancel every job of the run that waits or runs, and return their ids. A running job may take a while to save.

    Raises TunesmithError if waiting jobs are still there after the deadline.
    """
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
            raise TunesmithError(f"{run.root}: jobs {waiting} are still in the queue. Look with squeue, and try again.")
        time.sleep(POLL_SECONDS)
    if cancelled:
        with contextlib.suppress(TunesmithError, OSError):  # a full disk must not hide that the jobs are cancelled
            run.event("slurm", "cancelled", jobs=cancelled)
    return cancelled
