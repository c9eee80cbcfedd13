"""What a Slurm job has on each of its nodes, and the step that takes all of it on one node.

for allocation in await_allocation(os.environ["SLURM_JOB_ID"], Slurm(), is_stopped):
    subprocess.Popen([*node_step(allocation), "hostname"], env=step_environment(os.environ))
"""

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.errors import InputError, Preempted, TunesmithError
from launcher.slurm.client import Slurm, SlurmNoAnswer, SlurmRefused

RETRY_SECONDS = 5.0
REFUSED_SECONDS = 60.0

# As `scontrol --details show job` has it: "Nodes=n[1-2] CPU_IDs=0-3,8 Mem=4000 GRES=gpu:a100:2(IDX:0-1)".
_NODES = re.compile(r"^ *Nodes=(\S+) CPU_IDs=(\S+) Mem=(\d+) GRES=(\S*)", re.MULTILINE)
_GPUS = re.compile(r"\bgpu:(?:[^:,()]+:)?(\d+)")
# srun would request for a step of one node what sbatch requested for the whole job. (EXPORT_ENV: of --export=NONE.)
_WHOLE_JOB = re.compile(
    r"SLURM_(EXPORT_ENV|GPUS|GPUS_PER_\w+|GRES|MEM_PER_\w+|CPUS_PER_\w+|NTASKS\w*|NPROCS|NNODES|TRES_\w+)"
)


@dataclass(frozen=True)
class NodeAllocation:
    """One node's part of a job."""

    host: str
    num_cpus: int
    num_gpus: int
    memory_mib: int  # 0 where Slurm does not count memory


def await_allocation(job_id: str, slurm: Slurm, is_stopped: Callable[[], bool]) -> list[NodeAllocation]:
    """`read_allocation` as soon as Slurm answers. The job runs, so Slurm knows it: a refusal is a moment's confusion.

    Raises Preempted if the job is asked to stop meanwhile, and TunesmithError after REFUSED_SECONDS of refusals.
    """
    deadline = time.monotonic() + REFUSED_SECONDS
    while True:
        try:
            return read_allocation(job_id, slurm)
        except SlurmNoAnswer as error:
            print(f"error: {error} The job asks again.", file=sys.stderr, flush=True)
        except SlurmRefused as error:
            if time.monotonic() > deadline:
                raise TunesmithError(f"Slurm does not show what job {job_id} has: {error}") from error
        if is_stopped():
            raise Preempted("the job was asked to stop before Slurm showed what it has. Nothing had begun.")
        time.sleep(RETRY_SECONDS)


def read_allocation(job_id: str, slurm: Slurm) -> list[NodeAllocation]:
    """The nodes of a job, the first one first. Raises SlurmError if Slurm does not answer.

    Raises InputError if the answer does not say what the job has on each node.
    """
    details, allocations = slurm.show_job(job_id, "--details"), {}
    for hosts, cpu_ids, memory, gres in _NODES.findall(details):
        num_gpus = sum(map(int, _GPUS.findall(gres)))
        for host in slurm.host_names(hosts):
            allocations[host] = NodeAllocation(host, _count_ids(cpu_ids), num_gpus, int(memory))
    listed = re.search(r"^ *NodeList=(\S+)", details, re.MULTILINE)
    order = slurm.host_names(listed.group(1)) if listed else []
    if not allocations or set(order) != set(allocations):
        raise InputError(
            "`scontrol --details show job` does not show what the job has on each node. A line for each node such as "
            f"`Nodes=n1 CPU_IDs=0-3 Mem=4000 GRES=` is expected, so report this with Slurm's version:\n{details}"
        )
    return [allocations[host] for host in order]


def _count_ids(text: str) -> int:
    """How many numbers a list like "0-3,8" names."""
    bounds = [part.split("-") for part in text.split(",")]
    return sum(int(bound[-1]) - int(bound[0]) + 1 for bound in bounds)


def node_step(allocation: NodeAllocation) -> list[str]:
    """An srun command for one task that has all that the job has on one node. Other steps may share it."""
    gpus = f"gpu:{allocation.num_gpus}" if allocation.num_gpus else "none"
    step = ["srun", "--overlap", "--exact", "--nodes=1", "--ntasks=1", f"--nodelist={allocation.host}"]
    return [*step, f"--cpus-per-task={allocation.num_cpus}", f"--gres={gpus}"]


def step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of such an srun command: without what was requested for the whole job."""
    return {name: value for name, value in environ.items() if not _WHOLE_JOB.fullmatch(name)}
