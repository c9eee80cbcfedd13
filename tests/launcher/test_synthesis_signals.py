"""A signal that comes while synthesis is still starting ends it as preempted, with a sentence."""

import os
import signal
import time
from pathlib import Path

import pytest
import ray

import generation.synthesize
from cluster.errors import Preempted
from cluster.ray.cluster import ray_session
from cluster.run.rundir import RunDir
from launcher import stages
from launcher.recipe import Recipe


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_modules_and_inputs_are_loaded(tmp_path: Path, monkeypatch, number) -> None:
    def load(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(generation.synthesize, "run", load)
    with pytest.raises(Preempted, match="came before the stage began"):
        stages.synthesize(Recipe(name="test", model={"path": "."}), RunDir(tmp_path))


def test_while_ray_starts(tmp_path: Path, monkeypatch) -> None:
    """Ray takes SIGTERM as it starts, and its handler exits."""

    def start(**_: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(Preempted, match="SIGTERM came while Ray started"), ray_session(tmp_path):
        pass
