"""The checks of a preflight: whether every node of a job is fit for it. They take seconds.

check_node(report, run_root, num_gpus=8)       # on every node, at the same time; loads no torch
compare_reports(reports)                       # on node 0
sum_over_nodes(topology, own, head)            # on every node, once all are fit: whether they can compute together
"""

import datetime
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.files import MIB, write_json
from cluster.nodes.rendezvous import NodeAddress
from cluster.nodes.topology import Topology

PACKAGES = ("cluster", "generation", "trainer", "launcher")
LIBRARIES = ("torch", "deepspeed", "transformers", "ray", "vllm")
MIN_TMP_MIB = 64
MIN_RUN_MIB = 256
MIN_SHM_MIB = 16
MIN_INODES = 1000
MAX_SKEW_SECONDS = 30.0
NVIDIA_SMI_SECONDS = 20
NUM_NUMBERS = 2**18  # 1 MiB: more than one packet, and quick on any network
NCCL_BYTES = 2**28
NCCL_ROUNDS = 5
SUM_TIMEOUT = datetime.timedelta(seconds=60)


@dataclass(frozen=True)
class Finding:
    """A check that a node did not pass, and why."""

    check: str
    message: str


@dataclass
class NodeReport:
    """What a node found about itself."""

    rank: int
    host: str
    step_id: int
    code: str = ""  # hash of our sources, as this node reads them
    versions: dict[str, str] = field(default_factory=dict)
    skew_seconds: float = 0.0  # of its clock against that of the file server
    gpus: str = ""
    findings: list[Finding] = field(default_factory=list)
    nonce: str = ""  # what this node read where node 0 wrote it
    seconds: float = 0.0
    all_reduce_seconds: float = 0.0

    def try_check(self, check: str, function: Callable[[], str | None]) -> None:
        """Add a finding if `function` returns a message or raises OSError."""
        try:
            message = function()
        except OSError as error:
            message = str(error)
        if message:
            self.findings.append(Finding(check, message))


def code_hash(packages: Iterable[str] = PACKAGES) -> str:
    """Hash of the sources of our packages that this process would import."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries on which nodes have to agree. Imports none of them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def check_space(path: Path, min_mib: int) -> str | None:
    """Return a message if the file system of `path` has too little space or too few inodes."""
    state = os.statvfs(path)
    free_mib = state.f_bavail * state.f_frsize / MIB
    if free_mib < min_mib:
        return f"{path}: {free_mib:.1f} MiB free; {min_mib} MiB are needed"
    if state.f_files and state.f_favail < MIN_INODES:  # some file systems count none
        return f"{path}: {state.f_favail} inodes free; {MIN_INODES} are needed"
    return None


def check_writable(folder: Path, name: str) -> str | None:
    """Write, fsync and rename a file, as every checkpoint does. Raises OSError if that fails."""
    path = folder / f".preflight-{name}"
    try:
        write_json(path, {"pid": os.getpid()})
    finally:
        path.unlink(missing_ok=True)
    return None


def clock_skew(folder: Path, name: str) -> float:
    """How many seconds this node's clock is ahead of the clock that stamps the files of `folder`.

    That is one clock for all nodes, the file server's, so the skews of two nodes can be compared.
    """
    path = folder / f".clock-{name}"
    try:
        before = time.time()
        path.write_text("")
        stamp = path.stat().st_mtime
        after = time.time()
    finally:
        path.unlink(missing_ok=True)
    return 0.0 if before <= stamp <= after else (before + after) / 2 - stamp


def check_port() -> str | None:
    """Listen on a port, as a rendezvous does. Raises OSError if none is free."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        probe.listen()
    return None


def read_gpus(num_gpus: int) -> tuple[str, str | None]:
    """The node's GPUs as `nvidia-smi` lists them, and a message if something is wrong with them.

    `num_gpus` belong to the job.
    """
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi", None
    fields = "name,memory.total,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return "nvidia-smi hangs", f"nvidia-smi did not answer in {NVIDIA_SMI_SECONDS} s"
    lines = done.stdout.splitlines()
    if done.returncode:
        return "nvidia-smi fails", f"nvidia-smi: {(done.stderr or done.stdout).strip()}"
    bad = [line for line in lines if line.rsplit(",", 1)[-1].strip() not in ("0", "[N/A]", "N/A")]
    message = f"{num_gpus} belong to the job, nvidia-smi lists {len(lines)}" if len(lines) < num_gpus else None
    return "; ".join(lines), f"uncorrected memory errors: {'; '.join(bad)}" if bad else message


def check_node(report: NodeReport, run_root: Path, num_gpus: int) -> None:
    """Run all checks that a node can do by itself. `num_gpus` belong to the job."""
    started = time.monotonic()
    name = f"{report.host}-{os.getpid()}"
    report.code, report.versions = code_hash(), library_versions()
    report.try_check("run folder", lambda: check_writable(run_root, name))
    report.try_check("disk of the run folder", lambda: check_space(run_root, MIN_RUN_MIB))
    report.try_check("/tmp", lambda: check_space(Path("/tmp"), MIN_TMP_MIB) or check_writable(Path("/tmp"), name))
    report.try_check("/dev/shm", lambda: check_space(Path("/dev/shm"), MIN_SHM_MIB))
    report.try_check("port", check_port)
    if not any(finding.check == "run folder" for finding in report.findings):
        report.skew_seconds = round(clock_skew(run_root, name), 3)
    report.gpus, gpu_error = read_gpus(num_gpus)
    report.try_check("GPUs", lambda: gpu_error)
    report.seconds = round(time.monotonic() - started, 3)


def compare_reports(reports: list[NodeReport]) -> dict[str, list[Finding]]:
    """The findings of each host that has any: its own, and where it differs from most others."""
    findings = {report.host: list(report.findings) for report in reports}
    code = _most_common([report.code for report in reports])
    skews = sorted(report.skew_seconds for report in reports)
    usual_skew = skews[len(skews) // 2]
    names = sorted({name for report in reports for name in report.versions})
    versions = {name: _most_common([report.versions.get(name, "") for report in reports]) for name in names}
    for report in reports:
        mine = findings[report.host]
        if report.code != code:
            mine.append(Finding("code", f"its sources hash to {report.code}, those of the others to {code}"))
        for name, usual in versions.items():
            own = report.versions.get(name, "")
            if own != usual:
                mine.append(Finding("versions", f"{name} {own} here, {usual} on the others"))
        if abs(report.skew_seconds - usual_skew) > MAX_SKEW_SECONDS:
            off = report.skew_seconds - usual_skew
            mine.append(Finding("clock", f"{off:+.0f} s from the others; at most {MAX_SKEW_SECONDS:.0f} s are allowed"))
    return {host: found for host, found in findings.items() if found}


def from_json(fields: dict) -> NodeReport:
    return NodeReport(**fields | {"findings": [Finding(**finding) for finding in fields["findings"]]})


def _most_common(values: list[str]) -> str:
    """The most common value. In a tie, that of the node with the lowest number."""
    return max(dict.fromkeys(values), key=values.count)


def sum_over_nodes(topology: Topology, own: NodeAddress, head: NodeAddress) -> list[Finding]:
    """Sum a known tensor over all nodes, over gloo, and over NCCL on GPUs. Returns what is wrong here."""
    # The interface by which the nodes met, unless the user chose one: gloo would resolve the host's name.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", own.interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={own.interface}")
    import torch
    import torch.distributed as dist

    where = f"tcp://{head.address}:{head.port}"
    try:
        dist.init_process_group(
            "gloo",
            init_method=where,
            rank=topology.node_rank,
            world_size=topology.num_nodes,
            timeout=SUM_TIMEOUT,
        )
        numbers = torch.full((NUM_NUMBERS,), float(topology.node_rank + 1))  # [N]
        dist.all_reduce(numbers)
        expected = topology.num_nodes * (topology.num_nodes + 1) / 2
        wrong = int((numbers != expected).sum())
        findings = [Finding("all-reduce", f"{wrong} of {NUM_NUMBERS} sums are not {expected:g}")] if wrong else []
        if torch.cuda.is_available():
            findings += _sum_on_gpus(expected)
        dist.destroy_process_group()
    except RuntimeError as error:
        findings = [Finding("all-reduce", f"over {own.interface} with {where}: {' '.join(str(error).split())[:300]}")]
    return findings


def _sum_on_gpus(expected: float) -> list[Finding]:
    """The same with NCCL, on the first GPU of each node. Prints the bandwidth."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(0)
    group = dist.new_group(backend="nccl", timeout=SUM_TIMEOUT)
    rank = dist.get_rank()
    numbers = torch.full((NCCL_BYTES // 4,), float(rank + 1), device="cuda")  # [N]
    dist.all_reduce(numbers, group=group)
    wrong = int((numbers != expected).sum())
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(NCCL_ROUNDS):
        dist.all_reduce(numbers, group=group)
    torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / NCCL_ROUNDS
    size = dist.get_world_size()
    if rank == 0:  # bus bandwidth as nccl-tests define it: each byte crosses a link 2(n-1)/n times
        rate = NCCL_BYTES * 2 * (size - 1) / size / seconds / 1e9
        print(f"preflight: NCCL bus bandwidth {rate:.1f} GB/s", flush=True)
    return [Finding("NCCL all-reduce", f"{wrong} sums are not {expected:g}")] if wrong else []
