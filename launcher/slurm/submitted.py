"""The jobs of a run, as `<run>/jobs.jsonl` remembers them: one line a submitted job, appended and never changed."""

from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from cluster.files import read_jsonl
from cluster.run.rundir import RunDir


@dataclass(frozen=True)
class Submitted:
    """One line of jobs.jsonl. `reason` is "submitted" (by a user) or "continued" (by the job before it)."""

    time: float
    stage: str
    job_id: str
    attempt: int  # of this stage, from 1
    parent_job_ids: tuple[str, ...]
    argv: tuple[str, ...]
    reason: str

    @property
    def log(self) -> Path:
        """Where the job writes what it prints."""
        option = next(word for word in self.argv if word.startswith("--output="))
        return Path(option.removeprefix("--output=").replace("%j", self.job_id))


def read_jobs(run: RunDir) -> list[Submitted]:
    """Every job of the run in the order of submission; none if the run is not one of Slurm's."""
    file = run.jobs
    if not file.is_file():
        return []
    jobs = []
    for number, row in enumerate(read_jsonl(file), 1):
        try:
            parents, argv = tuple(map(str, row["parent_job_ids"])), tuple(row["argv"])
            values = {name: row[name] for name in ("time", "stage", "attempt", "reason")}
            jobs.append(Submitted(job_id=str(row["job_id"]), parent_job_ids=parents, argv=argv, **values))
        except (KeyError, TypeError) as error:
            raise InputError(f"{file}:{number}: not a submitted job ({error}). Fix or remove this line.") from error
    return jobs


def next_attempt(jobs: list[Submitted], stage: str) -> int:
    return 1 + max((job.attempt for job in jobs if job.stage == stage), default=0)
