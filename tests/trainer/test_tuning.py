"""Every way of tuning trains as plain PyTorch does, with each ZeRO stage, gradient checkpointing and packing it allows.

All jobs run in one torchrun of two ranks, where ZeRO-3 partitions even the smallest weight. A short run has every
way with each stage, and over the stages with each pair of the other two; a long one has all combinations.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from tests.trainer.test_exactness import TOLERANCE, assert_same_trace, assert_same_weights, reference_of
from tests.trainer.tools import DEADLINE_SECONDS, chat_documents, chosen, names_of, write_chats, write_job
from trainer.config.tuning import refusal

COMMON = {
    "adam_epsilon": 1e-3, "learning_rate": 1e-2, "weight_decay": 0.1, "warmup_ratio": 0.2, "max_grad_norm": 0.5,
    "micro_batch_size": 2, "global_batch_size": 4, "max_steps": 2,
}  # fmt: skip
LORA = {"rank": 4, "alpha": 16}
VARIANTS = {
    "full": {"tuning": "full"},
    "lora": {"tuning": "lora", "lora": LORA},
    "rslora": {"tuning": "lora", "lora": LORA | {"rslora": True}},
    "dora": {"tuning": "lora", "lora": LORA | {"dora": True}},
    "ia3": {"tuning": "ia3"},
    "prefix": {"tuning": "prefix", "prefix": {"num_virtual_tokens": 3}},
    "prompt": {"tuning": "prompt", "prompt": {"num_virtual_tokens": 5}},
    "prompt-text": {"tuning": "prompt", "prompt": {"num_virtual_tokens": 7, "init_text": "Say the words"}},
    "adapter": {"tuning": "adapter", "adapter": {"bottleneck_size": 6}},
}
ALIKE = ("rslora", "prompt-text")  # differ from their neighbor by a number or the start: two combinations will do
COMBINATIONS = list(itertools.product(range(4), (False, True), (False, True)))


def name_of(variant: str, zero_stage: int, checkpointing: bool, packing: bool) -> str:
    return f"{variant}-zero{zero_stage}{'-recomputed' * checkpointing}{'-packed' * packing}"


def settings_of(zero_stage: int, checkpointing: bool, packing: bool) -> dict:
    kind = "full" if checkpointing else "none"
    return {"zero_stage": zero_stage, "activation_checkpointing": kind, "packing": packing}


def jobs() -> tuple[dict[str, dict], set[str]]:
    """Settings by name, and the names of those for long runs."""
    found, long = {}, set()
    for (shift, (variant, settings)), combination in itertools.product(enumerate(VARIANTS.items()), COMBINATIONS):
        zero_stage, checkpointing, packing = combination
        if refusal(settings["tuning"], *combination) is not None:
            continue
        if variant in ALIKE and (zero_stage < 2 or checkpointing or packing):
            continue
        if variant == "full" and not checkpointing:
            continue  # test_exactness.py has them, with accumulation
        name = name_of(variant, *combination)
        found[name] = settings | settings_of(*combination)
        if variant not in ALIKE and (zero_stage + shift) % 4 != 2 * checkpointing + packing:
            long.add(name)
    return found, long


JOBS, LONG = jobs()


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory, chat_model: Path) -> dict[str, Path]:
    """Every job's run folder, after training on two ranks."""
    root = tmp_path_factory.mktemp("tuning")
    data = write_chats(root / "chats.jsonl", chat_documents(12))
    jobs = chosen(request, JOBS, LONG)
    runs = {name: write_job(root / name, chat_model, data, **COMMON | settings) for name, settings in jobs.items()}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    log = root / "output.txt"
    with open(log, "w") as output:
        code = subprocess.run(
            [*torchrun, "-m", "tests.trainer.tuning_worker", *map(str, runs.values())],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT,
            timeout=DEADLINE_SECONDS,
        ).returncode  # fmt: skip
    assert code == 0, log.read_text()[-4000:]
    return runs


def tuned_part(lm: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint should hold of `lm`, by name."""
    if isinstance(lm, PeftModel):
        return get_peft_model_state_dict(lm)
    return {name: parameter.detach() for name, parameter in lm.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", names_of(JOBS, LONG))
def test_every_way_of_tuning_trains_as_plain_pytorch_does(trained: dict[str, Path], name: str) -> None:
    expected, lm = reference_of(trained[name])
    assert len(expected) >= 2
    assert_same_trace(trained[name], expected, TOLERANCE)
    assert_same_weights(trained[name], tuned_part(lm))


@pytest.mark.parametrize("name", names_of(JOBS, LONG))
def test_nothing_but_what_is_tuned_changes(trained: dict[str, Path], chat_model: Path, name: str) -> None:
    from safetensors.torch import load_file

    noted = json.loads((trained[name] / "untouched.json").read_text())
    num_weights = 0 if JOBS[name]["tuning"] == "full" else len(load_file(chat_model / "model.safetensors"))
    assert noted == {"compared": num_weights, "changed": []}
