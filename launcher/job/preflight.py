"""Checks all nodes of a job at once, in seconds, before its stage begins.

    srun --ntasks-per-node=1 python -P -m launcher.job.preflight RUN_DIR [--no-all-reduce]

Every node writes `<run>/attempt-<job>-<restart>/preflight-node-<i>.json`. Node 0 compares these reports and writes
`preflight.json`. If all nodes are fit, they sum a known tensor together. An attempt calls `check_nodes`, which starts
all this and names the nodes and checks that failed.
"""

import argparse
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cluster.errors import EXIT_DONE, EXIT_FAILED, EXIT_RETRY, Preempted, TunesmithError
from cluster.files import write_json
from cluster.nodes.rendezvous import await_json, meet
from cluster.nodes.topology import Topology, read_topology, restart_count
from cluster.run.fence import own_token
from cluster.run.rundir import RunDir
from launcher.job import node_health
from launcher.job.node_checks import Finding, NodeReport, check_node, compare_reports, from_json, sum_over_nodes
from launcher.slurm.client import Slurm
from launcher.slurm.container import python_module

REPORT_SECONDS = 60.0  # until every node has reported; a shared file system may show files late
LIMIT_SECONDS = 240.0  # for the whole preflight

NO_REPORT = Finding(
    "run folder", "left no report: it cannot write to the run folder, or does not run. The log may have its error"
)

OnAllNodes = Callable[[list[str], float], int]


class PreflightFailed(TunesmithError):
    """A node is not fit for the job."""

    kind = "preflight"


def check_nodes(run: RunDir, job_id: str, hosts: tuple[str, ...], on_all_nodes: OnAllNodes) -> None:
    """Start the checks on all nodes. Raises PreflightFailed naming nodes and checks, which nodes.jsonl keeps as well.

    `on_all_nodes(argv, limit_seconds)` runs a command on every node of the job and returns its exit code.
    """
    code = on_all_nodes(python_module("launcher.job.preflight", str(run.root)), LIMIT_SECONDS)
    if code == EXIT_DONE:
        return
    if code == EXIT_RETRY:
        raise Preempted("the job was asked to stop before the stage began. The next attempt begins it.")
    folder = run.attempt_dir(job_id, restart_count())
    failures = read_failures(folder, hosts)
    failed = tuple(host for host in hosts if host in failures)
    checks = ", ".join(dict.fromkeys(finding.check for host in failed for finding in failures[host]))
    node_health.note(run, own_token(), hosts, failed=failed, preflight=checks or "unknown")
    listed = "; ".join(f"{host}: {each.check}: {each.message}" for host in failed for each in failures[host])
    reason = listed or f"exit code {code}, and no node reported why. Errors may be above"
    raise PreflightFailed(
        f"PREFLIGHT: {reason}. Nothing was started on the nodes. The next attempt leaves out the nodes that failed; "
        "slurm.preflight=false skips the checks."
    )


def read_failures(folder: Path, hosts: tuple[str, ...]) -> dict[str, list[Finding]]:
    """The failures that node 0 found, and those that single nodes found later. A node without a report has failed."""
    failures: dict[str, list[Finding]] = {}
    result = folder / "preflight.json"
    if result.exists():
        values = json.loads(result.read_text())["failures"]
        failures = {host: [Finding(**each) for each in found] for host, found in values.items()}
    for rank, host in enumerate(hosts):
        path = folder / f"preflight-node-{rank}.json"
        if not path.exists():
            failures.setdefault(host, [NO_REPORT])
        elif found := from_json(json.loads(path.read_text())).findings:
            failures.setdefault(host, found)
    return failures


def run_node(topology: Topology, run: RunDir, with_all_reduce: bool, report_seconds: float) -> int:
    """This node's part of the preflight. Returns the exit code."""
    folder = topology.attempt_dir(run)
    report = NodeReport(topology.node_rank, topology.hosts[topology.node_rank], topology.step_id)
    folder.mkdir(parents=True, exist_ok=True)
    if topology.node_rank == 0:
        write_json(folder / "preflight-nonce.json", {"nonce": uuid.uuid4().hex, "step_id": topology.step_id})
    check_node(report, run.root, topology.procs_per_node if "SLURM_GPUS_ON_NODE" in os.environ else 0)
    path = folder / f"preflight-node-{report.rank}.json"
    for finding in report.findings:  # also in the log, as the run folder may be what cannot be written
        print(f"preflight: {report.host}: {finding.check}: {finding.message}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + report_seconds
    report.nonce = await_json(folder / "preflight-nonce.json", deadline, topology.step_id)["nonce"]
    write_json(path, asdict(report))
    if topology.node_rank == 0:
        conclude(topology, folder, report_seconds)
    # Twice as long as node 0 waits, which may have begun to wait later.
    result = await_json(folder / "preflight.json", time.monotonic() + 2 * report_seconds, topology.step_id)
    if result["failures"]:
        return EXIT_FAILED
    if with_all_reduce and topology.num_nodes > 1:
        started = time.monotonic()
        own, head = meet(topology, run, report_seconds)
        report.findings += sum_over_nodes(topology, own, head)
        report.all_reduce_seconds = round(time.monotonic() - started, 3)
        write_json(path, asdict(report))
    return EXIT_FAILED if report.findings else EXIT_DONE


def conclude(topology: Topology, folder: Path, report_seconds: float) -> None:
    """Node 0: wait for all reports, compare them, and write the result for all nodes."""
    deadline = time.monotonic() + report_seconds
    reports, missing = [], []
    nonce = json.loads((folder / "preflight-nonce.json").read_text())["nonce"]
    for rank, host in enumerate(topology.hosts):
        try:
            path = folder / f"preflight-node-{rank}.json"
            reports.append(from_json(await_json(path, deadline, topology.step_id)))
        except TunesmithError:
            missing.append(host)
    failures = compare_reports(reports)
    for report in reports:
        if report.nonce != nonce:
            failures.setdefault(report.host, []).append(Finding("run folder", "it is not the folder that node 0 sees"))
    for host in missing:
        failures[host] = [NO_REPORT]
    values = {host: [vars(finding) for finding in found] for host, found in failures.items()}
    write_json(folder / "preflight.json", {"failures": values, "step_id": topology.step_id, "time": time.time()})


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.job.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--report-seconds", type=float, default=REPORT_SECONDS, help="limit of waiting for other nodes")
    parser.add_argument("--no-all-reduce", action="store_true", help="skip the sum, which imports torch for seconds")
    arguments = parser.parse_args(argv)
    try:
        topology = read_topology(os.environ, expand=Slurm().host_names)
        run = RunDir(arguments.run_dir.resolve())
        return run_node(topology, run, not arguments.no_all_reduce, arguments.report_seconds)
    except (TunesmithError, OSError) as error:
        print(f"preflight: {os.uname().nodename}: {error}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
