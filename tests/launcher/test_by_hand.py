"""A job that a user submits with sbatch is the run's from its first moment on a node."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import InputError
from cluster.files import write_json
from cluster.run.rundir import RunDir
from launcher.cli import app
from launcher.job.attempt import open_attempt
from launcher.slurm.submitted import read_jobs
from tests.launcher.slurm_chain import FakeSlurm, queue_line, recipe_of

SHOWN = """JobId=55 JobName=tunesmith-train
   SubmitTime={time} EligibleTime={time}
   Command=/home/me/slurm/train.sbatch recipe.yaml
   WorkDir=/home/me/my work
   StdOut={folder}/slurm 55.out
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm in which job 55, submitted by hand, runs. This process is on its first node."""
    line = queue_line("55", "RUNNING", "tunesmith-train", "0:12|1|n1|(null)|None")
    slurm = FakeSlurm(queue_lines={"55": line})
    slurm.answers["55"] = SHOWN.format(folder=tmp_path, time=line.split("|")[7])
    monkeypatch.setattr("launcher.slurm.client.Slurm", lambda: slurm)
    monkeypatch.setattr("launcher.job.attempt.Slurm", lambda: slurm)
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    monkeypatch.setenv("SLURM_JOB_NAME", "tunesmith-train")
    return slurm


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm) -> RunDir:
    """The run of job 55, which has begun and printed a line."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say a.", "output": "a"}\n')
    recipe = recipe_of(tmp_path, train={"precision": "fp32", "data": [str(tmp_path / "rows.jsonl")]})
    assert open_attempt("train", [str(tmp_path / "recipe.yaml"), f"run_dir={recipe.run_dir}"], ("n1",)) is None
    recipe.save(recipe.run)
    (tmp_path / "slurm 55.out").write_text("step 1\n")
    return recipe.run


def tunesmith(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if done.exception is not None:
        raise done.exception
    return done.output


def test_status_logs_and_cancel_know_it(run: RunDir, slurm: FakeSlurm) -> None:
    shown = tunesmith("status", run.root)
    assert "on n1 for 0:12" in shown and "srun --overlap --jobid=55" in shown and "NOT STARTED" in shown
    assert tunesmith("logs", run.root).splitlines() == [f"==> train, job 55: {run.root.parent}/slurm 55.out", "step 1"]
    assert "cancelled 55" in tunesmith("cancel", run.root)
    assert "CANCELLED" in tunesmith("status", run.root)


def test_a_job_that_slurm_starts_again_is_listed_once_and_still_does_not_own_the_run(
    run: RunDir, slurm: FakeSlurm
) -> None:
    slurm.answers["55"] = re.sub(r"SubmitTime=\S+", "SubmitTime=2037-01-01T00:00:00", slurm.answers["55"])
    arguments = [str(run.root.parent / "recipe.yaml"), f"run_dir={run.root}"]
    assert open_attempt("train", arguments, ("n1",)) is None
    assert [job.job_id for job in read_jobs(run)] == ["55"]


def test_nothing_starts_beside_it_and_afterwards_the_run_goes_on(run: RunDir, slurm: FakeSlurm) -> None:
    with pytest.raises(InputError, match=r"has jobs in the queue: 55 \(running\)"):
        tunesmith("resume", run.root)
    slurm.queue_lines["55"] = slurm.queue_lines["55"].replace("RUNNING", "COMPLETED")
    write_json(run.result("train"), {"status": "preempted"})
    assert "STOPPED" in tunesmith("status", run.root)
    shown = tunesmith("resume", run.root)
    assert "sbatch was called by hand" in shown and "--chdir=/home/me/my work" in shown


def test_a_silent_slurm_does_not_keep_the_job_from_its_stage(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answers["55"] = ""
    recipe_of(tmp_path)
    assert open_attempt("train", [str(tmp_path / "recipe.yaml"), f"run_dir={tmp_path / 'run'}"], ("n1",)) is None
    assert "will not know this job: scontrol printed nothing" in capsys.readouterr().err
