"""The status of a run, from its folder and one call of squeue. No accounting database is needed.

A stage is DONE if its files prove it. Otherwise its state is that of its job in the queue. If the job has left the
queue, the stage's result decides. If there is no result and Slurm does not know the job either, the state is UNKNOWN.
"""

import fcntl
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import InputError
from cluster.files import read_last_jsonl
from cluster.run.fence import Claim, claims
from cluster.run.rundir import RunDir
from launcher.done import is_done
from launcher.recipe import Recipe, read_resolved, refuse_older_layout
from launcher.slurm.client import NoSlurm, QueuedJob, Slurm, SlurmError
from launcher.slurm.submitted import SubmittedJob, live_jobs, queue_of, read_jobs
from launcher.sweep import read_index

DONE, RUNNING, SUSPENDED, WAITING = "DONE", "RUNNING", "SUSPENDED", "WAITING"
STOPPED, FAILED, CANCELLED, UNKNOWN = "STOPPED", "FAILED", "CANCELLED", "UNKNOWN"
NOT_STARTED = "NOT STARTED"
LIVE = (RUNNING, SUSPENDED, WAITING)
# A job in one of these states has no nodes: squeue names the flags of a job that waits instead of PENDING.
_WAITING_IN_QUEUE = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")


@dataclass(frozen=True)
class StageStatus:
    stage: str
    state: str
    job_id: str
    attempt: int  # 0 means that no job of Slurm has begun it
    detail: str


@dataclass(frozen=True)
class RunStatus:
    run: RunDir
    name: str
    stages: tuple[StageStatus, ...]
    is_unanswered: bool = False  # Slurm did not answer, so the run may go on

    @property
    def current(self) -> StageStatus | None:
        """A stage that runs, else one that waits, else the first that is not done. None means that all are done."""
        unfinished = [stage for stage in self.stages if stage.state != DONE]
        return min(unfinished, key=lambda stage: (*LIVE, stage.state).index(stage.state), default=None)

    @property
    def state(self) -> str:
        return self.current.state if self.current else DONE


@dataclass(frozen=True)
class QueueAnswer:
    """The answer of squeue about some jobs, or the error of a Slurm that did not answer."""

    jobs: Mapping[SubmittedJob, QueuedJob]
    error: str = ""
    may_answer_later: bool = True


def read_run(folder: Path) -> tuple[Recipe, RunDir]:
    """The recipe of a run folder, which may have been moved. Raises InputError if it is not a run folder."""
    run = RunDir(folder.resolve())
    if not run.recipe.is_file():
        raise InputError(
            f"{folder} is not a run folder: it has no {run.recipe.name}. `tunesmith list` shows the run folders."
        )
    refuse_older_layout(run)
    return read_resolved(run.recipe).model_copy(update={"run_dir": run.root}), run


def read_statuses(folders: list[Path], slurm: Slurm) -> list[RunStatus]:
    """The statuses of several runs, with one call of squeue."""
    runs = [read_run(folder) for folder in folders]
    jobs = {run: read_jobs(run) for _, run in runs}
    try:
        answer = QueueAnswer(queue_of([job for submitted in jobs.values() for job in submitted], slurm))
    except SlurmError as error:
        answer = QueueAnswer({}, str(error), may_answer_later=not isinstance(error, NoSlurm))
    return [status_of_run(recipe, run, jobs[run], answer) for recipe, run in runs]


def status_of_run(recipe: Recipe, run: RunDir, jobs: list[SubmittedJob], answer: QueueAnswer) -> RunStatus:
    stages: list[StageStatus] = []
    is_locked = not jobs and is_in_use(run)
    attempts = claims(run.root) if jobs else []
    for stage in recipe.stages:
        own = [job for job in jobs if job.stage == stage]
        if is_done(stage, recipe, run):
            begun = [job for job in own if num_attempts(job, attempts)][-1:]
            job_id, attempt = (begun[0].job_id, num_attempts(begun[0], attempts)) if begun else ("", 0)
            stages.append(StageStatus(stage, DONE, job_id, attempt, describe_result(run, stage)))
        elif own:
            stages.append(status_from_jobs(stage, run, own, attempts, answer))
        else:
            stages.append(status_without_jobs(stage, run, is_locked))
            is_locked = False  # a run on this machine is at its first stage that is not done
    is_unanswered = bool(jobs and answer.error and answer.may_answer_later)
    return RunStatus(run, recipe.name, tuple(stages), is_unanswered)


def status_without_jobs(stage: str, run: RunDir, is_running: bool) -> StageStatus:
    """A stage that is not done, of a run on this machine."""
    if is_running:
        return StageStatus(stage, RUNNING, "", 0, f"on this machine. {last_progress(run, stage)}".strip())
    result = run.read_result(stage) or {}
    state = {"failed": FAILED, "preempted": STOPPED}.get(result.get("status"), NOT_STARTED)
    return StageStatus(stage, state, "", 0, result.get("message", "") if state == FAILED else "")


def status_from_jobs(
    stage: str, run: RunDir, jobs: list[SubmittedJob], attempts: list[Claim], answer: QueueAnswer
) -> StageStatus:
    """A stage that is not done and has jobs, oldest first. `attempts` are the claims of the run."""

    def status(state: str, job: SubmittedJob, detail: str) -> StageStatus:
        return StageStatus(stage, state, job.job_id, num_attempts(job, attempts), detail)

    live = [(job, answer.jobs[job]) for job in jobs if job in answer.jobs and not answer.jobs[job].is_over]
    for job, queued in live:
        if queued.state not in _WAITING_IN_QUEUE:
            where = queued.nodes if len(queued.nodes) <= 40 else f"{queued.num_nodes} nodes"
            detail = f"on {where} for {queued.elapsed}. {last_progress(run, stage)}".strip()
            if queued.state == "SUSPENDED":
                return status(SUSPENDED, job, f"{detail}. An administrator, or a preemption, has suspended the job")
            return status(RUNNING, job, detail)
    if live:
        job, queued = live[0]
        again = f"after attempt {number}. " if (number := num_attempts(job, attempts)) else ""
        return status(WAITING, job, again + reason_of(queued))
    last, log = jobs[-1], newest_log(jobs)
    if answer.error:
        return status(UNKNOWN, last, f"{answer.error} The job's log: {log}")
    result = fresh_result(run, stage, last)
    if result.get("status") == "failed":
        return status(FAILED, last, f"{result.get('message', '')} Log: {log}".strip())
    known = answer.jobs.get(last)
    if result.get("cancelled") or (known is not None and known.state == "CANCELLED"):
        reason = "an earlier stage did not finish. " if known and "NeverSatisfied" in known.reason else ""
        return status(CANCELLED, last, f"{reason}`tunesmith resume` continues from what is saved")
    if result.get("status") == "preempted":
        return status(STOPPED, last, "everything is saved. `tunesmith resume` continues it")
    if known is None and not last.log.is_file():
        return status(CANCELLED, last, "the job left the queue before it began")
    if known is None:
        return status(UNKNOWN, last, f"Slurm no longer knows the job, and the job wrote no result. See its log: {log}")
    return status(FAILED, last, f"the job ended as {known.state} and wrote no result. See its log: {log}")


def num_attempts(job: SubmittedJob, attempts: list[Claim]) -> int:
    """The number of the newest attempt of a job. 0 means that the job has not begun its stage."""
    return max((claim.restart_count + 1 for claim in job.claims_of(attempts)), default=0)


def reason_of(queued: QueuedJob) -> str:
    """Why a job is not running yet."""
    after = ""
    if queued.dependency not in ("", "(null)"):
        job_ids = re.findall(r":(\d+)", queued.dependency)  # as in "afterok:101(unfulfilled)"
        after = f"for job {', '.join(job_ids)}"
    if queued.reason == "JobHeldUser":
        held = "held: the run is being submitted, or a user holds the job (scontrol release)"
    elif "held" in f"{queued.state} {queued.reason}".lower() or queued.state.endswith("HOLD"):
        held = f"held by an administrator or by Slurm ({queued.reason}): ask them to release it (scontrol release)"
    else:
        return after or f"Slurm's reason: {queued.reason}"
    return f"{held}; {after}" if after else held


def fresh_result(run: RunDir, stage: str, job: SubmittedJob) -> dict:
    """The stage's result. Empty if it is older than the job."""
    file = run.result(stage)
    if not file.is_file() or file.stat().st_mtime < job.time:
        return {}
    return run.read_result(stage) or {}


def last_progress(run: RunDir, stage: str) -> str:
    """The last step in the stage's metrics. Empty if there is none."""
    rows = [row for row in read_last_jsonl(run.metrics) if row.get("stage") == stage and "step" in row]
    if not rows:
        return ""
    return f"step {rows[-1]['step']}" + (f", loss {rows[-1]['loss']:.4f}" if rows[-1].get("loss") is not None else "")


def describe_result(run: RunDir, stage: str) -> str:
    """The result of a finished stage in a few words."""
    result = run.read_result(stage) or {}
    if stage == "synthesize" and "num_rows" in result:
        return f"{result['num_rows']:,} rows"
    if stage == "train" and "step" in result:
        loss = result.get("final_loss")
        return f"{result['step']:,} steps" + (f", loss {loss:.4f}" if loss is not None else "")
    if stage == "evaluate" and "models" in result:
        return ", ".join(f"{name} {value:.1%}" for name, value in exact_matches(result).items())
    return ""


def exact_matches(result: dict) -> dict[str, float]:
    """The share of exact matches of each model over all its rows."""
    shares = {}
    for name, groups in result["models"].items():
        rows = sum(group["num_rows"] for group in groups.values())
        if rows:
            shares[name] = sum(group["exact_match"] * group["num_rows"] for group in groups.values()) / rows
    return shares


def newest_log(jobs: list[SubmittedJob]) -> Path:
    """The log of the newest of these jobs that has begun."""
    return next((job.log for job in reversed(jobs) if job.log.is_file()), jobs[-1].log)


def is_in_use(run: RunDir) -> bool:
    """Whether a process on this machine holds the run folder's lock."""
    if not run.lock.is_file():
        return False
    with open(run.lock) as file:
        holder = file.read()
        # This check takes the lock for a moment, so it is made only if the holder is still alive.
        if not holder.isdigit() or not psutil.pid_exists(int(holder)):
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks, on which no run starts
            return False
    return False


def find_runs(folder: Path) -> list[tuple[Path, dict[str, object]]]:
    """Run folders below `folder` that the user may read, with the values of a sweep.

    Raises InputError if there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: there is no such folder. Runs are in `runs` unless `--run-dir` named another folder, which "
            "`tunesmith list FOLDER` lists."
        )
    found: list[tuple[Path, dict[str, object]]] = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and is_readable(path)):
        if RunDir(place).recipe.is_file():
            found.append((place, {}))
        found += [(run, values) for run, values in read_index(place) if RunDir(run).recipe.is_file()]
    return found


def is_readable(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def may_still_run(folder: Path, stage: str | None, slurm: Slurm) -> bool:
    """Whether jobs of the run, or of one stage, may still run. True also if Slurm does not answer."""
    _, run = read_run(folder)
    try:
        return bool(live_jobs([job for job in read_jobs(run) if stage in (None, job.stage)], slurm))
    except SlurmError:
        return True
