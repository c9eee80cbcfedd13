"""What runs on every node of a training job: one torchrun, whose ranks meet those of the other nodes.

    srun --ntasks-per-node=1 python -m launcher.job.node train RECIPE [key=value ...]
    srun --ntasks-per-node=1 python -m launcher.job.node exec RUN_DIR -- script.py [argument ...]

`train` runs the recipe's training stage. `exec` runs any script (or `-m module`) in the same way, with RUN_DIR as the
folder where the nodes find each other: for checking a cluster.

Each node writes `<run>/attempt-<job>-<restart>/node-<i>.exit.json`, and ends with the exit code of its ranks.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import EXIT_DONE, EXIT_FAILED, EXIT_RETRY, TunesmithError
from cluster.files import write_json
from cluster.log import stage_logger
from cluster.nodes.rendezvous import await_json, meet
from cluster.nodes.topology import Topology, read_topology
from cluster.processes.signals import StopRequest, ignore_stop_signals
from cluster.run.fence import Fence, Superseded, run_lock
from cluster.run.rundir import RunDir
from launcher.slurm.client import Slurm
from launcher.slurm.snapshot import check_code_of_step
from launcher.torchrun import run_torchrun
from trainer.checkpoint.state import is_trained

log = stage_logger("train")
FENCE_CHECK_SECONDS = 5.0  # how often every node checks for a newer token
AGREE_SECONDS = 60  # all ranks end together after a preemption, but a shared file system may show their files late


def torchrun_options(topology: Topology, run: RunDir) -> tuple[list[str], dict[str, str]]:
    """Meet the other nodes, if there are any. Returns torchrun's options on this node, and variables for its ranks.

    The variables make NCCL and gloo use the interface by which the nodes met, unless the user chose another.
    """
    options = [f"--nnodes={topology.num_nodes}", f"--nproc-per-node={topology.procs_per_node}"]
    if topology.num_nodes == 1:
        return [*options, "--standalone"], {}
    own, head = meet(topology, run)
    options += [
        "--rdzv-backend=c10d",
        f"--rdzv-id={topology.job_id}-{topology.restart_count}",
        f"--rdzv-endpoint={head.address}:{head.port}",
        # torchrun would find out who hosts the store by resolving names.
        f"--rdzv-conf=is_host={int(topology.node_rank == 0)}",
        f"--local-addr={own.address}",
    ]
    variables = {"NCCL_SOCKET_IFNAME": f"={own.interface}", "GLOO_SOCKET_IFNAME": own.interface}  # "=": exactly this
    return options, {name: value for name, value in variables.items() if name not in os.environ}


def run_node(topology: Topology, run: RunDir, command: list[str], is_training: bool = False) -> int:
    """Run `command` as this node's part of the job, write how it ended, and return the exit code.

    `is_training`: the ranks write a training result into `run`, from which an older one has been removed.
    Raises Superseded, with all ranks killed, if a newer token owns the run: the ranks of a node that is cut off may
    wait for those of other nodes, and no other process would end them.
    """
    folder = topology.attempt_dir(run)
    folder.mkdir(parents=True, exist_ok=True)
    code, fence = EXIT_FAILED, Fence(run.root)
    with StopRequest(interrupts=True) as stop:
        try:
            options, environ = torchrun_options(topology, run)
            code = run_torchrun(options, command, stop, environ, lambda: fence.check_throttled(FENCE_CHECK_SECONDS))
            if code != EXIT_DONE:
                fence.check()
            code = exit_code_by_result(run, code) if is_training else code
        except TunesmithError as error:
            code = error.exit_code
            raise
        finally:
            report = {"host": topology.hosts[topology.node_rank], "exit_code": code, "signals": stop.names}
            report |= {"step_id": topology.step_id, "time": round(time.time(), 3)}
            write_json(folder / f"node-{topology.node_rank}.exit.json", report)
        return agree_on_exit_code(topology, run) if code == EXIT_RETRY else code


def exit_code_by_result(run: RunDir, code: int) -> int:
    """The exit code of a training whose torchrun failed, corrected by the result of the training.

    Rank 0 writes the result when every rank has saved. After that the nodes end one by one. The torchrun of a late node
    may fail because the store on the head is gone, but the training has not failed.
    """
    result = run.read_result("train")
    if code == EXIT_FAILED and result is not None:
        return {"done": EXIT_DONE, "preempted": EXIT_RETRY}.get(result["status"], code)
    return code


def agree_on_exit_code(topology: Topology, run: RunDir) -> int:
    """The exit code of a node whose ranks were preempted: the first failure of another node, else "preempted".

    The head reads the exit reports of all nodes and writes the outcome (end.json); the others wait for that. If each
    node read each report, a thousand nodes would open a million files. No node leaves earlier, since
    srun --kill-on-bad-exit ends all others as soon as one ends with a code other than 0, and would turn their
    "preempted" into "killed".
    """
    folder = topology.attempt_dir(run)
    deadline = time.monotonic() + AGREE_SECONDS
    if topology.node_rank > 0:
        agreed = _await_exit_code(folder / "end.json", topology.step_id, deadline + 1.0)
        return EXIT_RETRY if agreed is None else agreed
    reports = [folder / f"node-{rank}.exit.json" for rank in range(topology.num_nodes)]
    codes = (_await_exit_code(report, topology.step_id, deadline) for report in reports)
    code = next((code for code in codes if code not in (EXIT_DONE, EXIT_RETRY, None)), EXIT_RETRY)
    write_json(folder / "end.json", {"exit_code": code, "step_id": topology.step_id})
    return code


def _await_exit_code(path: Path, step_id: int, deadline: float) -> int | None:
    """The exit code in a node's report. None means that the report was not there at the deadline."""
    try:
        return await_json(path, deadline, step_id)["exit_code"]
    except TunesmithError:
        return None


def train(environ: Mapping[str, str], procs_per_node: int | None, recipe_path: Path, overrides: list[str]) -> int:
    """Run the training stage of a recipe as this node's part of the job. The head holds the run folder's lock."""
    from launcher.recipe import load

    check_code_of_step()
    recipe = load(recipe_path, overrides)
    run = RunDir(recipe.run_dir.resolve()).create()
    topology = read_topology(environ, procs_per_node, Slurm().host_names)
    if is_trained(run):
        log.info(f"done already: {run.checkpoints}")
        return EXIT_DONE
    cpus_per_rank = max(1, len(os.sched_getaffinity(0)) // topology.procs_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(cpus_per_rank))
    with contextlib.ExitStack() as stack:
        if topology.node_rank == 0:  # all of it before the head publishes its address, for which the others wait
            stack.enter_context(run_lock(run.lock))
            Fence(run.root).check()
            recipe.save(run)
            run.result("train").unlink(missing_ok=True)
        return run_node(topology, run, ["-m", "trainer.train", str(run.root)], is_training=True)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launcher.job.node", description=__doc__.splitlines()[0])
    parser.add_argument("--procs-per-node", type=int, help="default: the GPUs of the job on this node, or 1")
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("train", help="run the training stage of a recipe")
    action.add_argument("recipe", type=Path)
    action.add_argument("overrides", nargs="*", metavar="key=value")
    action = actions.add_parser("exec", help="run any script in the same way")
    action.add_argument("run_dir", type=Path, help="folder where the nodes find each other")
    action.add_argument("command", nargs="+", help="after --: a script or `-m module`, and its arguments")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    # Outside run_node there is nothing to save, and after it a signal must not replace the exit code.
    ignore_stop_signals()
    try:
        if arguments.action == "train":
            return train(os.environ, arguments.procs_per_node, arguments.recipe, arguments.overrides)
        topology = read_topology(os.environ, arguments.procs_per_node, Slurm().host_names)
        return run_node(topology, RunDir(arguments.run_dir.resolve()), arguments.command)
    except Superseded as error:
        print(f"error: {error}", file=sys.stderr)
        # Any other exit code makes srun end the step by its id, which the step of the newer attempt has too.
        return EXIT_DONE
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
