"""Saving during training, on one rank: by way of a local disk, after a loss that is not finite, with a profile."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import TunesmithError
from cluster.run.manifest import verify_manifest
from tests.trainer.test_metrics import fake_tracker
from tests.trainer.tools import DEADLINE_SECONDS, num_steps_shown, trace, train_here, write_job
from trainer.checkpoint import checkpointer
from trainer.checkpoint.state import complete_checkpoints, newest_checkpoint, read_state
from trainer.monitoring import Diverged

NUM_STEPS = 6


@pytest.fixture
def run(tmp_path: Path, one_rank, chat_model: Path, chat_data: Path):
    """Make a run folder with these settings."""

    def make(name: str = "run", **train: object) -> Path:
        settings = {"global_batch_size": 2, "max_steps": NUM_STEPS, "tuning": "lora", **train}
        return write_job(tmp_path / name, chat_model, chat_data, **settings)

    return make


def steps_kept(folder: Path) -> list[int]:
    return [read_state(checkpoint).step for checkpoint in complete_checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_checkpoint_of_an_adapter_is_much_smaller_than_the_base(
    tmp_path: Path, one_rank, tokenizer, chat_data: Path, zero_stage: int
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"zero_stage": zero_stage, "tuning": "lora", "lora": {"rank": 1}, "max_steps": 2}
    folder = write_job(tmp_path / "run", tmp_path / "model", chat_data, **settings, checkpoint={"every_steps": 1})
    train_here(folder)
    num_bytes = sum(file["bytes"] for file in verify_manifest(newest_checkpoint(folder / "checkpoints"))["files"])
    assert num_bytes < (tmp_path / "model" / "model.safetensors").stat().st_size / 10
    shutil.rmtree(newest_checkpoint(folder / "checkpoints"))
    expected = trace(folder)
    assert train_here(folder)["status"] == "done"
    assert trace(folder) == expected


def test_training_continues_while_a_checkpoint_is_copied_and_the_next_save_waits(run, tmp_path, monkeypatch) -> None:
    local = tmp_path / "local"
    by_way = run(checkpoint={"every_steps": 2, "local_dir": str(local), "keep_last": 9})
    direct = run("direct", checkpoint={"every_steps": 2, "keep_last": 9})
    kept_at_copy = []

    def slow_copy(source: Path, target: Path) -> None:
        saved = int(target.name[-6:])
        deadline = time.monotonic() + DEADLINE_SECONDS
        while num_steps_shown(by_way) < min(saved + 1, NUM_STEPS):
            assert time.monotonic() < deadline, "training did not continue"
            time.sleep(0.01)
        kept_at_copy.append((saved, steps_kept(by_way)))
        shutil.copytree(source, target, dirs_exist_ok=True)
        shutil.rmtree(source)

    monkeypatch.setattr(checkpointer, "move_files", slow_copy)
    answers = [train_here(by_way), train_here(direct)]
    assert kept_at_copy == [(2, []), (4, [2]), (6, [2, 4])]
    assert trace(by_way) == trace(direct)
    for folder, other in zip(
        complete_checkpoints(by_way / "checkpoints"), complete_checkpoints(direct / "checkpoints"), strict=True
    ):
        names = [[file["name"] for file in verify_manifest(one)["files"]] for one in (folder, other)]
        assert names[0] == names[1]
        assert read_state(folder).train_loss == read_state(other).train_loss
    assert [Path(answer["checkpoint"]).name for answer in answers] == ["step_000006"] * 2
    assert not [path for path in local.rglob("*") if path.is_file()]
    assert not list((by_way / "checkpoints").glob(".*"))


def test_a_copy_that_fails_ends_training_at_the_next_step(run, tmp_path, monkeypatch) -> None:
    folder = run(checkpoint={"every_steps": 2, "local_dir": str(tmp_path / "local")})
    move_files = checkpointer.move_files

    def fail_on_the_second(source: Path, target: Path) -> None:
        if target.name.endswith("4"):
            raise OSError("the cable is out")
        move_files(source, target)

    monkeypatch.setattr(checkpointer, "move_files", fail_on_the_second)
    with pytest.raises(TunesmithError, match=r"could not be copied from .*local to .*: OSError: the cable is out"):
        train_here(folder)
    assert num_steps_shown(folder) in (4, 5)  # the copy may fail before or after the next step began
    assert steps_kept(folder) == [2]
    monkeypatch.undo()
    assert train_here(folder)["status"] == "done"
    assert steps_kept(folder) == [4, 6]


@pytest.mark.parametrize("by_way", [False, True])
def test_a_loss_that_is_not_finite_ends_training_and_the_previous_checkpoint_stays(run, tmp_path, by_way: bool) -> None:
    local = {"local_dir": str(tmp_path / "local")} if by_way else {}
    folder = run(learning_rate=1e30, warmup_ratio=0, tuning="full", checkpoint={"every_steps": 1, **local})
    with pytest.raises(
        Diverged, match=r"step 2: .* gradient norm (inf|nan).*documents \d+ \('<\|im_start\|>"
    ) as raised:
        train_here(folder)
    assert "learning_rate (" in str(raised.value)
    assert steps_kept(folder) == [1]
    verify_manifest(newest_checkpoint(folder / "checkpoints"))


def test_the_best_by_training_loss_is_kept(run) -> None:
    settings = {"every_steps": 1, "keep_last": 1, "keep_best": 2, "best": "train_loss"}
    folder = run(checkpoint=settings, learning_rate=0.05)
    train_here(folder)
    losses = {step: loss for step, (loss, _) in trace(folder).items()}
    best = sorted(losses, key=losses.get)[:2]
    assert set(steps_kept(folder)) == {NUM_STEPS, *best}
    for kept in complete_checkpoints(folder / "checkpoints"):
        assert read_state(kept).train_loss == losses[read_state(kept).step]


def test_a_profile_is_written_and_a_tracker_gets_the_figures(run, monkeypatch) -> None:
    calls: list = []
    monkeypatch.setitem(sys.modules, "trackio", fake_tracker("trackio", calls))
    folder = run(profile={"start_step": 2, "num_steps": 2}, report_to=["trackio"])
    train_here(folder)
    (file,) = (folder / "profile").iterdir()
    assert file.name == "steps-2-3.json"
    assert json.loads(file.read_text())["traceEvents"]
    assert [step for kind, step, *_ in calls[1:-1]] == list(range(1, NUM_STEPS + 1))
    assert calls[-1] == ("finish",)
    expected = {step: loss for step, (loss, _) in trace(folder).items()}
    assert {step: figures["train/loss"] for _, step, figures in calls[1:-1]} == expected


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(1, 64))
def test_ranks_without_a_saved_random_state_get_reproducible_seeds(seed: int, step: int, ranks: int) -> None:
    seeds = [checkpointer.new_rank_seed(seed, step, rank) for rank in range(ranks)]
    assert seeds == [checkpointer.new_rank_seed(seed, step, rank) for rank in range(ranks)]
    assert len({*seeds, checkpointer.new_rank_seed(seed, step + 1, 0)}) == ranks + 1
    torch.manual_seed(seeds[-1])
