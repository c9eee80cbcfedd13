"""Eight things that Slurm 22.05 and Ray 2.60 do, which are hard to guess, and how our code copes.

The first test of a number shows the fact, without any code of ours. The tests after it show that our code copes. If
that is tested elsewhere, the docstring names the test. If a first test fails with other versions, the code that copes
with the fact may not be needed any more.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.run.rundir import RunDir
from launcher.job.node_health import failed_nodes
from tests.slurm import faults
from tests.slurm.bed import SlurmBed
from tests.slurm.chained import ChainedRun
from tests.slurm.faults import Strike
from tests.slurm.machine import PROJECT
from tests.slurm.test_ray_job import RAY_SECONDS, kill, running

pytestmark = pytest.mark.slurm

BIN = Path(sys.executable).parent
NO_JOB = 999_999
ONE_NODE = ["--nodes=1", "--nodelist=n1", "--cpus-per-task=2", "--mem=1500", "--no-requeue"]
# Two nodes, as if a user had written the script: `ray` from the PATH, and a Ray that may take half a minute.
START = "ray start --block --disable-usage-stats --num-cpus=1 --object-store-memory=80000000"
HEAD = f"{START} --head --include-dashboard=false"
DRIVER = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=0)
def work(): time.sleep(0.2)
while True:
    ray.get(work.remote())
    print("driver: at work", flush=True)
"""
# A batch script and a step that print when they get which signal.
LISTEN = """
note() { echo "$1 $EPOCHREALTIME"; }
export -f note
trap 'note "batch TERM"' TERM
trap 'note "batch USR2"' USR2
srun bash -c 'trap "note \\"step TERM\\"" TERM; note "step listens"; while :; do sleep 0.2; done' &
while :; do sleep 0.2; done
"""
CHECK_CHAIN = """
import sys
from types import SimpleNamespace
from cluster.errors import TunesmithError
from launcher.slurm.client import Slurm
from launcher.slurm.submit import check_chain
parent, script = sys.argv[1:]
options = ["--parsable", "--hold", "--job-name=child", f"--dependency=afterok:{parent}"]
job = Slurm().submit(["sbatch", *options, script], "child")
try:
    chain = SimpleNamespace(stage="synthesize", parents=()), SimpleNamespace(stage="train", parents=("synthesize",))
    check_chain(chain, {"synthesize": parent, "train": job}, Slurm())
except TunesmithError as error:
    print(error)
"""


@pytest.fixture
def bed(slurm_cluster: SlurmBed) -> Iterator[SlurmBed]:
    """The cluster; jobs, and what a Ray left on its nodes, are ended afterwards."""
    yield slurm_cluster
    for job in slurm_cluster.squeue():
        slurm_cluster.client("scancel", str(job))
    for name in slurm_cluster.nodes:
        for pid, command in running(slurm_cluster, name).items():
            if "ray" in command:
                os.kill(pid, signal.SIGKILL)


def submit(bed: SlurmBed, name: str, body: str, options: list[str], home: Path | None = None) -> int:
    env = {"PATH": f"{BIN}:{bed.env['PATH']}", "HOME": str(home or bed.shared), "OMP_NUM_THREADS": "1"}
    return bed.sbatch(bed.write_script(f"{name}.sh", body), options=options, env=env)


def time_of(words: str, text: str) -> float:
    """The time at the end of the first line of these words."""
    return float(next(line for line in text.splitlines() if line.startswith(words)).rpartition(" ")[2])


@pytest.mark.long
def test_1_symmetric_run_ends_with_0_when_ray_does_not_start(bed: SlurmBed) -> None:
    """Ours: test_ray_job.py, "a node that Ray cannot use ends the job and is named"."""
    body = "ray symmetric-run --address 10.77.0.11:6379 --object-store-memory=1 -- echo the command has run"
    job = submit(bed, "symmetric", body, ONE_NODE)
    assert bed.wait_state(job, {"COMPLETED"}, 120)["ExitCode"] == "0:0"
    assert "Failed to start Ray" in bed.output(job) and "the command has run" not in bed.output(job).splitlines()


@pytest.mark.long
def test_2_ray_stop_ends_the_ray_of_another_job(bed: SlurmBed) -> None:
    """Ours: test_ray_job.py, "two jobs on one node do not meet"."""
    first = submit(bed, "stopped", f"{HEAD} --port=6379 --temp-dir=/tmp/first\necho ended", ONE_NODE)
    bed.wait_output(first, "Ray runtime started", RAY_SECONDS)
    assert running(bed, "n1", "gcs/gcs_server")
    second = submit(bed, "stops", "export RAY_ADDRESS=10.77.0.11:7000 RAY_TMPDIR=/tmp/second\nray stop", ONE_NODE)
    bed.wait_state(second, {"COMPLETED"}, 60)
    bed.wait_output(first, "ended", 30)
    assert not running(bed, "n1", "gcs/gcs_server")


@pytest.mark.long
def test_3_a_token_left_in_the_home_locks_workers_out(bed: SlurmBed) -> None:
    """Ours: every test of test_ray_job.py has such a file in its HOME."""
    home = bed.shared / "home-with-token"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("left-by-an-earlier-ray-of-this-user")
    head = submit(bed, "token-head", f"{HEAD} --port=6379 --temp-dir=/tmp/token", ONE_NODE, home)
    bed.wait_output(head, "Ray runtime started", RAY_SECONDS)
    options = [option.replace("n1", "n2") for option in ONE_NODE]
    worker = submit(bed, "token-worker", f"{START} --address=10.77.0.11:6379\necho code $?", options, home)
    bed.wait_output(worker, "code ", RAY_SECONDS)
    assert "code 0" not in bed.output(worker) and "InvalidAuthToken" in bed.output(worker)


def test_4_a_parent_that_never_was_counts_as_one_that_succeeded(bed: SlurmBed) -> None:
    """Ours: a chain asks Slurm again what it has taken, and a stage looks for the result of the one before it: also
    test_continuation.py, "a child without its input says so and ends"."""
    job = submit(bed, "orphan", "echo has run", [f"--dependency=afterok:{NO_JOB}"])
    bed.wait_state(job, {"COMPLETED"}, 30)
    assert "has run" in bed.output(job)


def is_forgotten(bed: SlurmBed, job: int) -> bool:
    try:
        return not bed.job(job)
    except subprocess.CalledProcessError:
        return True


@pytest.mark.long
def test_4_a_parent_that_failed_and_is_forgotten_counts_as_one_that_succeeded(bed: SlurmBed) -> None:
    """Slurm forgets a job MinJobAge after its end (five minutes, usually)."""
    with bed.configured("MinJobAge=2"):
        parent = submit(bed, "fails", "exit 3", ["--nodes=1"])
        bed.wait_state(parent, {"FAILED"}, 30)
        bed._wait("Slurm to forget it", lambda: is_forgotten(bed, parent), 120, str)
        job = submit(bed, "child-of-a-failure", "echo has run", [f"--dependency=afterok:{parent}"])
        bed.wait_output(job, "has run", 30)


def test_4_a_chain_that_slurm_took_with_such_a_parent_is_refused(bed: SlurmBed) -> None:
    script = bed.write_script("child.sh", "true")
    (bed.shared / "check.py").write_text(CHECK_CHAIN)
    said = bed.client(sys.executable, "-P", "check.py", str(NO_JOB), str(script), env={"PYTHONPATH": str(PROJECT)})
    assert said == f"Slurm took job {NO_JOB} (synthesize), which now is unknown to it. Try again.\n"


@pytest.mark.long
@pytest.mark.parametrize("notice", [False, True], ids=["by default", "with the option"])
def test_5_who_hears_of_a_preemption_and_when(bed: SlurmBed, notice: bool) -> None:
    """The steps at once, and the batch script only when GraceTime (20 s) is over; with an option of the admin's it is
    the batch script, with the job's own signal. Ours, for both: the next test, and test_faults.py."""
    lines = [faults.NOTICE_FIRST] if notice else []
    with bed.configured(*lines):
        options = [*ONE_NODE, "--signal=B:USR2@60", "--time=10"]
        job = submit(bed, "preempted", LISTEN, options)
        bed.wait_output(job, "step listens", 30)
        options = ["--partition=high", "--nodelist=n1", "--exclusive"]
        urgent = bed.sbatch(bed.write_script("urgent.sh", "true"), options=options)
        first, second = ("batch USR2", "step TERM") if notice else ("step TERM", "batch TERM")
        started = time.time()
        bed.wait_output(job, first, 10)
        bed._wait(second, lambda: second in bed.output(job), 40, lambda: bed.output(job))
        bed.wait_state(urgent, {"COMPLETED"}, 60)
    output = bed.output(job)
    assert time_of(first, output) - started < 6
    assert 15 < time_of(second, output) - time_of(first, output) < 30
    assert ("batch USR2" in output) == notice


@pytest.mark.parametrize("preempt", [faults.preempt, faults.preempt_by_notice])
def test_5_whoever_hears_it_the_training_saves_and_the_next_attempt_goes_on(
    make_run: Callable[..., ChainedRun], preempt: Callable[[Strike], str]
) -> None:
    run = make_run(step_seconds=0.3, steps=20)
    run.submit("train", "--signal=B:USR2@60", "--time=10")
    run.wait_step(2, 60)
    preempt(Strike(run, "train", random.Random(0)))
    run.wait_event("done", 60)
    (event,) = run.events("preempted")
    assert event["code"] == 75
    assert [row["step"] for row in run.metrics()] == list(range(1, 21)), "no step was lost, and none made twice"
    run.wait_quiet(30)


@pytest.mark.long
def test_6_a_job_that_was_requeued_runs_beside_its_own_past(bed: SlurmBed) -> None:
    """Ours: every attempt has a fencing token, and what is cut off stops before its next commit:
    test_continuation.py, "a node that is cut off computes on and writes nothing once another went on"."""
    rows = bed.shared / "rows"
    body = f"while :; do echo ${{SLURM_RESTART_COUNT:-0}} $EPOCHREALTIME >>{rows}; sleep 0.2; done"
    job = submit(bed, "requeued", body, ["--nodes=1", "--exclude=n3", "--requeue"])
    host = bed.wait_state(job, {"RUNNING"}, 30)["NodeList"]
    bed._wait("a row", rows.exists, 30, str)
    bed.nodes[host].partition()
    try:
        bed.client("scontrol", "update", f"NodeName={host}", "State=DOWN", "Reason=silent")
        begun_again = lambda: [line for line in rows.read_text().splitlines() if line.startswith("1 ")]  # noqa: E731
        began = float(bed._wait("the same job again", begun_again, 60, rows.read_text)[0].split()[1])
        time.sleep(2)
    finally:
        bed.nodes[host].heal()
    late = [line for line in rows.read_text().splitlines() if line.startswith("0 ") and float(line.split()[1]) > began]
    assert len(late) > 3
    bed.client("scancel", str(job))
    bed.wait_node(host, {"IDLE"}, 60)


@pytest.mark.long
def test_7_the_driver_learns_last_that_the_head_is_gone(bed: SlurmBed) -> None:
    """Ours: test_ray_job.py, "a killed head ends the job at once". (A node that falls silent is dead to Ray after a
    minute as well; that is not shown here.)"""
    (bed.shared / "driver.py").write_text(DRIVER)
    head = submit(bed, "head", f"{HEAD} --port=6379 --temp-dir=/tmp/gcs\necho head ended $EPOCHREALTIME", ONE_NODE)
    bed.wait_output(head, "Ray runtime started", RAY_SECONDS)
    body = f"{sys.executable} driver.py 10.77.0.11:6379\necho driver ended $EPOCHREALTIME"
    driver = submit(bed, "driver", body, ONE_NODE)
    bed.wait_output(driver, "driver: at work", RAY_SECONDS)
    kill(bed, "n1", "gcs/gcs_server")
    killed_at = time.time()
    bed.wait_output(head, "head ended", 30)
    bed.wait_output(driver, "driver ended", 120)
    assert time_of("head ended", bed.output(head)) - killed_at < 10
    assert time_of("driver ended", bed.output(driver)) - killed_at > 30


def test_8_srun_hides_the_exit_code_or_leaves_the_others_running(bed: SlurmBed) -> None:
    """Ours: the next two tests; of a notice, test_train_sbatch.py, where both nodes end with 75."""
    task = "bash -c '[ $SLURM_PROCID = 1 ] && exit 93; exec sleep 6'"
    body = f"srun --kill-on-bad-exit=1 {task}; echo killed $?; SECONDS=0; srun {task}; echo left $? after $SECONDS s"
    job = submit(bed, "masked", body, ["--nodes=2", "--ntasks-per-node=1"])
    bed.wait_state(job, {"COMPLETED"}, 60)
    assert "\nkilled 143\n" in bed.output(job)
    assert time_of("left 93 after", bed.output(job).removesuffix(" s\n")) >= 5


def test_8_under_our_supervisor_the_failing_nodes_exit_code_arrives_and_each_leaves_its_own(bed: SlurmBed) -> None:
    rank = "import socket, sys, time\ntime.sleep(60 * (socket.gethostname() == 'n1'))\nsys.exit(3)"
    (bed.shared / "fails.py").write_text(rank)
    srun = "srun --ntasks-per-node=1 --kill-on-bad-exit=1"
    body = f"{srun} {sys.executable} -P -m launcher.job.node exec $PWD/exits -- fails.py\necho srun exit code $?"
    (bed.shared / "exits").mkdir()
    job = submit(bed, "fails", f"export PYTHONPATH={PROJECT}\n{body}", ["--nodes=2", "--nodelist=n[1-2]"])
    bed.wait_state(job, {"COMPLETED"}, 120)
    assert "srun exit code 3\n" in bed.output(job)
    run = RunDir(bed.shared / "exits")
    report = json.loads((run.root / f"attempt-{job}-0" / "node-1.exit.json").read_text())
    assert (report["host"], report["exit_code"]) == ("n2", 3)
    assert failed_nodes(run.attempt_dir(str(job), 0), ("n1", "n2")) == ("n2",)


@pytest.mark.long
def test_8_a_step_that_lost_a_node_may_end_with_0(bed: SlurmBed) -> None:
    body = "srun --no-kill --ntasks-per-node=1 sleep 15\necho rc $?"
    job = submit(bed, "no-kill", body, ["--nodes=2", "--nodelist=n[1-2]", "--no-kill"])
    bed.wait_state(job, {"RUNNING"}, 30)
    time.sleep(2)
    bed.restart("n2")
    bed.wait_output(job, "rc ", 60)
    assert "rc 0" in bed.output(job)


def test_8_an_exit_code_of_0_proves_nothing(make_run: Callable[..., ChainedRun]) -> None:
    run = make_run({"1": ["lie", 0]})
    run.submit("train")
    child = run.submit("export", after=("train",))
    run.wait("the export", lambda: run.result("export").get("status") == "done", 60)
    run.wait_quiet(30)
    (crash,) = run.events("crashed")
    assert crash["code"] == 1
    assert crash["reason"] == "it ended with exit code 0, but its output is not there"
    assert run.bed.job(child)["JobState"] == "COMPLETED" and len(run.events("done")) == 2
