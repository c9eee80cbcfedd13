"""The supervisor of a node: exit codes, signals, and ranks that meet across nodes."""

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
from launcher.job.agent import exit_code_of
from launcher.job.node import agree_on_end, deliver, find_ranks, settled_code
from tests.slurm.bed import SlurmBed

# A rank that tells when it runs and when it is asked to stop; takes its handlers, and ends with 75, when told to.
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
    open(f"{folder}/asked-{rank}", "w").close()
open(f"{folder}/began-{rank}", "w").close()
wait_for(lambda: os.path.exists(f"{folder}/take-handlers"))
for name in ("SIGUSR2", "SIGTERM"):
    signal.signal(getattr(signal, name), handle)
wait_for(lambda: stopped)
wait_for(lambda: os.path.exists(f"{folder}/may-end"))
open(f"{folder}/saved-{rank}", "w").close()
sys.exit(75)
"""

ALL_REDUCE = """
import os
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(value)
where = [os.environ.get(name) for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
line = ["sum", str(int(value)), "over", str(dist.get_world_size()), "ranks", *map(str, where)]
os.write(1, (" ".join(line) + "\\n").encode())  # in one piece: two ranks of a node write to one pipe
dist.destroy_process_group()
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


@dataclass
class Failure:
    exitcode: int
    timestamp: int


def test_the_first_failure_decides_and_not_those_it_caused() -> None:
    assert exit_code_of([Failure(1, 20), Failure(75, 10)]) == 75
    assert exit_code_of([Failure(-signal.SIGTERM, 10), Failure(2, 10)]) == 2
    assert exit_code_of([Failure(-signal.SIGKILL, 10), Failure(-signal.SIGTERM, 11)]) == 128 + signal.SIGKILL
    assert exit_code_of([Failure(-signal.SIGSEGV, 10)]) == 128 + signal.SIGSEGV


@pytest.mark.parametrize(
    ("word_of_the_other", "code"),
    [
        ({"exit_code": 75, "step_id": 3}, 75),
        ({"exit_code": 0, "step_id": 3}, 75),
        ({"exit_code": 1, "step_id": 3}, 1),
        ({"exit_code": 1, "step_id": 2}, 75),
    ],
    ids=["preempted too", "done", "failed", "failed in an earlier step"],
)
def test_a_preempted_node_gives_way_to_a_failure_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word_of_the_other: dict, code: int
) -> None:
    monkeypatch.setattr("launcher.job.node.AGREE_SECONDS", 0)
    topology = Topology(("n1", "n2"), 0, 1, "41", 3, 0)
    folder = topology.attempt_dir(RunDir(tmp_path))
    folder.mkdir()
    write_json(folder / "node-0.exit.json", {"exit_code": 75, "step_id": 3})
    write_json(folder / "node-1.exit.json", word_of_the_other)
    assert agree_on_end(topology, RunDir(tmp_path)) == code
    (folder / "node-0.exit.json").unlink()  # the other node goes by what the head has written down
    assert agree_on_end(replace(topology, node_rank=1), RunDir(tmp_path)) == code


def test_a_node_whose_head_says_nothing_ends_as_preempted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.job.node.AGREE_SECONDS", 0)
    monkeypatch.setattr("launcher.job.node.POLL_SECONDS", 0.01)
    topology = Topology(("n1", "n2"), 1, 1, "41", 3, 0)
    folder = topology.attempt_dir(RunDir(tmp_path))
    folder.mkdir()
    write_json(folder / "end.json", {"exit_code": 1, "step_id": 2})  # of an earlier step
    assert agree_on_end(topology, RunDir(tmp_path)) == 75


@pytest.mark.parametrize(
    ("result", "code", "settled"),
    [("preempted", 1, 75), ("done", 1, 0), ("failed", 1, 1), (None, 1, 1), ("preempted", 2, 2), ("done", 137, 137)],
)
def test_a_late_node_that_lost_the_heads_store_ends_as_the_result_says(
    tmp_path: Path, result: str | None, code: int, settled: int
) -> None:
    run = RunDir(tmp_path)
    if result is not None:
        write_json(run.result("train"), {"status": result})
    assert settled_code(run, code) == settled


def test_a_process_without_a_handler_is_not_sent_the_signal_that_would_kill_it_or_be_lost() -> None:
    program = "import signal, time\nasked = []\n{}\nprint('ready', flush=True)\nwhile not asked: time.sleep(0.01)"
    answers = []
    for setup in ("", "signal.signal(signal.SIGUSR2, lambda *_: asked.append(True))"):
        command = [sys.executable, "-c", program.format(setup)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            answers.append(deliver([psutil.Process(process.pid)], signal.SIGUSR2))
            if not answers[-1]:
                process.kill()
            answers.append(process.wait(60))
    assert answers == [False, -signal.SIGKILL, True, 0]


@dataclass
class LocalNode:
    """A supervisor of two ranks on this machine, and the folder over which the ranks talk with the test."""

    process: subprocess.Popen
    folder: Path

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 60
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None and time.monotonic() < deadline, f"{names} did not come"
            time.sleep(0.02)

    def tell(self, name: str) -> None:
        (self.folder / name).touch()

    def word(self) -> dict:
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


def test_a_stop_signal_reaches_ranks_that_take_their_handlers_late_and_all_of_them_save(local_node: LocalNode) -> None:
    local_node.wait_for("began-0", "began-1")
    agent, *_ = psutil.Process(local_node.process.pid).children()
    ranks = find_ranks(agent.pid)
    assert len(ranks) == 2
    for process in (local_node.process, agent, *ranks):  # as Slurm does: every process of the step
        process.send_signal(signal.SIGUSR2)
    local_node.tell("take-handlers")
    local_node.wait_for("asked-0", "asked-1")
    agent.send_signal(signal.SIGTERM)  # torchrun would now give its ranks 30 s, and end with 1
    local_node.process.send_signal(signal.SIGTERM)
    local_node.tell("may-end")
    assert local_node.process.wait(60) == 75
    assert (local_node.folder / "saved-0").exists() and (local_node.folder / "saved-1").exists()
    word = local_node.word()
    assert (word["exit_code"], sorted(word["signals"])) == (75, ["SIGTERM", "SIGUSR2"])
    assert list((local_node.folder / "scratch").iterdir()) == []


def test_stopped_before_any_rank_began_is_preempted_and_leaves_no_process(local_node: LocalNode) -> None:
    supervisor = psutil.Process(local_node.process.pid)
    while not (children := supervisor.children()):  # torchrun takes seconds from here to its first rank
        assert local_node.process.poll() is None
    local_node.process.send_signal(signal.SIGTERM)
    assert local_node.process.wait(60) == 75
    assert not (local_node.folder / "began-0").exists()
    assert not any(child.is_running() for child in children)


def test_stopped_while_it_waits_for_another_node_it_leaves_word(tmp_path: Path) -> None:
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


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("num_nodes", "options", "answer"),
    [(2, ["--gres=gpu:2"], "sum 1111 over 4 ranks"), (3, [], "sum 111 over 3 ranks")],
    ids=["two nodes of two GPUs", "three nodes"],
)
def test_ranks_of_all_nodes_meet(slurm_cluster: SlurmBed, num_nodes: int, options: list[str], answer: str) -> None:
    script = slurm_cluster.shared / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    batch = slurm_cluster.write_script(
        "meet.sh", f"srun --kill-on-bad-exit=1 {sys.executable} -P -m launcher.job.node exec $PWD -- {script}"
    )
    options = [f"--nodes={num_nodes}", "--ntasks-per-node=1", *options]
    job = slurm_cluster.sbatch(batch, options=options, env={"OMP_NUM_THREADS": "1"})
    slurm_cluster.wait_state(job, {"COMPLETED"}, 120)
    lines = [line for line in slurm_cluster.output(job).splitlines() if line.startswith("sum")]
    assert lines == [f"{answer} 10.77.0.11 eth0 =eth0"] * int(answer.split()[3])
