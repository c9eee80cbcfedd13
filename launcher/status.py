"""How far a run is, from its folder and one question to squeue; no accounting database is needed.

A stage is DONE if its result proves it. Jobs in the queue speak for themselves. For a job that is gone the stage's
result speaks, and where there is none, and Slurm knows nothing more, the answer is UNKNOWN.
"""

import fcntl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import InputError
from cluster.run.fence import claims
from cluster.run.rundir import RunDir
from launcher.done import is_done
from launcher.plan import stages_of
from launcher.recipe import Recipe, read_resolved, refuse_older_layout
from launcher.slurm.client import QueuedJob, Slurm, SlurmError
from launcher.slurm.stop_margin import last_rows
from launcher.slurm.submitted import SubmittedJob, read_jobs
from launcher.sweep import read_index

DONE, RUNNING, WAITING, STOPPED = "DONE", "RUNNING", "WAITING", "STOPPED"
FAILED, CANCELLED, UNKNOWN, NOT_STARTED = "FAILED", "CANCELLED", "UNKNOWN", "NOT STARTED"
LIVE = (RUNNING, WAITING)


@dataclass(frozen=True)
class StageState:
    stage: str
    word: str
    job_id: str
    attempt: int  # 0 means that no job of Slurm has begun it
    detail: str


@dataclass(frozen=True)
class RunState:
    run: RunDir
    name: str
    stages: tuple[StageState, ...]

    @property
    def word(self) -> str:
        """The run in one word: what is going on, else what keeps the first unfinished stage from going on."""
        words = [stage.word for stage in self.stages]
        for live in LIVE:
            if live in words:
                return live
        return next((word for word in words if word != DONE), DONE)

    @property
    def stage(self) -> str:
        """The stage that `word` is about; none if all are done."""
        return next((stage.stage for stage in self.stages if stage.word == self.word and stage.word != DONE), "")


@dataclass(frozen=True)
class Answer:
    """What squeue said about jobs, or why it said nothing."""

    jobs: Mapping[str, QueuedJob]
    silence: str = ""


def ask(slurm: Slurm, job_ids: list[str]) -> Answer:
    """One question about all jobs. Silence is an answer here: nothing is known of any job."""
    if not job_ids:
        return Answer({})
    try:
        return Answer(slurm.queue(job_ids))
    except SlurmError as error:
        return Answer({}, str(error))


def read_run(folder: Path) -> tuple[Recipe, RunDir]:
    """The recipe of a run folder, wherever the folder lies now. Raises InputError if it is none."""
    run = RunDir(folder.resolve())
    if not run.recipe.is_file():
        raise InputError(
            f"{folder} is no run folder: there is no {run.recipe.name} in it. `tunesmith list` shows the run folders."
        )
    refuse_older_layout(run)
    return read_resolved(run.recipe).model_copy(update={"run_dir": run.root}), run


def read_status(folder: Path, slurm: Slurm) -> RunState:
    """The state of every stage of a run."""
    return read_all([folder], slurm)[0]


def read_all(folders: list[Path], slurm: Slurm) -> list[RunState]:
    """The states of several runs with one question to Slurm."""
    runs = [read_run(folder) for folder in folders]
    jobs = {run: read_jobs(run) for _, run in runs}
    answer = ask(slurm, [job.job_id for submitted in jobs.values() for job in submitted])
    return [state_of_run(recipe, run, jobs[run], answer) for recipe, run in runs]


def state_of_run(recipe: Recipe, run: RunDir, jobs: list[SubmittedJob], answer: Answer) -> RunState:
    stages: list[StageState] = []
    is_busy = not jobs and is_locked(run)
    for stage, _, _ in stages_of(recipe):
        own = [job for job in jobs if job.stage == stage]
        if is_done(stage, recipe, run):
            newest = own[-1:]
            job_id = newest[0].job_id if newest else ""
            stages.append(StageState(stage, DONE, job_id, num_attempts(run, job_id), figures(run, stage)))
        elif own:
            stages.append(state_of_jobs(stage, run, own, answer))
        else:
            stages.append(state_without_jobs(stage, run, is_busy))
            is_busy = False  # stages of a local run go one by one: it is at the first that is not done
    return RunState(run, recipe.name, tuple(stages))


def state_without_jobs(stage: str, run: RunDir, is_busy: bool) -> StageState:
    if is_busy:
        return StageState(stage, RUNNING, "", 0, f"on this machine. {progress(run, stage)}".strip())
    result = run.read_result(stage) or {}
    words = {"failed": FAILED, "preempted": STOPPED}
    word = words.get(result.get("status"), NOT_STARTED)
    return StageState(stage, word, "", 0, result.get("message", "") if word == FAILED else "")


def state_of_jobs(stage: str, run: RunDir, jobs: list[SubmittedJob], answer: Answer) -> StageState:
    """A stage that is not done, from its jobs, oldest first."""

    def state(word: str, job: SubmittedJob, detail: str) -> StageState:
        return StageState(stage, word, job.job_id, num_attempts(run, job.job_id), detail)

    live = [(job, answer.jobs[job.job_id]) for job in jobs if job.job_id in answer.jobs]
    live = [(job, queued) for job, queued in live if not queued.is_over]
    for job, queued in live:
        if queued.state != "PENDING":
            where = queued.nodes if len(queued.nodes) <= 40 else f"{queued.num_nodes} nodes"
            return state(RUNNING, job, f"on {where} for {queued.elapsed}. {progress(run, stage)}".strip())
    if live:
        job, queued = live[0]
        return state(WAITING, job, reason_of(queued))
    last, log = jobs[-1], newest_log(jobs)
    if answer.silence:
        return state(UNKNOWN, last, f"{answer.silence} Its log: {log}")
    result = fresh_result(run, stage, last)
    if result.get("status") == "failed":
        return state(FAILED, last, f"{result.get('message', '')} Log: {log}".strip())
    known = answer.jobs.get(last.job_id)
    if result.get("cancelled") or (known is not None and known.state == "CANCELLED"):
        because = "a stage before it did not finish. " if known and "NeverSatisfied" in known.reason else ""
        return state(CANCELLED, last, f"{because}`tunesmith resume` goes on from what is saved")
    if result.get("status") == "preempted":
        return state(STOPPED, last, "everything is saved; `tunesmith resume` goes on")
    if known is None and not last.log.is_file():
        return state(CANCELLED, last, "the job left the queue before it began")
    if known is None:
        return state(UNKNOWN, last, f"Slurm no longer knows the job, which left no result. Look at {log}")
    return state(FAILED, last, f"the job ended as {known.state} without a result. Look at {log}")


def num_attempts(run: RunDir, job_id: str) -> int:
    """How often a job has begun its stage."""
    return sum(claim.job_id == job_id for claim in claims(run.root)) if job_id else 0


def reason_of(queued: QueuedJob) -> str:
    """Why a job does not run yet."""
    if queued.reason == "JobHeldUser":
        return "held: its chain is being submitted, or somebody held it (scontrol release)"
    if queued.reason == "BeginTime":
        return "requeued: it starts again soon"
    if queued.dependency not in ("", "(null)"):
        return f"for {queued.dependency.replace('(unfulfilled)', '')}"
    return f"for Slurm: {queued.reason}"


def fresh_result(run: RunDir, stage: str, job: SubmittedJob) -> dict:
    """The stage's result, unless it is older than the job."""
    file = run.result(stage)
    if not file.is_file() or file.stat().st_mtime < job.time:
        return {}
    return run.read_result(stage) or {}


def progress(run: RunDir, stage: str) -> str:
    """The last thing that a stage wrote about itself."""
    rows = [row for row in last_rows(run.metrics) if row.get("stage") == stage and "step" in row]
    if not rows:
        return ""
    return f"step {rows[-1]['step']}" + (f", loss {rows[-1]['loss']:.4f}" if rows[-1].get("loss") is not None else "")


def figures(run: RunDir, stage: str) -> str:
    """What a finished stage came to."""
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
    """The output of the newest of these jobs that has begun."""
    return next((job.log for job in reversed(jobs) if job.log.is_file()), jobs[-1].log)


def is_locked(run: RunDir) -> bool:
    """Whether a process on this machine works in the run folder."""
    if not run.lock.is_file():
        return False
    with open(run.lock) as file:
        holder = file.read()
        # Asking the kernel takes the lock for a moment, so it is asked only where somebody is known to hold it.
        if not holder.isdigit() or not psutil.pid_exists(int(holder)):
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def find_runs(folder: Path) -> list[tuple[Path, dict[str, object]]]:
    """Run folders below `folder` with the values that a sweep gave them. Raises InputError if there is no folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder. Runs lie in `runs` unless --run-dir said otherwise.")
    found: list[tuple[Path, dict[str, object]]] = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if RunDir(place).recipe.is_file():
            found.append((place, {}))
        found += [(run, values) for run, values in read_index(place) if RunDir(run).recipe.is_file()]
    return found


def still_goes_on(folder: Path, stage: str | None, slurm: Slurm) -> bool:
    """Whether jobs of the run, or of one stage, may still print something. Silence says nothing, so it does not end."""
    _, run = read_run(folder)
    jobs = [job for job in read_jobs(run) if stage in (None, job.stage)]
    answer = ask(slurm, [job.job_id for job in jobs])
    if answer.silence:
        return True
    return any(not queued.is_over for queued in answer.jobs.values())
