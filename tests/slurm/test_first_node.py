"""Whether a job's first node is lost: it does not answer, and Slurm has taken it out of the job."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.job import first_node
from launcher.job.first_node import FirstNode, FirstNodeLost


class Slurm:
    """squeue, scancel and scontrol in the PATH: what they say is in files, what they were told in `told`."""

    def __init__(self, folder: Path) -> None:
        self.hosts, self.told, self._scancel = folder / "hosts", folder / "told", folder / "scancel"
        (folder / "squeue").write_text(f"#!/bin/sh\ncat {self.hosts}\n")
        (folder / "scontrol").write_text('#!/bin/sh\nfor last; do :; done\necho "$last" | tr , "\\n"\n')
        for program in ("squeue", "scontrol"):
            (folder / program).chmod(0o755)
        self.answers(True)

    def answers(self, yes: bool) -> None:
        self._scancel.write_text(f"#!/bin/sh\necho $1 >> {self.told}\nexit {0 if yes else 1}\n")
        self._scancel.chmod(0o755)

    @property
    def cancelled(self) -> list[str]:
        return self.told.read_text().split() if self.told.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(first_node, "CHECK_SECONDS", 0)
    return Slurm(tmp_path)


@pytest.fixture
def port() -> Iterator[int]:
    """One on which nobody listens until a test does."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_slurm_alone_decides(slurm: Slurm, port: int) -> None:
    node = FirstNode("n1", f"127.0.0.1:{port}")
    slurm.hosts.write_text("n1,n2\n")
    node.check()
    slurm.hosts.write_text("")  # the job is over, or Slurm does not know
    node.check()
    assert slurm.cancelled == []
    slurm.hosts.write_text("n2,n3\n")
    with pytest.raises(FirstNodeLost, match="first node n1 is lost"):
        node.check()
    assert slurm.cancelled == ["17"]


def test_a_node_that_answers_is_not_lost(slurm: Slurm) -> None:
    slurm.hosts.write_text("n2\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        FirstNode("n1", f"127.0.0.1:{server.getsockname()[1]}").check()
    assert slurm.cancelled == []


def test_a_slurm_that_does_not_answer_is_asked_again(slurm: Slurm, port: int) -> None:
    node = FirstNode("n1", f"127.0.0.1:{port}")
    slurm.hosts.write_text("n2\n")
    slurm.answers(False)
    node.check()
    slurm.answers(True)
    with pytest.raises(FirstNodeLost):
        node.await_result(is_over=lambda: False)


def test_the_supervisors_word_ends_the_wait(slurm: Slurm, port: int) -> None:
    slurm.hosts.write_text("n1,n2\n")
    words = iter([False, False, True])
    FirstNode("n1", f"127.0.0.1:{port}").await_result(is_over=lambda: next(words))
    assert next(words, None) is None and slurm.cancelled == []
