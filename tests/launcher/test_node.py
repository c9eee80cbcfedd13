"""A node of a training job: its exit code, its exit report, and the stop signals that it passes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from cluster.files import write_json
from cluster.nodes.topology import Topology
from cluster.run.rundir import RunDir
from launcher.job.node import agree_on_exit_code, exit_code_by_result
from launcher.torchrun import find_ranks

# A rank that leaves a file when it begins and when it gets a signal. It installs its handlers, and ends with 75, once
# the test has made a file for that.
RANK = """
import os, signal, sys, time
folder, rank = sys.argv[1], os.environ["RANK"]
stopped = []
def wait_for(done):
    deadline = time.monotonic() + 60
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
def handle(*_):
    stopped.append(1)
    open(f"{folder}/stopping-{rank}", "w").close()
open(f"{folder}/began-{rank}", "w").close()
wait_for(lambda: os.path.exists(f"{folder}/install-handlers"))
for name in ("SIGUSR2", "SIGTERM"):
    signal.signal(getattr(signal, name), handle)
wait_for(lambda: stopped)
wait_for(lambda: os.path.exists(f"{folder}/may-end"))
open(f"{folder}/saved-{rank}", "w").close()
sys.exit(75)
"""

WAIT_FOR_A_NODE = """
import sys
from pathlib import Path
import cluster.nodes.rendezvous
from cluster.nodes.topology import Topology
from cluster.run.rundir import RunDir
from launcher.job.node import run_node
cluster.nodes.rendezvous.local_addresses = lambda: {"10.0.0.5": "eth0"}
run_node(Topology(("a", "b"), 0, 1, "5", 0, 0), RunDir(Path(sys.argv[1])), ["script.py"])
"""


@pytest.mark.parametrize(
    ("report_of_the_other", "code"),
    [
        ({"exit_code": 75, "step_id": 3}, 75),
        ({"exit_code": 0, "step_id": 3}, 75),
        ({"exit_code": 1, "step_id": 3}, 1),
        ({"exit_code": 1, "step_id": 2}, 75),
    ],
    ids=["preempted too", "done", "failed", "failed in an earlier step"],
)
def test_a_preempted_node_gives_way_to_a_failure_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report_of_the_other: dict, code: int
) -> None:
    monkeypatch.setattr("launcher.job.node.AGREE_SECONDS", 0)
    topology = Topology(("n1", "n2"), 0, 1, "41", 3, 0)
    folder = topology.attempt_dir(RunDir(tmp_path))
    folder.mkdir()
    write_json(folder / "node-0.exit.json", {"exit_code": 75, "step_id": 3})
    write_json(folder / "node-1.exit.json", report_of_the_other)
    assert agree_on_exit_code(topology, RunDir(tmp_path)) == code
    (folder / "node-0.exit.json").unlink()  # the other node goes by what the head has written down
    assert agree_on_exit_code(replace(topology, node_rank=1), RunDir(tmp_path)) == code


def test_a_node_whose_head_writes_nothing_ends_as_preempted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.job.node.AGREE_SECONDS", 0)
    topology = Topology(("n1", "n2"), 1, 1, "41", 3, 0)
    folder = topology.attempt_dir(RunDir(tmp_path))
    folder.mkdir()
    write_json(folder / "end.json", {"exit_code": 1, "step_id": 2})  # of an earlier step
    assert agree_on_exit_code(topology, RunDir(tmp_path)) == 75


@pytest.mark.parametrize(
    ("result", "code", "expected"),
    [("preempted", 1, 75), ("done", 1, 0), ("failed", 1, 1), (None, 1, 1), ("preempted", 2, 2), ("done", 137, 137)],
)
def test_a_late_node_that_lost_the_heads_store_ends_as_the_result_says(
    tmp_path: Path, result: str | None, code: int, expected: int
) -> None:
    run = RunDir(tmp_path)
    if result is not None:
        write_json(run.result("train"), {"status": result})
    assert exit_code_by_result(run, code) == expected


@dataclass
class LocalNode:
    """A node with two ranks on this machine, and the folder of the files that ranks and test leave for each other."""

    process: subprocess.Popen
    folder: Path

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 60
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None and time.monotonic() < deadline, f"{names} did not come"
            time.sleep(0.02)

    def create(self, name: str) -> None:
        (self.folder / name).touch()

    def exit_report(self) -> dict:
        return json.loads((self.folder / "attempt-local-0" / "node-0.exit.json").read_text())


@pytest.fixture
def local_node(tmp_path: Path) -> Iterator[LocalNode]:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [
        sys.executable,
        "-m",
        "launcher.job.node",
        "--procs-per-node=2",
        "exec",
        str(tmp_path),
        "--",
        str(script),
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    (scratch := tmp_path / "scratch").mkdir()
    process = subprocess.Popen([*command, str(tmp_path)], env={**environ, "TMPDIR": str(scratch)})
    yield LocalNode(process, tmp_path)
    for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
        child.kill()
    process.kill()
    process.wait()


def test_a_stop_signal_reaches_ranks_whose_handlers_come_late_and_all_of_them_save(
    local_node: LocalNode,
) -> None:
    local_node.wait_for("began-0", "began-1")
    torchrun, *_ = psutil.Process(local_node.process.pid).children()
    ranks = find_ranks(torchrun.pid)
    assert len(ranks) == 2
    for process in (local_node.process, torchrun, *ranks):  # as Slurm does: every process of the step
        process.send_signal(signal.SIGUSR2)
    local_node.create("install-handlers")
    local_node.wait_for("stopping-0", "stopping-1")
    torchrun.send_signal(signal.SIGTERM)  # torchrun would now give its ranks 30 s, and end with 1
    local_node.process.send_signal(signal.SIGTERM)
    local_node.create("may-end")
    assert local_node.process.wait(60) == 75
    assert (local_node.folder / "saved-0").exists() and (local_node.folder / "saved-1").exists()
    report = local_node.exit_report()
    assert (report["exit_code"], sorted(report["signals"])) == (75, ["SIGTERM", "SIGUSR2"])
    assert list((local_node.folder / "scratch").iterdir()) == []


def test_stopped_before_any_rank_began_is_preempted_and_leaves_no_process(local_node: LocalNode) -> None:
    supervisor = psutil.Process(local_node.process.pid)
    while not (children := supervisor.children()):  # torchrun takes seconds from here to its first rank
        assert local_node.process.poll() is None
    local_node.process.send_signal(signal.SIGTERM)
    assert local_node.process.wait(60) == 75
    assert not (local_node.folder / "began-0").exists()
    assert not any(child.is_running() for child in children)


def test_stopped_while_it_waits_for_another_node_it_writes_its_exit_report(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAIT_FOR_A_NODE, str(tmp_path)], stderr=subprocess.DEVNULL)
    node = LocalNode(process, tmp_path)
    try:
        node.wait_for("attempt-5-0/node-0.json")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()
    assert json.loads((tmp_path / "attempt-5-0" / "node-0.exit.json").read_text())["exit_code"] == 75
