"""`resume RUN key=value` changes what may change, and refuses all else before anything starts."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.errors import InputError
from cluster.run.rundir import RunDir
from launcher.cli import app
from launcher.slurm.submit import submit
from launcher.slurm.submitted import cancel_run, read_jobs
from launcher.sweep import save_index
from tests.launcher.slurm_chain import FakeSlurm, recipe_of, submission_of

TRAIN = {"precision": "fp32", "data": ["rows.jsonl"], "global_batch_size": 8}


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm) -> RunDir:
    """A cancelled run of jobs 101 to 103, with a checkpoint."""
    chain = submission_of(recipe_of(tmp_path, train=TRAIN))
    submit(chain, slurm, lambda argv: None)
    cancel_run(chain.recipe.run, slurm)
    (chain.recipe.run.checkpoints / "step_000001").mkdir(parents=True)
    return chain.recipe.run


def resume(*arguments: object) -> None:
    done = CliRunner().invoke(app, ["resume", *map(str, arguments)])
    if done.exception is not None:
        raise done.exception


def test_what_may_change_is_in_the_new_jobs_and_in_the_recipe(run: RunDir) -> None:
    resume(run.root, "slurm.train.time=700", "train.micro_batch_size=2")
    first, *_ = read_jobs(run)[3:]
    assert first.option("time") == "700"
    saved = yaml.safe_load(run.recipe.read_text())
    assert (saved["train"]["micro_batch_size"], saved["slurm"]["train"]["time"]) == (2, "700")
    assert saved["train"]["global_batch_size"] == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=0.5", r"train\.learning_rate \(was .*, now 0\.5\)"),
        ("seed=9", r"seed \(was 0, now 9\)"),
        ("run_dir=/elsewhere", "run_dir cannot change on resume"),
        ("sweep.seed=[1]", "sweep cannot change on resume"),
        ("train.pakcing=true", "train.pakcing: unknown key"),
        ("train.packing", "not of the form key.sub=value"),
    ],
)
def test_what_may_not_change_is_named_and_nothing_is_touched(
    run: RunDir, slurm: FakeSlurm, override: str, message: str
) -> None:
    before, asked = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}, len(slurm.said)
    with pytest.raises(InputError, match=message) as refused:
        resume(run.root, "slurm.time=700", override)
    assert refused.value.exit_code == 2
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before and len(slurm.said) == asked


def test_a_run_on_this_machine_takes_changes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, train=TRAIN)
    recipe.save(recipe.run.create())
    ran = []
    monkeypatch.setattr("launcher.stages.run_all", ran.append)
    resume(recipe.run_dir, "train.max_steps=5")
    assert [(each.run_dir, each.train.max_steps) for each in ran] == [(recipe.run_dir, 5)]


@pytest.mark.parametrize("override", ["train.learning_rate=1", "train={}", "name=x"])
def test_the_values_of_a_sweep_stay(tmp_path: Path, override: str) -> None:
    sweep = RunDir(tmp_path / "run")
    member = recipe_of(tmp_path, train=TRAIN).model_copy(update={"run_dir": sweep.sweep / "a"})
    save_index(sweep, [({"train.learning_rate": 0.1}, member)])
    member.save(member.run.create())
    with pytest.raises(InputError, match="cannot change on resume"):
        resume(sweep.root, override)
