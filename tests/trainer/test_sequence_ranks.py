"""Sequence parallelism with more than one group of ranks, and after a stop."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.trainer.test_exactness import (
    COMMON,
    SHARED,
    TOLERANCE,
    assert_same_trace,
    assert_same_weights,
    reference_of,
)
from tests.trainer.tools import (
    DEADLINE_SECONDS,
    chat_documents,
    torchrun,
    trace,
    weights,
    write_chats,
    write_job,
)

pytestmark = pytest.mark.long


def run_ranks(folder: Path, num_ranks: int, module: str, *arguments: object) -> None:
    command = [*torchrun(num_ranks, folder), f"tests.trainer.{module}", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_two_groups_of_two_ranks_train_like_plain_pytorch(tmp_path: Path, chat_model: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", chat_documents(37))
    runs = [
        write_job(tmp_path / f"zero{stage}", chat_model, data, **COMMON | SHARED, zero_stage=stage)
        for stage in (1, 2, 3)
    ]
    run_ranks(tmp_path, 4, "exact_worker", *runs)
    for run in runs:
        expected, lm = reference_of(run)
        assert_same_trace(run, expected, TOLERANCE)
        assert_same_weights(run, dict(lm.named_parameters()))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stopped_training_resumes_bit_for_bit(tmp_path: Path, chat_model: Path, stage: int) -> None:
    data = write_chats(tmp_path / "chats.jsonl", chat_documents(37))
    whole, stopped = (
        write_job(tmp_path / name, chat_model, data, **COMMON | SHARED, num_epochs=2, zero_stage=stage)
        for name in ("whole", "stopped")
    )
    run_ranks(tmp_path, 2, "elastic_worker", whole, 0)
    run_ranks(tmp_path, 2, "elastic_worker", stopped, 3)
    assert max(trace(stopped)) == 3 < max(trace(whole))
    run_ranks(tmp_path, 2, "elastic_worker", stopped, 0)
    assert trace(stopped) == trace(whole)
    found, wanted = weights(stopped), weights(whole)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted) and found.keys() == wanted.keys()
