"""The supervisor of a job, which runs on the job's first node: one attempt at one stage.

    python -P -m launcher.job.supervisor STAGE RECIPE [key=value ...]

It starts the stage's steps on the job's nodes with srun and passes the request to save and stop on to them. The job's
script (slurm/attempt.sh) starts it, and requeues the job if the supervisor ends with EXIT_RETRY or is killed. See
attempt.py for a job that `<run>/jobs.jsonl` lists: it decides whether there is another attempt.

Nothing slow is imported here: until `main` has its handlers, a signal would kill it.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial

from cluster.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_RETRY, TunesmithError
from cluster.nodes.topology import export_hosts
from cluster.processes.awake import AwakeClock
from cluster.processes.signals import StopRequest
from cluster.run.fence import Superseded
from launcher.slurm.client import Slurm
from launcher.slurm.container import job_container, python_module, step_options
from launcher.slurm.snapshot import CODE_VARIABLE, RUNNING_CODE

POLL_SECONDS = 0.2
EXIT_OVERDUE = 124  # as timeout(1) has it
KILL_SECONDS = 30.0  # srun needs at most as long to end the tasks of all nodes


class Steps:
    """The steps of this job, which run one after another."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        # Called regularly while a step runs. An error that one of them raises ends the step and the attempt.
        self.checks: list[Callable[[], None]] = []

    def run(self, argv: list[str], limit_seconds: float = math.inf, can_save: bool = True) -> int:
        """Run a step to its end and return its exit code, or EXIT_OVERDUE if it was ended after `limit_seconds`.

        A request to stop is passed on as SIGUSR2. A step that cannot save is ended instead. srun passes USR2 to the
        tasks of all nodes. TERM would make srun end the step; Slurm sends it to the steps as well as to the script.
        """
        if self.stop.is_set:
            return EXIT_RETRY
        step = subprocess.Popen(argv)
        clock = AwakeClock()
        while True:
            try:
                code = step.wait(POLL_SECONDS)
                if code and self.stop.is_set and not can_save:  # Slurm's signal to the step has ended it
                    return EXIT_RETRY
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                if self.stop.is_set and not can_save:
                    end_step(step, 0)
                    return EXIT_RETRY
                if self.stop.pending:
                    self.stop.pending.clear()
                    step.send_signal(signal.SIGUSR2)
            if clock() > limit_seconds:
                end_step(step, 0)
                return EXIT_OVERDUE
            try:
                for check in self.checks:
                    check()
            except Superseded:
                step.kill()  # with TERM srun would end the step of the newer attempt, which has the same id
                raise
            except TunesmithError as error:
                end_step(step, getattr(error, "grace_seconds", 0.0))
                raise

    def run_on_all_nodes(self, argv: list[str], limit_seconds: float) -> int:
        """A step of one task on every node, which cannot save."""
        return self.run([*srun(), *argv], limit_seconds, can_save=False)


def end_step(step: subprocess.Popen, grace_seconds: float) -> None:
    """End a step on all nodes, after a request to save and stop if there are `grace_seconds`."""
    if grace_seconds:
        step.send_signal(signal.SIGUSR2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            step.wait(grace_seconds)
    step.send_signal(signal.SIGTERM)  # srun then kills the tasks, also stopped ones
    try:
        step.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired:  # a node does not answer; Slurm ends the rest with the job
        step.kill()
        step.wait()


def srun(num_nodes: int | None = None) -> list[str]:
    """The beginning of an srun command for one task on each of `num_nodes` nodes. None means all nodes of the job.

    It names what srun does not take over from sbatch, or should not. Since 22.05 srun does not take over the number of
    CPUs per task. It does take over --export, and would give the step only the listed variables, without PYTHONPATH,
    which the job's script has set.
    """
    num_nodes = num_nodes or int(os.environ["SLURM_JOB_NUM_NODES"])
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    options = [f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1"]
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    return ["srun", "--export=ALL", *options, *step_options()]


def train(steps: Steps, recipe: list[str]) -> int:
    """One supervisor per node, which starts the node's ranks.

    If one fails, srun ends the others (--kill-on-bad-exit). A minute after the first has finished it ends the rest.
    """
    options = ["--kill-on-bad-exit=1", "--wait=60"]
    return steps.run([*srun(), *options, *python_module("launcher.job.node", "train", *recipe)])


def export(steps: Steps, recipe: list[str]) -> int:
    """A step of one node."""
    return steps.run([*srun(1), *python_module("launcher.cli", "export", *recipe)])


def run_with_ray(stage: str, steps: Steps, recipe: list[str]) -> int:
    """Ray over all nodes, and the stage as its driver on this node."""
    from launcher.job import ray_job

    return ray_job.run(stage, recipe, steps.stop, steps.checks)


STAGES: dict[str, Callable[[Steps, list[str]], int]] = {
    "synthesize": partial(run_with_ray, "synthesize"),
    "train": train,
    "export": export,
    "evaluate": partial(run_with_ray, "evaluate"),
}


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] not in STAGES:
        print(f"error: expected one of {', '.join(STAGES)}, then a recipe, then key=value ...", file=sys.stderr)
        return EXIT_BAD_INPUT
    steps = Steps(StopRequest().install())
    stage, recipe = argv[0], argv[1:]
    try:
        from launcher.job.attempt import open_attempt

        hosts = tuple(Slurm().host_names(os.environ["SLURM_JOB_NODELIST"]))
        if job_container() is not None:
            export_hosts(os.environ, hosts)
        os.environ[CODE_VARIABLE] = str(RUNNING_CODE)
        attempt = open_attempt(stage, recipe, hosts)
        if attempt is None:
            return STAGES[stage](steps, recipe)
        steps.checks += attempt.checks()
        return attempt.execute(lambda: STAGES[stage](steps, recipe), steps.run_on_all_nodes)
    except (TunesmithError, OSError) as error:  # an OSError is of the run folder
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
