"""The driver of a Ray job starts before Ray does. Without Slurm: its step is one that never writes its address."""

import sys
from pathlib import Path

import pytest

from cluster.errors import Preempted, TunesmithError
from cluster.files import write_json
from cluster.processes.signals import StopRequest
from cluster.run.rundir import RunDir
from launcher.job import ray_job
from launcher.job.allocation import NodeAllocation
from launcher.job.ray_job import RayJob

SILENT_STEP = ["sh", "-c", "cat >/dev/null"]  # ends with its standard input


def ray_job_of(folder: Path, monkeypatch: pytest.MonkeyPatch, stop: StopRequest) -> RayJob:
    monkeypatch.setattr(ray_job, "node_step", lambda allocation: SILENT_STEP)
    (rendezvous_dir := folder / "rendezvous").mkdir()
    return RayJob(RunDir(folder), rendezvous_dir, [NodeAllocation("n1", 1, 0, 0)], stop)


@pytest.mark.parametrize("code", [0, 2])
def test_a_driver_that_needs_no_ray_ends_the_job_with_its_own_code(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ray_job_of(tmp_path, monkeypatch, StopRequest())
    assert job.run([sys.executable, "-c", f"raise SystemExit({code})"]) == code
    assert [step.has_ended for step in job.steps] == [True]


def test_a_node_that_reports_its_end_ends_the_job_although_its_srun_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slurmstepd that is killed cannot tell srun that its step has ended."""
    job = ray_job_of(tmp_path, monkeypatch, StopRequest())
    write_json(job.rendezvous_dir / "node-0.exit.json", {"host": "n1", "exit_code": 1, "reason": "its pipe closed"})
    with pytest.raises(TunesmithError, match="node n1: its pipe closed"):
        job.run([sys.executable, "-c", "import time; time.sleep(600)"])


def test_a_driver_that_waits_for_ray_ends_when_the_job_is_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    stop.names.append("SIGTERM")
    job = ray_job_of(tmp_path, monkeypatch, stop)
    wait = f"from cluster.ray.cluster import ray_session\nwith ray_session({str(tmp_path)!r}): pass"
    with pytest.raises(Preempted, match="before Ray was up"):
        job.run([sys.executable, "-c", wait])
    assert job._driver.returncode == -9
