"""The `slurm_cluster` fixture: one real cluster for all tests of the session that ask for it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.bed import SlurmBed, why_impossible


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmBed]:
    """A Slurm cluster of three nodes. Skips where there can be none, but fails in CI, where there has to be one."""
    reason = why_impossible()
    if reason:
        required = os.environ.get("CI") == "true" and os.geteuid() == 0 and Path("/etc/debian_version").exists()
        (pytest.fail if required else pytest.skip)(f"no Slurm cluster: {reason}")
    with SlurmBed(num_nodes=3) as bed:
        yield bed
