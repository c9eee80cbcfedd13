"""A check that the nodes of a job can compute together: they sum a known tensor, over gloo, and over NCCL on GPUs."""

import datetime
import os
import time

from cluster.nodes.rendezvous import NodeAddress
from cluster.nodes.topology import Topology
from launcher.job.node_checks import Finding

NUM_NUMBERS = 2**18  # 1 MiB: more than one packet, and quick on any network
NCCL_BYTES = 2**28
NCCL_ROUNDS = 5
TIMEOUT = datetime.timedelta(seconds=60)


def sum_over_nodes(topology: Topology, own: NodeAddress, head: NodeAddress) -> list[Finding]:
    """Sum a tensor over all nodes. Returns a finding if the sum on this node is wrong."""
    # The interface by which the nodes met, unless the user chose one: gloo would resolve the host's name.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", own.interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={own.interface}")
    import torch
    import torch.distributed as dist

    where = f"tcp://{head.address}:{head.port}"
    try:
        dist.init_process_group(
            "gloo", init_method=where, rank=topology.node_rank, world_size=topology.num_nodes, timeout=TIMEOUT
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
    group = dist.new_group(backend="nccl", timeout=TIMEOUT)
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
