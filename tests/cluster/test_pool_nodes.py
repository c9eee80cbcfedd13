"""Engines come and go with the nodes of the cluster: real Ray nodes on this machine, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import write_script

ROOT = Path(__file__).parents[2]
START_ATTEMPTS = 3  # Ray gives a node of its own 30 seconds, which is too few under load


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """The result of the scenario in node_scenario.py."""
    folder = tmp_path_factory.mktemp("nodes")
    model = write_script(folder / "model", latency_ms=200)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.cluster.node_scenario", model.path, str(folder / "seen.json")]
    for _ in range(START_ATTEMPTS):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400,
            env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
        if "timed out during startup" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "seen.json").read_text())


def test_a_node_that_joins_brings_an_engine(seen):
    assert seen["engines_at_start"] == 1
    assert seen["both_take_part"]


def test_when_a_node_is_lost_every_request_is_answered_once(seen):
    assert seen["answered_once_each"]
    assert (seen["restarts"], seen["quarantined"]) == (1, 0)


def test_an_engine_lost_with_its_node_comes_back_with_another_node(seen):
    assert seen["answered_with_a_new_node"]


def test_with_no_node_left_the_run_fails_with_a_message(seen):
    assert "the cluster had no resources for it in engine.start_timeout_seconds=30" in seen["without_nodes"]
    assert "Start the same command again to continue" in seen["without_nodes"]
