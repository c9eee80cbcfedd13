"""Status says when a job starts and ends, where it is in the queue, where its log is, and how to get to its nodes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.run.rundir import RunDir
from launcher.cli import app
from launcher.slurm.submit import submit
from tests.launcher.slurm_chain import FakeSlurm, recipe_of, submission_of

TIMES, PLACES = "--format=%i|%S|%L|%l|%P", "--format=%i|%Q|%r"


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm) -> RunDir:
    """A run whose jobs 101 (train), 102 and 103 wait."""
    chain = submission_of(recipe_of(tmp_path, train={"precision": "fp32", "data": ["rows.jsonl"]}))
    submit(chain, slurm, lambda argv: None)
    return chain.recipe.run


def last_lines(run: RunDir) -> list[str]:
    """What status prints after the table and the next step."""
    done = CliRunner().invoke(app, ["status", str(run.root)])
    assert done.exit_code == 0, done.exception
    lines = done.output.splitlines()
    return lines[next(number for number, line in enumerate(lines) if "Next: " in line) + 1 :]


def test_a_job_that_waits_has_a_place_an_expected_start_and_a_log(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.answers[TIMES] = "101|2026-11-28T14:00:00|12:00:00|12:00:00|gpu\n"
    # Equal priorities wait in the order of submission. Held jobs and those that wait for others are in nobody's way.
    slurm.answers[PLACES] = (
        "97|900|Dependency\n98|0|JobHeldUser\n100_[1-5]|50|Priority\n101|50|Priority\n102|60|Dependency\n"
        "103|40|Priority\n99|70|Resources\n"
    )
    assert last_lines(run) == [
        "train, job 101: Slurm expects it to start at 2026-11-28T14:00:00, place 3 of 4 in partition gpu, time limit "
        f"12:00:00. Its output will be in {run.logs}/train-101.log"
    ]
    assert ["squeue", "--noheader", "--states=PENDING", "--partition=gpu", PLACES] in slurm.said


def test_without_an_estimate_nothing_is_made_up(run: RunDir, slurm: FakeSlurm) -> None:
    (run.logs / "train-101.log").touch()
    slurm.answers.update({TIMES: "101|N/A|UNLIMITED|UNLIMITED|gpu,long\n", PLACES: ""})
    assert last_lines(run) == [
        f"train, job 101: Slurm expects no start yet, no time limit. Its output is in {run.logs}/train-101.log"
    ]


def test_a_job_that_runs_has_time_left_and_a_way_to_its_nodes(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.queue_lines["101"] = slurm.queue_lines["101"].replace("PENDING", "RUNNING")
    slurm.answers[TIMES] = "101|2026-11-28T14:00:00|3:20:11|12:00:00|gpu\n"
    shell = "A shell on its node: srun --overlap --jobid=101 --pty bash"
    assert last_lines(run) == [f"train, job 101: 3:20:11 of 12:00:00 left. {shell}"]
    slurm.answers[TIMES] = ""
    assert last_lines(run) == [f"train, job 101: {shell}"]
    slurm.answers[TIMES] = "101|2026-11-28T14:00:00|UNLIMITED|UNLIMITED|gpu\n"
    assert last_lines(run) == [f"train, job 101: no time limit. {shell}"]


def test_a_slurm_that_does_not_say_more_is_no_error(run: RunDir, slurm: FakeSlurm) -> None:
    refusing = FakeSlurm(queue_lines=slurm.queue_lines, refuse=("squeue",), refuse_at=2)
    slurm.__dict__.update(refusing.__dict__)
    [line] = last_lines(run)
    assert line.startswith("Nothing is known about times") and "refused" in line


def test_a_run_that_has_ended_asks_no_further(run: RunDir, slurm: FakeSlurm) -> None:
    for job_id, line in slurm.queue_lines.items():
        slurm.queue_lines[job_id] = line.replace("PENDING", "CANCELLED")
    slurm.said.clear()
    assert last_lines(run) == [] and len(slurm.said) == 1
