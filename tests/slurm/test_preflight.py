"""Preflight names the node and what is wrong with it, before a stage has started."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.job.node_checks import (
    Finding,
    NodeReport,
    check_space,
    clock_skew,
    compare,
    from_json,
    look_around,
    to_json,
)
from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT

CHECK = """
import os, sys
from pathlib import Path
from cluster.run.rundir import RunDir
from cluster.nodes.topology import expand_host_list
from launcher.job import attempt
from launcher.job import preflight
def on_all_nodes(argv, limit_seconds):
    return attempt.on_all_nodes([*argv, *sys.argv[2:]], limit_seconds)
try:
    hosts = tuple(expand_host_list(os.environ["SLURM_JOB_NODELIST"]))
    preflight.check_nodes(RunDir(Path(sys.argv[1])), os.environ["SLURM_JOB_ID"], hosts, on_all_nodes)
    print("all fit")
except preflight.PreflightFailed as error:
    print(error)
"""

# One node that sums with itself, by an all-reduce that is right, or adds something of its own.
SUM = """
import sys
from types import SimpleNamespace
import torch.distributed as dist
from launcher.job.all_reduce import sum_over_nodes
from cluster.nodes.topology import Topology
if sys.argv[1] == "wrong":
    dist.all_reduce = lambda numbers: numbers[0].add_(1)
place = SimpleNamespace(interface="lo", address="127.0.0.1", port=int(sys.argv[2]))
print(sum_over_nodes(Topology(("here",), 0, 1, "5", 0, 0), place, place))
"""


def reports(num: int = 3) -> list[NodeReport]:
    return [NodeReport(rank, f"n{rank + 1}", 0, "abc", {"torch": "2"}) for rank in range(num)]


def test_the_node_that_differs_from_most_is_named() -> None:
    assert compare(reports()) == {}
    found = reports()
    found[0].code = "xyz"
    found[1].versions = {"torch": "1"}
    found[2].skew_seconds = -100.0
    found[2].findings.append(Finding("/tmp", "full"))
    assert compare(found) == {
        "n1": [Finding("code", "its sources hash to xyz, those of the others to abc")],
        "n2": [Finding("versions", "torch 1 here, 2 on the others")],
        "n3": [Finding("/tmp", "full"), Finding("clock", "-100 s from the others; 30 s are borne")],
    }
    assert from_json(json.loads(json.dumps(to_json(found[2])))) == found[2]


def test_a_clock_that_runs_as_its_file_server_does_is_right(tmp_path: Path) -> None:
    assert abs(clock_skew(tmp_path, "here")) < 1


def test_a_clock_that_is_ahead_of_its_file_server_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100)
    assert 99 < clock_skew(tmp_path, "here") < 101
    report = NodeReport(0, "here", 0)
    look_around(report, tmp_path, num_gpus=0)
    assert 99 < report.skew_seconds < 101


@pytest.mark.parametrize(
    ("least", "check"),
    [("LEAST_RUN_MIB", "disk of the run folder"), ("LEAST_TMP_MIB", "/tmp"), ("LEAST_SHM_MIB", "/dev/shm")],
)
def test_too_little_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: str, check: str) -> None:
    monkeypatch.setattr(f"launcher.job.node_checks.{least}", 10**15)
    report = NodeReport(0, "here", 0)
    look_around(report, tmp_path, num_gpus=0)
    (finding,) = report.findings
    assert finding.check == check and "MiB are wanted" in finding.message


@pytest.mark.parametrize(
    ("num_inodes", "is_told"), [(10**6, True), (0, False)], ids=["few are free", "none are counted"]
)
def test_too_few_inodes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_inodes: int, is_told: bool
) -> None:
    state = SimpleNamespace(f_bavail=10**6, f_frsize=4096, f_files=num_inodes, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda _: state)
    assert ("0 inodes free" in (check_space(tmp_path, 1) or "")) == is_told


@pytest.mark.parametrize(("what", "said"), [("right", "[]"), ("wrong", "1 of 262144 sums are not 1")])
def test_a_wrong_sum_is_told(what: str, said: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-P", "-c", SUM, what, str(port)]
    done = subprocess.run(
        argv, cwd=PROJECT, env=os.environ | {"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_a_node_without_a_port_to_give_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listen(_: socket.socket) -> None:
        raise OSError("all are taken")

    monkeypatch.setattr(socket.socket, "listen", listen)
    report = NodeReport(0, "here", 0)
    look_around(report, tmp_path, num_gpus=0)
    assert report.findings == [Finding("port", "all are taken")]


def test_a_node_without_a_fault_finds_none_and_leaves_nothing(tmp_path: Path) -> None:
    report = NodeReport(0, "here", 0)
    look_around(report, tmp_path, num_gpus=0)
    assert report.findings == [] and report.versions["torch"] != "absent" and list(tmp_path.iterdir()) == []


def test_gpus_with_errors_and_absent_ones_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'H100, 81559 MiB, 0'\necho 'H100, 81559 MiB, 7'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    report = NodeReport(0, "here", 0)
    look_around(report, tmp_path, num_gpus=4)
    assert [finding.check for finding in report.findings] == ["GPUs"]
    assert "uncorrected memory errors: H100, 81559 MiB, 7" in report.findings[0].message
    program.write_text("#!/bin/sh\necho 'H100, 81559 MiB, [N/A]'\n")
    report = NodeReport(0, "here", 0)
    look_around(report, tmp_path, num_gpus=4)
    assert report.findings == [Finding("GPUs", "4 belong to the job, nvidia-smi lists 1")]


def check(bed: SlurmBed, name: str, *words: str, num_nodes: int = 3, setup: str = "") -> tuple[str, Path]:
    """What `check_nodes` says in a job of all nodes, and its run folder."""
    run = bed.shared / name
    run.mkdir(exist_ok=True)
    (bed.shared / "check.py").write_text(CHECK)
    script = bed.write_script(
        f"{name}.sh",
        f"export PYTHONPATH={PROJECT} OMP_NUM_THREADS=1\n{setup}\n{sys.executable} -P check.py {run} {' '.join(words)}",
    )
    job = bed.sbatch(script, options=[f"--nodes={num_nodes}", "--no-requeue"])
    bed.wait_state(job, {"COMPLETED"}, 180)
    return bed.output(job), run


def ledger(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "nodes.jsonl").read_text().splitlines()]


@pytest.mark.slurm
def test_a_full_tmp_and_a_run_folder_that_takes_nothing_name_their_nodes(slurm_cluster: SlurmBed) -> None:
    bed = slurm_cluster
    bed.nodes["n2"].fill_tmp()
    run = bed.shared / "sick"
    run.mkdir()
    # Read-only for n3 alone, as a mount that was lost and came back is.
    bed.nodes["n3"].run("mount", "--bind", str(run), str(run), cwd=bed.shared, env=bed.env)
    bed.nodes["n3"].run("mount", "-o", "remount,ro,bind", str(run), cwd=bed.shared, env=bed.env)
    try:
        said, run = check(bed, "sick", "--report-seconds=8")
    finally:
        bed.nodes["n3"].run("umount", str(run), cwd=bed.shared, env=bed.env)
        bed.nodes["n2"].empty_tmp()
    assert "PREFLIGHT: n2: /tmp: /tmp: 0.0 MiB free; 64 MiB are wanted; n3: run folder: left no report" in said, said
    assert "preflight: n3: " in said and "Read-only file system" in said
    (row,) = ledger(run)
    assert row["failed"] == ["n2", "n3"] and "/tmp" in row["preflight"]


@pytest.mark.long
@pytest.mark.slurm
def test_other_code_on_one_node_is_found_and_equal_nodes_sum_together(slurm_cluster: SlurmBed) -> None:
    bed = slurm_cluster
    said, run = check(bed, "fit", num_nodes=2)
    assert "all fit" in said, said
    (folder,) = run.glob("attempt-*")
    found = [json.loads(path.read_text()) for path in folder.glob("preflight-node-*.json")]
    assert len(found) == 2 and all(report["all_reduce_seconds"] > 0 for report in found)

    other = bed.shared / "loss.py"  # n1's checkout is a commit ahead
    other.write_text((PROJECT / "trainer" / "loss.py").read_text() + "# one line more\n")
    loss = str(PROJECT / "trainer" / "loss.py")
    bed.nodes["n1"].run("mount", "--bind", str(other), loss, cwd=bed.shared, env=bed.env)
    try:
        said, run = check(bed, "behind", "--no-all-reduce")
    finally:
        bed.nodes["n1"].run("umount", loss, cwd=bed.shared, env=bed.env)
    (line,) = [line for line in said.splitlines() if line.startswith("PREFLIGHT")]
    assert "n1: code: its sources hash to" in line and "n2" not in line and "n3" not in line


def test_alone_it_wants_no_other_node(tmp_path: Path) -> None:
    argv = [sys.executable, "-P", "-m", "launcher.job.preflight", str(tmp_path)]
    assert subprocess.run(argv, cwd=PROJECT, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT)}).returncode == 0
    assert json.loads((tmp_path / "attempt-local-0" / "preflight.json").read_text())["failures"] == {}
