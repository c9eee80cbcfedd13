"""Fixtures of the launcher's tests: a scripted Slurm in the place of the real one."""

import pytest

from tests.launcher.slurm_chain import FakeSlurm


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    slurm = FakeSlurm()
    monkeypatch.setattr("launcher.slurm.client.Slurm", lambda: slurm)
    return slurm
