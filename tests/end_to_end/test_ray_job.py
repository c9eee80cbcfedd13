"""`ray job submit -- tunesmith synthesize ...` on a Ray cluster that somebody else started."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.end_to_end.conftest import ROOT
from tests.fakes import write_script

BIN = Path(sys.executable).parent
NOT_UP_YET = ("No available agent", "Failed to connect", "Connection refused")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def ray_head() -> Iterator[dict[str, str]]:
    """A Ray head with a dashboard on loopback and a token; yields the environment of its clients."""
    folder = Path(tempfile.mkdtemp(prefix="rj-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    port, dashboard = free_port(), free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}/r", "--num-cpus=2"]
    command.append(f"--dashboard-agent-listen-port={free_port()}")  # jobs go through it, and its default may be taken
    head = subprocess.Popen(
        [*command, "--disable-usage-stats"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        started = [head, *psutil.Process(head.pid).children(recursive=True)]
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=60)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def submit(
    environment: dict[str, str], *command: str | Path, options: Iterable[str | Path] = ()
) -> subprocess.CompletedProcess:
    """`ray job submit -- command`, tried again while the cluster is coming up."""
    words = [BIN / "ray", "job", "submit", *options, "--", *command]
    for _ in range(60):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0 or not any(sign in done.stderr for sign in NOT_UP_YET):
            return done
        time.sleep(1)
    raise AssertionError(f"the Ray cluster did not come up: {done.stderr[-1000:]}")


def write_recipe(folder: Path, name: str, backend: str) -> Path:
    model = write_script(folder / "model")
    recipe = {
        "name": name,
        "run_dir": str(folder / name),
        "model": {"path": model.path},
        "engine": {"backend": backend},
        "synthesize": {"num_instructions": 20},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder / f"{name}.yaml"


def ship_code(folder: Path) -> Path:
    """A copy of the code with an engine that is nowhere else."""
    for package in ("cluster", "generation", "trainer", "launcher"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "fakes.py", folder / "shipped_engine.py")
    return folder


@pytest.mark.timeout(400)
def test_ray_job_submit_runs_the_stage_on_that_cluster_with_the_code_there_or_with_code_it_brings(tmp_path):
    there = write_recipe(tmp_path, "there", "tests.fakes:ScriptedEngine")
    brought = write_recipe(tmp_path, "brought", "shipped_engine:ScriptedEngine")
    code = ship_code(tmp_path / "code")
    with ray_head() as environment:
        done = submit(environment, BIN / "tunesmith", "synthesize", there)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        command = (BIN / "python", "-m", "launcher.cli", "synthesize", brought)
        done = submit(environment, *command, options=["--working-dir", code])  # the cluster is still there
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("there", "brought"):
        result = json.loads((tmp_path / name / "result-synthesize.json").read_text())
        assert result["num_accepted"] == 20
