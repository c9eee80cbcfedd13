"""What runs on each node of a Ray job: one `ray start`, with ports, a folder and a token that no other Ray has.

    srun ... python -P -m launcher.job.ray_node RENDEZVOUS_DIR RANK --cpus N --gpus N --memory-mib N --logs DIR
                                              [--head HOST:PORT --head-host NAME]

Standard input is a pipe from the supervisor (ray_job.py), which sends the token first and DONE or KEEP_LOGS at the end.
If the pipe closes, the supervisor is gone, and this node takes its Ray down. If srun keeps the pipe open after the end
of the supervisor, Slurm ends the step. Without --head this node is the head.

RENDEZVOUS_DIR is a folder that all nodes share. The node writes its address (node-<i>.json) and its exit report
(node-<i>.exit.json) there.
"""

import argparse
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster.errors import EXIT_DONE, EXIT_FAILED, TunesmithError
from cluster.files import MIB, write_json
from cluster.nodes.rendezvous import own_address
from cluster.processes.descendants import adopt_orphans, die_with_parent, end_descendants
from cluster.processes.signals import STOP_SIGNALS
from cluster.ray.folder import RAY_FOLDER, keep_logs, private_folder, ray_environment
from launcher.job.first_node import FirstNode
from launcher.job.ray_ports import PortBlock, claim_block
from launcher.slurm.snapshot import check_code_of_step

DONE, KEEP_LOGS, CLOSED = "done", "keep logs", ""  # messages of the supervisor; CLOSED: its pipe has closed
POLL_SECONDS = 0.2
END_SECONDS = 15.0
START_ATTEMPTS = 3  # Ray gives its own processes 30 seconds, which is not enough under load
MIN_STORE_MIB, MAX_STORE_MIB = 80, 1024  # Ray refuses less; requests and their results are small and need no more
STORE_SHARE = 0.3  # of the node's memory and of what is free in /dev/shm, at most
EXITED = re.compile(r"(\w+) \[exit code=(-?\d+)\]")  # as `ray start --block` reports its processes
COLOR = re.compile(r"\x1b\[[0-9;]*m")
MAX_FILES = 65535


class Pipe:
    """Messages from the supervisor, one a line."""

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._text = b""

    def read(self, timeout_seconds: float) -> str | None:
        """The next message, or CLOSED after the last one. None means that there is none yet."""
        while b"\n" not in self._text:
            if not select.select([self._descriptor], [], [], timeout_seconds)[0]:
                return None
            part = os.read(self._descriptor, 4096)
            if not part:
                return CLOSED
            self._text += part
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()


def run(arguments: argparse.Namespace) -> int:
    """Run a Ray node until the supervisor ends it, or Ray ends by itself. Returns the exit code."""
    check_code_of_step()
    pipe = Pipe()
    token = pipe.read(timeout_seconds=END_SECONDS)
    if not token:
        raise TunesmithError("no token on standard input. Only launcher.job.ray_job starts this module.")
    first_node = FirstNode(arguments.head_host, arguments.head) if arguments.head else None
    address, interface = own_address()
    with claim_block(int(os.environ["SLURM_JOB_ID"])) as block, private_folder(token) as folder:
        host = socket.gethostname()
        node = {"host": host, "address": address, "interface": interface, "head_port": block.head}  # if it is the head
        write_json(arguments.rendezvous_dir / f"node-{arguments.rank}.json", node)
        message = None
        try:
            environment = {**ray_environ(folder, address), **block.environment()}
            argv = ray_start(arguments, block, address)
            message = run_ray(argv, environment, folder, pipe, arguments, first_node)
        finally:
            end_descendants(END_SECONDS)
            if message != DONE:
                keep_logs(folder, arguments.logs / host)
    return EXIT_FAILED if message == CLOSED else EXIT_DONE


def run_ray(
    argv: list[str],
    environment: dict[str, str],
    folder: Path,
    pipe: Pipe,
    arguments: argparse.Namespace,
    first_node: FirstNode | None,
) -> str:
    """Run `ray start` until the supervisor's last message, and return that message.

    `first_node` is where the supervisor runs; None on that node itself. Raises TunesmithError if Ray ends first, or if
    the first node is lost.
    """
    for attempt in range(START_ATTEMPTS):
        log = folder / f"start{attempt}.log"
        with open(log, "w") as output:
            ray = subprocess.Popen(
                [*argv, f"--temp-dir={folder}/{RAY_FOLDER}{attempt}"],
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )  # fmt: skip
        stop_file = arguments.rendezvous_dir / f"node-{arguments.rank}.stop"
        if (message := await_message(ray, pipe, stop_file, first_node)) is not None:
            return message
        if "timed out during startup" not in log.read_text():
            break
        end_descendants(END_SECONDS)
    if first_node is not None:
        first_node.await_result(is_over=lambda: pipe.read(timeout_seconds=1) is not None)
    raise TunesmithError(failure_reason(log))


def ray_environ(folder: Path, address: str) -> dict[str, str]:
    """The environment of Ray and all engines on this node."""
    own = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    return {**own, **ray_environment(folder), "VLLM_HOST_IP": address, "RAY_prestart_worker_first_driver": "0"}


def ray_start(arguments: argparse.Namespace, block: PortBlock, address: str) -> list[str]:
    """The command line of `ray start`, without its folder. Nothing in it is secret."""
    argv = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    if arguments.head is None:
        argv += ["--head", "--include-dashboard=false", "--dashboard-host=127.0.0.1", "--no-monitor"]
    else:
        argv += [f"--address={arguments.head}"]
    argv += [f"--node-ip-address={address}", f"--num-cpus={arguments.cpus}", f"--num-gpus={arguments.gpus}"]
    return [
        *argv,
        f"--object-store-memory={object_store_bytes(arguments.memory_mib)}",
        *block.options(arguments.head is None),
    ]


def object_store_bytes(memory_mib: int) -> int:
    """Size of the object store. Raises TunesmithError if there is no room for the smallest store that Ray accepts."""
    try:
        shm_mib = psutil.disk_usage("/dev/shm").free / MIB
    except FileNotFoundError:
        shm_mib = 0
    memory_mib = memory_mib or psutil.virtual_memory().total // MIB
    size = min(STORE_SHARE * memory_mib, shm_mib * 0.9, MAX_STORE_MIB)
    if size < MIN_STORE_MIB:
        raise TunesmithError(
            f"Ray needs {MIN_STORE_MIB} MiB of /dev/shm for its object store, and at most {STORE_SHARE:.0%} of the "
            f"job's memory may go there. This node has {shm_mib:.0f} MiB free in /dev/shm, and the job has "
            f"{memory_mib} MiB of memory on it."
        )
    return int(size) * MIB


def await_message(
    ray: subprocess.Popen, pipe: Pipe, stop_file: Path, first_node: FirstNode | None = None
) -> str | None:
    """Wait for the supervisor's last message. None means that Ray has ended first.

    Slurm signals every process of a step. Ray inherits blocked signals, so it stays up while the driver saves. The
    supervisor stops the driver as soon as it sees `stop_file`, which this node makes when a signal comes.
    """
    while True:
        if signal.sigtimedwait(STOP_SIGNALS, POLL_SECONDS):
            stop_file.touch()
        if (message := pipe.read(timeout_seconds=0)) is not None:
            return message
        if ray.poll() is not None:
            return None
        if first_node is not None:
            first_node.check()


def failure_reason(log: Path) -> str:
    """Why Ray ended, as far as the output of `ray start` shows it."""
    output = COLOR.sub("", log.read_text(errors="replace"))
    if ended := EXITED.findall(output):
        return "Ray ended by itself: " + ", ".join(f"{process} (exit code {code})" for process, code in ended)
    lines = [text.strip() for text in output.splitlines() if text.strip()]
    return f"Ray did not start: {lines[-1] if lines else 'it printed nothing'}"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launcher.job.ray_node", description=__doc__.splitlines()[0])
    parser.add_argument("rendezvous_dir", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--memory-mib", type=int, required=True)
    parser.add_argument("--logs", type=Path, required=True, help="where Ray's logs are kept after a failure")
    parser.add_argument("--head", help="HOST:PORT of the head; default: this node is the head")
    parser.add_argument("--head-host", help="the head's name in Slurm")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    adopt_orphans()
    arguments = parse_arguments(argv)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_FILES if most_files == resource.RLIM_INFINITY else min(MAX_FILES, most_files)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most_files))
    code, reason = EXIT_FAILED, "it was killed"
    try:
        code, reason = run(arguments), ""
    except (TunesmithError, OSError) as error:  # an OSError is of this node's /tmp, /dev/shm or processes
        reason = str(error)
        print(f"error: {socket.gethostname()}: {reason}", file=sys.stderr)
    finally:
        report = {"host": socket.gethostname(), "exit_code": code, "reason": reason, "time": round(time.time(), 3)}
        write_json(arguments.rendezvous_dir / f"node-{arguments.rank}.exit.json", report)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
