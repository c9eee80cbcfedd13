"""What runs on each node of a Ray job, without a Ray: the pipe from the supervisor, signals, reasons of a failure."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.errors import TunesmithError
from launcher.job.ray_node import CLOSED, DONE, Pipe, failure_reason, object_store_bytes, ray_environ, ray_start

# As `ray start --block` of 2.60 writes it when one of its processes is killed.
KILLED = """Ray runtime started.
\x1b[39m 2026-11-24 20:48:12,779\tERR scripts.py:128 -- \x1b[31mSome Ray subprocesses exited unexpectedly:\x1b[39m
  \x1b[31m\x1b[1mgcs_server\x1b[22m\x1b[26m \x1b[39m\x1b[0m[exit code=-9]\x1b[0m
----- END gcs_server.out tail (exit code(s)=-9 (signal 9)) -----
Remaining processes will be killed.
"""

WATCHED = """
import signal, subprocess, sys
from pathlib import Path
from cluster.processes.signals import STOP_SIGNALS
from launcher.job.ray_node import Pipe, await_message
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
ray = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"])
print(await_message(ray, Pipe(), Path(sys.argv[1])), ray.poll())
ray.kill()
"""


def test_the_pipe_gives_messages_in_order_and_then_that_it_has_closed() -> None:
    reading, writing = os.pipe()
    pipe = Pipe(reading)
    assert pipe.read(0) is None
    os.write(writing, b"to")
    assert pipe.read(0) is None
    os.write(writing, b"ken\ndone\n")
    assert [pipe.read(0), pipe.read(0), pipe.read(0)] == ["token", DONE, None]
    os.close(writing)
    assert pipe.read(0) == CLOSED
    os.close(reading)


def test_a_process_that_was_killed_and_one_that_never_came_up_are_told_apart(tmp_path: Path) -> None:
    log = tmp_path / "start.log"
    log.write_text(KILLED)
    assert failure_reason(log) == "Ray ended by itself: gcs_server (exit code -9)"
    log.write_text("Traceback:\n  ...\nValueError: no such thing\n\n")
    assert failure_reason(log) == "Ray did not start: ValueError: no such thing"
    log.write_text("")
    assert failure_reason(log) == "Ray did not start: it printed nothing"


def test_a_signal_ends_neither_the_node_nor_its_ray_and_is_reported(tmp_path: Path) -> None:
    """As in a step: the node and its Ray get the signal. Neither ends, and the supervisor sees the file."""
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "stop")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout.readline() == "up\n"
        for process in (psutil.Process(node.pid), *psutil.Process(node.pid).children()):
            process.send_signal(signal.SIGTERM)
        while not (tmp_path / "stop").exists():
            assert node.poll() is None
        node.stdin.write(f"{DONE}\n")
        node.stdin.flush()
        assert node.stdout.read() == f"{DONE} None\n"


def test_the_object_store_fits_into_the_job_and_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**30))
    assert object_store_bytes(1000) == 300 * 2**20
    assert object_store_bytes(10**6) == 1024 * 2**20
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=200 * 2**20))
    assert object_store_bytes(10**6) == 180 * 2**20
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    with pytest.raises(TunesmithError, match="64 MiB free in /dev/shm"):
        object_store_bytes(10**6)


def test_what_the_user_has_set_for_another_ray_does_not_reach_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "VLLM_HOST_IP"):
        monkeypatch.setenv(name, "another")
    environment = ray_environ(tmp_path, "10.0.0.5")
    assert "RAY_ADDRESS" not in environment and "RAY_AUTH_TOKEN" not in environment
    assert "another" not in environment.values()
    assert environment["VLLM_HOST_IP"] == "10.0.0.5"


def test_a_head_and_a_worker_are_started_with_all_that_ray_would_guess() -> None:
    block = SimpleNamespace(options=lambda is_head: [f"--ports-of-head={is_head}"])
    share = {"cpus": 3, "gpus": 2, "memory_mib": 4000}
    head = ray_start(SimpleNamespace(head=None, **share), block, "10.0.0.5")
    worker = ray_start(SimpleNamespace(head="10.0.0.5:1", **share), block, "10.0.0.6")
    assert {"--head", "--include-dashboard=false", "--node-ip-address=10.0.0.5", "--ports-of-head=True"} < set(head)
    assert {"--address=10.0.0.5:1", "--node-ip-address=10.0.0.6", "--ports-of-head=False"} < set(worker)
    for argv in (head, worker):
        assert {"--block", "--num-cpus=3", "--num-gpus=2", "--disable-usage-stats"} < set(argv)
        assert any(option.startswith("--object-store-memory=") for option in argv)
