"""Which nodes to exclude from the next attempt, by how the attempts on them ended: `<run>/nodes.jsonl`.

Slurm leaves out nodes that it knows to be down. It does not know of a node on which only the jobs of this run die. A
node is excluded from the next attempt after three crashed attempts in a row, or after one failed preflight. A good
attempt on the node, or a day, clears it.
"""

import json
import time
from pathlib import Path

from cluster.errors import EXIT_RETRY
from cluster.files import append_jsonl, read_records
from cluster.run import fence
from cluster.run.rundir import RunDir
from launcher.slurm.client import Slurm, SlurmError

MIN_FAILURES = 3
FORGET_SECONDS = 24 * 3600.0
KILLED = (137, 143)  # SIGKILL, SIGTERM: how ranks end because the ranks of another node have ended


def note(run: RunDir, token: int, hosts: tuple[str, ...], failed: tuple[str, ...], preflight: str = "") -> None:
    """Record how the attempt with this fencing token ended for its nodes.

    `preflight` is the check that the nodes in `failed` did not pass. Empty means that it was not a preflight.
    """
    row = {"time": round(time.time(), 3), "fencing_token": token, "hosts": hosts, "failed": failed}
    append_jsonl(run.nodes, row | {"preflight": preflight})


def catch_up(run: RunDir) -> None:
    """Record the attempts that could not do so themselves, such as those whose first node died."""
    noted = {row["fencing_token"] for row in _rows(run)}
    for claim in fence.claims(run.root):
        if claim.token not in noted and claim.hosts:
            folder = run.attempt_dir(claim.job_id, claim.restart_count)
            note(run, claim.token, claim.hosts, failed_nodes(folder, claim.hosts))


def failed_nodes(attempt_dir: Path, hosts: tuple[str, ...]) -> tuple[str, ...]:
    """The nodes on which a crash began: nodes without an exit report if other nodes have one, else nodes whose ranks
    ended by themselves and were not killed. All nodes if neither is known."""
    exit_codes = {}
    for path in attempt_dir.glob("node-*.exit.json"):
        report = json.loads(path.read_text())
        exit_codes[report["host"]] = report["exit_code"]
    without_report = tuple(host for host in hosts if host not in exit_codes)
    crashed = tuple(host for host in hosts if exit_codes.get(host, 0) not in (0, EXIT_RETRY, *KILLED))
    if without_report and len(without_report) < len(hosts):
        return without_report
    return crashed or hosts


def often_failed(run: RunDir, now: float | None = None) -> list[str]:
    """Nodes that failed too often for the next attempt, the worst first."""
    now = time.time() if now is None else now
    counts: dict[str, int] = {}
    cleared: set[str] = set()
    for row in reversed(_rows(run)):
        if now - row["time"] > FORGET_SECONDS:
            break
        for host in row["hosts"]:
            if host in row["failed"] and host not in cleared:
                counts[host] = counts.get(host, 0) + (MIN_FAILURES if row["preflight"] else 1)
            elif host not in row["failed"]:
                cleared.add(host)
    failed = [host for host, count in counts.items() if count >= MIN_FAILURES]
    return sorted(failed, key=lambda host: (-counts[host], host))


def to_exclude(run: RunDir, num_nodes: int, partition: str | None, slurm: Slurm) -> list[str]:
    """Nodes that failed too often, but only as many as leave enough of the partition for a job of `num_nodes`."""
    failed = often_failed(run)
    if not failed:
        return []
    try:
        return leave_enough(failed, slurm.usable_nodes(partition), num_nodes)
    except SlurmError as error:
        run.event("slurm", "nodes not excluded", nodes=failed, reason=str(error))
        return []


def leave_enough(failed: list[str], usable: set[str], num_nodes: int) -> list[str]:
    """The first of `failed`, the worst first, without which `num_nodes` usable nodes are left.

    A node that is not usable anyway is always excluded.
    """
    num_spare = max(0, len(usable) - num_nodes)
    kept = [host for host in failed if host in usable][num_spare:]
    return [host for host in failed if host not in kept]


def _rows(run: RunDir) -> list[dict]:
    return read_records(run.nodes) if run.nodes.is_file() else []
