"""A recipe as a chain of jobs. Asks nobody and writes nothing: what is printed is what is submitted.

jobs = jobs_of(chain)                  # chain: Chain(recipe, folder, snapshot, python, environ, attempts, skip)
print(jobs[1].shell_line())            # train=$(sbatch ... --dependency=afterany:$synthesize ...)
argv = jobs[1].argv({"synthesize": "41"})
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from launcher.plan import stages_of
from launcher.recipe import Recipe
from launcher.slurm import container
from launcher.slurm.lead import check_time, lead_seconds
from launcher.slurm_config import JobConfig

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
STANDBY_OF = "TUNESMITH_STANDBY_OF"  # set by a job that submits its successor
_BAD_IN_PATHS = re.compile(r"[\x00-\x1f\x7f%\\,'\"]|\.sbatch")


@dataclass(frozen=True)
class Chain:
    """What a run's jobs depend on."""

    recipe: Recipe  # its run_dir is absolute
    folder: Path  # where jobs start, so that a recipe's relative paths mean what they mean to whoever submits
    snapshot: Path
    python: str
    environ: Mapping[str, str]
    attempts: Mapping[str, int]  # the number that this attempt at a stage has
    skip: frozenset[str] = frozenset()  # stages that are done


@dataclass(frozen=True)
class Job:
    """One job of a chain. `words` are the sbatch command but for its place in the chain."""

    stage: str
    attempt: int
    parents: tuple[str, ...]  # stages
    config: JobConfig
    words: tuple[str, ...]
    log: str  # with %j for the job's id

    def argv(self, job_ids: Mapping[str, str]) -> list[str]:
        """The command that submits the job after those with these ids, by stage. A job without parents is held."""
        place = ["--hold"]
        if self.parents:
            after = ":".join(job_ids[parent] for parent in self.parents)
            place = [f"--dependency=afterany:{after}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", "--parsable", *place, *self.words]

    def shell_line(self) -> str:
        """The same command for a shell, with the parents' ids as variables named after their stages."""
        argv = self.argv({parent: f"${parent}" for parent in self.parents})
        words = [word if word.startswith("--dependency=") else shlex.quote(word) for word in argv]
        return f"{self.stage}=$({' '.join(words)})"


def jobs_of(chain: Chain) -> list[Job]:
    """The jobs of the stages that are not done, in their order. Raises InputError for what Slurm could not be told."""
    check_paths(chain)
    stages = [stage for stage, _, _ in stages_of(chain.recipe) if stage not in chain.skip]
    return [
        job_of(chain, stage, parents=tuple(stages[number - 1 : number] if number else ()))
        for number, stage in enumerate(stages)
    ]


def job_of(chain: Chain, stage: str, parents: tuple[str, ...]) -> Job:
    recipe, attempt = chain.recipe, chain.attempts[stage]
    config, lead = recipe.slurm.of(stage), lead_seconds(recipe.run, stage)
    check_time(stage, config, lead)
    log = str(recipe.run.job_log(stage, attempt))
    words = [
        f"--job-name={recipe.name}-{stage}",
        f"--chdir={chain.folder}",
        f"--output={log}",
        "--open-mode=append",
        "--no-requeue",  # a job that starts again by itself may run while its first attempt, cut off, still writes
        f"--signal=B:USR2@{lead}",
        f"--export={','.join(exported(chain))}",
        *resources(config),
        *config.options,
        str(chain.snapshot / "slurm" / f"{stage}.sbatch"),
        str(recipe.run.recipe),
    ]
    return Job(stage, attempt, parents, config, tuple(words), log)


def resources(config: JobConfig) -> list[str]:
    """sbatch's options for what a job asks for; nothing for what is left to Slurm."""
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
    words = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return [*words, *(["--exclusive"] if config.exclusive else [])]


def exported(chain: Chain) -> list[str]:
    """The list of --export: names of variables, and the values of those that are ours.

    Raises InputError if a variable that the recipe names is not set here.
    """
    environ, recipe = chain.environ, chain.recipe
    needed = dict.fromkeys(recipe.slurm.environment, "slurm.environment")
    if recipe.export.to is not None and recipe.export.hub_token is not None:
        needed[recipe.export.hub_token.env] = "export.hub_token"
    for name, key in needed.items():
        if name not in environ:
            raise InputError(f"{key}: the variable {name} is not set here, so no job could get it. Set it, and submit.")
    names = {name for name in environ if name in USUAL or name.startswith(USUAL_PREFIXES)} - NOT_EXPORTED
    if recipe.export.to is not None and recipe.export.hub_token is None and HUB_TOKEN in environ:
        names.add(HUB_TOKEN)
    values = [f"TUNESMITH_PYTHON={chain.python}"]
    if recipe.slurm.container is not None:
        values.append(f"{container.ENVIRONMENT}={recipe.run.container}")
    return [*sorted(names | needed.keys()), STANDBY_OF, *values]


def check_paths(chain: Chain) -> None:
    """Raise InputError for a path that Slurm, or a list of variables, would take apart."""
    paths = {"the run folder": chain.recipe.run.root, "this folder": chain.folder, "Python": chain.python}
    for what, path in paths.items():
        if not Path(path).is_absolute() or _BAD_IN_PATHS.search(str(path)):
            raise InputError(
                f"{what} {str(path)!r}: for Slurm a path has to be absolute and without commas, quotes, percent signs, "
                "backslashes, line breaks and `.sbatch`. Choose another one."
            )
