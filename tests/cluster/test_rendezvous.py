"""How the nodes of a job find each other over the run folder."""

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
from cluster.nodes.topology import Topology
from cluster.run.rundir import RunDir


def test_the_address_is_that_of_the_interface_else_of_the_nodes_name_else_the_only_one() -> None:
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
def test_ports_are_below_those_that_linux_assigns(job_id: int) -> None:
    assert FIRST_PORT <= free_port(str(job_id)) < FIRST_PORT + NUM_PORTS <= 32768


def test_a_taken_port_is_skipped() -> None:
    port = free_port("41")
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        assert free_port("41") not in (port, None)
    assert free_port("41") == port


def fake_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the nodes of these tests find an address, whatever network the machine has."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("cluster.nodes.rendezvous.local_addresses", lambda: {"10.0.0.5": "eth0"})


def test_nodes_that_meet_read_the_same_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_network(monkeypatch)
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


def test_the_error_names_the_missing_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_network(monkeypatch)
    with pytest.raises(TunesmithError, match=r"node 1 \(n2\) did not write .*attempt-41-0/node-1\.json"):
        meet(Topology(("n1", "n2"), 0, 1, "41", 0, 0), RunDir(tmp_path), timeout_seconds=0)


def test_files_of_an_earlier_step_in_the_same_allocation_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_network(monkeypatch)
    now = Topology(("n1", "n2"), 0, 1, "41", 1, 0)
    with pytest.raises(TunesmithError):
        meet(dataclasses.replace(now, step_id=0, node_rank=1), RunDir(tmp_path), timeout_seconds=0)
    with pytest.raises(TunesmithError, match="node 1"):
        meet(now, RunDir(tmp_path), timeout_seconds=0)
    earlier = json.loads((tmp_path / "attempt-41-0/node-1.json").read_text())
    write_json(tmp_path / "attempt-41-0/node-1.json", earlier | {"step_id": 1})
    assert meet(now, RunDir(tmp_path), timeout_seconds=0)[0].host == "n1"
