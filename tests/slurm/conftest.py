"""The `slurm_cluster` fixture, one real cluster for all tests of the session that ask for it, and runs on it."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.bed import SlurmBed, why_impossible
from tests.slurm.chained import ChainedRun, make_scripted


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmBed]:
    """A Slurm cluster of three nodes. Skips where there can be none, but fails in CI, where there has to be one."""
    reason = why_impossible()
    if reason:
        required = os.environ.get("CI") == "true" and os.geteuid() == 0 and Path("/etc/debian_version").exists()
        (pytest.fail if required else pytest.skip)(f"no Slurm cluster: {reason}")
    with SlurmBed(num_nodes=3) as bed:
        yield bed


@pytest.fixture
def make_run(slurm_cluster: SlurmBed, request: pytest.FixtureRequest) -> Iterator[Callable[..., ChainedRun]]:
    """Makes runs with a scripted training (see scripted_supervisor.py), whose jobs are cancelled at the end."""
    runs: list[ChainedRun] = []

    def make(faults: dict | None = None, step_seconds: float = 0.2, steps: int = 6, **slurm: object) -> ChainedRun:
        name = re.sub(r"\W+", "-", request.node.name) + f"-{len(runs)}"
        script = {"steps": steps, "step_seconds": step_seconds, "faults": faults or {}}
        runs.append(make_scripted(slurm_cluster, name, script, **slurm))
        return runs[-1]

    yield make
    for run in runs:
        for job in run.jobs():
            slurm_cluster.client("scancel", str(job["job_id"]))
