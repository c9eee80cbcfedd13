"""The exit codes of `wait`, `status --exit-code` and `logs -f` say what a run came to."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.files import write_json
from cluster.run.rundir import RunDir
from launcher.cli import app
from launcher.slurm.client import NoSlurm, SlurmNoAnswer
from launcher.slurm.submit import submit
from launcher.sweep import save_index
from tests.launcher.slurm_chain import FakeSlurm, recipe_of, submission_of

DATA = {"precision": "fp32", "data": ["rows.jsonl"]}
looks: list[Callable[[], None]] = []  # what happens between two looks of `wait`


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    slurm = FakeSlurm()
    monkeypatch.setattr("launcher.slurm.client.Slurm", lambda: slurm)
    monkeypatch.setattr("launcher.outcome.time.sleep", lambda _: looks.pop(0)())
    looks.clear()
    return slurm


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm) -> RunDir:
    """A run whose jobs 101 (train), 102 and 103 wait."""
    chain = submission_of(recipe_of(tmp_path, train=DATA))
    submit(chain, slurm, lambda argv: None)
    return chain.recipe.run


def code_of(*arguments: object) -> int:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code


def end(slurm: FakeSlurm, state: str) -> None:
    """The first job ends so, and Slurm cancels those that wait for it."""
    for job_id, line in slurm.queue_lines.items():
        slurm.queue_lines[job_id] = line.replace("PENDING", state if job_id == "101" else "CANCELLED")


def finish(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.status.is_done", lambda *_: True)


def test_a_run_that_has_not_ended_is_3_and_only_if_asked_for(run: RunDir) -> None:
    assert code_of("status", run.root) == 0
    assert code_of("status", run.root, "--exit-code") == 3


@pytest.mark.parametrize(
    ("last", "result", "expected"),
    [
        ("FAILED", None, 1), ("FAILED", {"status": "failed", "exit_code": 1}, 1),
        ("FAILED", {"status": "failed", "exit_code": 2}, 2), ("FAILED", {"status": "preempted"}, 75),
        ("CANCELLED", None, 75),
    ],
)  # fmt: skip
def test_each_end_has_its_code(run: RunDir, slurm: FakeSlurm, last: str, result: dict | None, expected: int) -> None:
    looks.extend([lambda: end(slurm, last), lambda: None])
    if result:
        write_json(run.result("train"), result)
    assert code_of("wait", run.root) == expected
    assert code_of("status", run.root, "--exit-code") == expected
    looks.append(lambda: None)
    assert code_of("logs", "-f", run.root) == expected


def test_a_stage_that_failed_counts_although_one_before_it_was_not_begun(tmp_path: Path, slurm: FakeSlurm) -> None:
    recipe = recipe_of(tmp_path, train=DATA)
    recipe.save(recipe.run.create())
    write_json(recipe.run.result("export"), {"status": "failed", "exit_code": 1})
    assert code_of("status", recipe.run_dir, "--exit-code") == 1


def test_waiting_ends_when_all_is_done(run: RunDir, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    looks.extend([lambda: None, lambda: finish(run, monkeypatch)])
    assert code_of("wait", run.root) == 0 and looks == []


def test_what_only_seems_to_be_an_end_is_not_taken_for_one(
    run: RunDir, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of a job that has just left the queue is still on its way from the node."""
    looks.extend([lambda: end(slurm, "COMPLETED"), lambda: finish(run, monkeypatch)])
    assert code_of("wait", run.root) == 0


def test_waiting_goes_on_while_slurm_is_silent_and_ends_without_slurm(
    run: RunDir, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(error: Exception) -> None:
        def call(*_: object) -> str:
            raise error

        monkeypatch.setattr(FakeSlurm, "call", call)

    raises(SlurmNoAnswer("squeue gave no answer"))
    looks.extend([lambda: None] * 3 + [lambda: raises(NoSlurm("there is no Slurm here")), lambda: None])
    assert code_of("wait", run.root) == 1 and looks == []


def test_a_sweep_has_ended_with_its_last_run_and_the_gravest_end_counts(tmp_path: Path, slurm: FakeSlurm) -> None:
    sweep = RunDir(tmp_path / "sweep")
    members = [({"seed": n}, recipe_of(tmp_path, train=DATA, name=f"run{n}")) for n in range(3)]
    members = [(v, r.model_copy(update={"run_dir": sweep.sweep / r.name})) for v, r in members]
    save_index(sweep, members)
    for _, recipe in members[:2]:
        recipe.save(recipe.run.create())
    looks.append(lambda: None)
    assert code_of("wait", sweep.root) == 75  # not begun
    write_json(members[1][1].run.result("train"), {"status": "failed", "exit_code": 1})
    assert code_of("status", sweep.root, "--exit-code") == 1


def test_a_folder_that_is_no_run_is_bad_input(tmp_path: Path, slurm: FakeSlurm) -> None:
    done = CliRunner().invoke(app, ["wait", str(tmp_path)])
    assert done.exception.exit_code == 2
