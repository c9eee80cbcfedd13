"""Blocks of ports: all free, and one owner each."""

import socket

import pytest

from cluster.errors import TunesmithError
from launcher.job.ray_ports import BLOCK_SIZE, FIRST_PORT, NUM_BLOCKS, claim_block


def test_jobs_that_start_at_the_same_place_get_different_blocks_and_a_block_is_free_again_afterwards() -> None:
    with claim_block(41) as mine:
        with claim_block(41) as theirs, claim_block(41 + NUM_BLOCKS) as third:
            assert len({mine.first, theirs.first, third.first}) == 3
        with claim_block(41) as again:
            assert again.first == theirs.first


def test_a_block_with_one_port_taken_is_passed_over() -> None:
    with claim_block(7) as block:
        first = block.first
    with socket.socket() as other:
        other.bind(("127.0.0.1", first + BLOCK_SIZE - 1))
        other.listen()
        with claim_block(7) as block:
            assert block.first != first


def test_every_port_of_a_node_is_pinned_within_its_block_and_none_twice() -> None:
    with claim_block(2**31) as block:
        options = dict(option.removeprefix("--").split("=") for option in block.options(is_head=True))
        ports = [int(port) for port in (*options.values(), *block.environment().values())]
    assert len(set(ports)) == len(ports)
    assert block.first < min(ports) and max(ports) == block.first + BLOCK_SIZE - 1
    assert block.first >= FIRST_PORT and max(ports) < 20000  # where the nodes of a training meet
    assert int(options["min-worker-port"]) == sorted(ports)[-2]
    assert set(options) >= {"port", "dashboard-port", "ray-client-server-port"}
    assert not set(dict(option.split("=") for option in block.options(is_head=False))) & {"--port", "--dashboard-port"}


def test_where_nothing_is_free_the_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.job.ray_ports._claim", lambda first: None)
    with pytest.raises(TunesmithError, match=f"cannot start on {socket.gethostname()}: it needs 250 free ports"):
        claim_block(1).__enter__()
