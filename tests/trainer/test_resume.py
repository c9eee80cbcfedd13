"""A training that was killed or stopped resumes bit for bit. Through the command line, on two ranks."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from cluster.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_RETRY, InputError, TunesmithError
from cluster.run.manifest import verify_manifest
from tests.trainer.tools import (
    DEADLINE_SECONDS,
    chat_documents,
    command,
    end_tree,
    num_steps_shown,
    start_command,
    trace,
    train_here,
    wait_until,
    weights,
    write_chats,
    write_job,
)
from trainer.checkpoint.state import complete_checkpoints, newest_checkpoint, read_state

EVERY_STEPS = 4
NUM_STEPS = 40
KILLED_AT = 10  # between two checkpoints
SETTINGS = {
    "tuning": "lora", "lora": {"rank": 4, "dropout": 0.2},  # dropout: the random state has to come back too
    "zero_stage": 2, "precision": "fp32", "learning_rate": 3e-3, "max_seq_len": 128, "num_processes": 2,
    "micro_batch_size": 1, "global_batch_size": 4, "num_epochs": 12, "max_steps": NUM_STEPS,
    "checkpoint": {"every_steps": EVERY_STEPS},
}  # fmt: skip


def write_recipe(folder: Path, model: Path, data: Path, **train: object) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = {"name": "resume", "model": {"path": str(model)}, "train": {"data": str(data), **SETTINGS, **train}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def stop_at_step(recipe: Path, run: Path, step: int, stop) -> int:
    """Start training, call `stop` with the process as soon as `step` is in metrics.jsonl, and return the exit code."""
    process = start_command("train", recipe, "--run-dir", run, cwd=recipe.parent)
    try:
        wait_until(lambda: num_steps_shown(run) >= step, process, f"step {step}")
        stop(process)
        return process.wait(DEADLINE_SECONDS)
    finally:
        end_tree(process)


def signal_until_ended(process) -> None:
    """Signal every rank until it has ended, also while it saves and while its interpreter exits."""
    os.kill(process.pid, signal.SIGTERM)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child)]
    assert len(ranks) == SETTINGS["num_processes"]
    for number in itertools.count():
        ranks = [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
        if not ranks:
            return
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal((signal.SIGUSR1, signal.SIGTERM)[number % 2])
        time.sleep(0.002)


def is_rank(process: psutil.Process) -> bool:
    return "trainer.train" in process.cmdline() and "LOCAL_RANK" in process.environ()


def assert_same(run: Path, expected: Path) -> None:
    assert trace(run) == trace(expected)
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key
    figures = [json.loads((folder / "result-train.json").read_text()) for folder in (run, expected)]
    for key in ("status", "step", "num_tokens", "num_trained_tokens", "final_loss"):
        assert figures[0][key] == figures[1][key], key


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, chat_model: Path, chat_data: Path) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(root, chat_model, chat_data)
    code, output = command("train", recipe, "--run-dir", root / "run", cwd=root)
    assert code == EXIT_DONE, output
    return root / "run"


@pytest.mark.long
@pytest.mark.parametrize("more", [{"local_dir": "local"}, {}])
def test_a_killed_training_resumes_bit_for_bit(
    tmp_path: Path, chat_model: Path, chat_data: Path, undisturbed, more: dict[str, str]
) -> None:
    """Killed between two checkpoints, then at a random instant of a training that saves after every step."""
    recipe, run = write_recipe(tmp_path, chat_model, chat_data), tmp_path / "run"
    stop_at_step(recipe, run, KILLED_AT, end_tree)
    local = {key: str(tmp_path / folder) for key, folder in more.items()}
    write_recipe(tmp_path, chat_model, chat_data, checkpoint={"every_steps": 1, **local})

    def kill(process) -> None:
        time.sleep(random.random() * 0.5)
        end_tree(process)

    stop_at_step(recipe, run, num_steps_shown(run) + 4, kill)
    for folder in complete_checkpoints(run / "checkpoints"):
        verify_manifest(folder)
    state = read_state(newest_checkpoint(run / "checkpoints"))
    assert EVERY_STEPS + 3 <= state.step < NUM_STEPS
    half = run / "checkpoints" / ".saving_step_000777"  # as if it had been killed while saving
    half.mkdir()
    (half / "state.json").write_text("{")
    code, output = command("train", recipe, "--run-dir", run, cwd=tmp_path)
    assert code == EXIT_DONE, output
    assert f"resuming from {run}/checkpoints/step_{state.step:06d}, step {state.step} of {NUM_STEPS}" in output
    assert_same(run, undisturbed)
    assert not half.exists()


def test_a_training_that_was_killed_and_then_stopped_resumes_bit_for_bit(
    tmp_path: Path, chat_model: Path, chat_data: Path, undisturbed
) -> None:
    """Killed between two checkpoints. When stopped, it saves a step for which no checkpoint was due."""
    recipe, run = write_recipe(tmp_path, chat_model, chat_data), tmp_path / "run"
    stop_at_step(recipe, run, KILLED_AT, end_tree)
    killed_at = num_steps_shown(run)
    saved = read_state(newest_checkpoint(run / "checkpoints")).step
    assert saved <= killed_at < NUM_STEPS
    write_recipe(tmp_path, chat_model, chat_data, checkpoint={"every_steps": 1000})
    code = stop_at_step(recipe, run, num_steps_shown(run) + 4, signal_until_ended)
    output = (tmp_path / "output.txt").read_text()
    assert code == EXIT_RETRY, output
    assert "The same command continues it" in output
    step = read_state(newest_checkpoint(run / "checkpoints")).step
    assert step == max(trace(run)) < NUM_STEPS
    assert json.loads((run / "result-train.json").read_text())["status"] == "preempted"
    code, output = command("train", recipe, "--run-dir", run, cwd=tmp_path)
    assert code == EXIT_DONE, output
    num_rows = len((run / "metrics.jsonl").read_text().splitlines())
    assert num_rows == NUM_STEPS + killed_at - saved, "only what the kill cost was done twice"
    assert_same(run, undisturbed)


@pytest.fixture
def unfinished(tmp_path: Path, one_rank, chat_model: Path, chat_data: Path) -> Path:
    """A run folder of one rank whose training is not finished."""
    run = write_job(tmp_path / "run", chat_model, chat_data, checkpoint={"every_steps": 2}, global_batch_size=2)

    class StopsInTime:
        @property
        def is_set(self) -> bool:
            return num_steps_shown(run) >= 3

    from trainer.job import read_job
    from trainer.train import train

    assert train(read_job(run), StopsInTime())["status"] == "preempted"
    assert read_state(newest_checkpoint(run / "checkpoints")).step == 3
    return run


def rewrite(run: Path, **changes: object) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for section, values in changes.items():
        recipe[section] = {**recipe[section], **values} if isinstance(values, dict) else values
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_every_file_of_a_checkpoint_is_checked_before_it_is_loaded(unfinished: Path) -> None:
    folder = newest_checkpoint(unfinished / "checkpoints")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) >= 5
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{file}: corrupt"):
            train_here(unfinished)
        file.write_bytes(content)
    assert train_here(unfinished)["status"] == "done"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"learning_rate": 0.5}}, r"train\.learning_rate \(was [0-9.]+, now 0\.5\)"),
        ({"train": {"packing": False}}, r"train\.packing \(was True, now False\)"),
        ({"seed": 1}, r"seed \(was 0, now 1\)"),
        ({"train": {"zero_stage": 3}}, r"train\.zero_stage \(was \d, now 3\)"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(unfinished: Path, changes: dict, named: str) -> None:
    rewrite(unfinished, **changes)
    with pytest.raises(
        InputError, match=rf"step_000003: saved by another job than this recipe's: {named}\. .*--run-dir"
    ):
        train_here(unfinished)


def test_a_checkpoint_of_other_data_is_refused(unfinished: Path, tmp_path: Path) -> None:
    other = write_chats(tmp_path / "other.jsonl", chat_documents(36, seed=1))
    rewrite(unfinished, train={"data": [str(other)]})
    with pytest.raises(InputError, match=r"saved by another job.*the encoded examples"):
        train_here(unfinished)


def test_a_checkpoint_of_another_base_model_is_refused(unfinished: Path, tmp_path: Path, chat_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(chat_model, tmp_path / "other-model")
    tensors = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    rewrite(unfinished, model={"path": str(other)})
    with pytest.raises(InputError, match=r"saved by another job.*: model \(was"):
        train_here(unfinished)


def test_a_batch_size_that_does_not_fit_the_new_number_of_ranks_is_refused(unfinished: Path) -> None:
    rewrite(unfinished, train={"micro_batch_size": 4})
    with pytest.raises(InputError, match=r"global_batch_size=2 .* 4 x 1 ranks.*step_000003 was saved by 1 ranks"):
        train_here(unfinished)


def test_saving_more_often_stays_the_same_job_and_older_checkpoints_are_removed(unfinished: Path) -> None:
    rewrite(unfinished, train={"checkpoint": {"every_steps": 1, "keep_last": 2}})
    last = train_here(unfinished)["step"]
    left = sorted(path.name for path in (unfinished / "checkpoints").glob("step_*"))
    assert left == [f"step_{last - 1:06d}", f"step_{last:06d}"]
    assert not list((unfinished / "checkpoints").glob(".saving_*"))


def test_training_does_not_start_over_if_deepspeed_loads_nothing(unfinished: Path, monkeypatch) -> None:
    from deepspeed import DeepSpeedEngine

    monkeypatch.setattr(DeepSpeedEngine, "load_checkpoint", lambda *_, **__: (None, None))
    with pytest.raises(TunesmithError, match="could not load this checkpoint"):
        train_here(unfinished)


@pytest.mark.long
def test_a_corrupt_checkpoint_ends_the_command_with_exit_code_2(
    tmp_path: Path, chat_model: Path, chat_data: Path, undisturbed: Path
) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    folder = newest_checkpoint(run / "checkpoints")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"finished": False}))
    recipe = write_recipe(tmp_path, chat_model, chat_data)
    code, output = command("train", recipe, "--run-dir", run, cwd=tmp_path)
    assert code == EXIT_BAD_INPUT, output
    assert output.count(f"error: {folder}/state.json: corrupt") == 1
    assert "Traceback" not in output


def test_changed_settings_end_the_command_with_exit_code_2_before_anything_starts(
    tmp_path: Path, chat_model: Path, chat_data: Path, undisturbed: Path
) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    recipe = write_recipe(tmp_path, chat_model, chat_data, learning_rate=0.5)
    before = (run / "recipe.yaml").read_text()
    code, output = command("train", recipe, "--run-dir", run, cwd=tmp_path)
    assert code == EXIT_BAD_INPUT
    assert "train.learning_rate (was 0.003, now 0.5)" in output
    assert (run / "recipe.yaml").read_text() == before
