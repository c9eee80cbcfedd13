"""What the batch script of a job runs, once, on the job's first node: one attempt at one stage.

    python -P -m launcher.slurm.attempt STAGE RECIPE [key=value ...]

It starts the stage's steps on the job's nodes with srun, passes on "save and stop", and ends with the stage's exit
code. Nothing slow is imported here: until `main` has its handlers, a signal would kill it.
"""

import os
import signal
import subprocess
import sys
from functools import partial

from cluster.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, TunesmithError
from launcher.slurm import container

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.2
asked: list[int] = []  # stop signals that nobody has passed on yet


def python_module(module: str, *arguments: str) -> list[str]:
    """The command line of one of our modules, inside the job's container if it has one.

    -P: a folder of the same name in the working directory is not ours.
    """
    inside = container.of_job()
    return [*(inside.command() if inside else [sys.executable]), "-P", "-m", module, *arguments]


def train(recipe: list[str]) -> int:
    """One supervisor per node, which starts the node's ranks.

    If one fails, srun ends the others (--kill-on-bad-exit), and those that still run a minute after the first is done.
    """
    options = ["--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=60"]
    return run_step([*srun(), *options, *python_module("launcher.node", "train", *recipe)])


def export(recipe: list[str]) -> int:
    """A step of one node."""
    return run_step([*srun(), "--nodes=1", "--ntasks=1", *python_module("launcher.cli", "export", *recipe)])


def generate(stage: str, recipe: list[str]) -> int:
    """A Ray over all nodes, and the stage as its driver on this one."""
    from launcher.slurm import ray_job

    return ray_job.run(stage, recipe, asked)


def srun() -> list[str]:
    """srun, told what it does not take over from sbatch, or should not.

    Since 22.05 it no longer takes over how many CPUs a task has. It does take over the --export of a job that lists
    variables, and would pass on those alone: not PYTHONPATH, which the job's script has set.
    """
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    inside = container.of_job()
    options = [f"--cpus-per-task={cpus}"] if cpus else []
    return ["srun", "--export=ALL", *options, *(inside.srun_options() if inside else [])]


def run_step(argv: list[str]) -> int:
    """Run a step to its end, and hand on every wish to stop as SIGUSR2. Returns its exit code.

    srun passes USR2 to the tasks of all nodes, whereas TERM makes it end the step; and Slurm, when it sends TERM to
    the batch script, has sent it to the steps as well.
    """
    if asked:
        return EXIT_PREEMPTED
    step = subprocess.Popen(argv)
    while True:
        try:
            code = step.wait(POLL_SECONDS)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if asked:
                asked.clear()
                step.send_signal(signal.SIGUSR2)


STAGES = {
    "synthesize": partial(generate, "synthesize"),
    "train": train,
    "export": export,
    "evaluate": partial(generate, "evaluate"),
}


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] not in STAGES:
        print(f"error: expected one of {', '.join(STAGES)}, then a recipe, then key=value ...", file=sys.stderr)
        return EXIT_BAD_INPUT
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _frame: asked.append(number))
    try:
        return STAGES[argv[0]](argv[1:])
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
