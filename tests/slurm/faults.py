"""Faults that strike a chained run on the bed, each undone when it has had its effect."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.slurm.chained import ChainedRun

NOTICE_SECONDS = 180  # until Slurm has noticed a dead node and another attempt has begun
FORGOTTEN_SECONDS = 5
SAVED_SECONDS = 15
NOTICE_FIRST = "SlurmctldParameters=preempt_send_user_signal"  # newer: PreemptParameters=send_user_signal


@dataclass
class Strike:
    """A chained run in the middle of an attempt, and the dice."""

    run: ChainedRun
    stage: str
    rng: random.Random

    @property
    def attempt(self) -> dict:
        return self.run.events("attempt started")[-1]

    def any_host(self) -> str:
        return self.rng.choice(self.attempt["hosts"])

    def wait_next_attempt(self) -> None:
        """Until another attempt has begun; or until the stage is done, for a fault may come too late to matter."""
        number = self.attempt["fencing_token"]

        def went_on() -> bool:
            return self.attempt["fencing_token"] > number or bool(self.run.events("done", "gave up"))

        self.run.wait(f"attempt {number + 1}", went_on, NOTICE_SECONDS)


def kill_a_process(strike: Strike) -> str:
    """Any of the run on a node: a rank, torchrun, the supervisor of the node, that of the job, srun. Not the batch
    script, without which Slurm takes the job for failed."""
    host, commands = strike.any_host(), strike.run.processes()
    pids = sorted(pid for pid in strike.run.processes_on(host) if "slurm_script" not in commands.get(pid, ""))
    if not pids:
        return f"{host}: no process left"
    pid = strike.rng.choice(pids)
    command = commands.get(pid, "")
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return f"{host}: {' '.join(part.rsplit('/', 1)[-1] for part in command.split()[:6])}"


def kill_a_node(strike: Strike, host: str | None = None) -> str:
    host = host or strike.any_host()
    with strike.run.bed.powered_off(host):
        strike.wait_next_attempt()
    return host


def cut_off_the_batch_host(strike: Strike, until: Callable[[], bool] = lambda: True) -> str:
    """Cut it off until another attempt has begun, and `until` holds too."""
    host = strike.attempt["hosts"][0]
    node = strike.run.bed.nodes[host]
    node.partition()
    try:
        strike.wait_next_attempt()
        strike.run.wait("what was cut off to end", until, NOTICE_SECONDS)
    finally:
        node.heal()
    strike.run.bed.wait_node(host, {"IDLE", "ALLOCATED", "MIXED"}, 120)
    return host


def kill_slurmd(strike: Strike) -> str:
    """Back before Slurm misses it; or later, and then what it had started is still there when others take over."""
    host, is_late = strike.any_host(), strike.rng.random() < 0.5
    strike.run.bed.kill_slurmd(host)
    if is_late:
        strike.wait_next_attempt()
    else:
        time.sleep(strike.rng.uniform(1, 5))
    strike.run.bed.start_slurmd(host)
    return f"{host}, back {'when others had taken over' if is_late else 'at once'}"


def kill_the_controller(strike: Strike) -> str:
    """Once it has saved what it knows of the chain: from what it forgets with its last seconds no client recovers."""
    seconds = strike.rng.uniform(1, 10)
    saved = strike.run.bed.folder / "state" / "job_state"
    changed_at = max(row["time"] for row in strike.run.jobs() + strike.run.events())
    with contextlib.suppress(AssertionError):  # it saves every few seconds, where there is anything new
        strike.run.wait(
            "a saved state", lambda: saved.exists() and saved.stat().st_mtime > changed_at + 1, SAVED_SECONDS
        )
    strike.run.bed.kill_controller()
    time.sleep(seconds)
    strike.run.bed.start_controller()
    return f"back after {seconds:.0f} s{go_on_if_forgotten(strike.run, strike.stage)}"


def go_on_if_forgotten(run: ChainedRun, stage: str) -> str:
    """A slurmctld that is killed forgets its last seconds: that a job was released, or all jobs of the chain, and then
    no job goes on. Do what its user would: release it, or start the chain again as `tunesmith resume` does."""

    def known() -> set[int]:
        return {run.job(stage)} & run.bed.squeue().keys()

    try:
        run.wait("a job of the chain", lambda: known() or run.events("done", "gave up"), FORGOTTEN_SECONDS)
    except AssertionError:
        (argv,) = [row["argv"] for row in run.jobs() if int(row["job_id"]) == run.job(stage)]
        job = run.submit(stage, *argv[2 : argv.index(str(run.script))])
        return f", and had forgotten all jobs of the chain: started again as job {job}"
    if held := [job for job in known() if run.bed.job(job)["Reason"] == "JobHeldUser"]:
        run.bed.client("scontrol", "release", ",".join(map(str, held)))
        return f", and had forgotten that {held} were released"
    return ""


def scancel(strike: Strike, *options: str) -> str:
    """A fault that comes when the job is over, and the next has not begun, hits nothing."""
    job = strike.attempt["job"]
    try:
        strike.run.bed.client("scancel", *options, job)
    except subprocess.CalledProcessError:
        if strike.run.bed.squeue().get(int(job), "COMPLETING") != "COMPLETING":
            raise
        return f"job {job}: over already"
    return f"job {job}"


def ask_to_stop(strike: Strike) -> str:
    """What --signal=B:USR2 does before the time limit."""
    return scancel(strike, "--batch", "--signal=USR2")


def preempt(strike: Strike) -> str:
    urgent = strike.run.bed.write_script("urgent.sh", "sleep 2")
    job = strike.run.bed.sbatch(urgent, options=["--partition=high", "--nodes=3", "--exclusive"])
    strike.run.bed.wait_state(job, {"COMPLETED"}, NOTICE_SECONDS)
    return f"by job {job}"


def preempt_by_notice(strike: Strike) -> str:
    """As an admin can have it: the job's own signal, at once, before Slurm's."""
    with strike.run.bed.configured(NOTICE_FIRST):
        return preempt(strike)


def slow_down(strike: Strike) -> str:
    """Bursts in which all of a node's processes stand still."""
    host = strike.any_host()
    for _ in range(3):
        pids = strike.run.processes_on(host)
        for number, seconds in ((signal.SIGSTOP, 1.0), (signal.SIGCONT, 0.5)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(seconds)
    return host


FAULTS: dict[str, Callable[[Strike], str]] = {
    function.__name__.replace("_", " "): function
    for function in (
        kill_a_process, kill_a_node, cut_off_the_batch_host, kill_slurmd, kill_the_controller,
        ask_to_stop, preempt, preempt_by_notice, slow_down,
    )
}  # fmt: skip
