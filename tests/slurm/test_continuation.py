"""Chains of jobs under a real Slurm: who goes on, who does not, and what an attempt that was cut off may still do."""

import os
import signal

import pytest

from cluster.files import write_json
from cluster.run.rundir import RunDir
from tests.slurm.chained import ChainedRun

pytestmark = pytest.mark.slurm

WEIGHTS = "0 1 2 3 4 5 "


def weights(run: ChainedRun) -> str:
    (last,) = sorted((run.run / "checkpoints").glob("step_*"))[-1:]
    return (last / "weights.txt").read_text()


def kill_supervisor(run: ChainedRun) -> None:
    """Of the attempt that runs: nobody is left to say how it ended."""
    words = "-m tests.slurm.scripted_attempt train"
    (pid,) = [pid for pid, command in run.processes().items() if words in command]
    os.kill(pid, signal.SIGKILL)


def test_a_killed_rank_costs_one_attempt_and_the_children_wait_for_the_next(make_run) -> None:
    run = make_run({"1": ["kill", 3]})
    first = run.submit("train")
    child = run.submit("export", after=("train",))
    run.wait("the export", lambda: run.result("export").get("status") == "done", 120)
    run.wait_quiet(30)
    assert weights(run) == WEIGHTS
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert [row["fencing_token"] for row in run.metrics()] == [1, 1, 2, 2, 2, 2]
    (crash,) = run.events("crashed")
    assert (crash["job"], crash["code"]) == (str(first), 137)
    # Attempt 1, the one that went on, and the standby of that one, which nobody needed.
    assert [row["attempt"] for row in run.jobs("train")] == [1, 2, 3]
    states = [run.bed.job(row["job_id"])["JobState"] for row in run.jobs("train")]
    assert states == ["FAILED", "COMPLETED", "CANCELLED"]
    assert [row["attempt"] for row in run.jobs("export")] == [1, 2], "the export as well had a standby"
    assert run.bed.job(child)["JobState"] == "COMPLETED"
    assert run.processes() == {}


def test_an_attempt_that_dies_without_a_word_is_followed_by_the_standby_that_it_had(make_run) -> None:
    run = make_run(step_seconds=0.4)
    run.submit("train")
    run.submit("export", after=("train",))
    run.wait_step(2, 60)
    kill_supervisor(run)
    run.wait("the export", lambda: run.result("export").get("status") == "done", 60)
    run.wait_quiet(30)
    assert run.events("crashed", "preempted") == [], "nobody was left to say so"
    assert [event["attempt"] for event in run.events("attempt started")] == [1, 2, 1]
    assert weights(run) == WEIGHTS
    assert run.processes() == {}


def test_attempts_that_bring_nothing_stop_the_chain_and_take_the_children_with_them(make_run) -> None:
    run = make_run({"2": ["kill", 3], "3": ["kill", 3]} | {"1": ["kill", 3]}, max_attempts_without_progress=2)
    run.submit("train")
    child = run.submit("export", after=("train",))
    run.wait_event("stopped", 120)
    run.wait_quiet(30)
    assert [row["attempt"] for row in run.jobs("train")] == [1, 2, 3, 4], "the first one made progress; two did not"
    assert run.bed.job(run.jobs("train")[-1]["job_id"])["JobState"] == "CANCELLED"
    assert run.bed.job(child)["JobState"] == "CANCELLED"
    result = run.result("train")
    assert result["status"] == "failed" and result["kind"] == "no progress"
    assert "NO PROGRESS: 2 attempts" in result["message"] and "exit code 137" in result["message"]


def test_bad_input_stops_at_once(make_run) -> None:
    run = make_run({"1": ["bad-input", 1]})
    run.submit("train")
    child = run.submit("export", after=("train",))
    run.wait_event("stopped", 60)
    run.wait_quiet(30)
    assert len(run.jobs("train")) == 2 and run.bed.job(child)["JobState"] == "CANCELLED"
    assert (run.result("train")["kind"], run.result("train")["exit_code"]) == ("bad input", 2)


def test_a_run_that_is_cancelled_saves_and_nothing_follows(make_run) -> None:
    """As `tunesmith cancel` does it, but once, and not until no job is left."""
    run = make_run(step_seconds=0.3, steps=100)
    run.submit("train")
    run.submit("export", after=("train",))
    run.wait_step(2, 60)
    write_json(RunDir(run.run).cancelled, {})
    for job in (*run.jobs("export"), *reversed(run.jobs("train"))):
        run.bed.client("scancel", str(job["job_id"]))
    (event,) = run.wait_event("cancelled", 30)
    run.wait_quiet(30)
    assert event["code"] == 75 and len(run.events("attempt started")) == 1
    assert (len(run.jobs("train")), len(run.jobs("export"))) == (2, 1), "the first, and the standby that it had"
    assert run.processes() == {}


def test_a_child_without_its_input_says_so_and_ends(make_run) -> None:
    run = make_run()
    job = run.submit("train", "--begin=now+3600")
    run.bed.client("scancel", str(job))  # by somebody who did not know of the child
    child = run.submit("export", after=("train",))
    run.wait_quiet(60)
    assert run.bed.job(child)["ExitCode"] == "2:0"
    assert "train is not done" in run.result("export")["message"]


def test_a_child_that_begins_too_early_waits_again(make_run) -> None:
    run = make_run(step_seconds=1.5)
    run.submit("train")
    run.wait_step(1, 60)
    child = run.submit("export", after=("train",))
    run.bed.client("scontrol", "update", f"JobId={child}", "Dependency=")  # as if nobody had moved it in time
    run.wait("the export", lambda: run.result("export").get("status") == "done", 120)
    (early,) = run.events("came too early")
    assert early["waits_for"] == ["train"] and len(run.jobs("export")) == 3
    assert (run.run / "export" / "weights.txt").read_text() == WEIGHTS


def test_a_stopped_rank_is_found_and_ended_and_the_chain_goes_on(make_run) -> None:
    run = make_run({"1": ["stop", 3]}, hang_timeout_seconds=4, hang_grace_seconds=1)
    run.submit("train")
    run.wait_event("done", 120)
    (hung,) = run.events("crashed")
    assert "HUNG: train has made no step" in hung["reason"]
    assert weights(run) == WEIGHTS
    run.wait_quiet(30)
    assert run.processes() == {}


@pytest.mark.long
@pytest.mark.parametrize("noticed", ["told", "by itself"])
def test_a_node_that_is_cut_off_computes_on_and_writes_nothing_once_another_went_on(make_run, noticed: str) -> None:
    """Slurm takes half a minute to notice; `told` that the node is down it does the same at once."""
    num_steps = 40 if noticed == "told" else 100
    run = make_run(step_seconds=0.5, steps=num_steps)
    run.submit("train")
    run.wait_step(3, 60)
    host = run.metrics()[0]["host"]
    node = run.bed.nodes[host]
    pids = set(run.processes())
    node.partition()
    try:
        if noticed == "told":
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
    """Each of them gets a step further, so that the chain does not stop for want of progress."""
    run = make_run({str(attempt): ["kill", attempt] for attempt in (1, 2, 3)})
    run.submit("train")
    run.wait_event("done", 120)
    hosts = [event["hosts"] for event in run.events("attempt started")]
    assert hosts == [["n1"], ["n1"], ["n1"], ["n2"]]
    (event,) = run.events("nodes excluded")
    assert (event["nodes"], event["standby"]) == (["n1"], str(run.jobs("train")[3]["job_id"]))
    assert weights(run) == WEIGHTS
    run.wait_quiet(30)


def test_an_attempt_that_said_nothing_counts_against_its_node_as_well(make_run) -> None:
    """The next one writes it down, and asks for another node for the one after itself."""
    run = make_run({str(attempt): ["kill", attempt] for attempt in (1, 2)}, step_seconds=0.5)
    run.submit("train")
    run.wait("a step of the third", lambda: any(row["fencing_token"] == 3 for row in run.metrics()), 60)
    kill_supervisor(run)
    run.wait_event("done", 60)
    run.wait_quiet(30)
    assert [event["hosts"] for event in run.events("attempt started")] == [["n1"]] * 4
    assert ["--exclude=n1" in job["argv"] for job in run.jobs("train")] == [False] * 4 + [True]


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
    assert all(run.bed.job(row["job_id"])["JobState"] != "TIMEOUT" for row in run.jobs("train"))
