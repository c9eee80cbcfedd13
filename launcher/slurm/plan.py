"""The jobs of a recipe before they are submitted, for people."""

from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.engine_room import engines_of_evaluation
from launcher.plan import describe_stages, print_memory
from launcher.recipe import Recipe
from launcher.slurm.sbatch import Submission
from launcher.slurm_config import JobConfig
from trainer.config.train import TrainConfig
from trainer.memory import USABLE_FRACTION, usable_bytes

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def print_slurm_plan(submission: Submission, path: Path, command: str, console: Console) -> None:
    """The jobs, the memory of training on them, and every command. `command` submits them."""
    recipe = submission.recipe
    train = recipe.train.model_copy(update={"num_processes": recipe.slurm.of("train").ranks})
    planned = recipe.model_copy(update={"train": train})
    console.print(job_table(submission, planned, path))
    if any(job.stage == "train" for job in submission.jobs):
        print_memory(planned, console, lambda: usable_on_a_node(planned.train, planned.slurm.of("train")))
    print_line = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    print_line(f"Jobs start in {submission.folder} and run the code in {submission.snapshot}.")
    for job in submission.jobs:
        print_line(f"\n{job.stage}: {job.script}")
        print_line(job.shell_line())
    if submission.jobs:
        print_line(f"\nscontrol release ${submission.jobs[0].stage}")
    print_line(f"\nThe same is in {recipe.run.plan}. Nothing was submitted.")
    print_line(f"To submit it: {command}")


def job_table(submission: Submission, planned: Recipe, path: Path) -> Table:
    table = Table(title=f"{planned.name}: {path}, on Slurm", title_justify="left", show_lines=True)
    for heading in ("job", "after", "asks for", "what", "result"):
        table.add_column(heading, overflow="fold")
    jobs = {job.stage: job for job in submission.jobs}
    for stage, what, result in describe_stages(planned, " in the job", engines_of_evaluation(planned)):
        if stage in jobs:
            after = ", ".join(jobs[stage].parents) or "-"
            table.add_row(stage, after, asked_for(jobs[stage].config), Text(what), Text(result))
        else:
            table.add_row(stage, "-", "done already, no job", Text(what), Text(result))
    return table


def asked_for(config: JobConfig) -> str:
    """`4 nodes x 8 GPUs, 32 CPUs a task, 6:00:00`."""
    nodes, gpus = config.nodes or 1, config.num_gpus
    parts = [f"{nodes} node{'s' if nodes > 1 else ''}" + (f" x {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "")]
    parts += [f"{config.cpus_per_task} CPUs a task"] if config.cpus_per_task else []
    parts += [f"{config.memory} a node" if _amount(config.memory) else "all memory of a node"] if config.memory else []
    parts += [config.time] if config.time else []
    parts += [f"partition {config.partition}"] if config.partition else []
    parts += ["whole nodes"] if config.exclusive else []
    return ", ".join([*parts, *config.options])


def usable_on_a_node(train: TrainConfig, job: JobConfig) -> int | None:
    """Bytes that a rank may use on the cluster. None if neither the recipe nor the memory of the job says how many."""
    if train.gpu_memory_gib is not None:
        return usable_bytes(train, 1)
    if job.num_gpus or job.memory is None or not _amount(job.memory):
        return None
    return int(_amount(job.memory) * USABLE_FRACTION)  # one rank a node where there are no GPUs


def _amount(memory: str) -> int:
    """Bytes of a size as in sbatch --mem. 0 means all memory of a node."""
    return int(memory.rstrip("KMGT")) * _UNITS.get(memory[-1], _UNITS["M"])
