"""Training on several ranks gives the results of plain PyTorch in one process, for every ZeRO stage.

All jobs run in one torchrun of two ranks. The reference has no packing, accumulation or DeepSpeed: it feeds the
documents of a step one by one, and divides the sum of their token losses by the number of their labels.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.trainer.tools import (
    DEADLINE_SECONDS,
    chat_documents,
    chosen,
    names_of,
    torchrun,
    trace,
    weights,
    write_chats,
    write_job,
)
from trainer.data.batches import Batches
from trainer.data.chat import IGNORE
from trainer.data.mixture import held_out_documents
from trainer.data.tokens import load_tokens
from trainer.engine import learning_rate
from trainer.job import TrainJob, read_job
from trainer.model.load import load_model
from trainer.model.tokenizer import load_tokenizer

TOLERANCE = 1e-4  # relative; float32 sums in another order give about 1e-6
# A large epsilon keeps AdamW from turning rounding noise of near-zero gradients into whole steps.
COMMON = {
    "adam_epsilon": 1e-3, "learning_rate": 3e-3, "weight_decay": 0.1, "warmup_ratio": 0.2, "max_grad_norm": 0.5,
    "micro_batch_size": 2,
}  # fmt: skip
# Accumulated micro-batches -> rows a step (for two ranks with micro-batches of two rows), and epochs.
ACCUMULATION = {
    1: {"global_batch_size": 4, "num_epochs": 1},
    4: {"global_batch_size": 16, "num_epochs": 2},
}
FULL = {
    f"zero{stage}-{'packed' if packing else 'plain'}-accum{accum}": {"zero_stage": stage, "packing": packing, **rows}
    for stage in range(4) for packing in (True, False) for accum, rows in ACCUMULATION.items()
}  # fmt: skip
UNCLIPPED = {
    f"zero{stage}-unclipped": {"zero_stage": stage, "max_grad_norm": 0.0, **ACCUMULATION[4]} for stage in (0, 2, 3)
}
CHUNKS = {"loss_chunk_tokens": 48, **ACCUMULATION[4]}
CHUNKED = {f"zero{stage}-chunked": {"zero_stage": stage, **CHUNKS} for stage in (2, 3)}
HELD_OUT = {
    f"zero{stage}-held-out": {"zero_stage": stage, "validation": {"fraction": 0.25, "every_steps": 1}, **CHUNKS}
    for stage in (2, 3)
}  # fmt: skip
EXAMPLES = {
    f"zero{stage}-examples": {"zero_stage": stage, "batch_unit": "examples", "global_batch_size": 11, "num_epochs": 2}
    for stage in range(4)
}  # fmt: skip
CHECKPOINTED = {
    f"zero{stage}-{kind}": {"zero_stage": stage, "activation_checkpointing": kind, **ACCUMULATION[4]}
    for stage, kind in ((3, "full"), (2, "selective"))
}
OFFLOADED = {
    f"zero{stage}-offloaded-{what}": {"zero_stage": stage, "zero": zero, **ACCUMULATION[4]}
    for stage, what, zero in (
        (1, "optimizer", {"offload_optimizer": "cpu"}), (2, "optimizer", {"offload_optimizer": "cpu"}),
        (3, "all", {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    )
}  # fmt: skip
SHARED = {"sequence_parallel_size": 2, "packing": False, "global_batch_size": 8, "batch_unit": "examples"}
SEQUENCE = {f"zero{stage}-sequence": {"zero_stage": stage, **SHARED} for stage in range(4)}
BF16 = {f"bf16-zero{stage}": {"zero_stage": stage, "precision": "bf16", **ACCUMULATION[4]} for stage in (1, 2, 3)}
BF16["bf16-zero3-hpz"] = {"zero_stage": 3, "precision": "bf16", "zero": {"hpz_partition_size": 2}, **ACCUMULATION[4]}
COMPILED = {f"zero{stage}-compiled": {"zero_stage": stage, "compile": True, **ACCUMULATION[4]} for stage in (0, 2)}
# Short runs have every stage packed with accumulation, and plain without.
LONG = {f"zero{stage}-{rows}" for stage in range(4) for rows in ("packed-accum1", "plain-accum4")} | COMPILED.keys()
JOBS = FULL | UNCLIPPED | CHECKPOINTED | OFFLOADED | CHUNKED | HELD_OUT | EXAMPLES | BF16 | SEQUENCE | COMPILED


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory, chat_model: Path) -> dict[str, Path]:
    """Every job's run folder, after training on two ranks."""
    root = tmp_path_factory.mktemp("exact")
    data = write_chats(root / "chats.jsonl", chat_documents(37))
    jobs = chosen(request, JOBS, LONG)
    runs = {name: write_job(root / name, chat_model, data, **COMMON | settings) for name, settings in jobs.items()}
    command = [*torchrun(2, root), "tests.trainer.exact_worker", *map(str, runs.values())]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = root / "output.txt"
    with open(log, "w") as output:
        code = subprocess.run(
            command, env=environ, stdout=output, stderr=subprocess.STDOUT, timeout=DEADLINE_SECONDS
        ).returncode
    assert code == 0, log.read_text()[-4000:]
    return runs


def document_loss(lm: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of token losses of one document, alone in its batch, over the whole vocabulary and sequence.

    Logits of virtual tokens, which come before it where a prompt is tuned, are left out.
    """
    logits = lm(input_ids=ids[None], use_cache=False).logits[0].float()
    return F.cross_entropy(logits[-len(ids) :], labels, ignore_index=IGNORE, reduction="sum")


def reference(job: TrainJob) -> tuple[dict[int, tuple[float, float]], torch.nn.Module]:
    """Loss and gradient norm of every step, and the model afterwards, by a plain loop in this process."""
    config = job.config
    tokenizer, num_added = load_tokenizer(job.model, None)
    (cache,) = job.run.tokens.iterdir()
    tokens = load_tokens(cache)
    batches = Batches(tokens, config, job.seed, 0, 1)
    torch.manual_seed(job.seed)
    plain = config.model_copy(update={"attention": "sdpa", "compile": False})
    lm = load_model(job.model, plain, tokenizer, num_added).train()
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2 and config.tuning != "ia3"]  # IA3 trains factors, in any shape
    vectors = [p for p in trained if not any(p is matrix for matrix in matrices)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.betas, eps=config.adam_epsilon)
    found = {}
    for step in range(batches.num_steps):
        documents = [document for row in batches.rows_of_step(step) for document in row]
        spans = [slice(int(tokens.offsets[d]), int(tokens.offsets[d + 1])) for d in documents]
        num_trained_tokens = sum(int((tokens.labels[span] != IGNORE).sum()) for span in spans)
        total = 0.0
        for span in spans:
            ids, labels = (torch.tensor(array[span].astype("int64")) for array in (tokens.input_ids, tokens.labels))
            loss = document_loss(lm, ids, labels) / num_trained_tokens
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, batches.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        found[step + 1] = (total, float(norm))
    return found, lm


_references: dict[str, tuple] = {}


def reference_of(run: Path) -> tuple[dict[int, tuple[float, float]], torch.nn.Module]:
    """The reference of a job. Jobs with the same reference share it."""
    job = read_job(run)
    irrelevant = {
        "zero_stage", "zero", "activation_checkpointing", "precision", "sequence_parallel_size", "loss_chunk_tokens",
        "compile",
    }  # fmt: skip
    key = job.config.model_dump_json(exclude=irrelevant)
    if key not in _references:
        _references[key] = reference(job)
    return _references[key]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_same_weights(run: Path, wanted: dict[str, torch.Tensor]) -> None:
    """The newest checkpoint holds exactly these tensors."""
    found = weights(run)
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert relative(tensor, wanted[key].detach()) < TOLERANCE, key


def assert_same_trace(run: Path, expected: dict[int, tuple[float, float]], tolerance: float) -> None:
    found = trace(run)
    assert found.keys() == expected.keys()
    for step, (loss, norm) in expected.items():
        assert found[step][0] == pytest.approx(loss, rel=tolerance), f"loss of step {step}"
        assert found[step][1] == pytest.approx(norm, rel=tolerance), f"gradient norm of step {step}"


@pytest.mark.parametrize("name", names_of({name: job for name, job in JOBS.items() if name not in BF16}, LONG))
def test_two_ranks_train_like_plain_pytorch(trained: dict[str, Path], name: str) -> None:
    expected, lm = reference_of(trained[name])
    assert_same_trace(trained[name], expected, TOLERANCE)
    assert_same_weights(trained[name], dict(lm.named_parameters()))


def test_the_jobs_cover_the_hard_cases(trained: dict[str, Path]) -> None:
    """Unequal numbers of labels per rank, micro-batches that are all padding, and gradients that are clipped."""
    for name in FULL.keys() & trained.keys():
        job = read_job(trained[name])
        (cache,) = job.run.tokens.iterdir()
        ranks = [Batches(load_tokens(cache), job.config, job.seed, rank, 2) for rank in range(2)]
        labels = [[b.num_trained_tokens for b in rank.micro_batches(ranks[0].steps_per_epoch - 1)] for rank in ranks]
        assert sum(labels[0]) != sum(labels[1])
        if job.config.global_batch_size == 16:
            assert 0 in labels[1], name
        assert any(norm > job.config.max_grad_norm for _, norm in trace(trained[name]).values())


@pytest.mark.parametrize("name", HELD_OUT)
def test_two_ranks_validate_like_plain_pytorch(trained: dict[str, Path], name: str) -> None:
    """The number of labels differs between ranks and micro-batches, and one rank has one row less."""
    _, lm = reference_of(trained[name])
    job = read_job(trained[name])
    (cache,) = job.run.tokens.iterdir()
    tokens = load_tokens(cache)
    total, num_trained_tokens = 0.0, 0
    with torch.no_grad():
        for document in held_out_documents(tokens, job.config, job.seed):
            span = tokens.span(document)
            ids, labels = (torch.tensor(array[span].astype("int64")) for array in (tokens.input_ids, tokens.labels))
            total += float(document_loss(lm, ids, labels))
            num_trained_tokens += int((labels != IGNORE).sum())
    result = json.loads((job.run.root / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["stage"] == "validation"
    assert result["loss"] == pytest.approx(total / num_trained_tokens, rel=TOLERANCE)


def test_steps_counted_in_examples_take_as_many_passes_as_their_rows_need(trained: dict[str, Path]) -> None:
    job = read_job(trained["zero2-examples"])
    (cache,) = job.run.tokens.iterdir()
    batches = Batches(load_tokens(cache), job.config, job.seed, 0, 2)
    steps = range(batches.num_steps)
    assert {len(batches.micro_batches(step)) for step in steps} > {1}
    assert sorted({sum(map(len, batches.rows_of_step(step))) for step in steps}) == [4, 11]


@pytest.mark.parametrize("name", BF16)
def test_bf16_stays_near_float32(trained: dict[str, Path], name: str) -> None:
    """Weights are rounded to 8 bits. Beyond that they may differ by a fifth of what training changed."""
    expected, lm = reference_of(trained[name])
    assert_same_trace(trained[name], expected, 0.03)
    for key, start in load_file(read_job(trained[name]).model.path + "/model.safetensors").items():
        found, wanted = weights(trained[name])[key], lm.get_parameter(key).detach()
        assert found.dtype == torch.bfloat16
        moved = float((wanted - start).norm() / wanted.norm())
        assert relative(found, wanted) < 2**-8 + 0.2 * moved, key
