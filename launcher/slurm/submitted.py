"""The jobs of a run, as `<run>/jobs.jsonl` lists them: one line for each submitted job, appended and never changed.

A Slurm that was installed anew gives the same ids again, and another cluster gives them to other jobs. A queued job is
the run's only if its name and its submit time agree with the line too.

A job that was cancelled is not requeued: see launcher/job/requeue.py.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import InputError, TunesmithError
from cluster.files import append_jsonl, read_records
from cluster.run.fence import Claim
from cluster.run.rundir import RunDir
from launcher.slurm.client import QueuedJob, Slurm

DEADLINE_SECONDS = 30.0
POLL_SECONDS = 0.5
# Clocks of machines differ, and an hour comes twice when summer time ends.
CLOCK_SECONDS = 3 * 3600.0
_SLURM_TIME = "%Y-%m-%dT%H:%M:%S"  # local time


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

    @property
    def code(self) -> Path | None:
        """The copy of the code that the job was submitted with. None means that it runs the project itself."""
        script = next((Path(word) for word in self.argv if word.endswith(".sbatch")), Path())
        return script.parents[1] if script.parts[-4:-3] == (RunDir(Path()).code.name,) else None

    @property
    def is_by_hand(self) -> bool:
        """Whether a user submitted it with sbatch. Then its attempts do not own the run, and nothing follows it."""
        return "--parsable" not in self.argv

    def is_named(self, name: str | None) -> bool:
        return self.option("job-name") in (None, name)

    def is_same(self, queued: QueuedJob) -> bool:
        """Whether a queued job with this id is this job. A job that is requeued gets a later submit time."""
        try:
            submitted = time.mktime(time.strptime(queued.submit_time, _SLURM_TIME))
        except ValueError:  # N/A
            submitted = self.time
        return self.is_named(queued.name) and submitted >= self.time - CLOCK_SECONDS

    def claims_of(self, claims: Iterable[Claim]) -> list[Claim]:
        """Those claims of a run that attempts of this job have made."""
        return [each for each in claims if each.job_id == self.job_id and each.time >= self.time - CLOCK_SECONDS]


def read_jobs(run: RunDir) -> list[SubmittedJob]:
    """Every job of the run in the order of submission. A run on one machine has none."""
    if not run.jobs.is_file():
        return []
    jobs = []
    for number, row in enumerate(read_records(run.jobs), 1):
        try:
            parents, argv = tuple(map(str, row["parent_job_ids"])), tuple(row["argv"])
            jobs.append(SubmittedJob(row["time"], row["stage"], str(row["job_id"]), parents, argv))
        except (KeyError, TypeError) as error:
            raise InputError(f"{run.jobs}:{number}: not a submitted job ({error}). Fix or remove this line.") from error
    return jobs


def own_job(run: RunDir) -> SubmittedJob | None:
    """The job that this process belongs to. None means that it was submitted by hand."""
    job_id, name = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_JOB_NAME")
    jobs = [job for job in reversed(read_jobs(run)) if not job.is_by_hand]
    return next((job for job in jobs if job.job_id == job_id and job.is_named(name)), None)


def note_job_by_hand(run: RunDir, stage: str, arguments: Sequence[str], slurm: Slurm) -> None:
    """Add this job, which a user submitted with sbatch, to the run's list, so that status, logs and cancel know it."""
    job_id = os.environ["SLURM_JOB_ID"]
    shown = dict(line.strip().split("=", 1) for line in slurm.show_job(job_id).splitlines() if "=" in line)
    times = re.search(r"\bSubmitTime=(\S+)", " ".join(f"{name}={value}" for name, value in shown.items()))
    submitted = time.mktime(time.strptime(times[1], _SLURM_TIME)) if times else time.time()
    options = {"job-name": os.environ.get("SLURM_JOB_NAME"), "chdir": shown["WorkDir"], "output": shown["StdOut"]}
    argv = ["sbatch", *(f"--{name}={value}" for name, value in options.items() if value is not None)]
    job = SubmittedJob(submitted, stage, job_id, (), (*argv, f"slurm/{stage}.sbatch", *arguments))
    if all((each.job_id, each.argv) != (job_id, job.argv) for each in read_jobs(run.create())):  # not started again
        append_jsonl(run.jobs, asdict(job))


def queue_of(jobs: Sequence[SubmittedJob], slurm: Slurm) -> dict[SubmittedJob, QueuedJob]:
    """What Slurm knows of these jobs. A job that it has forgotten is missing."""
    found = slurm.queue(job.job_id for job in jobs)
    return {job: found[job.job_id] for job in jobs if job.job_id in found and job.is_same(found[job.job_id])}


def live_jobs(jobs: Sequence[SubmittedJob], slurm: Slurm) -> list[QueuedJob]:
    """Those of these jobs that wait or run, in the same order."""
    return [queued for queued in queue_of(jobs, slurm).values() if not queued.is_over]


def cancel_run(run: RunDir, slurm: Slurm) -> list[str]:
    """Cancel every job of the run that waits or runs, and return their ids. A running job may take a while to save.

    Writes nothing that matters, so that a full disk keeps no job alive. Raises TunesmithError if waiting jobs are still
    there after the deadline.
    """
    cancelled: list[str] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    jobs = read_jobs(run)
    # Jobs that wait come before jobs that run, and within both the last one first.
    while live := sorted(reversed(live_jobs(jobs, slurm)), key=lambda job: job.state != "PENDING"):
        new = [job.job_id for job in live if job.job_id not in cancelled]
        slurm.cancel(new)
        cancelled += new
        if not new and all(job.state != "PENDING" for job in live):
            break  # the jobs that still run were asked to end, and save
        if time.monotonic() > deadline:
            waiting = ",".join(job.job_id for job in live)
            raise TunesmithError(
                f"{run.root}: jobs are still in the queue {DEADLINE_SECONDS:g} s after they were cancelled. "
                f"`squeue --jobs={waiting}` shows their state, and `tunesmith cancel {run.root}` cancels them again."
            )
        time.sleep(POLL_SECONDS)
    if cancelled:
        with contextlib.suppress(TunesmithError, OSError):  # a full disk must not hide that the jobs are cancelled
            run.event("slurm", "cancelled", jobs=cancelled)
    return cancelled
