"""Sessions on a private Ray and on a running one, each in a process of its own."""

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray

from cluster.errors import TunesmithError
from cluster.ray.cluster import _start

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
SESSION = """
import json, os, sys, tempfile
from pathlib import Path
import ray
from cluster.ray.cluster import ray_session

@ray.remote
def package():
    import cluster
    return cluster.__file__

def settings():
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}

before = settings()
try:
    with ray_session(Path(sys.argv[1])):
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        facts = {
            "package": ray.get(package.remote()),
            "cluster": ray.get_runtime_context().gcs_address,
            "token_mode": token.stat().st_mode,
            "folder_mode": token.parent.stat().st_mode,
            "folder": str(token.parent),
            "sessions": sorted(path.name for path in Path(tempfile.gettempdir()).glob("tunesmith-ray-*")),
        }
        print(json.dumps(facts), flush=True)
        if sys.argv[2] == "fail":
            raise ZeroDivisionError("on purpose")
        if sys.argv[2] == "wait":
            sys.stdin.read()
finally:
    print(json.dumps({"env_restored": settings() == before, "is_up": ray.is_initialized()}))
"""


@pytest.fixture
def short_folder():
    """A temporary folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ts", dir="/tmp") as folder:
        yield Path(folder)


def session(folder: Path, how: str = "plain", **env: str) -> subprocess.Popen:
    """Run SESSION in another working directory, with TMPDIR in `folder`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", SESSION, str(folder / "run"), how],
        cwd=folder,
        env={**environment, "TMPDIR": str(folder), **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def facts_of(process: subprocess.Popen) -> tuple[list[dict], str]:
    out, error = process.communicate()
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], error


def test_a_private_ray_has_a_private_token_and_leaves_nothing(short_folder):
    (inside, after), error = facts_of(session(short_folder))
    assert stat.S_IMODE(inside["token_mode"]) == 0o600, error
    assert stat.S_IMODE(inside["folder_mode"]) == 0o700
    assert inside["package"] == str(ROOT / "cluster" / "__init__.py")
    assert after == {"env_restored": True, "is_up": False}
    assert list(short_folder.glob("tunesmith-ray-*")) == []
    assert not (short_folder / "run" / "logs").exists()


def test_a_session_that_fails_keeps_the_logs_of_its_workers(short_folder):
    _, error = facts_of(session(short_folder, "fail"))
    assert "on purpose" in error
    assert list((short_folder / "run" / "logs" / "ray").glob("worker-*"))


def test_the_next_session_removes_the_folder_of_a_killed_one_but_not_of_a_live_one(short_folder):
    killed, living = session(short_folder, "wait"), session(short_folder, "wait")
    folders = [Path(json.loads(process.stdout.readline())["folder"]) for process in (killed, living)]
    killed.kill()
    killed.wait()
    for name in ("tunesmith-ray-leftover", "tunesmith-ray-beginning"):
        (short_folder / name / "r0").mkdir(parents=True)
    os.utime(short_folder / "tunesmith-ray-leftover", (0, 0))
    (inside, _), _ = facts_of(session(short_folder))
    assert folders[0].name not in inside["sessions"]
    assert folders[1].name in inside["sessions"]
    assert "tunesmith-ray-leftover" not in inside["sessions"]
    assert "tunesmith-ray-beginning" in inside["sessions"]
    facts_of(living)


@pytest.mark.parametrize("address", ["auto", "http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_an_address_of_another_kind_is_bad_input(short_folder, address):
    _, error = facts_of(session(short_folder, RAY_ADDRESS=address))
    assert f"InputError: RAY_ADDRESS={address}: expected the head's HOST:PORT" in error


def test_a_temporary_folder_too_long_for_sockets_is_bad_input(short_folder):
    deep = short_folder / ("x" * 40)
    deep.mkdir()
    _, error = facts_of(session(short_folder, TMPDIR=str(deep)))
    assert "InputError: TMPDIR is too long" in error
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize(("num_late", "num_tried"), [(0, 1), (2, 3), (3, 3)])
def test_a_ray_that_starts_slowly_is_tried_again_a_few_times(short_folder, monkeypatch, num_late, num_tried):
    folders = []

    def init(_temp_dir: str, **_: object) -> None:
        folders.append(_temp_dir)
        if len(folders) <= num_late:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    fails = pytest.raises(TunesmithError, match="Ray did not start") if num_late == num_tried else nullcontext()
    with fails:
        _start(short_folder)
    assert len(folders) == len(set(folders)) == num_tried


def test_a_running_ray_is_joined_and_not_stopped(short_folder):
    token = short_folder / "token"
    token.write_text("a-secret-of-this-test-only")
    token.chmod(0o600)
    port, *ports = free_ports(5)
    flags = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
        "runtime-env-agent-port",
    )
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--port={port}", f"--temp-dir={short_folder}/ray", "--num-cpus=2"]
        + ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
        + [f"--{flag}={number}" for flag, number in zip(flags, ports, strict=True)],
        env={**os.environ, **auth},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = []
        while (line := head.stdout.readline()) and "runtime started" not in line:
            said.append(line)
        assert line, "".join(said)
        for _ in range(2):  # the second finds it up: the first has not stopped it
            (inside, after), error = facts_of(session(short_folder, RAY_ADDRESS=f"127.0.0.1:{port}", **auth))
            assert inside["cluster"].endswith(f":{port}"), error
            assert after["is_up"] is False
            assert head.poll() is None
    finally:
        head.terminate()
        head.communicate()


def free_ports(num: int) -> list[int]:
    """Ports that are free now; held together while they are drawn, so that no two are the same."""
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
