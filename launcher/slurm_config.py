"""The `slurm:` section of a recipe: what its jobs request from Slurm."""

import re
from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from cluster.config import EnvName, StrictModel

# Options of sbatch that the launcher sets itself, and those with which it would lose sight of the job.
OWNED = (
    "array", "chdir", "clusters", "cluster", "dependency", "error", "export", "export-file", "get-user-env", "help",
    "hold", "input", "job-name", "kill-on-invalid-dep", "no-requeue", "ntasks", "ntasks-per-node", "open-mode",
    "output", "parsable", "quiet", "requeue", "signal", "test-only", "usage", "version", "wait", "wrap",
)  # fmt: skip
FIELD_OF_OPTION = {
    "nodes": "nodes", "gpus": "gpus_per_node", "gpus-per-node": "gpus_per_node", "cpus-per-task": "cpus_per_task",
    "mem": "memory", "time": "time", "partition": "partition", "account": "account", "qos": "qos",
    "exclusive": "exclusive", "exclude": "exclude", "container": "container.image",
}  # fmt: skip
_OPTION = re.compile(r"--([a-z][a-z0-9-]*)(=[^\x00-\x1f\x7f]*)?")
# As in --gres=gpu:a100:2,nic:1 and --tres-per-task=gres/gpu=2. Without a number it is one GPU.
_GPUS = re.compile(r"(?:^|[,:/])gpu(?::(?!\d+(?:[,(=]|$))[\w.-]+)?(?:[:=](\d+))?(?=[,(]|$)")
_PER_NODE = ("gres", "tres-per-node", "tres-per-task")  # a job has one task on each node
_CPU_OPTIONS = ("--cores", "--cpus", "--exclusive", "--hint", "--mincpus", "--sockets", "--threads")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class ContainerConfig(StrictModel):
    """The image in which the steps of a job run. The job's own script runs outside it."""

    runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis", description="program that runs the image; pyxis means srun --container-image"
    )
    image: str = Field(
        pattern=r"^[^\s,\x00]+$", description="name of the image. For apptainer, the path to a .sif file"
    )
    mounts: tuple[str, ...] = Field(
        (), description="OUTSIDE:INSIDE[:ro]; the run folder and the working directory are added"
    )
    python: str = Field("python3", pattern=r"^[^\s\x00]+$", description="Python inside the image")

    @field_validator("mounts")
    @classmethod
    def _mounts_are_paths(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            if not re.fullmatch(r"/[^\s,:\x00]*:/[^\s,:\x00]*(:[a-z+]+)?", mount):
                raise ValueError(f"{mount!r} is not /outside:/inside or /outside:/inside:ro")
        return mounts


class JobConfig(StrictModel):
    """What one job requests. A field that is `null` is left to the section `slurm`, or to Slurm."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # YAML reads an account such as 12345 as a number

    nodes: int | None = Field(None, ge=1, description="number of nodes")
    gpus_per_node: int | None = Field(None, ge=0, description="number of GPUs on each node")
    cpus_per_task: int | None = Field(None, ge=1, description="CPUs of the one task that runs on each node")
    memory: str | None = Field(
        None, pattern=r"^[0-9]+[KMGT]?$", description="memory of each node, as in sbatch --mem; 0 means all"
    )
    time: str | None = Field(None, description="time limit, as in sbatch --time: minutes, H:M:S or D-H:M:S")
    partition: str | None = Field(None, pattern=r"^[A-Za-z0-9_.,-]+$", description="as in sbatch --partition")
    account: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$", description="as in sbatch --account")
    qos: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$", description="as in sbatch --qos")
    exclusive: bool | None = Field(None, description="whether the job shares its nodes with no other job")
    exclude: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.,\[\]-]+$", description="nodes on which the job never runs, as in sbatch --exclude"
    )
    options: tuple[str, ...] = Field((), description="further options of sbatch, such as --constraint=h100")

    @field_validator("time", mode="before")
    @classmethod
    def _minutes_are_a_number(cls, value: object) -> object:
        """YAML reads 90 as a number, and also 1:30:00: as 5400, in base sixty."""
        if isinstance(value, int) and not isinstance(value, bool):
            if value >= 3600:
                raise ValueError("YAML reads H:M:S without quotes as a number. Put the time in quotes")
            return str(value)
        return value

    @field_validator("time")
    @classmethod
    def _a_time_of_slurm(cls, value: str | None) -> str | None:
        if value is not None and not seconds_of(value):
            raise ValueError("expected a time above 0: minutes, H:M:S or D-H:M:S")
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _one_option_is_a_list_too(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("options")
    @classmethod
    def _options_are_free(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            refuse_option(option)
        return options

    @property
    def num_gpus(self) -> int:
        """GPUs on each node, by `gpus_per_node` or by an option of sbatch."""
        named = [option.removeprefix("--").partition("=")[::2] for option in self.options]
        counts = [int(count or 1) for name, value in named if name in _PER_NODE for count in _GPUS.findall(value)]
        counts += [int(value.rpartition(":")[2]) for name, value in named if name == "gpus-per-task"]
        return self.gpus_per_node or sum(counts)

    @property
    def num_cpus(self) -> int | None:
        """CPUs on each node. None if the recipe leaves them to Slurm: whole nodes, or CPUs that come with GPUs."""
        changed = any(option.startswith(_CPU_OPTIONS) for option in self.options)
        return self.cpus_per_task or (None if self.exclusive or self.num_gpus or changed else 1)

    @property
    def ranks(self) -> int:
        """Ranks of a training: one per GPU, or one per node if the job has no GPUs."""
        return (self.nodes or 1) * (self.num_gpus or 1)


def refuse_option(option: str) -> None:
    """Raise ValueError if a text is not an option of sbatch, or one that the launcher sets."""
    match = _OPTION.fullmatch(option)
    if match is None:
        raise ValueError(f"{option!r} is not of the form --name or --name=value, on one line")
    name = match[1]
    if name in FIELD_OF_OPTION:
        raise ValueError(f"--{name} has a field of its own: set slurm.{FIELD_OF_OPTION[name]}")
    # sbatch takes any unambiguous beginning of a name: --dep is --dependency.
    if (owned := next((known for known in OWNED if known.startswith(name)), None)) is not None:
        raise ValueError(f"--{name}: the launcher sets --{owned} itself. Leave it out")


def seconds_of(time: str) -> int | None:
    """Seconds of a time in sbatch's form: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. None means that it is no time."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    days, *parts = match.groups()
    values = [int(part) for part in parts if part is not None]
    if days is None and len(values) < 3:
        values = [0, *values]  # M and M:S begin with minutes, all others with hours
    hours, minutes, seconds = [*values, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class OneNodeJobConfig(JobConfig):
    """The job of export or evaluate. The default is one node."""

    nodes: int | None = Field(1, ge=1, description="number of nodes")


class SlurmConfig(JobConfig):
    """What the jobs of a run request, and in its subsections what differs for single stages."""

    max_attempts_without_progress: int = Field(
        3, ge=1, description="attempts in a row without progress after which a stage and those after it are given up"
    )
    max_runs_at_once: int | None = Field(
        None, ge=1, description="runs of a sweep that have jobs running at once; `null` means all of them"
    )
    preflight: bool | None = Field(
        None, description="check the nodes before a stage; `null` means only if it has several"
    )
    start_timeout_seconds: float = Field(
        3600,
        gt=0,
        description="a stage without a first step, or a first row of metrics, after this time counts as hung",
    )
    hang_timeout_seconds: float | None = Field(
        None,
        gt=0,
        description="a stage without a further step after this time counts as hung; `null` means ten times the longest "
        "gap so far, but at least 900",
    )
    hang_grace_seconds: float = Field(
        60, ge=0, description="time for a hung stage to save and stop before it is killed"
    )
    synthesize: JobConfig = JobConfig()
    train: JobConfig = JobConfig()
    export: OneNodeJobConfig = OneNodeJobConfig()
    evaluate: OneNodeJobConfig = OneNodeJobConfig()
    container: ContainerConfig | None = None
    environment: tuple[EnvName, ...] = Field(
        (), description="names of further variables that jobs get from your environment"
    )

    def of(self, stage: str) -> JobConfig:
        """What a stage's job requests: its own fields, else those of this section. Options add up."""
        own: JobConfig = getattr(self, stage)
        fields = {name: getattr(self, name) for name in JobConfig.model_fields}
        fields |= {name: value for name in JobConfig.model_fields if (value := getattr(own, name)) is not None}
        return JobConfig(**fields | {"options": (*self.options, *own.options)})
