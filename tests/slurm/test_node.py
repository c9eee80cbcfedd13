"""The ranks of all nodes of a real Slurm job meet."""

import sys

import pytest

from tests.slurm.bed import SlurmBed

ALL_REDUCE = """
import os
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(value)
where = [os.environ.get(name) for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
line = ["sum", str(int(value)), "over", str(dist.get_world_size()), "ranks", *map(str, where)]
os.write(1, (" ".join(line) + "\\n").encode())  # in one piece: two ranks of a node write to one pipe
dist.destroy_process_group()
"""


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("num_nodes", "options", "answer"),
    [(2, ["--gres=gpu:2"], "sum 1111 over 4 ranks"), (3, [], "sum 111 over 3 ranks")],
    ids=["two nodes of two GPUs", "three nodes"],
)
def test_ranks_of_all_nodes_meet(slurm_cluster: SlurmBed, num_nodes: int, options: list[str], answer: str) -> None:
    script = slurm_cluster.shared / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    batch = slurm_cluster.write_script(
        "meet.sh", f"srun --kill-on-bad-exit=1 {sys.executable} -P -m launcher.job.node exec $PWD -- {script}"
    )
    options = [f"--nodes={num_nodes}", "--ntasks-per-node=1", *options]
    job = slurm_cluster.sbatch(batch, options=options, env={"OMP_NUM_THREADS": "1"})
    slurm_cluster.wait_state(job, {"COMPLETED"}, 120)
    lines = [line for line in slurm_cluster.output(job).splitlines() if line.startswith("sum")]
    assert lines == [f"{answer} 10.77.0.11 eth0 =eth0"] * int(answer.split()[3])
