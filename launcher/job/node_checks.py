"""Is every node of a job fit for it? Checked in seconds, before any time on a GPU is spent.

    look_around(report, run_root, num_gpus=8)      # on every node, at the same time
    compare(reports)                               # on one

Every node leaves `preflight-node-<i>.json` in the folder of its attempt: what it is, what it saw, and what is wrong.
Node 0 compares them. Without torch, but for the all-reduce, in which all nodes take part or none.
"""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.files import write_json

PACKAGES = ("cluster", "generation", "trainer", "launcher")
LIBRARIES = ("torch", "deepspeed", "transformers", "ray", "vllm")
LEAST_TMP_MIB = 64
LEAST_RUN_MIB = 256
LEAST_SHM_MIB = 16
LEAST_INODES = 1000
MAX_SKEW_SECONDS = 30.0
NVIDIA_SMI_SECONDS = 20


@dataclass(frozen=True)
class Finding:
    """A check that a node did not pass."""

    check: str
    message: str


@dataclass
class NodeReport:
    """What a node says of itself."""

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

    def try_check(self, check: str, look: Callable[[], str | None]) -> None:
        """Note what `look` finds wrong, be it told or raised."""
        try:
            message = look()
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
    """Versions of Python and of the libraries on which nodes have to agree; importing none of them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def check_space(path: Path, least_mib: int) -> str | None:
    """What is wrong with the room at `path`, by trying and not only by what the file system says of itself."""
    state = os.statvfs(path)
    free_mib = state.f_bavail * state.f_frsize / 2**20
    if free_mib < least_mib:
        return f"{path}: {free_mib:.1f} MiB free; {least_mib} MiB are wanted"
    if state.f_files and state.f_favail < LEAST_INODES:  # some file systems count none
        return f"{path}: {state.f_favail} inodes free; {LEAST_INODES} are wanted"
    return None


def check_writable(folder: Path, name: str) -> str | None:
    """Write, fsync and rename, as every checkpoint does."""
    path = folder / f".preflight-{name}"
    try:
        write_json(path, {"pid": os.getpid()})
    finally:
        path.unlink(missing_ok=True)
    return None


def clock_skew(folder: Path, name: str) -> float:
    """How far this node's clock is ahead of the one that stamps the files of `folder`, in seconds.

    On one file server that is the same clock for all nodes, so two of these can be compared.
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
    """True to what a rendezvous needs: a port on which others can connect."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        probe.listen()
    return None


def read_gpus() -> tuple[str, str | None]:
    """The node's GPUs as `nvidia-smi` lists them, and what is wrong with them."""
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
    return "; ".join(lines), f"uncorrected memory errors: {'; '.join(bad)}" if bad else None


def look_around(report: NodeReport, run_root: Path, num_gpus: int) -> None:
    """All that a node can check by itself."""
    started = time.monotonic()
    name = f"{report.host}-{os.getpid()}"
    report.code, report.versions = code_hash(), library_versions()
    report.try_check("run folder", lambda: check_writable(run_root, name))
    report.try_check("disk of the run folder", lambda: check_space(run_root, LEAST_RUN_MIB))
    report.try_check("/tmp", lambda: check_space(Path("/tmp"), LEAST_TMP_MIB) or check_writable(Path("/tmp"), name))
    report.try_check("/dev/shm", lambda: check_space(Path("/dev/shm"), LEAST_SHM_MIB))
    report.try_check("port", check_port)
    if not any(finding.check == "run folder" for finding in report.findings):
        report.skew_seconds = round(clock_skew(run_root, name), 3)
    report.gpus, wrong = read_gpus()
    report.try_check("GPUs", lambda: wrong)
    listed = len(report.gpus.split("; ")) if shutil.which("nvidia-smi") else None
    if listed is not None and listed < num_gpus and not wrong:
        report.findings.append(Finding("GPUs", f"{num_gpus} belong to the job, nvidia-smi lists {listed}"))
    report.seconds = round(time.monotonic() - started, 3)


def compare(reports: list[NodeReport]) -> dict[str, list[Finding]]:
    """What is wrong with which host: its own findings, and where it differs from most others."""
    wrong = {report.host: list(report.findings) for report in reports}
    code = _most_common([report.code for report in reports])
    skews = sorted(report.skew_seconds for report in reports)
    usual_skew = skews[len(skews) // 2]
    versions = {name: _most_common([report.versions.get(name, "") for report in reports]) for name in _names(reports)}
    for report in reports:
        mine = wrong[report.host]
        if report.code != code:
            mine.append(Finding("code", f"its sources hash to {report.code}, those of the others to {code}"))
        for name, usual in versions.items():
            own = report.versions.get(name, "")
            if own != usual:
                mine.append(Finding("versions", f"{name} {own} here, {usual} on the others"))
        if abs(report.skew_seconds - usual_skew) > MAX_SKEW_SECONDS:
            off = report.skew_seconds - usual_skew
            mine.append(Finding("clock", f"{off:+.0f} s from the others; {MAX_SKEW_SECONDS:.0f} s are borne"))
    return {host: findings for host, findings in wrong.items() if findings}


def to_json(report: NodeReport) -> dict:
    return asdict(report)


def from_json(fields: dict) -> NodeReport:
    return NodeReport(**fields | {"findings": [Finding(**finding) for finding in fields["findings"]]})


def _names(reports: list[NodeReport]) -> list[str]:
    return sorted({name for report in reports for name in report.versions})


def _most_common(values: list[str]) -> str:
    """The value that most have; of equally many, that of the node with the lowest number."""
    return max(dict.fromkeys(values), key=values.count)
