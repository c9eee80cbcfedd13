"""What runs on each node of a Ray job: one `ray start`, on ports, with a folder and under a token of its own.

    srun ... python -P -m launcher.job.ray_node MEETING RANK --cpus N --gpus N --memory-mib N --logs DIR
                                              [--head HOST:PORT --head-host NAME]

Standard input is the line to the supervisor (ray_job.py): first comes the token, and at the end DONE, or KEEP_LOGS.
If it breaks off, the supervisor is gone, and Ray goes as well; where Slurm does not let it break off, it ends the step.
Without --head this node is the head.

In MEETING, a folder that all nodes see, it tells its address (node-<i>.json) and how it ended (node-<i>.exit.json).
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
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.errors import EXIT_DONE, EXIT_FAILED, TunesmithError
from cluster.files import write_json
from cluster.nodes.rendezvous import own_address
from cluster.processes.orphans import adopt_orphans, die_with_parent, end_descendants
from cluster.ray.folder import RAY_FOLDER, keep_logs, private_folder, ray_environment
from launcher.job.first_node import FirstNode
from launcher.job.ray_ports import PortBlock, claim_block

DONE, KEEP_LOGS, BROKEN_OFF = "done", "keep logs", ""
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
POLL_SECONDS = 0.2
END_SECONDS = 15.0
START_ATTEMPTS = 3  # Ray gives its own processes 30 seconds, which is too few under load
MIN_STORE_MIB, MAX_STORE_MIB = 80, 1024  # Ray takes no less; requests and answers are small and need no more
STORE_SHARE = 0.3  # of the node's memory and of what is free in /dev/shm, at most
EXITED = re.compile(r"(\w+) \[exit code=(-?\d+)\]")  # as `ray start --block` tells of its processes
COLOR = re.compile(r"\x1b\[[0-9;]*m")
MAX_FILES = 65535


@dataclass(frozen=True)
class RayNode:
    """What a node tells the supervisor."""

    host: str
    address: str
    interface: str
    head_port: int  # where it listens if it is the head
    step_id: str


class Line:
    """The line to the supervisor."""

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._text = b""

    def read(self, timeout_seconds: float) -> str | None:
        """The next line, BROKEN_OFF after the last, or None if there is none yet."""
        while b"\n" not in self._text:
            if not select.select([self._descriptor], [], [], timeout_seconds)[0]:
                return None
            part = os.read(self._descriptor, 4096)
            if not part:
                return BROKEN_OFF
            self._text += part
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()


def run(arguments: argparse.Namespace) -> int:
    """Keep a Ray node up until the supervisor has had enough, or Ray ends. Returns the exit code."""
    line = Line()
    token = line.read(timeout_seconds=END_SECONDS)
    if not token:
        raise TunesmithError("no token came on standard input; this is to be started by the supervisor of the job.")
    first_node = FirstNode(arguments.head_host, arguments.head) if arguments.head else None
    address, interface = own_address()
    with claim_block(int(os.environ["SLURM_JOB_ID"])) as block, private_folder(token) as folder:
        node = RayNode(socket.gethostname(), address, interface, block.head, os.environ["SLURM_STEP_ID"])
        write_json(arguments.meeting / f"node-{arguments.rank}.json", asdict(node))
        word = None
        try:
            environment = {**ray_environ(folder, address), **block.environment()}
            word = keep_up(ray_start(arguments, block, address), environment, folder, line, arguments, first_node)
        finally:
            end_descendants(END_SECONDS)
            if word != DONE:
                keep_logs(folder, arguments.logs / node.host)
    return EXIT_FAILED if word == BROKEN_OFF else EXIT_DONE


def keep_up(
    argv: list[str],
    environment: dict[str, str],
    folder: Path,
    line: Line,
    arguments: argparse.Namespace,
    first_node: FirstNode | None,
) -> str:
    """Run `ray start` until the supervisor's last word, and return that.

    Raises TunesmithError if Ray ends first, or with `first_node`, on which the supervisor is, lost.
    """
    for attempt in range(START_ATTEMPTS):
        log = folder / f"start{attempt}.log"
        with open(log, "w") as output:
            ray = subprocess.Popen(
                [*argv, f"--temp-dir={folder}/{RAY_FOLDER}{attempt}"],
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )  # fmt: skip
        if (word := watch(ray, line, arguments.meeting / f"node-{arguments.rank}.asked", first_node)) is not None:
            return word
        if "timed out during startup" not in log.read_text():
            break
        end_descendants(END_SECONDS)
    if first_node is not None:
        first_node.await_result(is_over=lambda: line.read(timeout_seconds=1) is not None)
    raise TunesmithError(why_ended(log))


def ray_environ(folder: Path, address: str) -> dict[str, str]:
    """The environment of Ray and all engines on this node."""
    given = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    return {**given, **ray_environment(folder), "VLLM_HOST_IP": address, "RAY_prestart_worker_first_driver": "0"}


def ray_start(arguments: argparse.Namespace, block: PortBlock, address: str) -> list[str]:
    """The command line of `ray start` but for its folder. Nothing in it is secret."""
    argv = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    if arguments.head is None:
        argv += ["--head", "--include-dashboard=false", "--dashboard-host=127.0.0.1", "--no-monitor"]
    else:
        argv += [f"--address={arguments.head}"]
    argv += [f"--node-ip-address={address}", f"--num-cpus={arguments.cpus}", f"--num-gpus={arguments.gpus}"]
    return [*argv, f"--object-store-memory={store_bytes(arguments.memory_mib)}", *block.options(arguments.head is None)]


def store_bytes(memory_mib: int) -> int:
    """Size of the object store. Raises TunesmithError if there is no room for the least that Ray takes."""
    try:
        shm_mib = psutil.disk_usage("/dev/shm").free / 2**20
    except FileNotFoundError:
        shm_mib = 0
    memory_mib = memory_mib or psutil.virtual_memory().total // 2**20
    size = min(STORE_SHARE * memory_mib, shm_mib * 0.9, MAX_STORE_MIB)
    if size < MIN_STORE_MIB:
        raise TunesmithError(
            f"Ray needs {MIN_STORE_MIB} MiB of /dev/shm for its object store, and not more than {STORE_SHARE:.0%} of "
            f"memory; free in /dev/shm are {shm_mib:.0f} MiB, and the job has {memory_mib} MiB of memory on this node."
        )
    return int(size) * 2**20


def watch(ray: subprocess.Popen, line: Line, asked: Path, first_node: FirstNode | None = None) -> str | None:
    """Wait for the supervisor's last word, or None if Ray ends first.

    Slurm signals every process of a step. Ray has the signals blocked, as a process inherits that, and so lives on
    while the driver, which the supervisor then asks to stop, saves what it has.
    """
    while True:
        if signal.sigtimedwait(SIGNALS, POLL_SECONDS):
            asked.touch()
        if (word := line.read(timeout_seconds=0)) is not None:
            return word
        if ray.poll() is not None:
            return None
        if first_node is not None:
            first_node.check()


def why_ended(log: Path) -> str:
    """The reason as far as `ray start` told it."""
    said = COLOR.sub("", log.read_text(errors="replace"))
    if ended := EXITED.findall(said):
        return "Ray ended by itself: " + ", ".join(f"{process} (exit code {code})" for process, code in ended)
    lines = [text.strip() for text in said.splitlines() if text.strip()]
    return f"Ray did not start: {lines[-1] if lines else 'it said nothing'}"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launcher.job.ray_node", description=__doc__.splitlines()[0])
    parser.add_argument("meeting", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--memory-mib", type=int, required=True)
    parser.add_argument("--logs", type=Path, required=True, help="where Ray's logs are kept if something goes wrong")
    parser.add_argument("--head", help="HOST:PORT of the head; default: this is the head")
    parser.add_argument("--head-host", help="the head's name in Slurm")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
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
        word = {"host": socket.gethostname(), "exit_code": code, "reason": reason, "time": round(time.time(), 3)}
        write_json(arguments.meeting / f"node-{arguments.rank}.exit.json", word)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
