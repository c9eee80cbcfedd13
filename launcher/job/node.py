"""What runs on every node of a training job: one supervised torchrun.

    srun --ntasks-per-node=1 python -m launcher.job.node train RECIPE [key=value ...]
    srun --ntasks-per-node=1 python -m launcher.job.node exec RUN_DIR -- script.py [argument ...]

`train` runs the recipe's training stage. `exec` runs any script (or `-m module`) in the same way, with RUN_DIR as the
place where the nodes find each other: for checking a cluster. Outside a Slurm job both use this machine alone.

Each node leaves `<run>/attempt-<job>-<restart>/node-<i>.exit.json`, and ends with the exit code of its ranks.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, Preempted, TunesmithError
from cluster.files import write_json
from cluster.nodes.rendezvous import meet
from cluster.nodes.topology import Topology, read_topology
from cluster.run.fence import Fence, run_lock
from cluster.run.rundir import RunDir
from trainer.results import is_trained

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
POLL_SECONDS = 0.5
FENCE_SECONDS = 5.0  # how often every node looks for a newer token
AGREE_SECONDS = 60  # all ranks end together after a preemption; a shared file system may take its time to show it


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes of a job meet, as one of them sees it."""

    id: str
    head_address: str
    head_port: int
    own_address: str
    own_interface: str
    is_head: bool


def torchrun_argv(num_nodes: int, procs_per_node: int, rendezvous: Rendezvous | None, command: list[str]) -> list[str]:
    """The command line that runs `command` (a script or `-m module`, then arguments) as this node's ranks.

    `rendezvous` is None for a job of one node, which needs no address that others can reach.
    """
    # -P: the working directory is the user's, and a folder `launcher` in it is not ours.
    argv = [
        sys.executable,
        "-P",
        "-m",
        "launcher.job.agent",
        f"--nnodes={num_nodes}",
        f"--nproc-per-node={procs_per_node}",
    ]
    if rendezvous is None:
        return [*argv, "--standalone", *command]
    return [
        *argv,
        "--rdzv-backend=c10d",
        f"--rdzv-id={rendezvous.id}",
        f"--rdzv-endpoint={rendezvous.head_address}:{rendezvous.head_port}",
        # Said outright: torchrun would find out who hosts the store by resolving names.
        f"--rdzv-conf=is_host={int(rendezvous.is_head)}",
        f"--local-addr={rendezvous.own_address}",
        *command,
    ]


def train_command(run_dir: Path) -> list[str]:
    """What each rank of the training stage runs."""
    return ["-m", "trainer.train", str(run_dir)]


def train_argv(run_dir: Path, num_nodes: int, procs_per_node: int, rendezvous: Rendezvous | None) -> list[str]:
    """The command line that trains the resolved recipe of `run_dir` on this node."""
    return torchrun_argv(num_nodes, procs_per_node, rendezvous, train_command(run_dir))


def child_env(rendezvous: Rendezvous | None) -> dict[str, str]:
    """This process's environment for the ranks: they import our packages and none of the same name in the working
    directory, and NCCL and gloo use the interface by which the nodes met unless the user chose one."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    if rendezvous is not None:
        env.setdefault("NCCL_SOCKET_IFNAME", f"={rendezvous.own_interface}")  # "=": this name, not all that begin so
        env.setdefault("GLOO_SOCKET_IFNAME", rendezvous.own_interface)
    return env


def find_ranks(agent_pid: int) -> list[psutil.Process]:
    """The rank processes that torchrun has started so far."""
    ranks = []
    with contextlib.suppress(psutil.NoSuchProcess):  # torchrun, or a rank, has just ended
        for child in psutil.Process(agent_pid).children():
            if "LOCAL_RANK" in child.environ():
                ranks.append(child)
    return ranks


def _catches(process: psutil.Process, signum: int) -> bool:
    """True if the process has a handler for the signal (the mask SigCgt of proc(5))."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signum - 1) & 1)
    return False


def deliver(ranks: list[psutil.Process], signum: int) -> bool:
    """Pass a signal on to the ranks. False if it has to be tried again later.

    SIGUSR1 and SIGUSR2 wait until every rank has its handler: one that still imports its libraries ignores them.
    """
    try:
        if signum != signal.SIGTERM and not all(_catches(rank, signum) for rank in ranks):
            return False
        for rank in ranks:
            rank.send_signal(signum)
    except (psutil.NoSuchProcess, FileNotFoundError):
        pass  # a rank has just ended, and torchrun ends the others
    return True


class StopSignals:
    """Notes the signals that ask to stop, for as long as it is entered. Ctrl-C counts as SIGTERM."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.waiting: deque[int] = deque()
        self.has_begun = False  # set when torchrun starts; until then there is nothing to save

    def __enter__(self) -> "StopSignals":
        self._previous = {signum: signal.signal(signum, self._note) for signum in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: object) -> None:
        self.names.append(signal.Signals(signum).name)
        self.waiting.append(signal.SIGTERM if signum == signal.SIGINT else signum)
        if not self.has_begun:
            raise Preempted(f"{self.names[-1]} came before training began. The same command starts it.")


def supervise(argv: list[str], env: dict[str, str], stops: StopSignals, fence: Fence) -> int:
    """Run torchrun to its end, passing stop signals on to its ranks. Returns its exit code.

    Raises Superseded, with all of them killed, when a newer token owns the run: ranks of a node that is cut off
    may wait for those of other nodes, and then nobody else tells them.
    """
    stops.has_begun = True
    agent = subprocess.Popen(argv, env=env, process_group=0)
    try:
        while (code := _wait(agent)) is None:
            fence.check_now_and_then(FENCE_SECONDS)
            ranks = find_ranks(agent.pid)
            for _ in range(len(stops.waiting)):
                signum = stops.waiting.popleft()
                if signum == signal.SIGTERM and not ranks:
                    return EXIT_PREEMPTED  # no rank has begun, so there is nothing to save
                if not ranks or not deliver(ranks, signum):
                    stops.waiting.append(signum)
        return code if code >= 0 else 128 - code
    finally:
        _kill_group(agent)


def _wait(agent: subprocess.Popen) -> int | None:
    try:
        return agent.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _kill_group(agent: subprocess.Popen) -> None:
    """End whatever is left of torchrun and its ranks, such as the data loaders of a rank that was killed."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left, as it should be
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()


def join_job(topology: Topology, run: RunDir) -> Rendezvous | None:
    """Meet the other nodes of the job; None where there are none."""
    if topology.num_nodes == 1:
        return None
    own, head = meet(topology, run)
    is_head = topology.node_rank == 0
    return Rendezvous(topology.rendezvous_id, head.address, head.port, own.address, own.interface, is_head)


def agree_on_end(topology: Topology, run: RunDir) -> int:
    """The exit code of a node whose ranks were preempted: a failure elsewhere goes before it.

    The head waits for the word of every node and writes down what they come to (end.json), for which the others wait:
    were each to read each, a thousand nodes would open a million files. Nobody leaves earlier, since
    srun --kill-on-bad-exit ends all others as soon as one does with a code that is not 0, and would turn their
    "preempted" into "killed".
    """
    folder = topology.attempt_dir(run)
    deadline = time.monotonic() + AGREE_SECONDS
    if topology.node_rank > 0:
        said = _await_exit_code(folder / "end.json", topology.step_id, deadline + POLL_SECONDS)
        return EXIT_PREEMPTED if said is None else said
    words = [folder / f"node-{rank}.exit.json" for rank in range(topology.num_nodes)]
    codes = (_await_exit_code(word, topology.step_id, deadline) for word in words)
    code = next((code for code in codes if code not in (EXIT_DONE, EXIT_PREEMPTED, None)), EXIT_PREEMPTED)
    write_json(folder / "end.json", {"exit_code": code, "step_id": topology.step_id})
    return code


def _await_exit_code(word: Path, step_id: int, deadline: float) -> int | None:
    """The exit code that a file tells of, once it is there; None at the deadline."""
    while (code := _read_exit_code(word, step_id)) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return code


def _read_exit_code(path: Path, step_id: int) -> int | None:
    word = json.loads(path.read_text()) if path.exists() else {}
    return word["exit_code"] if word.get("step_id") == step_id else None  # else it is of an earlier srun


def settled_code(run: RunDir, code: int) -> int:
    """The exit code of a training whose torchrun failed, in the light of the result.

    Rank 0 writes it when every rank has saved. After that the nodes end one by one, and the torchrun of a late one may
    fail for want of the store on the head; the training has not.
    """
    result = run.read_result("train")
    if code == EXIT_FAILED and result is not None:
        return {"done": EXIT_DONE, "preempted": EXIT_PREEMPTED}.get(result["status"], code)
    return code


def run_node(topology: Topology, run: RunDir, command: list[str], is_training: bool = False) -> int:
    """Run `command` as this node's part of the job, leave word of how it ended, and return the ranks' exit code.

    `is_training` says that its ranks leave a result in `run`, from which an older one has been removed.
    """
    folder = topology.attempt_dir(run)
    folder.mkdir(parents=True, exist_ok=True)
    code = EXIT_FAILED
    with StopSignals() as stops:
        try:
            rendezvous = join_job(topology, run)
            argv = torchrun_argv(topology.num_nodes, topology.procs_per_node, rendezvous, command)
            code = supervise(argv, child_env(rendezvous), stops, Fence(run.root))
            code = settled_code(run, code) if is_training else code
        except TunesmithError as error:
            code = error.exit_code
            raise
        finally:
            word = {"host": topology.hosts[topology.node_rank], "exit_code": code, "signals": stops.names}
            word |= {"step_id": topology.step_id, "time": round(time.time(), 3)}
            write_json(folder / f"node-{topology.node_rank}.exit.json", word)
        return agree_on_end(topology, run) if code == EXIT_PREEMPTED else code


def train(environ: Mapping[str, str], procs_per_node: int | None, recipe_path: Path, overrides: list[str]) -> int:
    """Run the training stage of a recipe as this node's part of the job. The head holds the run folder's lock."""
    from launcher.recipe import load

    recipe = load(recipe_path, overrides)
    run = RunDir(recipe.run_dir.resolve()).create()
    if "SLURM_JOB_ID" not in environ:
        procs_per_node = procs_per_node or recipe.train.num_processes
    topology = read_topology(environ, procs_per_node)
    if is_trained(run):
        print(f"[train] done already: {run.checkpoints}", flush=True)
        return EXIT_DONE
    cpus_per_rank = max(1, len(os.sched_getaffinity(0)) // topology.procs_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(cpus_per_rank))
    with contextlib.ExitStack() as stack:
        if topology.node_rank == 0:  # all of it before the head publishes its address, for which the others wait
            stack.enter_context(run_lock(run.lock))
            Fence(run.root).check()
            recipe.save(run)
            run.result("train").unlink(missing_ok=True)
        return run_node(topology, run, train_command(run.root), is_training=True)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launcher.job.node", description=__doc__.splitlines()[0])
    parser.add_argument("--procs-per-node", type=int, help="default: the GPUs of the job on this node, or 1")
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("train", help="run the training stage of a recipe")
    action.add_argument("recipe", type=Path)
    action.add_argument("overrides", nargs="*", metavar="key=value")
    action = actions.add_parser("exec", help="run any script in the same way")
    action.add_argument("run_dir", type=Path, help="where the nodes find each other")
    action.add_argument("command", nargs="+", help="after --: a script or `-m module`, and its arguments")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    # Outside run_node there is nothing to save, and after it a signal must not replace the exit code.
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    try:
        if arguments.action == "train":
            return train(os.environ, arguments.procs_per_node, arguments.recipe, arguments.overrides)
        topology = read_topology(os.environ, arguments.procs_per_node)
        return run_node(topology, RunDir(arguments.run_dir.resolve()), arguments.command)
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
