"""slurm/train.sbatch under a real Slurm, with a real model and DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.files import sha256_file
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


def exit_reports(run: Path, job: int) -> list[dict]:
    """What each of two nodes left about its end."""
    return [json.loads((run / f"attempt-{job}-0" / f"node-{node}.exit.json").read_text()) for node in (0, 1)]


def test_two_nodes_train_one_model_and_the_same_command_goes_on_after_a_notice(
    slurm_cluster: SlurmBed, recipe: Path
) -> None:
    run, options = recipe.parent / "run", ["--nodes=2"]
    command = [SCRIPT, "recipe.yaml", f"train.num_epochs={NUM_STEPS // 2}"]
    job = slurm_cluster.sbatch(*command, options=options, cwd=recipe.parent, env=ENV)
    slurm_cluster.wait_output(job, "step 3/", 300)
    slurm_cluster.client("scancel", "--batch", "--signal=USR2", str(job))  # what --signal=B:USR2@300 does
    assert slurm_cluster.wait_state(job, {"FAILED"}, 60)["ExitCode"] == "75:0", slurm_cluster.output(job)
    result = json.loads((run / "result-train.json").read_text())
    assert result["status"] == "preempted"
    stopped_at = result["step"]
    assert read_rows(run / "metrics.jsonl")[-1]["step"] == stopped_at >= 3
    assert [report["exit_code"] for report in exit_reports(run, job)] == [75, 75]

    job = slurm_cluster.sbatch(*command, options=options, cwd=recipe.parent, env=ENV)
    slurm_cluster.wait_state(job, {"COMPLETED"}, 300)
    output = slurm_cluster.output(job)
    assert f"resuming from {result['checkpoint']}, step {stopped_at} of {NUM_STEPS}" in output
    assert "x 2 ranks" in output and f"; {NUM_STEPS} steps" in output
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if row["stage"] == "train"]
    assert steps == list(range(1, NUM_STEPS + 1))
    result = json.loads((run / "result-train.json").read_text())
    assert (result["status"], result["step"], result["num_documents"]) == ("done", NUM_STEPS, 8)
    assert (run / "checkpoints" / f"step_{NUM_STEPS:06d}").is_dir()
    assert [(report["host"], report["exit_code"]) for report in exit_reports(run, job)] == [("n1", 0), ("n2", 0)]


@pytest.mark.long
@pytest.mark.parametrize("num_nodes", [2, 3])
def test_nodes_train_as_one_machine_does(slurm_cluster: SlurmBed, recipe: Path, num_nodes: int) -> None:
    """Bit for bit, with as many ranks."""
    here, values = recipe.parent / "here", [f"train.global_batch_size={2 * num_nodes}", "train.num_epochs=6"]
    command = [sys.executable, "-m", "launcher.cli", "train", "recipe.yaml", *values, "--run-dir", here]
    environ = {**os.environ, **ENV, "PYTHONPATH": str(PROJECT)}
    argv = [*map(str, command), f"train.num_processes={num_nodes}"]
    done = subprocess.run(argv, cwd=recipe.parent, env=environ, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    options = [f"--nodes={num_nodes}"]
    job = slurm_cluster.sbatch(SCRIPT, "recipe.yaml", *values, options=options, cwd=recipe.parent, env=ENV)
    slurm_cluster.wait_state(job, {"COMPLETED"}, 300)
    assert f"x {num_nodes} ranks" in slurm_cluster.output(job)
    assert trained(recipe.parent / "run") == trained(here) != {}
    losses = [[row["loss"] for row in read_rows(run / "metrics.jsonl")] for run in (recipe.parent / "run", here)]
    assert losses[0] == losses[1]


def trained(run: Path) -> dict[str, str]:
    """SHA-256 of the last weights, by step and file."""
    last = sorted((run / "checkpoints").glob("step_*"))[-1]
    return {f"{last.name}/{path.name}": sha256_file(path) for path in (last / "weights").glob("*.safetensors")}


def test_bad_input_arrives_as_exit_code_2(slurm_cluster: SlurmBed, recipe: Path) -> None:
    job = slurm_cluster.sbatch(SCRIPT, "recipe.yaml", "train.zero_stge=3", cwd=recipe.parent, env=ENV)
    assert slurm_cluster.wait_state(job, {"FAILED"}, 60)["ExitCode"] == "2:0"
    assert "did you mean `zero_stage`?" in slurm_cluster.output(job)
