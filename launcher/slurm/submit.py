"""From a recipe to a chain of jobs in Slurm's queue: the whole of it, or nothing.

The first job is held, and each other job waits for the one before it. Slurm is asked whether it knows all of them, and
only then the first one is released. If anything fails on the way, every job is cancelled.
"""

import contextlib
import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from cluster.errors import InputError, TunesmithError
from cluster.files import append_jsonl, exclusive_lock, write_json
from cluster.run.rundir import STAGES
from launcher.done import is_done
from launcher.engine_room import check_engines
from launcher.recipe import Recipe
from launcher.slurm import container
from launcher.slurm.client import Partition, Slurm, clean_environment
from launcher.slurm.sbatch import PlannedJob, Submission
from launcher.slurm.snapshot import take_snapshot
from launcher.slurm.submitted import SubmittedJob, live_jobs, read_jobs
from launcher.slurm_config import JobConfig, seconds_of

FAKE_ID = "1"  # of a parent, in a command that is only tested: it leaves out the dependency


def prepare(recipe: Recipe, folder: Path, code: Path) -> Submission:
    """The jobs of what is not done, with a copy of the code in the folder `code`. Submits nothing.

    Raises InputError if the run folder is another recipe's, or if the jobs could not be what the recipe says.
    """
    recipe = recipe.model_copy(update={"run_dir": Path(os.path.abspath(recipe.run_dir))})
    run = recipe.run
    recipe.check_run_folder(run)
    done = frozenset(stage for stage in STAGES if is_done(stage, recipe, run))
    if "train" not in done:
        check_batch(recipe)
    check_engines(recipe, done)
    submission = Submission(
        recipe=recipe,
        folder=folder,
        snapshot=take_snapshot(code),
        python=sys.executable,
        environ=clean_environment(os.environ),
        skip=done,
    )
    save_plan(submission)
    return submission


def check_batch(recipe: Recipe) -> None:
    """Raise InputError if the ranks of the training job cannot share its batches equally."""
    train, job = recipe.train, recipe.slurm.of("train")
    ranks, sequence_parallel_size = job.ranks, train.sequence_parallel_size
    key = "gpus_per_node" if job.num_gpus else "ranks per node"
    what = f"slurm.train: the number of ranks is {ranks} (nodes={job.nodes or 1} x {key}={job.num_gpus or 1})"
    if ranks % sequence_parallel_size:
        raise InputError(
            f"{what}, which train.sequence_parallel_size={sequence_parallel_size} does not divide. Change one of them."
        )
    data_parallel_size = ranks // sequence_parallel_size
    per_pass = train.micro_batch_size * data_parallel_size
    if train.batch_unit == "rows" and train.global_batch_size % per_pass:
        raise InputError(
            f"{what}; train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"micro_batch_size {train.micro_batch_size} x {data_parallel_size} = {per_pass}. Change one of them."
        )


def save_plan(submission: Submission) -> None:
    """Write `plan.json`. A stage's id stands as $stage in the commands of those that wait for it."""
    jobs = [
        {
            "stage": job.stage,
            "parents": job.parents,
            "argv": job.argv({parent: f"${parent}" for parent in job.parents}),
            "log": job.log,
            "asks": job.config.model_dump(),
        }
        for job in submission.jobs
    ]
    submission.recipe.run.create()
    write_json(
        submission.recipe.run.plan,
        {
            "folder": str(submission.folder), "code": str(submission.snapshot), "python": submission.python,
            "done": sorted(submission.skip), "jobs": jobs,
        },
    )  # fmt: skip


def check_with_slurm(submission: Submission, slurm: Slurm) -> None:
    """Raise InputError if a job of the chain could never run here, with the recipe's key for it."""
    partitions = slurm.partitions()
    for job in submission.jobs:
        try:
            check_request(job.stage, job.config, partitions)
        except InputError as error:
            raise InputError(f"{error} Here are: {list_partitions(partitions)}.") from error
        try:
            slurm.test(job.argv(dict.fromkeys(job.parents, FAKE_ID)))
        except InputError as error:
            raise InputError(
                f"Slurm would never run {job.stage}: {error} Asked with: {' '.join(job.options)}. "
                f"Change slurm.{job.stage} or slurm in the recipe. Here are: {list_partitions(partitions)}."
            ) from error


def list_partitions(partitions: list[Partition]) -> str:
    """`gpu (default, 8 nodes, at most 1-00:00:00), long (2 nodes, no time limit), old (down)`."""
    described = []
    for each in partitions:
        limit = f"at most {each.time_limit}" if seconds_of(each.time_limit) else "no time limit"
        facts = [f"{each.num_nodes} node{'' if each.num_nodes == 1 else 's'}", limit] if each.is_up else ["down"]
        described.append(f"{each.name} ({', '.join(['default'] * each.is_default + facts)})")
    return ", ".join(described)


def check_request(stage: str, config: JobConfig, partitions: list[Partition]) -> None:
    """Raise InputError if a partition is unknown or down, or has neither the nodes nor the time that are asked for."""
    known = {partition.name: partition for partition in partitions}
    if config.partition is None:
        chosen = [partition for partition in partitions if partition.is_default]
    else:
        for name in config.partition.split(","):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean `{near[0]}`?" if near else ""
                raise InputError(f"slurm.partition of {stage}: there is no partition {name} here.{hint}")
        chosen = [known[name] for name in config.partition.split(",")]
    if not chosen:
        return
    names = " or ".join(partition.name for partition in chosen)
    if not any(partition.is_up for partition in chosen):
        raise InputError(f"slurm.partition of {stage}: {names} is down. Choose another one.")
    nodes, most = config.nodes or 1, max(partition.num_nodes for partition in chosen)
    if nodes > most:
        raise InputError(f"slurm.nodes={nodes} of {stage}: partition {names} has {most}. Lower slurm.{stage}.nodes.")
    limits = [seconds_of(partition.time_limit) for partition in chosen]
    if config.time is not None and None not in limits and (wanted := seconds_of(config.time)) > max(limits):
        raise InputError(
            f"slurm.time={config.time} of {stage} is {wanted} s, and partition {names} allows "
            f"{max(limits)} s. Lower slurm.{stage}.time, or choose another partition."
        )


def refuse_live_jobs(recipe: Recipe, slurm: Slurm) -> None:
    """Raise InputError if jobs of the run wait or run: two at once would undo each other's work."""
    live = live_jobs(read_jobs(recipe.run), slurm)
    if listed := ", ".join(f"{job.job_id} ({job.state.lower()})" for job in live):
        raise InputError(
            f"{recipe.run.root} has jobs in the queue: {listed}. See `tunesmith status {recipe.run.root}`, "
            f"or end them with `tunesmith cancel {recipe.run.root}`."
        )


def submit(
    submission: Submission, slurm: Slurm, on_submit: Callable[[list[str]], None], after_run: str | None = None
) -> dict[str, str]:
    """Submit the chain and return the jobs' ids by stage. Calls `on_submit` with every sbatch command that was run.

    The chain waits for the end of the job `after_run`.
    """
    recipe = submission.recipe
    run = recipe.run.create()
    with exclusive_lock(run.submission_lock, f"submission of {run.root}"):
        refuse_live_jobs(recipe, slurm)
        with exclusive_lock(run.lock, f"run folder {run.root}"):
            recipe.save(run)
        make_log_folders_and_container(submission)
        size = run.jobs.stat().st_size if run.jobs.is_file() else None
        ids: dict[str, str] = {}
        try:
            for job in submission.jobs:
                argv = job.argv(ids, after_run)
                ids[job.stage] = slurm.submit(argv, job.name)
                on_submit(argv)
            check_chain(submission.jobs, ids, slurm)
            for job in submission.jobs:
                parents = tuple(ids[parent] for parent in job.parents)
                own = SubmittedJob(
                    round(time.time(), 3), job.stage, ids[job.stage], parents, tuple(job.argv(ids, after_run))
                )
                append_jsonl(run.jobs, asdict(own))
            slurm.release(ids[submission.jobs[0].stage])
        except BaseException:  # Ctrl-C too: no part of a chain stays in the queue. It is raised again
            undo_submission(submission.jobs, ids, slurm)
            # A cancelled job in the list would hide the state that an earlier job has left its stage in.
            if size is None:
                run.jobs.unlink(missing_ok=True)
            else:
                os.truncate(run.jobs, size)
            raise
    with contextlib.suppress(TunesmithError):  # of a full disk; the jobs are submitted
        run.event("slurm", "submitted", jobs=ids)
    return ids


def undo_submission(jobs: list[PlannedJob], ids: Mapping[str, str], slurm: Slurm) -> None:
    """Cancel the jobs of an incomplete chain, the last one first, and one that Slurm may have taken without an id."""
    job_ids = list(reversed(ids.values()))
    without_id = [job.name for job in jobs if job.stage not in ids][:1]
    try:
        slurm.cancel(job_ids)
        if without_id:
            slurm.cancel([job.job_id for job in slurm.find(without_id)])
    except TunesmithError as error:
        left = [f"scancel {' '.join(job_ids)}"] * bool(job_ids) + [f"scancel --name={name}" for name in without_id]
        raise TunesmithError(f"{error} A part of a chain may be left in the queue: {'; '.join(left)}") from error


def make_log_folders_and_container(submission: Submission) -> None:
    """Make what the jobs need in the run folder."""
    recipe = submission.recipe
    for job in submission.jobs:
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    if recipe.slurm.container is not None:
        folders = (recipe.run.root, submission.folder)
        write_json(recipe.run.container, container.make_settings(recipe.slurm.container, folders))


def check_chain(jobs: list[PlannedJob], ids: Mapping[str, str], slurm: Slurm) -> None:
    """Raise TunesmithError unless Slurm knows all jobs by their names and what they wait for.

    Slurm accepts a job whose parent it does not know.
    """
    known = slurm.queue(ids.values())
    for job in jobs:
        entry = known.get(ids[job.stage])
        if entry is None or entry.name != job.name:
            found = "is unknown to it"
        else:
            waits_for_all = {ids[parent] for parent in job.parents} <= set(re.findall(r"[0-9]+", entry.dependency))
            if entry.state == "PENDING" and waits_for_all:
                continue
            found = f"is {entry.state}, waiting for {entry.dependency}"
        raise TunesmithError(f"Slurm took job {ids[job.stage]} ({job.stage}), which now {found}. Try again.")
