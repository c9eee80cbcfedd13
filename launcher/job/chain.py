"""The jobs of a run that follow each other, as `<run>/jobs.jsonl` lists them, and what is asked of Slurm about them.

Each line is a job that was submitted: `{"time", "stage", "job_id", "attempt", "parent_job_ids", "argv", "reason"}`.
"""

import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import TunesmithError
from cluster.files import read_jsonl
from cluster.run.fence import TOKEN_VARIABLE
from cluster.run.rundir import RunDir, append_jsonl
from launcher.slurm.submitted import read_jobs

SUBMITTED, CONTINUED = "submitted", "continued"
STANDBY_OF = "TUNESMITH_STANDBY_OF"  # in the environment of a job: the attempt for which it stands by
COMMAND_SECONDS = 60
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "PMI_")  # what a job's environment says of that job


class SlurmSilent(TunesmithError):
    """Slurm refused a command or did not answer: what it would have said is unknown."""


@dataclass(frozen=True)
class Job:
    """A line of jobs.jsonl."""

    stage: str
    job_id: str
    attempt: int
    parent_job_ids: tuple[str, ...]
    argv: tuple[str, ...]
    reason: str


class Chain:
    """The submitted jobs of a run, the oldest first."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.path = run.jobs
        self.jobs: list[Job] = []
        self.read()

    def read(self) -> None:
        self.jobs = [
            Job(job.stage, job.job_id, job.attempt, job.parent_job_ids, job.argv, job.reason)
            for job in read_jobs(self.run)
        ]

    def find(self, job_id: str) -> Job | None:
        return next((job for job in self.jobs if job.job_id == job_id), None)

    def add(self, job: Job) -> None:
        """Write down a job that Slurm has taken."""
        # Numbers are written as the lines before have them, whoever wrote those.
        rows = read_jsonl(self.path)
        number = type(rows[-1]["job_id"]) if rows else str
        parents = [number(parent) for parent in job.parent_job_ids]
        row = {"time": round(time.time(), 3), "stage": job.stage, "job_id": number(job.job_id), "attempt": job.attempt}
        append_jsonl(self.path, {**row, "parent_job_ids": parents, "argv": list(job.argv), "reason": job.reason})
        self.jobs.append(job)

    def of_stage(self, stage: str) -> list[Job]:
        """The jobs of a stage since it was last submitted by hand: what came before was another try of the user's."""
        jobs = [job for job in self.jobs if job.stage == stage]
        starts = [place for place, job in enumerate(jobs) if job.reason == SUBMITTED]
        return jobs[starts[-1] :] if starts else jobs

    def parents_of(self, stage: str) -> list[str]:
        """The stages on which a stage waits."""
        parents = {}
        for job in self.of_stage(stage):
            for parent in filter(None, map(self.find, job.parent_job_ids)):
                parents[parent.stage] = None
        return [parent for parent in parents if parent != stage]

    def children_of(self, stage: str) -> list[str]:
        """The stages that wait directly on a stage."""
        stages = dict.fromkeys(job.stage for job in self.jobs)
        return [child for child in stages if stage in self.parents_of(child)]

    def descendants_of(self, stage: str) -> list[str]:
        found: list[str] = []
        for child in self.children_of(stage):
            found += [child, *self.descendants_of(child)]
        return list(dict.fromkeys(found))


def successor_argv(first: Iterable[str], dependency: str, exclude: Iterable[str]) -> list[str]:
    """The command that submits a stage once more, after `dependency`: that of its first attempt, for other nodes.

    Nodes that the user excluded stay so.
    """
    options, excluded, words = [], [], iter(list(first)[1:])
    for word in words:
        name, has_value, value = word.partition("=")
        if name in ("--dependency", "-d", "--exclude", "-x", "--begin", "-b"):
            value = value if has_value else next(words)
            excluded += [value] if name in ("--exclude", "-x") else []
        elif name not in ("--hold", "-H", "--parsable"):
            options.append(word)
    excluded += [node for node in exclude if node not in excluded]
    more = [f"--exclude={','.join(excluded)}"] if excluded else []
    return ["sbatch", "--parsable", f"--dependency={dependency}", *more, *options]


def submission_environ(environ: Mapping[str, str], standby_of: str) -> dict[str, str]:
    """The environment for sbatch inside a job, without what belongs to this job alone."""
    kept = {
        name: value
        for name, value in environ.items()
        if name == "SLURM_CONF" or not (name.startswith(FOREIGN) or name == TOKEN_VARIABLE)
    }
    return kept | {STANDBY_OF: standby_of}


def submit(argv: list[str], standby_of: str) -> str:
    """Run an sbatch command line in the folder where this job was submitted; returns the new job's id."""
    folder = Path(os.environ.get("SLURM_SUBMIT_DIR", "."))
    return ask(argv, cwd=folder, env=submission_environ(os.environ, standby_of)).strip().split(";")[0]


def ask(argv: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command of Slurm's and return what it prints. Raises SlurmSilent if it fails or does not answer."""
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=env, check=True, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise SlurmSilent(f"{' '.join(argv[:3])} ...: {reason}") from error
    return done.stdout


def is_alive(job_id: str) -> bool:
    """True if the job waits or runs. Raises SlurmSilent if that cannot be known."""
    lines = ask(["squeue", "--me", "--noheader", "--format=%A"]).split()  # those that are not over
    return job_id in lines
