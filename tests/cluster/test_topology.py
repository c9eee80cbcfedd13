"""Reading a job's nodes from the environment."""

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from cluster.nodes.topology import Topology, read_topology
from cluster.run.rundir import RunDir

JOB = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_STEP_NODELIST": "n[2-3]",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "7",
    "SLURM_LOCALID": "0",
}


def expand(host_list: str) -> list[str]:
    return {"n[2-3]": ["n2", "n3"], "n[1-3]": ["n1", "n2", "n3"], "n2": ["n2"]}[host_list]


def test_without_a_job_the_topology_is_one_local_node() -> None:
    topology = read_topology({})
    assert topology == Topology((socket.gethostname(),), 0, 1, "local", 0, 0)


def test_a_step_sees_its_own_nodes_and_its_attempt() -> None:
    topology = read_topology(JOB | {"SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "2"}, expand=expand)
    assert topology == Topology(("n2", "n3"), 1, 8, "41", 7, 2)
    assert topology.attempt_dir(RunDir(Path("run"))) == Path("run/attempt-41-2")


def test_a_step_in_a_container_uses_the_exported_hosts() -> None:
    """It has no scontrol. A step on some of the nodes, or of another job, does not use them."""
    exported = JOB | {"TUNESMITH_HOSTS": "41 n1 n2 n3", "SLURM_STEP_NODELIST": "n[1-3]"}
    assert read_topology(exported, expand=lambda _: []).hosts == ("n1", "n2", "n3")
    assert read_topology(exported | {"SLURM_STEP_NODELIST": "n[2-3]"}, expand=expand).hosts == ("n2", "n3")
    assert read_topology(exported | {"SLURM_JOB_ID": "42"}, expand=lambda _: ["m1", "m2"]).hosts == ("m1", "m2")


def test_an_explicit_number_of_processes_overrides_that_of_gpus() -> None:
    assert read_topology(JOB | {"SLURM_GPUS_ON_NODE": "8"}, 3, expand).procs_per_node == 3
    assert read_topology(JOB, None, expand).procs_per_node == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_LOCALID": "1"}, "ntasks-per-node=1"),
        ({"SLURM_NODEID": "2"}, "no node number 2"),
        ({"SLURM_NODEID": None}, "SLURM_NODEID"),
        ({"SLURM_GPUS_ON_NODE": "gpu:2"}, "SLURM_GPUS_ON_NODE='gpu:2'"),
        ({"SLURM_GPUS_ON_NODE": "0"}, "procs_per_node is 0"),
        ({"SLURM_JOB_ID": "../../etc"}, "SLURM_JOB_ID"),
        ({"SLURM_RESTART_COUNT": "1\n2"}, "SLURM_RESTART_COUNT"),
    ],
)
def test_an_environment_that_no_task_has_is_an_error(changes: dict[str, str | None], message: str) -> None:
    environ = {key: value for key, value in (JOB | changes).items() if value is not None}
    with pytest.raises(InputError, match=message):
        read_topology(environ, expand=expand)


@given(st.text(st.sampled_from("n1[-],. \n$();'\"/~\x00"), max_size=8))
def test_only_lists_of_host_names_reach_scontrol(host_list: str) -> None:
    expanded = []

    def spy(text: str) -> list[str]:
        expanded.append(text)
        return ["n1"]

    try:
        read_topology(JOB | {"SLURM_STEP_NODELIST": host_list, "SLURM_NODEID": "0"}, expand=spy)
    except InputError:
        assert expanded == []
    else:
        assert expanded == [host_list]
        assert host_list[0] != "-" and set(host_list) <= set("n1[-],.")


def test_a_list_that_expands_to_something_else_is_an_error() -> None:
    with pytest.raises(InputError, match="expands to"):
        read_topology(JOB, expand=lambda _: ["n2", "n3;reboot"])
