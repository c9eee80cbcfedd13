"""A recipe as a chain of jobs. Runs no command and writes no file: what is printed is what is submitted.

jobs = Submission(recipe, folder, snapshot, python, environ, skip).jobs
print(jobs[1].shell_line())            # train=$(sbatch ... --dependency=afterok:$synthesize ...)
argv = jobs[1].argv({"synthesize": "41"})
"""

import re
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cluster.errors import InputError
from cluster.files import read_last_jsonl
from cluster.run.manifest import MANIFEST
from cluster.run.rundir import RunDir
from launcher.recipe import Recipe
from launcher.slurm import container
from launcher.slurm_config import JobConfig, seconds_of
from trainer.checkpoint.state import newest_checkpoint

# Variables that a job gets if they are set where it is submitted. Values stay out of the command line.
USUAL = frozenset(
    {
        "DS_ACCELERATOR", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HOME", "HTTPS_PROXY",
        "HTTP_PROXY", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LOGNAME", "NO_PROXY", "OMP_NUM_THREADS", "PATH", "SHELL",
        "TORCH_EXTENSIONS_DIR", "TRANSFORMERS_OFFLINE", "TZ", "USER", "XDG_CACHE_HOME", "http_proxy", "https_proxy",
        "no_proxy",
    }
)  # fmt: skip
USUAL_PREFIXES = ("CUDA_", "GLOO_", "NCCL_", "TORCH_NCCL_", "UCX_", "VLLM_")
NOT_EXPORTED = frozenset({"CUDA_VISIBLE_DEVICES"})  # of the machine where the job is submitted, not of its nodes
HUB_TOKEN = "HF_TOKEN"
# How long before its time limit a job is asked to save and stop.
SLURM_SECONDS = 60  # Slurm may send the signal as much too late
SAVE_SECONDS = 90  # assumed for a first checkpoint; 300 s in all with the other values
STEP_SECONDS = 60  # assumed for a first step
FLUSH_SECONDS = 30  # other stages write as they go, or start from the beginning
LAST_STEPS = 100
_BAD_IN_PATHS = re.compile(r"[\x00-\x1f\x7f%\\,'\"]|\.sbatch")


@dataclass(frozen=True)
class Submission:
    """What the jobs of a run are made of."""

    recipe: Recipe  # its run_dir is absolute
    folder: Path  # where jobs start: the folder of the submission, so that relative paths of the recipe are right
    snapshot: Path
    python: str
    environ: Mapping[str, str]
    skip: frozenset[str] = frozenset()  # stages that are done
    tag: str = field(default_factory=lambda: secrets.token_hex(4))  # in the names of its jobs, which no others have

    @cached_property
    def jobs(self) -> list["PlannedJob"]:
        """Planned once, since the run folder decides the margins: what is printed is what is submitted."""
        return plan_jobs(self)


@dataclass(frozen=True)
class PlannedJob:
    """One job of a chain. `options` are those of the sbatch command, except its place in the chain."""

    stage: str
    name: str  # no other job has it
    parents: tuple[str, ...]  # stages
    config: JobConfig
    options: tuple[str, ...]
    script: str
    recipe: str  # the script's argument
    log: str  # with %j for the job's id

    def argv(self, job_ids: Mapping[str, str], after_run: str | None = None) -> list[str]:
        """The command that submits the job after those with these ids, by stage. A job without parents is held.

        `after_run` is the last job of another run of a sweep. The job waits for its end, whatever it came to.
        """
        place = ["--hold", *([f"--dependency=afterany:{after_run}"] if after_run else [])]
        if self.parents:
            after = ":".join(job_ids[parent] for parent in self.parents)
            # A parent that is requeued has not ended. If it fails, Slurm cancels this job.
            place = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", "--parsable", *place, *self.options, self.script, self.recipe]

    def shell_line(self) -> str:
        """The same command for a shell, with the parents' ids as variables named after their stages."""
        argv = self.argv({parent: f"${parent}" for parent in self.parents})
        quoted = [each if each.startswith("--dependency=") else shlex.quote(each) for each in argv]
        return f"{self.stage}=$({' '.join(quoted)})"


def plan_jobs(submission: Submission) -> list[PlannedJob]:
    """The jobs of the stages that are not done, in their order. Raises InputError for values that Slurm cannot take."""
    check_paths(submission)
    stages = [stage for stage in submission.recipe.stages if stage not in submission.skip]
    return [
        plan_job(submission, stage, parents=tuple(stages[number - 1 : number] if number else ()))
        for number, stage in enumerate(stages)
    ]


def plan_job(submission: Submission, stage: str, parents: tuple[str, ...]) -> PlannedJob:
    recipe = submission.recipe
    config, stop_margin = recipe.slurm.of(stage), stop_margin_seconds(recipe.run, stage)
    if config.time is not None and (limit := seconds_of(config.time)) <= stop_margin:
        raise InputError(
            f"slurm.time={config.time} of {stage} is {limit} s, and the job is asked to save and stop {stop_margin} s "
            f"before its end. Set slurm.{stage}.time above {stop_margin} s."
        )
    log, name = str(recipe.run.job_log(stage)), f"{recipe.name}-{stage}-{submission.tag}"
    options = (
        f"--job-name={name}",
        f"--chdir={submission.folder}",
        f"--output={log}",
        "--open-mode=append",
        "--requeue",  # after a preemption, a lost node or a crash: see launcher/job/attempt.py
        f"--signal=B:USR2@{stop_margin}",
        f"--export={','.join(exported(submission))}",
        *resources(config),
        *config.options,
    )
    script = submission.snapshot / "slurm" / f"{stage}.sbatch"
    return PlannedJob(stage, name, parents, config, options, str(script), str(recipe.run.recipe), log)


def stop_margin_seconds(run: RunDir, stage: str) -> int:
    """Seconds from the signal to the time limit. For training: twice the time to save, the longest of the last steps,
    and the inaccuracy of Slurm.

    Saving and steps are timed by what an earlier attempt left. Without an earlier attempt they are assumed.
    """
    if stage != "train":
        return FLUSH_SECONDS + SLURM_SECONDS
    saving, step = last_save_seconds(run), longest_step_seconds(run)
    saving = SAVE_SECONDS if saving is None else saving
    step = STEP_SECONDS if step is None else step
    return round(2 * saving + step) + SLURM_SECONDS


def last_save_seconds(run: RunDir) -> float | None:
    """From the first to the last file of the newest checkpoint. The manifest is written last."""
    folder = newest_checkpoint(run.checkpoints)
    if folder is None:
        return None
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return max(0.0, (folder / MANIFEST).stat().st_mtime - min(times))


def longest_step_seconds(run: RunDir) -> float | None:
    seconds = [row["seconds"] for row in read_last_jsonl(run.metrics) if row.get("stage") == "train" and "step" in row]
    return max(seconds[-LAST_STEPS:], default=None)


def resources(config: JobConfig) -> list[str]:
    """The options of sbatch for what a job asks for. A field that is None is left to Slurm."""
    values = {
        "nodes": config.nodes or 1,
        "ntasks-per-node": 1,
        "gpus-per-node": config.gpus_per_node or None,
        "cpus-per-task": config.cpus_per_task,
        "mem": config.memory,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "exclude": config.exclude,
    }
    options = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return [*options, *(["--exclusive"] if config.exclusive else [])]


def exported(submission: Submission) -> list[str]:
    """The list of --export: names of variables, and NAME=value for the variables of this project.

    Raises InputError if a variable that the recipe names is not set here.
    """
    environ, recipe = submission.environ, submission.recipe
    needed = dict.fromkeys(recipe.slurm.environment, "slurm.environment")
    if recipe.export.to is not None and recipe.export.hub_token is not None:
        needed[recipe.export.hub_token.env] = "export.hub_token"
    for name, key in needed.items():
        if name not in environ:
            raise InputError(
                f"{key}: the variable {name} is not set here, so no job could get it. Set it and try again."
            )
    names = {name for name in environ if name in USUAL or name.startswith(USUAL_PREFIXES)} - NOT_EXPORTED
    if recipe.export.to is not None and recipe.export.hub_token is None and HUB_TOKEN in environ:
        names.add(HUB_TOKEN)
    values = [f"TUNESMITH_PYTHON={submission.python}"]
    if recipe.slurm.container is not None:
        values.append(f"{container.ENVIRONMENT}={recipe.run.container}")
    return [*sorted(names | needed.keys()), *values]


def check_paths(submission: Submission) -> None:
    """Raise InputError for a path that Slurm, a list of variables, or a list of folders would split."""
    paths = {"the run folder": submission.recipe.run.root, "the current folder": submission.folder}
    paths["Python"] = submission.python
    for what, path in paths.items():
        if not Path(path).is_absolute() or _BAD_IN_PATHS.search(str(path)):
            raise InputError(
                f"{what} {str(path)!r}: for Slurm a path has to be absolute and without commas, quotes, percent signs, "
                "backslashes, line breaks and `.sbatch`. Choose another one."
            )
    is_split = {"the run folder": submission.recipe.run.root, "the code": submission.snapshot}  # in PYTHONPATH
    if submission.recipe.slurm.container is not None:
        is_split["the current folder"] = submission.folder  # in the container's mounts
    for what, path in is_split.items():
        if ":" in str(path):
            raise InputError(
                f"{what} {str(path)!r}: Python and containers split a path at a colon, so jobs would run other code. "
                "Choose a path without colons."
            )
