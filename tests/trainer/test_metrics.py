"""The loss monitor, the watchdog, MFU, trackers, and logging of a step after the next one was started."""

import json
import math
import random
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError

from cluster.run.rundir import RunDir
from tests.trainer.tools import DEADLINE_SECONDS
from trainer.checkpoint.state import TrainState
from trainer.config.train import TrainConfig, WatchConfig
from trainer.coordinator import AgreedStep
from trainer.flops import ModelFlops, Utilization, model_flops, peak_flops
from trainer.metrics import StepLogger, open_trackers
from trainer.monitoring import Diverged, LossMonitor, Watchdog

FINITE = st.floats(-100, 100)
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.integers(0, 10**6), st.one_of(st.tuples(FINITE, NOT_FINITE), st.tuples(NOT_FINITE, FINITE)))
def test_a_figure_that_is_not_finite_ends_the_run_and_names_step_and_data(step: int, figures: tuple) -> None:
    monitor = LossMonitor(WatchConfig(), lambda step: f"the rows of {step}")
    with pytest.raises(Diverged, match=rf"step {step}: .*train\.learning_rate \(1\.00e-03.*the rows of {step}$"):
        monitor.check(step, *figures, lr=1e-3)


@given(st.integers(2, 30), st.floats(1, 10), st.integers(0, 100))
def test_a_jump_is_a_warning_once_the_window_is_full(window: int, num_std: float, seed: int) -> None:
    rng = random.Random(seed)
    losses = [2 + rng.random() for _ in range(window)]
    limit = np.mean(losses) + num_std * max(np.std(losses, ddof=1), 0.01 * np.mean(losses))

    def check_after(losses: list[float], loss: float) -> str | None:
        monitor = LossMonitor(WatchConfig(spike_window=window, spike_std=num_std), str)
        monitor.recent_losses.extend(losses)
        return monitor.check(99, loss, 1.0, 1e-3)

    assert check_after(losses, limit - 1e-6) is None
    assert "step 99: the loss jumped" in check_after(losses, limit + 1e-6)
    assert check_after(losses[1:], 1e9) is None


def test_a_rank_that_hangs_prints_its_location_and_stacks_once(tmp_path: Path) -> None:
    with open(tmp_path / "output", "w+") as output, Watchdog(0.1, rank=3, output=output) as watchdog:
        watchdog.set_location("step 7, saving")

        def hang() -> None:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while "in hang" not in (tmp_path / "output").read_text() and time.monotonic() < deadline:
                time.sleep(0.01)

        hanging = threading.Thread(target=hang)
        hanging.start()
        hanging.join()
        printed = (tmp_path / "output").read_text()
        assert "[train] rank 3 has been at step 7, saving for" in printed
        assert "in hang" in printed
        time.sleep(0.3)
        assert (tmp_path / "output").read_text().count("rank 3") == 1, "once for each location"


def test_a_rank_that_moves_on_prints_nothing(tmp_path: Path) -> None:
    with open(tmp_path / "output", "w+") as output, Watchdog(60, rank=0, output=output) as watchdog:
        for step in range(100):
            watchdog.set_location(f"step {step}")
    assert (tmp_path / "output").read_text() == ""


def llama(**settings: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**settings))


def llama_8b():
    """Llama-3.1-8B's shape, without its values."""
    return llama(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize(("length", "expected"), [(8192, 0.338), (1024, 0.301)])
def test_mfu_of_an_8b_model_follows_the_convention(length: int, expected: float) -> None:
    """6,500 tokens per second on one H100, all with a label."""
    flops_per_token = model_flops(llama_8b()).count(np.array([length]), length) / length
    assert flops_per_token * 6500 / peak_flops("NVIDIA H100 80GB HBM3") == pytest.approx(expected, abs=5e-4)


def test_frozen_weights_count_two_thirds_and_tied_ones_once() -> None:
    shape = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    untied, tied = (llama(**shape, tie_word_embeddings=tied) for tied in (False, True))
    assert model_flops(untied) == model_flops(tied)
    whole = model_flops(untied)
    untied.requires_grad_(False)
    frozen = model_flops(untied)
    assert (frozen.body, frozen.head) == (whole.body * 4 / 6, whole.head * 4 / 6)
    assert frozen.attention == whole.attention
    adapted = get_peft_model(tied, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    adapters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert adapters > 0
    assert model_flops(adapted) == ModelFlops(frozen.body + 6 * adapters, frozen.head, frozen.attention)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(0, 8))
def test_packing_adds_no_attention_and_one_document_costs_more_than_its_parts(parts: list[int], at: int) -> None:
    flops = ModelFlops(body=5.0, head=3.0, attention=2.0)
    at = min(at, len(parts))
    apart = flops.count(np.array(parts), 3)
    split = flops.count(np.array(parts[:at]), 1) + flops.count(np.array(parts[at:]), 2)
    assert split == pytest.approx(apart)
    assert flops.count(np.array([sum(parts)]), 3) >= apart


def test_without_a_known_gpu_there_is_no_mfu() -> None:
    assert peak_flops("") is None
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200")
    if not torch.cuda.is_available():
        assert Utilization(torch.nn.Identity(), 1).of_step(np.array([10]), 10, 1.0) is None


def fake_tracker(name: str, calls: list) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.init = lambda **settings: calls.append(("init", settings))
    module.log = lambda figures, step: calls.append(("log", step, figures))
    module.finish = lambda: calls.append(("finish",))
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_figures_go_to_the_trackers_of_the_recipe(tmp_path: Path, monkeypatch, name: str) -> None:
    calls: list = []
    monkeypatch.setitem(sys.modules, name, fake_tracker(name, calls))
    assert TrainConfig(report_to=[name]).report_to == (name,)
    with open_trackers([name], RunDir(tmp_path), {"learning_rate": 1.0}) as report:
        report(3, {"loss": 2.0})
    (_, settings), logged, end = calls
    assert settings["config"] == {"learning_rate": 1.0}
    assert settings["resume"] == "allow"
    assert logged == ("log", 3, {"train/loss": 2.0})
    assert end == ("finish",)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_at_once(monkeypatch, name: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValidationError, match=rf"{name} is not installed.*pip install {name}"):
        TrainConfig(report_to=[name])


def test_a_hang_is_reported_before_the_process_group_times_out() -> None:
    assert TrainConfig().stall_timeout_seconds < TrainConfig().process_group_timeout_seconds
    assert TrainConfig(process_group_timeout_seconds=30).stall_timeout_seconds == 15
    with pytest.raises(ValidationError, match="would end the ranks first"):
        TrainConfig(process_group_timeout_seconds=30, watch={"stall_timeout_seconds": 30})


def make_logger(run: RunDir, is_lazy: bool, sent: list) -> StepLogger:
    monitor = LossMonitor(WatchConfig(), lambda step: f"rows of {step}")
    report = lambda step, figures: sent.append((step, figures["loss"]))  # noqa: E731
    logger = StepLogger(run, 9, 0, True, monitor, Utilization(torch.nn.Identity(), 1), report)
    logger.is_lazy = is_lazy
    return logger


def log_step(logger: StepLogger, number: int, loss: float) -> None:
    state = TrainState(number, number, number * 10, number * 4, 1, "job")
    step = AgreedStep([], num_rows=1, num_trained_tokens=4, document_lengths=np.array([6, 4]), should_stop=False)
    logger.log_step(step, state, torch.tensor(loss * 4), torch.tensor(1.0), 1e-3)


@pytest.mark.parametrize("is_lazy", [False, True])
def test_steps_are_logged_in_order_and_lazily_one_later(tmp_path: Path, capsys, is_lazy: bool) -> None:
    sent: list = []
    logger = make_logger(RunDir(tmp_path), is_lazy, sent)
    for number in (1, 2, 3):
        log_step(logger, number, loss=float(number))
        assert len(sent) == number - is_lazy
    logger.flush()
    assert sent == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert logger.take_mean_loss() == 2.0
    assert logger.take_mean_loss() is None
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["memory_gib"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert [shown.index(f"step {number}/9 | loss {number}.0000") for number in (1, 2, 3)] == sorted(
        shown.index(f"step {number}/9") for number in (1, 2, 3)
    )
    assert "GiB" in shown and " left" in shown


@pytest.mark.parametrize("is_lazy", [False, True])
def test_a_loss_that_is_not_finite_is_reported_for_its_own_step(tmp_path: Path, is_lazy: bool) -> None:
    logger = make_logger(RunDir(tmp_path), is_lazy, [])
    with pytest.raises(Diverged, match=r"step 2: .* rows of 2"):
        for number, loss in enumerate((1.0, math.nan, 1.0), 1):
            log_step(logger, number, loss)
