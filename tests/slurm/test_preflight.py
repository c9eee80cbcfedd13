"""Preflight on a real Slurm names the node and what is wrong with it, before a stage has started."""

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT

CHECK = """
import os, sys
from pathlib import Path
from cluster.processes.signals import StopRequest
from cluster.run.rundir import RunDir
from launcher.slurm.client import Slurm
from launcher.job import supervisor
from launcher.job import preflight
steps = supervisor.Steps(StopRequest())
def on_all_nodes(argv, limit_seconds):
    return steps.run_on_all_nodes([*argv, *sys.argv[2:]], limit_seconds)
try:
    hosts = tuple(Slurm().host_names(os.environ["SLURM_JOB_NODELIST"]))
    preflight.check_nodes(RunDir(Path(sys.argv[1])), os.environ["SLURM_JOB_ID"], hosts, on_all_nodes)
    print("all fit")
except preflight.PreflightFailed as error:
    print(error)
"""


def check(bed: SlurmBed, name: str, *options: str, num_nodes: int = 3, setup: str = "") -> tuple[str, Path]:
    """The output of `check_nodes` in a job of all nodes, and its run folder."""
    run = bed.shared / name
    run.mkdir(exist_ok=True)
    (bed.shared / "check.py").write_text(CHECK)
    script = bed.write_script(
        f"{name}.sh",
        f"export PYTHONPATH={PROJECT} OMP_NUM_THREADS=1\n{setup}\n"
        f"{sys.executable} -P check.py {run} {' '.join(options)}",
    )
    job = bed.sbatch(script, options=[f"--nodes={num_nodes}", "--no-requeue"])
    bed.wait_state(job, {"COMPLETED"}, 180)
    return bed.output(job), run


def health_records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "nodes.jsonl").read_text().splitlines()]


@pytest.mark.slurm
def test_a_full_tmp_and_a_read_only_run_folder_name_their_nodes(slurm_cluster: SlurmBed) -> None:
    bed = slurm_cluster
    bed.nodes["n2"].fill_tmp()
    run = bed.shared / "sick"
    run.mkdir()
    # Read-only for n3 alone, as a mount that was lost and came back is.
    bed.nodes["n3"].run("mount", "--bind", str(run), str(run), cwd=bed.shared, env=bed.env)
    bed.nodes["n3"].run("mount", "-o", "remount,ro,bind", str(run), cwd=bed.shared, env=bed.env)
    try:
        output, run = check(bed, "sick", "--report-seconds=8")
    finally:
        bed.nodes["n3"].run("umount", str(run), cwd=bed.shared, env=bed.env)
        bed.nodes["n2"].empty_tmp()
    assert "PREFLIGHT: n2: /tmp: /tmp: 0.0 MiB free; 64 MiB are needed; n3: run folder: left no report" in output, (
        output
    )
    assert "preflight: n3: " in output and "Read-only file system" in output
    (record,) = health_records(run)
    assert record["failed"] == ["n2", "n3"] and "/tmp" in record["preflight"]


@pytest.mark.long
@pytest.mark.slurm
def test_other_code_on_one_node_is_found_and_equal_nodes_sum_together(slurm_cluster: SlurmBed) -> None:
    bed = slurm_cluster
    output, run = check(bed, "fit", num_nodes=2)
    assert "all fit" in output, output
    (folder,) = run.glob("attempt-*")
    found = [json.loads(path.read_text()) for path in folder.glob("preflight-node-*.json")]
    assert len(found) == 2 and all(report["all_reduce_seconds"] > 0 for report in found)

    other = bed.shared / "loss.py"  # n1's checkout is a commit ahead
    other.write_text((PROJECT / "trainer" / "model" / "loss.py").read_text() + "# one line more\n")
    loss = str(PROJECT / "trainer" / "model" / "loss.py")
    bed.nodes["n1"].run("mount", "--bind", str(other), loss, cwd=bed.shared, env=bed.env)
    try:
        output, run = check(bed, "behind", "--no-all-reduce")
    finally:
        bed.nodes["n1"].run("umount", loss, cwd=bed.shared, env=bed.env)
    (line,) = [line for line in output.splitlines() if line.startswith("PREFLIGHT")]
    assert "n1: code: its sources hash to" in line and "n2" not in line and "n3" not in line
