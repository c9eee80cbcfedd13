"""How far a run is: proof before the queue, the queue before a result, and no answer is never success."""

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import InputError
from cluster.files import append_jsonl, exclusive_lock, write_json
from cluster.run.fence import claim
from cluster.run.rundir import RunDir
from launcher.print_status import print_runs, print_status
from launcher.run_commands import list_runs
from launcher.slurm.client import SlurmNoAnswer, parse_queue_line
from launcher.slurm.logs import print_logs
from launcher.slurm.submit import submit
from launcher.slurm.submitted import read_jobs
from launcher.status import QueueAnswer, RunStatus, find_runs, may_still_run, read_run, read_statuses, status_of_run
from tests.launcher.slurm_chain import FakeSlurm, queue_line, recipe_of, submission_of

DATA = {"precision": "fp32", "data": ["rows.jsonl"]}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose jobs 101 (train), 102 and 103 were submitted."""
    chain = submission_of(recipe_of(tmp_path, train=DATA))
    submit(chain, FakeSlurm(), lambda argv: None)
    return chain.recipe.run


def state(run: RunDir, *lines: str, error: str = "") -> RunStatus:
    """The status of the run if squeue prints these lines, each without the time and the name."""
    recipe, _ = read_run(run.root)
    jobs = {job.job_id: job for job in read_jobs(run)}
    queue = {jobs[line.split("|")[0]]: parse_queue_line(f"{line}|N/A|") for line in lines}
    return status_of_run(recipe, run, list(jobs.values()), QueueAnswer(queue, error))


def train(run: RunDir, *lines: str, error: str = "") -> tuple[str, str]:
    first = state(run, *lines, error=error).stages[0]
    return first.state, first.detail


def leave_checkpoint(run: RunDir, finished: bool) -> None:
    folder = run.checkpoints / "step_000004"
    folder.mkdir(parents=True, exist_ok=True)
    values = {"step": 4, "num_rows": 8, "num_tokens": 9, "num_trained_tokens": 5, "world_size": 2, "job": {}}
    write_json(folder / "state.json", values | {"finished": finished})
    write_json(folder / "manifest.json", {"files": []})


RUNNING = "101|RUNNING|0:12|2|n[1-2]|(null)|None"


def test_the_queue_says_what_runs_and_what_waits_for_what(run: RunDir) -> None:
    run.metrics.write_text('{"stage": "train", "step": 3, "loss": 1.5}\n{"stage": "tr')
    found = state(run, RUNNING, "102|PENDING|0:00|1||afterok:101(unfulfilled)|Dependency")
    assert found.state == "RUNNING" and found.current.stage == "train"
    assert (found.stages[0].state, found.stages[0].detail) == ("RUNNING", "on n[1-2] for 0:12. step 3, loss 1.5000")
    assert (found.stages[1].state, found.stages[1].detail) == ("WAITING", "for job 101")
    claim(run.root, "train", "101")
    assert train(run, "101|PENDING|0:00|2||(null)|BeginTime")[1] == "after attempt 1. Slurm's reason: BeginTime"
    (run.claims / "000001.json").unlink()
    assert train(run, "101|PENDING|0:00|2||(null)|JobHeldUser")[1].startswith("held:")
    assert train(run, "101|PENDING|0:00|2||(null)|Priority")[1] == "Slurm's reason: Priority"


def test_suspended_and_held_jobs_are_named_so(run: RunDir) -> None:
    assert train(run, RUNNING.replace("RUNNING", "SUSPENDED"))[0] == "SUSPENDED"
    held = state(run, "102|PENDING|0:00|1||afterok:101(unfulfilled)|JobHeldAdmin").stages[1]
    assert held.state == "WAITING" and held.detail.startswith("held by an administrator or by Slurm")
    assert held.detail.endswith("; for job 101")


def test_the_job_of_a_stage_that_is_done_is_the_one_that_did_it(run: RunDir) -> None:
    claim(run.root, "train", "101")
    first = json.loads(run.jobs.read_text().splitlines()[0])
    append_jsonl(run.jobs, first | {"job_id": "108"})
    leave_checkpoint(run, finished=True)
    assert (state(run).stages[0].job_id, state(run).stages[0].attempt) == ("101", 1)


def test_lines_that_a_full_disk_has_torn_are_passed_over(run: RunDir) -> None:
    run.metrics.write_text('{"stage": "train", "step": 3, "loss": 1.5}\n{"stage": "tr')
    append_jsonl(run.metrics, {"stage": "train", "step": 4, "loss": 1.25})
    with open(run.jobs, "a") as file:
        file.write('{"time": 17')
    assert train(run, RUNNING)[1].endswith("step 4, loss 1.2500")
    assert len(read_jobs(run)) == 3


def test_logs_of_jobs_that_have_not_begun_say_so(run: RunDir) -> None:
    printed: list[str] = []
    print_logs(run, None, False, lambda: False, printed.append)
    assert len(printed) == 1 and printed[0].startswith("No output yet: no job has begun.")


def test_no_answer_and_jobs_that_slurm_does_not_know_are_unknown(run: RunDir) -> None:
    found, detail = train(run, error="squeue gave no answer in 60 s.")
    assert found == "UNKNOWN" and "gave no answer" in detail and "train-101.log" in detail
    assert train(run) == ("CANCELLED", "the job left the queue before it began")
    (run.logs / "train-101.log").touch()
    found, detail = train(run)
    assert found == "UNKNOWN" and "wrote no result" in detail and "train-101.log" in detail
    assert state(run).state == "UNKNOWN"


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ("FAILED", "FAILED"), ("COMPLETED", "FAILED"), ("TIMEOUT", "FAILED"), ("NODE_FAIL", "FAILED"),
        ("CANCELLED", "CANCELLED"),
    ],
)  # fmt: skip
def test_a_job_that_is_over_without_a_result_has_failed_whatever_its_exit_code(
    run: RunDir, last: str, expected: str
) -> None:
    assert train(run, f"101|{last}|0:12|2|n[1-2]|(null)|None")[0] == expected


def test_the_result_decides_for_a_job_that_left_the_queue_unless_it_is_older(run: RunDir) -> None:
    write_json(run.result("train"), {"status": "failed", "message": "the disk is full"})
    assert train(run) == ("FAILED", f"the disk is full Log: {run.logs}/train-101.log")
    assert train(run, RUNNING)[0] == "RUNNING"
    write_json(run.result("train"), {"status": "preempted", "step": 3})
    assert train(run)[0] == "STOPPED"
    assert train(run, "101|CANCELLED|0:12|2|n[1-2]|(null)|None")[0] == "CANCELLED"
    write_json(run.result("train"), {"status": "preempted", "step": 3, "cancelled": True})
    assert train(run)[0] == "CANCELLED"
    (run.logs / "train-101.log").touch()
    os.utime(run.result("train"), (time.time() - 1000,) * 2)
    assert train(run)[0] == "UNKNOWN"


def test_done_is_what_the_result_proves(run: RunDir) -> None:
    (run.logs / "train-101.log").touch()
    write_json(run.result("train"), {"status": "done", "step": 4, "final_loss": 0.25})
    assert train(run)[0] == "UNKNOWN"  # a result without its checkpoint
    leave_checkpoint(run, finished=False)
    assert train(run)[0] == "UNKNOWN"
    leave_checkpoint(run, finished=True)
    assert train(run, error="squeue gave no answer") == ("DONE", "4 steps, loss 0.2500")


def test_the_status_of_a_run_without_jobs_comes_from_its_folder_alone(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, train=DATA)
    run = recipe.run.create()
    recipe.save(run)
    slurm = FakeSlurm(refuse=("squeue",))
    assert [stage.state for stage in read_statuses([run.root], slurm)[0].stages] == ["NOT STARTED"] * 3
    with exclusive_lock(run.lock, "test"):
        assert [stage.state for stage in read_statuses([run.root], slurm)[0].stages] == [
            "RUNNING",
            *["NOT STARTED"] * 2,
        ]
    write_json(run.result("train"), {"status": "failed", "message": "no such file"})
    assert read_statuses([run.root], slurm)[0].state == "FAILED"
    assert slurm.said == []
    with pytest.raises(InputError, match="it ran on this machine"):
        print_logs(run, None, False, lambda: False, print)


def test_a_list_leaves_out_runs_of_others_that_may_not_be_read(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("mine", "theirs"):
        recipe = recipe_of(tmp_path, train=DATA).model_copy(update={"run_dir": tmp_path / "runs" / name})
        recipe.save(recipe.run.create())
    monkeypatch.setattr("launcher.status.is_readable", lambda path: path.name != "theirs")
    list_runs(tmp_path / "runs")
    printed = capsys.readouterr().out
    assert "mine" in printed and "1 folders may not be read and are left out: theirs" in printed


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        read_run(tmp_path)


def test_a_thousand_nodes_and_many_runs_are_a_few_questions_and_a_table(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("launcher.slurm.client.JOBS_PER_CALL", 40)  # a command line has room for so many ids
    slurm, recipe = FakeSlurm(), recipe_of(tmp_path, train=DATA)
    for number in range(20):
        chain = submission_of(recipe.model_copy(update={"run_dir": tmp_path / "runs" / f"r{number:03d}"}))
        submit(chain, slurm, lambda argv: None)
    nodes = ",".join(f"node{number:04d}" for number in range(1000))
    for job_id in slurm.queue_lines:
        name = slurm.queue_lines[job_id].split("|")[8]
        slurm.queue_lines[job_id] = queue_line(job_id, "RUNNING", name, f"1-02:03:04|1000|{nodes}|(null)|None")
    slurm.said.clear()
    states = read_statuses([place for place, _ in find_runs(tmp_path / "runs")], slurm)
    assert [words[0] for words in slurm.said] == ["squeue"] * 2
    console = Console(width=200, record=True, file=io.StringIO())
    print_runs([(state, {}) for state in states], console)
    print_status(states[7], console)
    text = console.export_text()
    assert text.count("RUNNING") == 20 + 3 + 1 and "on 1000 nodes for 1-02:03:04." in text
    assert "node0001" not in text


def test_logs_are_followed_across_attempts_until_the_run_ends(run: RunDir) -> None:
    logs = run.logs
    (logs / "train-101.log").write_text("step 1\nste")
    heard: list[str] = []

    def is_live() -> bool:
        """What happens between the two questions."""
        if len(asked) == 1:
            first = json.loads(run.jobs.read_text().splitlines()[0])
            again = first | {"job_id": "104"}
            with open(run.jobs, "a") as file:
                file.write(json.dumps(again) + "\n")
            (logs / "train-101.log").write_text("step 1\nstep 2\n")
            (logs / "train-104.log").write_text("going on\nthe end, without a line break")
        asked.append(1)
        return len(asked) < 3

    asked: list[int] = []
    original = print_logs.__globals__["SECONDS_BETWEEN_QUERIES"], print_logs.__globals__["POLL_SECONDS"]
    print_logs.__globals__.update(SECONDS_BETWEEN_QUERIES=0, POLL_SECONDS=0)
    try:
        print_logs(run, None, True, is_live, heard.append)
    finally:
        print_logs.__globals__.update(SECONDS_BETWEEN_QUERIES=original[0], POLL_SECONDS=original[1])
    text = [line for line in heard if not line.startswith("==>")]
    assert text == ["step 1", "step 2", "going on", "the end, without a line break"]
    assert [line.split(":")[0] for line in heard if line.startswith("==>")] == [
        "==> train, job 101", "==> train, job 104",
    ]  # fmt: skip


def test_following_does_not_end_because_slurm_does_not_answer(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(self: FakeSlurm, argv: list[str]) -> str:
        raise SlurmNoAnswer("squeue gave no answer")

    assert not may_still_run(run.root, None, FakeSlurm())
    monkeypatch.setattr(FakeSlurm, "call", no_answer)
    assert may_still_run(run.root, None, FakeSlurm())
