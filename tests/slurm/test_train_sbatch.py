"""slurm/train.sbatch under a real Slurm, with a real model and DeepSpeed."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT
from tests.slurm.training import TRAIN, lay_out

pytestmark = pytest.mark.slurm

NUM_STEPS = 60  # two an epoch; so many that the notice comes in time
SCRIPT = PROJECT / "slurm" / "train.sbatch"
# The two ranks share a small machine with the rest of the tests.
ENV = {"TUNESMITH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def recipe(slurm_cluster: SlurmBed, tiny_model: Path, request: pytest.FixtureRequest) -> Path:
    """A recipe over eight conversations, in a folder of its own below the shared one."""
    folder = slurm_cluster.shared / request.node.name
    lay_out(folder, tiny_model)
    values = {"name": "tiny", "run_dir": "run", "model": {"path": "model"}, "train": TRAIN}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exit_words(run: Path, job: int) -> list[dict]:
    """What each of two nodes left about its end."""
    return [json.loads((run / f"gen-{job}-0" / f"node-{node}.exit.json").read_text()) for node in (0, 1)]


def test_two_nodes_train_one_model_and_the_same_command_goes_on_after_a_notice(
    slurm_cluster: SlurmBed, recipe: Path
) -> None:
    run, options = recipe.parent / "run", ["--nodes=2"]
    command = [SCRIPT, "recipe.yaml", f"train.num_epochs={NUM_STEPS // 2}"]
    job = slurm_cluster.sbatch(*command, options=options, cwd=recipe.parent, env=ENV)
    slurm_cluster.wait_output(job, "step 3/", 300)
    slurm_cluster.client("scancel", "--batch", "--signal=USR2", str(job))  # what --signal=B:USR2@300 does
    assert slurm_cluster.wait_state(job, {"FAILED"}, 60)["ExitCode"] == "75:0", slurm_cluster.output(job)
    verdict = json.loads((run / "verdict-train.json").read_text())
    assert verdict["status"] == "preempted"
    stopped_at = verdict["step"]
    assert read_rows(run / "metrics.jsonl")[-1]["step"] == stopped_at >= 3
    assert [word["exit_code"] for word in exit_words(run, job)] == [75, 75]

    job = slurm_cluster.sbatch(*command, options=options, cwd=recipe.parent, env=ENV)
    slurm_cluster.wait_state(job, {"COMPLETED"}, 300)
    output = slurm_cluster.output(job)
    assert f"going on from {verdict['checkpoint']}, step {stopped_at} of {NUM_STEPS}" in output
    assert "x 2 ranks" in output and f"; {NUM_STEPS} steps" in output
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if row["stage"] == "train"]
    assert steps == list(range(1, NUM_STEPS + 1))
    verdict = json.loads((run / "verdict-train.json").read_text())
    assert (verdict["status"], verdict["step"], verdict["num_rows"]) == ("done", NUM_STEPS, 8)
    assert (run / "checkpoints" / f"step_{NUM_STEPS:06d}").is_dir()
    assert [(word["host"], word["exit_code"]) for word in exit_words(run, job)] == [("n1", 0), ("n2", 0)]


def test_bad_input_arrives_as_exit_code_2(slurm_cluster: SlurmBed, recipe: Path) -> None:
    job = slurm_cluster.sbatch(SCRIPT, "recipe.yaml", "train.zero_stge=3", cwd=recipe.parent, env=ENV)
    assert slurm_cluster.wait_state(job, {"FAILED"}, 60)["ExitCode"] == "2:0"
    assert "did you mean `zero_stage`?" in slurm_cluster.output(job)
