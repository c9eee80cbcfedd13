"""Whether a job's first node is lost: it does not answer, and Slurm has taken it out of the job."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.job import first_node
from launcher.job.first_node import FirstNode, FirstNodeLost


class Slurm:
    """scontrol and scancel in the PATH. `job` holds the fields of the job, `log` the commands that end it."""

    def __init__(self, folder: Path) -> None:
        self.job, self.log, self._commands = folder / "job", folder / "log", [folder / "scancel", folder / "scontrol"]
        self.answers(True)

    def show(self, nodes: str, state: str = "RUNNING", restarts: int = 0, requeue: int = 1) -> None:
        self.job.write_text(f"JobId=17 JobState={state} Requeue={requeue} Restarts={restarts} NodeList={nodes}\n")

    def answers(self, yes: bool) -> None:
        end = f"echo ${{0##*/}} $@ >> {self.log}; exit {0 if yes else 1}"
        cases = f"*hostnames*) for last; do :; done; echo $last | tr , ' ';; *show*) cat {self.job};; *) {end};;"
        for command in self._commands:
            command.write_text(f'#!/bin/bash\ncase "$*" in {cases} esac\n')
            command.chmod(0o755)

    @property
    def commands(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(first_node, "CHECK_SECONDS", 0)
    return Slurm(tmp_path)


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which no process listens until a test does."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_slurm_alone_decides(slurm: Slurm, port: int) -> None:
    node = FirstNode("n1", f"127.0.0.1:{port}")
    for fields in ({"nodes": "n1,n2"}, {"nodes": "n2,n3", "state": "COMPLETING"}, {"nodes": "n2,n3", "restarts": 1}):
        slurm.show(**fields)
        node.check()
    assert slurm.commands == []
    slurm.show("n2,n3")
    with pytest.raises(FirstNodeLost, match="first node n1 is lost"):
        node.check()
    assert slurm.commands == ["scontrol requeue 17"]


def test_a_job_that_may_not_be_requeued_is_cancelled(slurm: Slurm, port: int) -> None:
    slurm.show("n2", requeue=0)
    with pytest.raises(FirstNodeLost):
        FirstNode("n1", f"127.0.0.1:{port}").check()
    assert slurm.commands == ["scancel 17"]


def test_a_node_that_answers_is_not_lost(slurm: Slurm) -> None:
    slurm.show("n2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        FirstNode("n1", f"127.0.0.1:{server.getsockname()[1]}").check()
    assert slurm.commands == []


def test_a_slurm_that_does_not_answer_is_asked_again(slurm: Slurm, port: int) -> None:
    node = FirstNode("n1", f"127.0.0.1:{port}")
    slurm.show("n2")
    slurm.answers(False)
    node.check()
    slurm.answers(True)
    with pytest.raises(FirstNodeLost):
        node.await_result(is_over=lambda: False)


def test_the_message_of_the_supervisor_ends_the_wait(slurm: Slurm, port: int) -> None:
    slurm.show("n1,n2")
    answers = iter([False, False, True])
    FirstNode("n1", f"127.0.0.1:{port}").await_result(is_over=lambda: next(answers))
    assert next(answers, None) is None and slurm.commands == []
