"""The memory estimate of a job matches its measured memory, and the chosen stage follows from the estimate."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from cluster.files import GIB
from tests.trainer.tools import (
    DEADLINE_SECONDS,
    chat_documents,
    chosen,
    names_of,
    save_llama,
    torchrun,
    train_here,
    write_chats,
    write_job,
)
from trainer.config.train import TrainConfig
from trainer.config.zero import ZeroConfig
from trainer.job import read_job
from trainer.memory import RESERVED_BYTES, USABLE_FRACTION, ModelFacts, choose_stage, estimate, read_facts

SMALL_BUCKETS = {"reduce_bucket_size": 100_000, "max_live_parameters": 200_000}
MEASURED = {
    "float32, ZeRO-1": {"zero_stage": 1}, "float32, ZeRO-3": {"zero_stage": 3},
    "bf16, ZeRO-1": {"zero_stage": 1, "precision": "bf16"}, "bf16, ZeRO-2": {"zero_stage": 2, "precision": "bf16"},
    "loss in chunks": {"zero_stage": 1, "loss_chunk_tokens": 64},
}  # fmt: skip
LONG = ("float32, ZeRO-1", "float32, ZeRO-3", "bf16, ZeRO-1", "loss in chunks")


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory, tokenizer) -> dict[str, tuple[dict, Path]]:
    """For every job: the measured bytes of the first of its two ranks, and its run folder."""
    root = tmp_path_factory.mktemp("memory")
    sizes = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    model = save_llama(root / "model", tokenizer, tied=False, **sizes)
    data = write_chats(root / "chats.jsonl", chat_documents(60))
    common = {"micro_batch_size": 2, "global_batch_size": 8, "max_seq_len": 256, "zero": SMALL_BUCKETS}
    jobs = chosen(request, MEASURED, LONG)
    runs = [write_job(root / name, model, data, **common, **settings) for name, settings in jobs.items()]
    command = [*torchrun(2, root), "tests.trainer.memory_worker", root / "measured.json", *runs]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environ, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((root / "measured.json").read_text())
    return {run.name: (found[run.name], run) for run in runs}


@pytest.mark.parametrize("name", names_of(MEASURED, LONG))
def test_the_estimate_matches_the_measurement(measured: dict, name: str) -> None:
    found, run = measured[name]
    job = read_job(run)
    expected = estimate(read_facts(job.model, job.config), job.config, job.config.zero_stage, world_size=2)
    assert found["states"] == pytest.approx(expected.states, rel=0.03), (found, expected)


FACTS = ModelFacts(
    num_parameters=8_030_261_248, num_trained=8_030_261_248, num_persistent=0, num_largest=525_336_576,
    num_layers=32, hidden_size=4096, intermediate_size=14336,
    num_heads=32, num_kv_heads=8, head_size=128, vocab_size=128_256,
)  # fmt: skip


def config_of(**settings: object) -> TrainConfig:
    return TrainConfig(**{"micro_batch_size": 1, "global_batch_size": 128, "max_seq_len": 4096, **settings})


def test_the_estimate_of_an_8b_model_matches_the_arithmetic() -> None:
    """bf16 weights 16 GB; float32 masters and moments 96 GB; float32 gradients 32 GB, and 16 GB in bf16 on stage 1."""
    billion = 8.030261248
    for stage, states in ((1, 2 + 6 + 12 / 8), (2, 2 + 4 / 8 + 12 / 8), (3, 2 / 8 + 4 / 8 + 12 / 8)):
        found = estimate(FACTS, config_of(), stage, world_size=8)
        assert found.states / 1e9 == pytest.approx(states * billion, rel=1e-6)


@given(stage=st.integers(1, 2), ranks=st.integers(1, 512), precision=st.sampled_from(["bf16", "fp32"]))
def test_more_ranks_and_higher_stages_never_take_more(stage: int, ranks: int, precision: str) -> None:
    config = config_of(precision=precision)
    here = estimate(FACTS, config, stage, ranks)
    assert estimate(FACTS, config, stage, ranks * 2).states < here.states
    assert estimate(FACTS, config, stage + 1, ranks).states <= here.states


@given(stage=st.sampled_from([1, 2, 3]), ranks=st.sampled_from([1, 2, 8, 64]))
def test_offloading_and_recomputing_never_take_more(stage: int, ranks: int) -> None:
    plain = estimate(FACTS, config_of(), stage, ranks)
    offloaded = estimate(FACTS, config_of(zero={"offload_optimizer": "cpu"}), stage, ranks)
    assert offloaded.total < plain.total
    assert offloaded.host > 0 == plain.host
    totals = [
        estimate(FACTS, config_of(activation_checkpointing=kind), stage, ranks).total
        for kind in ("none", "selective", "full")
    ]
    assert sorted(totals, reverse=True) == totals


@given(usable=st.integers(20 * GIB, 200 * GIB), ranks=st.sampled_from([4, 8, 16]))
def test_auto_is_the_lowest_stage_that_fits(usable: int, ranks: int) -> None:
    totals = {stage: estimate(FACTS, config_of(), stage, ranks).total for stage in (1, 2, 3)}
    fitting = [stage for stage, total in totals.items() if total <= usable]
    if fitting:
        assert choose_stage(FACTS, config_of(), ranks, usable).stage == min(fitting)
    else:
        with pytest.raises(InputError, match="no stage fits"):
            choose_stage(FACTS, config_of(), ranks, usable)


@given(usable=st.integers(4 * GIB, 200 * GIB), ranks=st.sampled_from([1, 2, 8, 16]), stage=st.sampled_from([1, 2, 3]))
def test_the_proposed_settings_fit(usable: int, ranks: int, stage: int) -> None:
    """An error ends with settings. With these the job fits into the same memory."""
    config = config_of(zero_stage=stage, micro_batch_size=4)
    try:
        chosen = choose_stage(FACTS, config, ranks, usable)
        assert chosen.stage == stage
        assert chosen.states <= usable
        return
    except InputError as error:
        message = str(error)
    assert f"train.zero_stage={stage} cannot hold this model" in message
    assert estimate(FACTS, config, stage, ranks).states > usable
    proposal = message.partition("usable. ")[2]
    if not proposal.startswith("Set "):
        assert proposal.startswith("Use more ranks")
        return
    values = dict(setting.removeprefix("train.").split("=") for setting in proposal[4:-1].split(", "))
    offload = {key.removeprefix("zero."): values.pop(key) for key in list(values) if key.startswith("zero.")}
    changed = config.model_dump() | values | {"zero": ZeroConfig(**offload)}
    changed["micro_batch_size"] = int(changed["micro_batch_size"])
    assert choose_stage(FACTS, TrainConfig(**changed), ranks, usable).total <= usable


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tuning": "lora", "lora": {"rank": 3}},
        {"tuning": "lora", "lora": {"target_modules": ["q_proj"]}},
        {"tuning": "lora", "lora": {"rank": 3, "dora": True}},
        {"tuning": "ia3"},
        {"tuning": "adapter", "adapter": {"bottleneck_size": 5}},
        {"tuning": "prefix", "packing": False},
        {"tuning": "prompt", "packing": False},
    ],
)
def test_facts_equal_those_of_the_loaded_model(tmp_path: Path, tokenizer, tied: bool, settings: dict) -> None:
    from trainer.model.load import load_model
    from trainer.model.tokenizer import load_tokenizer
    from trainer.resolve import with_choices

    job = read_job(write_job(tmp_path / "run", save_llama(tmp_path / "model", tokenizer, tied=tied), None, **settings))
    config = with_choices(job.config, zero_stage=0, attention="sdpa")
    lm = load_model(job.model, config, *load_tokenizer(job.model, None))
    facts = read_facts(job.model, config)
    trained = sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)
    adapters = trained if settings else 0
    assert facts.num_trained == trained
    assert facts.num_parameters == sum(parameter.numel() for parameter in lm.parameters()) - adapters


def test_a_job_too_large_for_the_memory_is_refused_before_it_starts(
    one_rank: None, tmp_path: Path, chat_model: Path, chat_data: Path
) -> None:
    tiny = RESERVED_BYTES / USABLE_FRACTION / GIB + 1e-5
    run = write_job(tmp_path / "run", chat_model, chat_data, gpu_memory_gib=tiny, zero_stage=2)
    with pytest.raises(InputError, match=r"train\.zero_stage=2 cannot hold this model: each rank needs .*weights"):
        train_here(run)
    assert not (run / "tokens").exists()


def test_a_resumed_job_keeps_its_stage(one_rank: None, tmp_path: Path, chat_model: Path, chat_data: Path) -> None:
    """Its checkpoints are of that stage, so the memory that is free now does not matter."""
    settings = {"max_steps": 2, "checkpoint": {"every_steps": 1}, "precision": "fp32"}
    run = write_job(tmp_path / "run", chat_model, chat_data, **settings)
    train_here(run)
    choice = json.loads((run / "zero.json").read_text())
    assert choice["zero_stage"] == 0
    (run / "zero.json").write_text(json.dumps(choice | {"zero_stage": 2}))
    with pytest.raises(InputError, match=r"saved by another job.*train\.zero_stage"):
        train_here(run)  # it believes that it was 2, and not what it would choose now
