"""Requeued jobs under a real Slurm: who goes on, who does not, and what an attempt that was cut off may still do."""

import os
import signal
import time

import pytest

from tests.slurm.bed import FINAL_STATES
from tests.slurm.chained import ChainedRun

pytestmark = pytest.mark.slurm

WEIGHTS = "0 1 2 3 4 5 "


def weights(run: ChainedRun) -> str:
    (last,) = sorted((run.run / "checkpoints").glob("step_*"))[-1:]
    return (last / "weights.txt").read_text()


def kill_supervisor(run: ChainedRun) -> None:
    """Of the attempt that runs. It cannot report how it ended."""
    words = "-m tests.slurm.scripted_supervisor train"
    (pid,) = [pid for pid, command in run.processes().items() if words in command]
    os.kill(pid, signal.SIGKILL)


def kill_batch_script(run: ChainedRun) -> None:
    (pid,) = [pid for pid, command in run.processes().items() if f"job{run.job('train'):05d}/slurm_script" in command]
    os.kill(pid, signal.SIGKILL)


def restarts(run: ChainedRun, stage: str = "train") -> int:
    return int(run.bed.job(run.job(stage))["Restarts"])


def state(run: ChainedRun, stage: str = "train") -> str:
    return run.bed.job(run.job(stage))["JobState"]


def test_a_killed_rank_costs_one_attempt_and_the_children_wait_for_the_next(make_run) -> None:
    run = make_run({"1": ["kill", 3]})
    job = run.submit("train")
    run.submit("export", after=("train",))
    run.wait("the export", lambda: run.result("export").get("status") == "done", 120)
    run.wait_quiet(30)
    assert weights(run) == WEIGHTS
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert [row["fencing_token"] for row in run.metrics()] == [1, 1, 2, 2, 2, 2]
    (crash,) = run.events("crashed")
    assert (crash["job"], crash["attempt"], crash["code"]) == (str(job), 1, 137)
    assert [event["attempt"] for event in run.events("attempt started", "requeued")] == [1, 1, 2, 1]
    assert (restarts(run), restarts(run, "export")) == (1, 0)
    assert (state(run), state(run, "export")) == ("COMPLETED", "COMPLETED")
    assert len(run.jobs()) == 2 and run.processes() == {}


def test_a_supervisor_that_is_killed_is_followed_by_another_attempt(make_run) -> None:
    run = make_run(step_seconds=0.4)
    run.submit("train")
    run.submit("export", after=("train",))
    run.wait_step(2, 60)
    kill_supervisor(run)
    run.wait("the export", lambda: run.result("export").get("status") == "done", 60)
    run.wait_quiet(30)
    assert run.events("crashed", "preempted") == []
    assert [event["attempt"] for event in run.events("attempt started")] == [1, 2, 1]
    assert weights(run) == WEIGHTS
    assert run.processes() == {}


def test_a_batch_script_that_is_killed_fails_the_job_and_its_children_do_not_wait_for_ever(make_run) -> None:
    """What only a second, waiting job could do. `tunesmith resume` goes on."""
    run = make_run(step_seconds=0.4)
    run.submit("train")
    run.submit("export", after=("train",))
    run.wait_step(2, 60)
    kill_batch_script(run)
    run.wait_quiet(60)
    assert (state(run), state(run, "export")) == ("FAILED", "CANCELLED")
    run.submit("train")
    run.wait_event("done", 60)
    assert weights(run) == WEIGHTS
    run.wait_quiet(30)


def test_attempts_that_bring_nothing_stop_the_job_and_take_the_children_with_them(make_run) -> None:
    run = make_run({"2": ["kill", 3], "3": ["kill", 3]} | {"1": ["kill", 3]}, max_attempts_without_progress=2)
    run.submit("train")
    run.submit("export", after=("train",))
    run.wait_event("gave up", 120)
    run.wait_quiet(30)
    assert restarts(run) == 2, "the first attempt made progress; two did not"
    assert (state(run), state(run, "export")) == ("FAILED", "CANCELLED")
    result = run.result("train")
    assert result["status"] == "failed" and result["kind"] == "no progress"
    assert "NO PROGRESS: 2 attempts" in result["message"] and "exit code 137" in result["message"]


def test_bad_input_stops_at_once(make_run) -> None:
    run = make_run({"1": ["bad-input", 1]})
    run.submit("train")
    run.submit("export", after=("train",))
    run.wait_event("gave up", 60)
    run.wait_quiet(30)
    assert restarts(run) == 0 and state(run, "export") == "CANCELLED"
    assert (run.result("train")["kind"], run.result("train")["exit_code"]) == ("bad input", 2)


@pytest.mark.parametrize("who", ["the job", "the user"])
def test_a_job_that_is_cancelled_saves_and_does_not_come_back(make_run, who: str) -> None:
    """`scancel -u` cancels everything of a user."""
    run = make_run(step_seconds=0.3, steps=100)
    run.submit("train")
    run.submit("export", after=("train",))
    run.wait_step(2, 60)
    run.bed.client("scancel", *([str(run.job("train"))] if who == "the job" else ["-u", "root"]))
    run.wait_event("cancelled", 30)
    run.wait_quiet(30)
    time.sleep(8)  # longer than a requeued job waits on this bed
    assert run.bed.squeue().keys() & {run.job("train"), run.job("export")} == set()
    assert (state(run), state(run, "export")) == ("CANCELLED", "CANCELLED")
    assert len(run.events("attempt started")) == 1 and restarts(run) == 0
    assert run.result("train")["cancelled"] is True
    assert run.processes() == {}


def test_a_job_that_waits_to_start_again_can_be_cancelled(make_run) -> None:
    run = make_run({"1": ["kill", 3]})
    run.submit("train")
    run.submit("export", after=("train",))
    run.wait_event("requeued", 60)
    run.bed.client("scancel", str(run.job("train")))
    run.wait_quiet(30)
    assert (state(run), state(run, "export")) == ("CANCELLED", "CANCELLED")
    assert len(run.events("attempt started")) == 1


def test_a_child_without_its_input_says_so_and_ends(make_run) -> None:
    run = make_run()
    run.submit("train", "--begin=now+3600")
    run.submit("export", after=("train",))
    run.bed.client("scontrol", "update", f"JobId={run.job('export')}", "Dependency=")
    run.wait("the end", lambda: state(run, "export") in FINAL_STATES, 60)
    assert run.bed.job(run.job("export"))["ExitCode"] == "2:0"
    assert "train is not done" in run.result("export")["message"]
    run.bed.client("scancel", str(run.job("train")))


def test_a_stopped_rank_is_found_and_ended_and_the_job_goes_on(make_run) -> None:
    run = make_run({"1": ["stop", 3]}, hang_timeout_seconds=4, hang_grace_seconds=1)
    run.submit("train")
    run.wait_event("done", 120)
    (hung,) = run.events("crashed")
    assert "HUNG: train has made no step" in hung["reason"]
    assert weights(run) == WEIGHTS
    run.wait_quiet(30)
    assert run.processes() == {}


def test_a_slurmctld_that_is_gone_is_asked_until_it_is_back(make_run) -> None:
    run = make_run({"1": ["kill", 14]}, step_seconds=1, steps=16)
    run.submit("train")
    run.wait_step(8, 60)  # until then slurmctld has saved that the job runs
    run.bed.kill_controller()
    try:
        run.wait_event("crashed", 60)
        time.sleep(5)
        assert run.events("requeued") == []
    finally:
        run.bed.start_controller()
    run.wait_event("done", 240)
    assert weights(run) == "".join(f"{step} " for step in range(16)) and restarts(run) == 1
    run.wait_quiet(60)


@pytest.mark.long
@pytest.mark.parametrize("noticed", ["marked as down", "by itself"])
def test_a_node_that_is_cut_off_computes_on_and_writes_nothing_once_another_went_on(make_run, noticed: str) -> None:
    """Slurm takes half a minute to notice; If an admin marks the node as down, it does the same at once."""
    num_steps = 60 if noticed == "marked as down" else 120
    run = make_run(step_seconds=0.5, steps=num_steps)
    run.submit("train")
    run.wait_step(3, 60)
    host = run.metrics()[0]["host"]
    node = run.bed.nodes[host]
    pids = set(run.processes())
    node.partition()
    try:
        if noticed == "marked as down":
            at_cut = run.metrics()[-1]["step"]
            run.wait_step(at_cut + 2, 30)
            run.bed.client("scontrol", "update", f"NodeName={host}", "State=DOWN", "Reason=silent")
        _, successor = run.wait_event("attempt started", 90, count=2)
        taken_over = successor["time"]
        before = [row for row in run.metrics() if row["fencing_token"] == 1]
        assert before[-1]["step"] > 3, "it went on while it was cut off"
        run.wait("the old processes to end by themselves", lambda: not pids & run.processes().keys(), 60)
    finally:
        node.heal()
    run.wait_event("done", 120)
    rows = run.metrics()
    assert weights(run) == "".join(f"{step} " for step in range(num_steps))
    assert all(row["time"] <= taken_over for row in rows if row["fencing_token"] == 1)
    claims = [row["fencing_token"] for row in rows]
    assert claims == sorted(claims), "not one row of the old attempt among those of the new one"
    assert rows[claims.index(2)]["host"] != host
    assert restarts(run) == 1
    run.bed.wait_node(host, {"IDLE"}, 60)


def test_a_node_that_fails_its_preflight_is_left_out_of_the_next_attempt(make_run) -> None:
    run = make_run(preflight=True)
    run.bed.nodes["n1"].fill_tmp()
    try:
        run.submit("train", "--nodes=2")  # Slurm takes n1 and n2
        run.wait_event("done", 180)
    finally:
        run.bed.nodes["n1"].empty_tmp()
    (crash,) = run.events("crashed")
    assert "PREFLIGHT: n1: /tmp: /tmp: 0.0 MiB free" in crash["reason"]
    first, second = run.events("attempt started")
    assert (first["hosts"], second["hosts"]) == (["n1", "n2"], ["n2", "n3"])
    assert {row["fencing_token"] for row in run.metrics()} == {2}, "nothing had begun on the nodes of the first attempt"
    assert weights(run) == WEIGHTS


def test_a_node_on_which_three_attempts_crashed_is_left_out_of_the_fourth(make_run) -> None:
    """Each of them gets a step further, so that the job does not stop for want of progress."""
    run = make_run({str(attempt): ["kill", attempt] for attempt in (1, 2, 3)})
    run.submit("train")
    run.wait_event("done", 120)
    hosts = [event["hosts"] for event in run.events("attempt started")]
    assert hosts == [["n1"], ["n1"], ["n1"], ["n2"]]
    assert [event["excluded"] for event in run.events("requeued")] == [[], [], ["n1"]]
    assert weights(run) == WEIGHTS
    run.wait_quiet(30)


def test_a_killed_supervisor_counts_against_its_node_as_well(make_run) -> None:
    run = make_run({str(attempt): ["kill", attempt] for attempt in (1, 2)}, step_seconds=0.5)
    run.submit("train")
    run.wait("a step of the third", lambda: any(row["fencing_token"] == 3 for row in run.metrics()), 60)
    kill_supervisor(run)
    run.wait_event("done", 60)
    run.wait_quiet(30)
    assert [event["hosts"] for event in run.events("attempt started")] == [["n1"]] * 3 + [["n2"]]
    assert [event["excluded"] for event in run.events("requeued")] == [[], [], ["n1"]]


@pytest.mark.long
def test_a_time_limit_is_met_with_everything_saved(make_run) -> None:
    """Slurm's own notice, half a minute before the end of a minute."""
    run = make_run(step_seconds=0.5, steps=100)
    run.submit("train", "--time=1", "--signal=B:USR2@30")
    run.wait_event("done", 240)
    stops = run.events("preempted")
    assert stops and {stop["code"] for stop in stops} == {75} and run.events("crashed") == []
    assert [row["step"] for row in run.metrics()] == list(range(1, 101)), "no step was lost, and none made twice"
    run.wait_quiet(30)
    assert restarts(run) == len(stops)


@pytest.mark.long
def test_a_job_that_missed_its_notice_goes_on_after_its_time_limit(make_run) -> None:
    """Slurm sends TERM at the limit, and the script has KillWait to requeue the job."""
    run = make_run(step_seconds=0.5, steps=150)
    run.submit("train", "--time=1")
    run.wait_event("done", 300)
    assert weights(run) == "".join(f"{step} " for step in range(150))
    assert restarts(run) >= 1
    run.wait_quiet(30)
