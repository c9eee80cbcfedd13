"""The nodes of a job and this node's rank among them, read from the environment.

topology = read_topology(os.environ)  # the SLURM_* variables of one task per node; without them one local node
"""

import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from cluster.run.rundir import RunDir

HOSTS_VARIABLE = "TUNESMITH_HOSTS"  # a job's id and its nodes, for steps in a container, which has no scontrol
_HOST_LIST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]*")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Topology:
    """The nodes of a job, and which of them this one is. `job_id` is "local" outside Slurm."""

    hosts: tuple[str, ...]
    node_rank: int
    procs_per_node: int
    job_id: str
    step_id: int
    restart_count: int

    @property
    def num_nodes(self) -> int:
        return len(self.hosts)

    def attempt_dir(self, run: RunDir) -> Path:
        """Where the nodes of this attempt of the job leave files for each other."""
        return run.attempt_dir(self.job_id, self.restart_count)


def _integer(environ: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environ.get(key, "" if default is None else str(default))
    if not re.fullmatch(r"[0-9]+", text):
        raise InputError(f"environment variable {key}={text!r}: expected a number. Start this with srun inside a job.")
    return int(text)


def restart_count(environ: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has requeued the job that this process belongs to."""
    return _integer(environ, "SLURM_RESTART_COUNT", default=0)


def attempt_number() -> int:
    """The number of this attempt of the job, from 1."""
    return restart_count() + 1


def export_hosts(environ: MutableMapping[str, str], hosts: Iterable[str]) -> None:
    """Give the steps of this job its node names, in their environment."""
    environ[HOSTS_VARIABLE] = " ".join([environ["SLURM_JOB_ID"], *hosts])


def _exported_hosts(environ: Mapping[str, str]) -> list[str]:
    """The names from `export_hosts`; none if this step belongs to another job or runs on some of its nodes."""
    job_id, *hosts = environ.get(HOSTS_VARIABLE, "").split() or [""]
    on_all = environ.get("SLURM_STEP_NODELIST", environ["SLURM_JOB_NODELIST"]) == environ["SLURM_JOB_NODELIST"]
    return hosts if on_all and job_id == environ.get("SLURM_JOB_ID") else []


def read_topology(
    environ: Mapping[str, str],
    procs_per_node: int | None = None,
    expand: Callable[[str], list[str]] | None = None,
) -> Topology:
    """The topology of a Slurm job with one task per node; outside Slurm one local node.

    `expand` gives the names in a compressed list such as `gpu[01-03]`; a local node needs none. `procs_per_node`
    defaults to SLURM_GPUS_ON_NODE, and to 1 if the job has no GPUs. Raises InputError if the environment is not that of
    such a task.
    """
    procs = procs_per_node or _integer(environ, "SLURM_GPUS_ON_NODE", default=1)
    if procs < 1:
        raise InputError(f"procs_per_node is {procs}; expected 1 or more.")
    if "SLURM_JOB_NODELIST" not in environ:
        return Topology((socket.gethostname(),), 0, procs, "local", 0, 0)
    host_list = environ.get("SLURM_STEP_NODELIST", environ["SLURM_JOB_NODELIST"])
    if not _HOST_LIST.fullmatch(host_list):
        raise InputError(f"{host_list!r} is not a list of nodes as Slurm writes it. Start this with srun inside a job.")
    hosts = tuple(_exported_hosts(environ) or expand(host_list))
    node_rank = _integer(environ, "SLURM_NODEID")
    if not all(_HOST.fullmatch(host) for host in hosts) or len(set(hosts)) != len(hosts) or node_rank >= len(hosts):
        raise InputError(
            f"node list {host_list!r} expands to {list(hosts)}, which has no node number {node_rank}. "
            "Start this with srun inside a job."
        )
    if _integer(environ, "SLURM_LOCALID", default=0) != 0:
        raise InputError("srun started several tasks on this node; expected one (--ntasks-per-node=1).")
    job_id = str(_integer(environ, "SLURM_JOB_ID"))
    step_id = _integer(environ, "SLURM_STEP_ID", default=0)
    return Topology(hosts, node_rank, procs, job_id, step_id, restart_count(environ))
