"""Reading a job's shape from the environment, and meeting over the run folder; no Slurm needed."""

import dataclasses
import json
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError, TunesmithError
from cluster.files import write_json
from cluster.nodes.rendezvous import FIRST_PORT, NUM_PORTS, choose_address, free_port, local_addresses, meet
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


def test_no_job_is_one_local_node() -> None:
    topology = read_topology({})
    assert topology == Topology((socket.gethostname(),), 0, 1, "local", 0, 0)
    assert topology.rendezvous_id == "local-0"


def test_a_step_sees_its_own_nodes_and_its_attempt() -> None:
    topology = read_topology(JOB | {"SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "2"}, expand=expand)
    assert topology == Topology(("n2", "n3"), 1, 8, "41", 7, 2)
    assert topology.attempt_dir(RunDir(Path("run"))) == Path("run/attempt-41-2")


def test_a_step_in_an_image_goes_by_what_the_jobs_script_has_told_it() -> None:
    """There is no scontrol; a step on some of the nodes, or of another job, was not told."""
    told = JOB | {"TUNESMITH_HOSTS": "41 n1 n2 n3", "SLURM_STEP_NODELIST": "n[1-3]"}
    assert read_topology(told, expand=lambda _: []).hosts == ("n1", "n2", "n3")
    assert read_topology(told | {"SLURM_STEP_NODELIST": "n[2-3]"}, expand=expand).hosts == ("n2", "n3")
    assert read_topology(told | {"SLURM_JOB_ID": "42"}, expand=lambda _: ["m1", "m2"]).hosts == ("m1", "m2")


def test_an_explicit_number_of_processes_goes_before_that_of_gpus() -> None:
    assert read_topology(JOB | {"SLURM_GPUS_ON_NODE": "8"}, 3, expand).procs_per_node == 3
    assert read_topology(JOB, None, expand).procs_per_node == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
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
def test_an_environment_no_task_has_is_refused_by_name(changes: dict[str, str | None], complaint: str) -> None:
    environ = {key: value for key, value in (JOB | changes).items() if value is not None}
    with pytest.raises(InputError, match=complaint):
        read_topology(environ, expand=expand)


@given(st.text(st.sampled_from("n1[-],. \n$();'\"/~\x00"), max_size=8))
def test_only_lists_of_host_names_reach_scontrol(host_list: str) -> None:
    asked = []

    def spy(text: str) -> list[str]:
        asked.append(text)
        return ["n1"]

    try:
        read_topology(JOB | {"SLURM_STEP_NODELIST": host_list, "SLURM_NODEID": "0"}, expand=spy)
    except InputError:
        assert asked == []
    else:
        assert asked == [host_list]
        assert host_list[0] != "-" and set(host_list) <= set("n1[-],.")


def test_a_name_that_scontrol_could_not_mean_is_refused() -> None:
    with pytest.raises(InputError, match="expands to"):
        read_topology(JOB, expand=lambda _: ["n2", "n3;reboot"])


def test_the_address_is_that_of_the_chosen_interface_else_of_the_own_name_else_the_only_one() -> None:
    two = {"10.0.0.5": "eth0", "192.168.9.5": "ib0"}
    assert choose_address(two, ["10.0.0.5"], "ib0") == "192.168.9.5"
    assert choose_address(two, ["127.0.1.1", "192.168.9.5"], None) == "192.168.9.5"
    assert choose_address({"10.0.0.5": "eth0"}, ["127.0.1.1"], None) == "10.0.0.5"
    with pytest.raises(InputError, match=r"eth0 10\.0\.0\.5, ib0 192\.168\.9\.5.*GLOO_SOCKET_IFNAME"):
        choose_address(two, ["127.0.1.1"], None)
    with pytest.raises(InputError, match="eth7"):
        choose_address(two, ["10.0.0.5"], "eth7")
    with pytest.raises(InputError, match="it has: none"):
        choose_address({}, ["127.0.1.1"], None)


def test_loopback_is_never_an_address() -> None:
    assert not [address for address in local_addresses() if address.startswith("127.")]


@given(st.integers(min_value=1, max_value=2**31))
def test_ports_stay_clear_of_those_linux_hands_out(job_id: int) -> None:
    assert FIRST_PORT <= free_port(str(job_id)) < FIRST_PORT + NUM_PORTS <= 32768


def test_a_taken_port_is_passed_over() -> None:
    port = free_port("41")
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        assert free_port("41") not in (port, None)
    assert free_port("41") == port


def a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the nodes of these tests find an address, whatever network the machine has."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("cluster.nodes.rendezvous.local_addresses", lambda: {"10.0.0.5": "eth0"})


def test_nodes_that_meet_read_the_same_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_network(monkeypatch)
    head = Topology(("n1", "n2"), 0, 1, "41", 0, 0)
    answers = {}

    def run(topology: Topology) -> None:
        answers[topology.node_rank] = meet(topology, RunDir(tmp_path), timeout_seconds=30)

    threads = [threading.Thread(target=run, args=(dataclasses.replace(head, node_rank=rank),)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0][1] == answers[1][1] == answers[0][0]
    assert (answers[0][0].host, answers[1][0].host, answers[1][0].port) == ("n1", "n2", None)


def test_the_node_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_network(monkeypatch)
    with pytest.raises(TunesmithError, match=r"node 1 \(n2\) did not write .*attempt-41-0/node-1\.json"):
        meet(Topology(("n1", "n2"), 0, 1, "41", 0, 0), RunDir(tmp_path), timeout_seconds=0)


def test_word_of_an_earlier_step_in_the_same_allocation_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_network(monkeypatch)
    now = Topology(("n1", "n2"), 0, 1, "41", 1, 0)
    with pytest.raises(TunesmithError):
        meet(dataclasses.replace(now, step_id=0, node_rank=1), RunDir(tmp_path), timeout_seconds=0)
    with pytest.raises(TunesmithError, match="node 1"):
        meet(now, RunDir(tmp_path), timeout_seconds=0)
    earlier = json.loads((tmp_path / "attempt-41-0/node-1.json").read_text())
    write_json(tmp_path / "attempt-41-0/node-1.json", earlier | {"step_id": 1})
    assert meet(now, RunDir(tmp_path), timeout_seconds=0)[0].host == "n1"
