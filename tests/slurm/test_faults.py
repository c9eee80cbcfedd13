"""Faults strike a chained training of two nodes with real torchrun and DeepSpeed: its weights come out bit for bit the
same as those of a training that nothing struck."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm import faults
from tests.slurm.bed import SlurmBed
from tests.slurm.faults import Strike
from tests.slurm.training import make_training, weights

pytestmark = [pytest.mark.slurm, pytest.mark.long]

STRIKE_AT = 25  # two checkpoints of ten steps are there by then
END_SECONDS = 400


@pytest.fixture(scope="module")
def undisturbed(slurm_cluster: SlurmBed, tiny_model: Path) -> dict[str, str]:
    run = make_training(slurm_cluster, tiny_model, "undisturbed")
    run.submit("train", "--nodes=2")
    run.wait_event("done", END_SECONDS)
    run.wait_quiet(60)
    return weights(run)


def rank_on(strike: Strike, host: str) -> int:
    """The rank of a node, by its pid on this machine; children of its own, if any, came later."""
    commands = strike.run.processes()
    return min(pid for pid in strike.run.processes_on(host) if "-m trainer.train" in commands[pid].split("launcher")[0])


def kill_a_rank(strike: Strike) -> None:
    host, job, began = strike.attempt["hosts"][1], strike.attempt["job"], time.monotonic()
    os.kill(rank_on(strike, host), signal.SIGKILL)
    strike.run.wait_event("crashed", 60)
    assert time.monotonic() - began < 30, "the other rank must not be left waiting"
    path = strike.run.run / f"attempt-{job}-0" / "node-1.exit.json"
    assert json.loads(path.read_text())["exit_code"] == 137


def kill_the_batch_host(strike: Strike) -> None:
    faults.kill_a_node(strike, strike.attempt["hosts"][0])


def kill_another_node(strike: Strike) -> None:
    faults.kill_a_node(strike, strike.attempt["hosts"][1])


def cut_off_the_batch_host(strike: Strike) -> None:
    old = set(strike.run.processes_on(strike.attempt["hosts"][0]))
    faults.cut_off_the_batch_host(strike, lambda: not old & strike.run.processes().keys())
    taken_over = strike.attempt["time"]
    late = [row for row in strike.run.metrics() if row["fencing_token"] == 1 and row["time"] > taken_over + 1]
    assert late == []


def signals_of(strike: Strike, job: str) -> set[str]:
    """What the supervisors of the job's two nodes were sent."""
    folder = strike.run.run / f"attempt-{job}-0"
    return {name for rank in (0, 1) for name in json.loads((folder / f"node-{rank}.exit.json").read_text())["signals"]}


def preempt(strike: Strike) -> None:
    """Slurm's own signal goes to the steps; GraceTime later it would kill."""
    job = strike.attempt["job"]
    faults.preempt(strike)
    (event,) = strike.run.wait_event("preempted", 90)
    assert event["code"] == 75 and "SIGTERM" in signals_of(strike, job)


def preempt_by_notice(strike: Strike) -> None:
    """The signal of --signal goes to the batch script, which hands it on."""
    job = strike.attempt["job"]
    faults.preempt_by_notice(strike)
    (event,) = strike.run.wait_event("preempted", 90)
    assert event["code"] == 75 and signals_of(strike, job) == {"SIGUSR2"}


def kill_slurmd(strike: Strike) -> None:
    """For so long that Slurm takes the node for dead; its rank, which stood still meanwhile, wakes up during the next
    attempt's."""
    bed, host = strike.run.bed, strike.attempt["hosts"][1]
    old, rank = set(strike.run.processes_on(host)), rank_on(strike, host)
    os.kill(rank, signal.SIGSTOP)
    bed.kill_slurmd(host)
    strike.wait_next_attempt()
    os.kill(rank, signal.SIGCONT)
    strike.run.wait("the end of the old ranks", lambda: not old & strike.run.processes().keys(), 60)
    bed.start_slurmd(host)


def kill_slurmd_briefly(strike: Strike) -> None:
    bed, host = strike.run.bed, strike.attempt["hosts"][1]
    bed.kill_slurmd(host)
    time.sleep(2)
    bed.start_slurmd(host)


def slow_down_a_rank(strike: Strike) -> None:
    pid = rank_on(strike, strike.attempt["hosts"][1])
    for _ in range(5):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.5)


FAULTS: dict[str, tuple[Callable[[Strike], object], int]] = {  # and how many attempts it takes in all
    "a rank is killed": (kill_a_rank, 2),
    "a node is killed": (kill_another_node, 2),
    "the batch host is killed": (kill_the_batch_host, 2),
    "slurmctld is killed": (faults.kill_the_controller, 1),
    "slurmd is killed": (kill_slurmd, 2),
    "slurmd is killed and comes back": (kill_slurmd_briefly, 1),
    "the batch host is cut off": (cut_off_the_batch_host, 2),
    "a job of higher priority": (preempt, 2),
    "a job of higher priority, after a notice": (preempt_by_notice, 2),
    "the time limit": (faults.ask_to_stop, 2),
    "a slow node": (slow_down_a_rank, 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_weights_are_those_of_an_undisturbed_training(
    slurm_cluster: SlurmBed, tiny_model: Path, undisturbed: dict[str, str], name: str
) -> None:
    strike, num_attempts = FAULTS[name]
    run = make_training(slurm_cluster, tiny_model, re.sub(r"\W+", "-", name))
    run.submit("train", "--nodes=2")
    run.wait_step(STRIKE_AT, 180)
    strike(Strike(run, "train", random.Random(0)))
    run.wait_event("done", END_SECONDS)
    run.wait_quiet(60)
    assert weights(run) == undisturbed != {}
    assert run.result("train")["status"] == "done"
    assert len(run.events("attempt started")) == num_attempts
    assert run.processes() == {}
    claims = [row["fencing_token"] for row in run.metrics()]
    assert claims == sorted(claims)
