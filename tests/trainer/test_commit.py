"""Checkpoints are complete or absent at every instant, the right ones are kept, and a failed copy is reported."""

import json
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.errors import InputError
from cluster.run.manifest import verify_manifest, write_manifest
from tests.conftest import SmallDisk
from trainer.checkpoint.commit import commit_checkpoint, move_files, partial_folder
from trainer.checkpoint.state import (
    TrainState,
    complete_checkpoints,
    expired_checkpoints,
    newest_checkpoint,
    step_folder,
)
from trainer.config.train import CheckpointConfig, TrainConfig

NUM_KILLS = 15


def test_a_kill_at_any_instant_leaves_complete_checkpoints(tmp_path: Path) -> None:
    checkpoints, local = tmp_path / "run" / "checkpoints", tmp_path / "local"
    rng, last_step = random.Random(0), 0
    for _ in range(NUM_KILLS):
        argv = [sys.executable, "-m", "tests.trainer.commit_worker", checkpoints, local, last_step]
        with subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, text=True) as process:
            first = process.stdout.readline()
            time.sleep(rng.random() * 0.05)
            process.kill()
            lines = (first + process.stdout.read()).splitlines()
        printed = int(lines[-1])
        folders = complete_checkpoints(checkpoints)
        last_step = int(folders[-1].name.removeprefix("step_"))
        assert last_step in (printed, printed + 1), "the printed step is complete, and at most the next one"
        for folder in folders:
            names = {entry["name"] for entry in verify_manifest(folder)["files"]}
            assert names == {"part-0", "part-1", "weights/w-0", "weights/w-1"}
        assert {folder.name for folder in checkpoints.glob("[!.]*")} == {folder.name for folder in folders}


def add_checkpoint(checkpoints: Path, step: int, **losses: float | None) -> Path:
    folder = step_folder(checkpoints, step)
    folder.mkdir(parents=True)
    state = TrainState(step, 0, 0, 0, 1, "job", **losses)
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    write_manifest(folder, ["state.json"], step=step)
    return folder


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(1, 4)), min_size=1, max_size=8),
    st.integers(1, 4), st.integers(0, 4), st.sampled_from(["validation_loss", "train_loss"]),
)  # fmt: skip
def test_the_newest_and_the_best_are_kept(
    tmp_path_factory, losses: list[int | None], last: int, best: int, by: str
) -> None:
    checkpoints = tmp_path_factory.mktemp("kept")
    other = "train_loss" if by == "validation_loss" else "validation_loss"
    for step, loss in enumerate(losses, 1):
        add_checkpoint(checkpoints, step, **{by: loss, other: -step})
    gone = expired_checkpoints(checkpoints, CheckpointConfig(keep_last=last, keep_best=best, best=by))
    kept = [step for step in range(1, len(losses) + 1) if step_folder(checkpoints, step) not in gone]
    assert kept[-min(last, len(losses)) :] == list(range(1, len(losses) + 1))[-last:]
    rated = sorted((loss, -step) for step, loss in enumerate(losses, 1) if loss is not None)
    assert set(kept) == set(range(1, len(losses) + 1)[-last:]) | {-step for _, step in rated[:best]}


def test_training_resumes_from_the_newest_even_if_an_older_one_is_best(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=1, keep_best=1, best="train_loss")
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5), 1):
        partial = partial_folder(tmp_path, step)
        partial.mkdir()
        (partial / "state.json").write_text(json.dumps(asdict(TrainState(step, 0, 0, 0, 1, "job", train_loss=loss))))
        commit_checkpoint(tmp_path, step, config)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step_000002", "step_000004"]
    assert newest_checkpoint(tmp_path).name == "step_000004"


def test_keeping_the_best_by_a_loss_that_is_not_measured_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"train.validation is not set.*best=train_loss"):
        TrainConfig(checkpoint={"keep_best": 1})
    TrainConfig(checkpoint={"keep_best": 1, "best": "train_loss"})


def test_a_copy_to_a_full_disk_fails_with_the_reason_and_keeps_its_source(
    tmp_path: Path, small_disk: SmallDisk
) -> None:
    source, target = tmp_path / "local" / "part", small_disk.path / "checkpoints" / ".saving_step_000001"
    source.mkdir(parents=True)
    (source / "big").write_bytes(b"\0" * 200_000)
    with pytest.raises(InputError, match="the disk is full"):
        move_files(source, target)
    assert (source / "big").is_file()
