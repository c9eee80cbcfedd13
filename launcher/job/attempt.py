"""What the batch script of a job runs, once, on the job's first node: one attempt at one stage.

    python -P -m launcher.job.attempt STAGE RECIPE [key=value ...]

It starts the stage's steps on the job's nodes with srun, passes on "save and stop", and ends with the stage's exit
code. A job that `<run>/jobs.jsonl` lists is part of a chain: see continuation.py for who goes on if it dies.

Nothing slow is imported here: until `main` has its handlers, a signal would kill it.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from cluster.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, TunesmithError
from cluster.nodes.topology import tell_hosts
from launcher.slurm.container import of_job, python_module, step_options

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.2
OVERDUE = 124  # as timeout(1) says it
KILL_SECONDS = 30.0  # srun takes so long at most to end the tasks of all nodes
asked: list[int] = []  # stop signals that nobody has passed on yet
# What is done now and then while a step runs. An error that one of them raises ends the step and the attempt.
watches: list[Callable[[], None]] = []


def train(recipe: list[str]) -> int:
    """One supervisor per node, which starts the node's ranks.

    If one fails, srun ends the others (--kill-on-bad-exit), and those that still run a minute after the first is done.
    """
    options = ["--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=60"]
    return run_step([*srun(), *options, *python_module("launcher.job.node", "train", *recipe)])


def export(recipe: list[str]) -> int:
    """A step of one node."""
    return run_step([*srun(), "--nodes=1", "--ntasks=1", *python_module("launcher.cli", "export", *recipe)])


def generate(stage: str, recipe: list[str]) -> int:
    """A Ray over all nodes, and the stage as its driver on this one."""
    from launcher.job import ray_job

    return ray_job.run(stage, recipe, asked, watches)


def on_all_nodes(argv: list[str], limit_seconds: float) -> int:
    """A step of one task on every node."""
    return run_step([*srun(), "--ntasks-per-node=1", *argv], limit_seconds, can_save=False)


def srun() -> list[str]:
    """srun, told what it does not take over from sbatch, or should not.

    Since 22.05 it no longer takes over how many CPUs a task has. It does take over the --export of a job that lists
    variables, and would pass on those alone: not PYTHONPATH, which the job's script has set.
    """
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    options = [f"--cpus-per-task={cpus}"] if cpus else []
    return ["srun", "--export=ALL", *options, *step_options()]


def run_step(argv: list[str], limit_seconds: float = math.inf, can_save: bool = True) -> int:
    """Run a step to its end, and hand on every wish to stop as SIGUSR2. Returns its exit code; OVERDUE if it was ended
    because it took longer than `limit_seconds`. A step that cannot save is ended by the first wish to stop.

    srun passes USR2 to the tasks of all nodes, whereas TERM makes it end the step; and Slurm, when it sends TERM to
    the batch script, has sent it to the steps as well.
    """
    if asked:
        return EXIT_PREEMPTED
    step = subprocess.Popen(argv)
    deadline = time.monotonic() + limit_seconds
    while True:
        try:
            code = step.wait(POLL_SECONDS)
            if code and asked and not can_save:  # Slurm asked the step as well, and that was its end
                return EXIT_PREEMPTED
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if asked:
                if not can_save:
                    end_step(step, 0)
                    return EXIT_PREEMPTED
                asked.clear()
                step.send_signal(signal.SIGUSR2)
        if time.monotonic() > deadline:
            end_step(step, 0)
            return OVERDUE
        try:
            for watch in watches:
                watch()
        except TunesmithError as error:
            end_step(step, getattr(error, "grace_seconds", 0.0))
            raise


def end_step(step: subprocess.Popen, grace_seconds: float) -> None:
    """End a step on all nodes, after it had so long to save and stop."""
    if grace_seconds:
        step.send_signal(signal.SIGUSR2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            step.wait(grace_seconds)
    step.send_signal(signal.SIGTERM)  # on which srun kills the tasks, stopped ones too
    try:
        step.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired:  # a node that does not answer; Slurm ends what is left with the job
        step.kill()
        step.wait()


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
    stage, recipe = argv[0], argv[1:]
    try:
        from launcher.job.continuation import open_attempt

        if of_job() is not None:
            tell_hosts(os.environ)
        attempt = open_attempt(stage, recipe, os.environ)
        if attempt is None:
            return STAGES[stage](recipe)
        watches.extend(attempt.watches())
        return attempt.execute(lambda: STAGES[stage](recipe), on_all_nodes)
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
