"""Which nodes are suspect, by how the attempts on them ended: `<run>/nodes.jsonl`.

Slurm leaves out nodes that it knows to be down. Of one on which only our jobs die, it knows nothing. A node in three
attempts in a row that crashed is left out of the next, and one that failed a preflight at once. A good attempt on it,
or a day, clears it.
"""

import json
import time

from cluster.errors import EXIT_PREEMPTED
from cluster.files import read_jsonl
from cluster.run import fence
from cluster.run.rundir import RunDir, append_jsonl
from launcher.job.chain import SlurmSilent, ask

SUSPECT_FAILURES = 3
FORGET_SECONDS = 24 * 3600.0
KILLED = (137, 143)  # SIGKILL, SIGTERM: how ranks end because those of another node have
USABLE = "idle,allocated,mixed,completing"


def note(run: RunDir, job_id: str, hosts: tuple[str, ...], failed: tuple[str, ...], preflight: str = "") -> None:
    """Write down how an attempt ended for its nodes. `preflight`: the check that `failed` did not pass."""
    row = {"time": round(time.time(), 3), "job_id": job_id, "hosts": hosts, "failed": failed, "preflight": preflight}
    append_jsonl(run.nodes, row)


def catch_up(run: RunDir) -> None:
    """Write down the attempts that died without a word, those of whole nodes above all."""
    noted = {row["job_id"] for row in _rows(run)}
    for claim in fence.claims(run.root):
        if claim.job_id not in noted and claim.hosts:
            note(run, claim.job_id, claim.hosts, culprits(run, claim.job_id, claim.hosts))
            noted.add(claim.job_id)


def culprits(run: RunDir, job_id: str, hosts: tuple[str, ...]) -> tuple[str, ...]:
    """The nodes that a crash began on: those that left no word if others did, else those that were not just killed."""
    words = {}
    for path in (path for folder in run.attempt_dirs(job_id) for path in folder.glob("node-*.exit.json")):
        word = json.loads(path.read_text())
        words[word["host"]] = word["exit_code"]
    silent = tuple(host for host in hosts if host not in words)
    own = tuple(host for host in hosts if words.get(host, 0) not in (0, EXIT_PREEMPTED, *KILLED))
    if silent and len(silent) < len(hosts):
        return silent
    return own or hosts


def suspects(run: RunDir, now: float | None = None) -> list[str]:
    """Nodes that had better be left out, the worst first."""
    now = time.time() if now is None else now
    counts: dict[str, int] = {}
    cleared: set[str] = set()
    for row in reversed(_rows(run)):
        if now - row["time"] > FORGET_SECONDS:
            break
        for host in row["hosts"]:
            if host in row["failed"] and host not in cleared:
                counts[host] = counts.get(host, 0) + (SUSPECT_FAILURES if row["preflight"] else 1)
            elif host not in row["failed"]:
                cleared.add(host)
    bad = [host for host, count in counts.items() if count >= SUSPECT_FAILURES]
    return sorted(bad, key=lambda host: (-counts[host], host))


def to_exclude(run: RunDir, num_nodes: int, partition: str | None) -> list[str]:
    """The suspects, but never so many that a job of `num_nodes` could not run on what is left of the partition."""
    bad = suspects(run)
    if not bad:
        return []
    where = [f"--partition={partition}"] if partition else []
    try:
        usable = set(ask(["sinfo", "--noheader", "--Node", "--format=%N", f"--states={USABLE}", *where]).split())
    except SlurmSilent as error:
        run.event("slurm", "suspects not excluded", nodes=bad, reason=str(error))
        return []
    return within(bad, usable, num_nodes)


def within(bad: list[str], usable: set[str], num_nodes: int) -> list[str]:
    """As many of `bad`, the worst first, as can be spared of the usable nodes. Those that are down cost nothing."""
    spare = len(usable) - num_nodes
    excluded = []
    for host in bad:
        if host not in usable:
            excluded.append(host)
        elif spare > 0:
            excluded.append(host)
            spare -= 1
    return excluded


def _rows(run: RunDir) -> list[dict]:
    return read_jsonl(run.nodes) if run.nodes.is_file() else []
