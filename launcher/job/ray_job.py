"""A stage that generates text, over all nodes of a job: a Ray of its own, and the stage's process as its driver.

The supervisor in this file runs on the job's first node. It starts the driver there, and a step on every node
(ray_node.py):

    start the driver, which reads its input meanwhile      nothing to do, or bad input: the job ends
    start the head's step, then those of the other nodes   a step ends: the job ends
    wait until Ray counts exactly these nodes as alive
    give the driver the address of Ray                     the head ends: the job ends; a worker: go on without it
    take down what was started, and nothing else

The exit code is the driver's. What srun returns decides nothing.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import EXIT_DONE, EXIT_FAILED, EXIT_RETRY, Preempted, TunesmithError
from cluster.files import write_json
from cluster.log import stage_logger
from cluster.nodes.rendezvous import is_listening, read_json
from cluster.nodes.topology import restart_count
from cluster.processes.awake import AwakeClock
from cluster.processes.descendants import die_with_parent
from cluster.processes.signals import StopRequest
from cluster.ray.cluster import ADDRESS_FILE
from cluster.ray.folder import new_token, private_folder, ray_environment
from cluster.run.fence import Superseded, run_lock, verify
from cluster.run.manifest import is_sealed
from cluster.run.rundir import RunDir
from launcher.job.allocation import NodeAllocation, await_allocation, node_step, step_environment
from launcher.job.ray_node import DONE, KEEP_LOGS
from launcher.recipe import Recipe, load
from launcher.slurm.client import Slurm
from launcher.slurm.container import python_module, step_options

log = stage_logger("ray")
POLL_SECONDS = 0.1
REPORT_SECONDS = 2.0  # between two looks for the exit report of a node
UP_SECONDS = 300  # from the first step to the last node that is alive; NFS may show a file a minute late
SAVE_SECONDS = 300  # for a driver that was asked to stop; Slurm may allow less
SAVE_WITHOUT_HEAD_SECONDS = 15  # the driver's calls to Ray hang, but every finished request is on disk already
END_SECONDS = 30  # for a node to take its Ray down


@dataclass
class NodeStep:
    """The step that keeps Ray up on one node."""

    rank: int
    allocation: NodeAllocation
    srun: subprocess.Popen
    rendezvous_dir: Path
    _next_look: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether srun has ended, or the node has written its exit report: srun may not hear of the end of its step."""
        if self.srun.poll() is not None:
            return True
        if time.monotonic() < self._next_look:  # the folder is on a shared file system
            return False
        self._next_look = time.monotonic() + REPORT_SECONDS
        return self.exit_report is not None

    @property
    def exit_report(self) -> dict | None:
        return read_json(self.rendezvous_dir / f"node-{self.rank}.exit.json")

    def read_address(self) -> dict | None:
        """What the node has written about itself: see ray_node.run. None means that it has not yet."""
        return read_json(self.rendezvous_dir / f"node-{self.rank}.json")

    def failure_reason(self) -> str:
        """Why the node ended: from its exit report if it could write one."""
        report = self.exit_report
        code = self.srun.poll()
        ended = "its step ended, and srun did not notice it" if code is None else f"its step ended (srun: {code})"
        reason = report["reason"] if report and report["reason"] else ended
        return f"node {self.allocation.host}: {reason}"

    def send(self, message: str) -> None:
        """Send a line to the node. A node that has ended does not get it."""
        with contextlib.suppress(BrokenPipeError):
            self.srun.stdin.write(f"{message}\n".encode())
            self.srun.stdin.flush()


class DriverEnded(Exception):
    """The driver ended before Ray was up."""


@dataclass
class RayJob:
    """Everything that one attempt starts."""

    run_dir: RunDir
    rendezvous_dir: Path
    allocations: list[NodeAllocation]
    stop: StopRequest
    checks: Sequence[Callable[[], None]] = ()
    steps: list[NodeStep] = field(default_factory=list)
    token: str = field(default_factory=new_token)
    _others: list[subprocess.Popen] = field(default_factory=list)  # processes on this node
    _driver: subprocess.Popen | None = None  # one of them, from `run` on
    _clock: AwakeClock = field(default_factory=AwakeClock)

    def run(self, command: list[str]) -> int:
        """Bring Ray up, run `command` on it, and take Ray down. Returns the exit code."""
        last_message = KEEP_LOGS
        with private_folder(self.token) as folder:
            environment = {**os.environ, **ray_environment(folder)}
            for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):  # Ray prefers these to our files
                environment.pop(name, None)
            address = self.rendezvous_dir / "address"
            try:
                self._driver = self._start(command, {**environment, ADDRESS_FILE: str(address)})
                with contextlib.suppress(DriverEnded):
                    write_json(address, self._bring_up(environment))
                code = self._drive()
                last_message = DONE if code in (EXIT_DONE, EXIT_RETRY) else KEEP_LOGS
                return code
            finally:
                self._take_down(last_message)

    def _bring_up(self, environment: dict[str, str]) -> str:
        """Start Ray on all nodes and return the head's HOST:PORT. Raises TunesmithError naming a node that fails."""
        deadline = self._clock() + UP_SECONDS
        self._start_step(0, None)
        while (node := self.steps[0].read_address()) is None:
            self._wait(deadline)
        head = f"{node['address']}:{node['head_port']}"
        while len(self.allocations) > 1 and not is_listening(node["address"], node["head_port"]):
            self._wait(deadline)
        for rank in range(1, len(self.allocations)):
            self._start_step(rank, head)
        self._await_all(head, deadline, environment)
        num_cpus = sum(node.num_cpus for node in self.allocations)
        num_gpus = sum(node.num_gpus for node in self.allocations)
        log.info(f"Ray is up: {', '.join(self._hosts())}; {num_cpus} CPUs, {num_gpus} GPUs")
        return head

    def _await_all(self, head: str, deadline: float, environment: dict[str, str]) -> None:
        """Wait until the nodes that Ray counts as alive are those of this job."""
        addresses = []
        for step in self.steps:
            while (node := step.read_address()) is None:
                self._wait(deadline)
            addresses.append(node["address"])
        if len(set(addresses)) < len(addresses):
            listed = ", ".join(map(" ".join, zip(self._hosts(), addresses, strict=True)))
            raise TunesmithError(
                f"several nodes have one address ({listed}). Set GLOO_SOCKET_IFNAME to their interface."
            )
        seconds = str(max(1, round(deadline - self._clock())))
        command = python_module("launcher.job.ray_ready", head, seconds, *addresses)
        check = self._start(command, environment, stdout=subprocess.PIPE)
        while check.poll() is None:
            self._wait(deadline + END_SECONDS)
        if check.returncode != 0:
            reason = check.stdout.read().decode(errors="replace").strip().splitlines()[-1:] or ["the check was killed."]
            raise TunesmithError(reason[0])

    def _hosts(self) -> list[str]:
        return [step.allocation.host for step in self.steps]

    def _start_step(self, rank: int, head: str | None) -> None:
        allocation = self.allocations[rank]
        arguments = [str(self.rendezvous_dir), str(rank), f"--logs={self.run_dir.ray_logs}"]
        arguments += [f"--cpus={allocation.num_cpus}", f"--gpus={allocation.num_gpus}"]
        arguments += [f"--memory-mib={allocation.memory_mib}"]
        arguments += [] if head is None else [f"--head={head}", f"--head-host={self.allocations[0].host}"]
        srun = subprocess.Popen(
            [*node_step(allocation), *step_options(), *python_module("launcher.job.ray_node", *arguments)],
            env=step_environment(os.environ),
            stdin=subprocess.PIPE,
            preexec_fn=die_with_parent,
        )
        self.steps.append(NodeStep(rank, allocation, srun, self.rendezvous_dir))
        self.steps[-1].send(self.token)

    def _wait(self, deadline: float) -> None:
        """Wait a moment for nodes that are coming up. Raises if a node or the driver has ended, or at the deadline."""
        if self._driver.poll() is not None:
            raise DriverEnded
        for step in self.steps:
            if step.has_ended:
                raise TunesmithError(step.failure_reason())
        if self.stop.is_set:
            raise Preempted("the job was asked to stop before Ray was up. Nothing had begun.")
        if self._clock() > deadline:
            late = [step.allocation.host for step in self.steps if step.read_address() is None] or self._hosts()
            raise TunesmithError(
                f"Ray is not up after {UP_SECONDS} s. Missing: {', '.join(late)}. Their errors may be above. "
                f"If not, check that the run folder {self.run_dir.root} is on a file system that all nodes share."
            )
        time.sleep(POLL_SECONDS)

    def _drive(self) -> int:
        """Wait for the driver's end while watching the nodes. Returns its exit code."""
        driver, head, workers = self._driver, self.steps[0], self.steps[1:]
        save_until = None  # set once the driver has been asked to stop
        while driver.poll() is None:
            for check in self.checks:
                check()  # an error that it raises ends the job
            if self._should_stop() and save_until is None:
                driver.send_signal(signal.SIGUSR2 if step_options() else signal.SIGTERM)  # TERM would end srun's step
                save_until = self._clock() + SAVE_SECONDS
            if head.has_ended:
                if save_until is None:
                    driver.kill()
                    raise TunesmithError(f"Ray's head has ended, so the job cannot continue. {head.failure_reason()}")
                save_until = min(save_until, self._clock() + SAVE_WITHOUT_HEAD_SECONDS)
            if save_until is not None and self._clock() > save_until:
                driver.kill()
            for step in [step for step in workers if step.has_ended]:
                workers.remove(step)
                log.info(f"{step.failure_reason()}; continuing with {1 + len(workers)} of {len(self.steps)} nodes")
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(POLL_SECONDS)
        code = driver.returncode
        was_ended_by_us = code < 0 or code > 128 or head.has_ended  # above 128: how srun reports a signal
        if save_until is not None and was_ended_by_us and code != EXIT_DONE:
            raise Preempted("the job was asked to stop. All finished requests are on disk.")
        return code if code >= 0 else 128 - code

    def _should_stop(self) -> bool:
        """Whether Slurm has asked the job to stop: by a signal to this process, or to the step on this node."""
        return self.stop.is_set or (self.rendezvous_dir / "node-0.stop").exists()

    def _start(self, argv: list[str], environment: dict[str, str], stdout: int | None = None) -> subprocess.Popen:
        """Start a process on this node that ends with this one. With a container it is a step: only steps run in it."""
        if options := step_options():
            argv, environment = [*node_step(self.allocations[0]), *options, *argv], step_environment(environment)
        process = subprocess.Popen(
            argv, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, preexec_fn=die_with_parent
        )
        self._others.append(process)
        return process

    def _take_down(self, message: str) -> None:
        """End what this attempt has started: the workers first, as they would report a lost head."""
        for process in self._others:
            process.kill()
            process.wait()
        for step in reversed(self.steps):
            step.send(message)
            with contextlib.suppress(BrokenPipeError):
                step.srun.stdin.close()
        deadline = time.monotonic() + END_SECONDS
        for end in (None, signal.SIGTERM, signal.SIGKILL):
            for step in self.steps:
                if end is not None and step.srun.poll() is None:
                    step.srun.send_signal(end)
            for step in self.steps:
                seconds = deadline - time.monotonic()
                if step.exit_report is not None:  # its srun ends at once, or does not notice the end
                    seconds = min(seconds, REPORT_SECONDS)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    step.srun.wait(max(0, seconds))
            deadline = time.monotonic() + END_SECONDS / 3


def run(stage: str, arguments: list[str], stop: StopRequest, checks: Sequence[Callable[[], None]] = ()) -> int:
    """One attempt at `stage` of a recipe. Returns the exit code.

    `stop` is set when Slurm wants the job to stop. `checks` are called while the driver runs. An error that one of them
    raises ends the driver.
    """
    recipe = load(Path(arguments[0]), arguments[1:])
    run = RunDir(recipe.run_dir.resolve()).create()
    with run_lock(run.lock):
        pass  # the driver will hold it; if another job does, the error comes now and not when Ray is up
    job = os.environ["SLURM_JOB_ID"]
    # A new folder has no file of an earlier try.
    rendezvous_dir = run.attempt_dir(job, restart_count()) / f"ray-{secrets.token_hex(4)}"
    rendezvous_dir.mkdir(parents=True)
    allocations = await_allocation(job, Slurm(), lambda: stop.is_set)
    log_idle_nodes(recipe, allocations)
    write_result_file(run, stage, None)
    code, message = EXIT_FAILED, f"the supervisor of the job failed; the log of job {job} has its error."
    try:
        ray_job = RayJob(run, rendezvous_dir, allocations, stop, checks)
        code = ray_job.run(python_module("launcher.cli", stage, *arguments))
        message = f"{stage} ended with exit code {code}; the log of job {job} has its error."
    except Superseded:
        raise
    except TunesmithError as error:
        code, message = error.exit_code, str(error)
        run.event(stage, "preempted" if code == EXIT_RETRY else "failed", reason=message, job_id=job)
        raise
    finally:
        if code != EXIT_DONE:
            status = "preempted" if code == EXIT_RETRY else "failed"
            write_result_file(run, stage, {"status": status, "exit_code": code, "message": message, "job_id": job})
    return code


def write_result_file(run: RunDir, stage: str, result: dict | None) -> None:
    """Replace the stage's result; None removes it. The result of a dataset that is sealed stays.

    Raises Superseded if a newer attempt owns the run.
    """
    verify(run.root)
    if stage == "synthesize" and is_sealed(run.synthesized):
        return
    if result is None:
        run.result(stage).unlink(missing_ok=True)
    else:
        write_json(run.result(stage), result)


def log_idle_nodes(recipe: Recipe, allocations: list[NodeAllocation]) -> None:
    """Log what the engines leave idle: one engine on four nodes is allowed, but hardly ever intended."""
    num_engines, num_gpus = recipe.engine.num_replicas, sum(node.num_gpus for node in allocations)
    if num_gpus and (idle := num_gpus - num_engines * recipe.engine.gpus_per_engine) > 0:
        log.info(f"engine.num_replicas={num_engines} leaves {idle} of {num_gpus} GPUs idle")
    elif not num_gpus and num_engines < len(allocations):
        log.info(f"engine.num_replicas={num_engines} leaves some of the {len(allocations)} nodes idle")
