"""What `tunesmith status` says about live jobs: times, the place in the queue, the log, a way to the nodes."""

from launcher.slurm.client import JobTimes, Slurm, SlurmError
from launcher.slurm.submitted import SubmittedJob, read_jobs
from launcher.status import LIVE, WAITING, RunStatus, StageStatus

_NO_LIMIT = ("UNLIMITED", "NOT_SET", "INVALID")


def describe_live_jobs(status: RunStatus, slurm: Slurm) -> list[str]:
    """One line for each job that runs. If none runs, one for the first job that waits."""
    live = [stage for stage in status.stages if stage.state in LIVE and stage.job_id]
    shown = [stage for stage in live if stage.state != WAITING] or live[:1]
    if not shown:
        return []
    jobs = {job.job_id: job for job in read_jobs(status.run)}
    try:
        return [_describe(stage, jobs[stage.job_id], slurm) for stage in shown]
    except SlurmError as error:
        return [f"Nothing is known about times and the place in the queue: {error}"]


def _describe(stage: StageStatus, job: SubmittedJob, slurm: Slurm) -> str:
    times = slurm.times(job.job_id)
    if stage.state == WAITING:
        facts = _of_waiting(job, times, slurm) if times else []
        log = "Its output is in" if job.log.is_file() else "Its output will be in"
        return f"{stage.stage}, job {job.job_id}: {''.join(f'{fact}. ' for fact in facts)}{log} {job.log}"
    left = [f"{times.left} of {times.limit} left"] if times and times.limit not in _NO_LIMIT else ["no time limit"]
    facts = left if times else []
    shell = f"A shell on its node: srun --overlap --jobid={job.job_id} --pty bash"
    return f"{stage.stage}, job {job.job_id}: {''.join(f'{fact}. ' for fact in facts)}{shell}"


def _of_waiting(job: SubmittedJob, times: JobTimes, slurm: Slurm) -> list[str]:
    place = slurm.place(job.job_id, times.partition)
    start = "Slurm expects no start yet" if times.start == "N/A" else f"Slurm expects it to start at {times.start}"
    limit = "no time limit" if times.limit in _NO_LIMIT else f"time limit {times.limit}"
    where = [f"place {place[0]} of {place[1]} in partition {times.partition}"] if place else []
    return [", ".join([start, *where, limit])]
