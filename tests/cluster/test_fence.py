"""Only the newest attempt at a run may write, and an older one does no harm."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import EXIT_FAILED, InputError
from cluster.run.fence import (
    TOKEN_VARIABLE,
    Fence,
    Superseded,
    claim,
    claims,
    newest,
    own_token,
    run_lock,
    verify,
)
from cluster.run.rundir import RunDir
from generation.request_log import RequestLog
from tests.generation.test_request_log import make_id
from trainer.checkpoint.commit import commit_checkpoint, partial_folder
from trainer.checkpoint.state import complete_checkpoints
from trainer.config.train import CheckpointConfig

CLAIMER = """
import sys
from pathlib import Path
from cluster.run.fence import claim
for _ in range(20):
    print(claim(Path(sys.argv[1]), "train", "7"))
"""


def test_processes_that_claim_at_once_get_consecutive_tokens(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", CLAIMER, str(tmp_path)]
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    numbers = [int(line) for process in processes for line in process.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 61))
    assert newest(tmp_path) == 60
    assert {each.job_id for each in claims(tmp_path)} == {"7"}


def test_threads_that_claim_at_once_get_consecutive_tokens(tmp_path: Path) -> None:
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda: numbers.append(claim(tmp_path, "train", "7"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


@settings(max_examples=30, deadline=None)
@given(own=st.integers(1, 5), torn=st.sets(st.integers(1, 5)))
def test_only_the_newest_passes_even_if_a_claim_is_incomplete(tmp_path_factory, own, torn) -> None:
    run = tmp_path_factory.mktemp("run")
    for number in range(1, 6):
        assert claim(run, "train", str(100 + number)) == number
        if number in torn:  # killed between making the file and writing it
            (RunDir(run).claims / f"{number:06d}.json").write_text("")
    fence = Fence(run, own)
    assert fence.is_superseded is (own < 5)
    if own == 5:
        return fence.check()
    with pytest.raises(Superseded) as raised:
        fence.check()
    assert raised.value.exit_code == EXIT_FAILED
    assert "fencing token 5" in str(raised.value) and ("job 105" in str(raised.value)) is (5 not in torn)
    assert [each.token for each in claims(run)] == [1, 2, 3, 4, 5]


def test_a_local_run_needs_no_token_and_excludes_processes_with_one(tmp_path: Path, monkeypatch) -> None:
    claim(tmp_path, "train", "7")
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert own_token() is None
    verify(tmp_path)
    with run_lock(RunDir(tmp_path).lock):
        monkeypatch.setenv(TOKEN_VARIABLE, "1")
        with pytest.raises(InputError, match="in use"), run_lock(RunDir(tmp_path).lock):
            pass
    with run_lock(RunDir(tmp_path).lock):
        monkeypatch.setenv(TOKEN_VARIABLE, "2")
        with run_lock(RunDir(tmp_path).lock):
            monkeypatch.delenv(TOKEN_VARIABLE)
            with pytest.raises(InputError, match="in use"), run_lock(RunDir(tmp_path).lock):
                pass


def test_a_variable_that_is_not_a_number_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "two")
    with pytest.raises(InputError, match=TOKEN_VARIABLE):
        own_token()


def write_part(checkpoints: Path, step: int, content: str) -> None:
    partial = partial_folder(checkpoints, step)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "part").write_text(content)
    (partial / "state.json").write_text(json.dumps({"step": step}))


def test_a_checkpoint_of_an_old_attempt_is_never_put_in_place(tmp_path: Path, monkeypatch) -> None:
    checkpoints = tmp_path / "checkpoints"
    config = CheckpointConfig(keep_last=2)
    monkeypatch.setenv(TOKEN_VARIABLE, str(claim(tmp_path, "train", "1")))
    write_part(checkpoints, 1, "first")
    commit_checkpoint(checkpoints, 1, config)
    write_part(checkpoints, 2, "first")

    monkeypatch.setenv(TOKEN_VARIABLE, str(claim(tmp_path, "train", "2")))
    write_part(checkpoints, 2, "second")  # both are being written, side by side
    monkeypatch.setenv(TOKEN_VARIABLE, "1")
    with pytest.raises(Superseded, match="job 2"):
        commit_checkpoint(checkpoints, 2, config)
    assert [folder.name for folder in complete_checkpoints(checkpoints)] == ["step_000001"]
    monkeypatch.setenv(TOKEN_VARIABLE, "2")
    commit_checkpoint(checkpoints, 2, config)
    assert (checkpoints / "step_000002" / "part").read_text() == "second"


def test_the_request_log_of_an_old_attempt_is_closed_and_disturbs_no_record(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("cluster.run.fence.CHECK_SECONDS", 0.0)
    monkeypatch.setenv(TOKEN_VARIABLE, str(claim(tmp_path, "synthesize", "1")))
    old = RequestLog(tmp_path / "requests")
    old.append(make_id(1), {"by": 1})
    number = claim(tmp_path, "synthesize", "2")
    monkeypatch.setenv(TOKEN_VARIABLE, str(number))
    with RequestLog(tmp_path / "requests") as new:
        new.append(make_id(2), {"by": 2})
        with pytest.raises(Superseded):
            old._fence._checked = float("-inf")
            old.append(make_id(3), {"by": 1})
        old._fence.token = number  # as if its check had been a moment too early
        old.append(make_id(4), {"by": 1})
        new.append(make_id(5), {"by": 2})
        assert [new.get(make_id(i)) for i in (1, 2, 5)] == [{"by": 1}, {"by": 2}, {"by": 2}]
        assert make_id(4) not in new
        new.append(make_id(4), {"by": 2})
    old.close()
    with RequestLog(tmp_path / "requests") as log:
        assert log.ids() == {make_id(i) for i in (1, 2, 4, 5)}
        assert log.get(make_id(4)) == {"by": 2}, "the record of the newer token counts"


def test_a_check_is_cheap(tmp_path: Path) -> None:
    """It precedes commits that happen several times a second."""
    for _ in range(50):
        claim(tmp_path, "train", "7")
    started = time.process_time()
    for _ in range(200):
        Fence(tmp_path, 50).check()
    assert (time.process_time() - started) / 200 < 0.005
    assert os.listdir(tmp_path) == ["claims"], "and leaves nothing behind"


def test_the_state_of_a_run_can_be_read_without_the_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(tmp_path, "train", "7")

    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "utime", forbidden)
    assert newest(tmp_path) == 1
