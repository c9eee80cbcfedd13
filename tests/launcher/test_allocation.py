"""What a job has on each node, as Slurm shows it, and what a step of one node requests."""

from types import SimpleNamespace

import pytest

from cluster.errors import InputError, Preempted
from launcher.job import allocation
from launcher.job.allocation import NodeAllocation, node_step, read_allocation, step_environment
from launcher.slurm.client import SlurmError, SlurmNoAnswer, SlurmRefused

DETAILS = """JobId=7 JobName=tunesmith-synthesize
   NodeList=n[3,1-2]
   NumNodes=3 NumCPUs=12 NumTasks=3 CPUs/Task=4 ReqB:S:C:T=0:0:*:*
     Nodes=n[1-2] CPU_IDs=0-3,8 Mem=4000 GRES=gpu:a100:2(IDX:0-1),nic:1(IDX:0)
     Nodes=n3 CPU_IDs=5 Mem=0 GRES=
   TresPerJob=gres:gpu:4
"""


def allocations_of(details: str) -> list[NodeAllocation]:
    names = {"n[3,1-2]": ["n3", "n1", "n2"], "n[1-2]": ["n1", "n2"], "n3": ["n3"]}
    return read_allocation("7", SimpleNamespace(show_job=lambda *_: details, host_names=names.__getitem__))


def test_each_node_has_its_own_share_in_the_order_of_the_job() -> None:
    assert allocations_of(DETAILS) == [
        NodeAllocation("n3", 1, 0, 0),
        NodeAllocation("n1", 5, 2, 4000),
        NodeAllocation("n2", 5, 2, 4000),
    ]


@pytest.mark.parametrize("lost", ["     Nodes=n3 CPU_IDs=5 Mem=0 GRES=\n", "   NodeList=n[3,1-2]\n"])
def test_a_node_that_slurm_does_not_show_is_an_error(lost: str) -> None:
    with pytest.raises(InputError, match="does not show what the job has on each node"):
        allocations_of(DETAILS.replace(lost, ""))


def test_a_slurm_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the job a moment later: this is no bad input."""
    answers = [SlurmNoAnswer("connect failure"), SlurmRefused("Invalid job id specified"), DETAILS]

    def show_job(*_: str) -> str:
        if isinstance(answer := answers.pop(0), SlurmError):
            raise answer
        return answer

    monkeypatch.setattr(allocation, "RETRY_SECONDS", 0)
    names = {"n[3,1-2]": ["n3", "n1", "n2"], "n[1-2]": ["n1", "n2"], "n3": ["n3"]}
    slurm = SimpleNamespace(show_job=show_job, host_names=names.__getitem__)
    assert len(allocation.await_allocation("7", slurm, lambda: False)) == 3 and answers == []
    answers.append(SlurmNoAnswer("connect failure"))
    with pytest.raises(Preempted, match="asked to stop"):
        allocation.await_allocation("7", slurm, lambda: True)


def test_gpus_of_several_kinds_add_up() -> None:
    details = DETAILS.replace("nic:1(IDX:0)", "gpu:h100:3(IDX:2-4)")
    assert allocations_of(details)[1].num_gpus == 5


def test_a_step_requests_all_of_its_node_and_not_what_the_whole_job_has() -> None:
    step = node_step(NodeAllocation("n1", 5, 2, 4000))
    assert {"--overlap", "--exact", "--nodelist=n1", "--cpus-per-task=5", "--gres=gpu:2"} < set(step)
    assert "--gres=none" in node_step(NodeAllocation("n3", 1, 0, 0))
    names = ("GPUS", "GPUS_PER_TASK", "NTASKS", "MEM_PER_CPU", "NNODES", "EXPORT_ENV")
    of_job = {f"SLURM_{name}": "4" for name in names}
    kept = {"SLURM_JOB_ID": "7", "HF_TOKEN": "x", "SLURM_GPUS_ON_NODE": "2", "SLURM_CONF": "/etc"}
    assert step_environment(of_job | kept) == kept
