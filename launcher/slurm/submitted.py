"""The jobs of a run, as `<run>/jobs.jsonl` lists them: one line for each submitted job, appended and never changed."""

from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from cluster.files import read_jsonl
from cluster.run.rundir import RunDir


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
