"""The checks of a node before a stage: each names what is wrong."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.job.node_checks import (
    Finding,
    NodeReport,
    check_node,
    check_space,
    clock_skew,
    compare_reports,
    from_json,
)

PROJECT = Path(__file__).parents[2]

# One node that sums with itself, by an all-reduce that is right, or adds something of its own.
SUM = """
import sys
from types import SimpleNamespace
import torch.distributed as dist
from launcher.job.node_checks import sum_over_nodes
from cluster.nodes.topology import Topology
if sys.argv[1] == "wrong":
    dist.all_reduce = lambda numbers: numbers[0].add_(1)
place = SimpleNamespace(interface="lo", address="127.0.0.1", port=int(sys.argv[2]))
print(sum_over_nodes(Topology(("here",), 0, 1, "5", 0, 0), place, place))
"""


def reports(num: int = 3) -> list[NodeReport]:
    return [NodeReport(rank, f"n{rank + 1}", 0, "abc", {"torch": "2"}) for rank in range(num)]


def test_the_node_that_differs_from_most_is_named() -> None:
    assert compare_reports(reports()) == {}
    found = reports()
    found[0].code = "xyz"
    found[1].versions = {"torch": "1"}
    found[2].skew_seconds = -100.0
    found[2].findings.append(Finding("/tmp", "full"))
    assert compare_reports(found) == {
        "n1": [Finding("code", "its sources hash to xyz, those of the others to abc")],
        "n2": [Finding("versions", "torch 1 here, 2 on the others")],
        "n3": [Finding("/tmp", "full"), Finding("clock", "-100 s from the others; at most 30 s are allowed")],
    }
    assert from_json(json.loads(json.dumps(asdict(found[2])))) == found[2]


def test_a_clock_that_runs_as_its_file_server_does_is_right(tmp_path: Path) -> None:
    assert abs(clock_skew(tmp_path, "here")) < 1


def test_a_clock_that_is_ahead_of_its_file_server_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100)
    assert 99 < clock_skew(tmp_path, "here") < 101
    report = NodeReport(0, "here", 0)
    check_node(report, tmp_path, num_gpus=0)
    assert 99 < report.skew_seconds < 101


@pytest.mark.parametrize(
    ("minimum", "check"),
    [("MIN_RUN_MIB", "disk of the run folder"), ("MIN_TMP_MIB", "/tmp"), ("MIN_SHM_MIB", "/dev/shm")],
)
def test_too_little_space_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minimum: str, check: str
) -> None:
    monkeypatch.setattr(f"launcher.job.node_checks.{minimum}", 10**15)
    report = NodeReport(0, "here", 0)
    check_node(report, tmp_path, num_gpus=0)
    (finding,) = report.findings
    assert finding.check == check and "MiB are needed" in finding.message


@pytest.mark.parametrize(
    ("num_inodes", "is_reported"), [(10**6, True), (0, False)], ids=["few are free", "the file system counts none"]
)
def test_too_few_inodes_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_inodes: int, is_reported: bool
) -> None:
    state = SimpleNamespace(f_bavail=10**6, f_frsize=4096, f_files=num_inodes, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda _: state)
    assert ("0 inodes free" in (check_space(tmp_path, 1) or "")) == is_reported


@pytest.mark.parametrize(("what", "expected"), [("right", "[]"), ("wrong", "1 of 262144 sums are not 1")])
def test_a_wrong_sum_is_reported(what: str, expected: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-P", "-c", SUM, what, str(port)]
    done = subprocess.run(
        argv, cwd=PROJECT, env=os.environ | {"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr


def test_a_node_without_a_free_port_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listen(_: socket.socket) -> None:
        raise OSError("all are taken")

    monkeypatch.setattr(socket.socket, "listen", listen)
    report = NodeReport(0, "here", 0)
    check_node(report, tmp_path, num_gpus=0)
    assert report.findings == [Finding("port", "all are taken")]


def test_a_node_without_a_fault_finds_none_and_leaves_nothing(tmp_path: Path) -> None:
    report = NodeReport(0, "here", 0)
    check_node(report, tmp_path, num_gpus=0)
    assert report.findings == [] and report.versions["torch"] != "absent" and list(tmp_path.iterdir()) == []


def test_gpus_with_errors_and_absent_ones_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'H100, 81559 MiB, 0'\necho 'H100, 81559 MiB, 7'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    report = NodeReport(0, "here", 0)
    check_node(report, tmp_path, num_gpus=4)
    assert [finding.check for finding in report.findings] == ["GPUs"]
    assert "uncorrected memory errors: H100, 81559 MiB, 7" in report.findings[0].message
    program.write_text("#!/bin/sh\necho 'H100, 81559 MiB, [N/A]'\n")
    report = NodeReport(0, "here", 0)
    check_node(report, tmp_path, num_gpus=4)
    assert report.findings == [Finding("GPUs", "4 belong to the job, nvidia-smi lists 1")]


def test_a_single_node_waits_for_no_other(tmp_path: Path) -> None:
    argv = [sys.executable, "-P", "-m", "launcher.job.preflight", str(tmp_path)]
    assert subprocess.run(argv, cwd=PROJECT, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT)}).returncode == 0
    assert json.loads((tmp_path / "attempt-local-0" / "preflight.json").read_text())["failures"] == {}
