"""Tokens per second, MFU and peak memory of packed training on one GPU: `python -m tests.gpu.throughput`.

Counts on torch, transformers, peft and pydantic, and on no DeepSpeed, network or weights: models are random, of a
published shape, and documents of log-normal length fill rows of up to 8,192 tokens. The model, its attention, loss,
adapters and recomputation are the trainer's own; around them is a plain loop of one process, so that figures are those
of a rank between its collectives. The full model is tuned as under ZeRO in bf16: float32 masters and moments.

Targets on one H200: 12,000 tokens/s for `8b-lora`, 45 % MFU for `3b-full`. With $OUT set, results go there too.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from cluster.config import ModelConfig
from trainer.config.train import TrainConfig
from trainer.data.batches import MicroBatch, best_fit_decreasing
from trainer.flops import model_flops, peak_flops
from trainer.model.adapters import adapt, is_decayed
from trainer.model.attention import flash_attention_kwargs
from trainer.model.choose_attention import choose_attention
from trainer.model.layers import configure_layers, uses_liger
from trainer.model.load import DTYPES, CausalLMWithLoss
from trainer.model.loss import loss_settings

NUM_WARM_UP = 3  # steps that are not counted; the first compile and choose kernels
MEDIAN_TOKENS, SPREAD = 400, 1.0  # of the log-normal lengths of documents
SHARE_TRAINED = 0.6  # of a document's tokens have a label: the answers
LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500_000.0,
}  # fmt: skip
LLAMA_3B = {
    "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "rope_theta": 500_000.0, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
LORA = {"tuning": "lora", "lora": {"rank": 16, "alpha": 32}}


@dataclass(frozen=True)
class Job:
    shape: dict
    train: dict
    target: str = ""


JOBS = {
    "8b-lora": Job(LLAMA_8B, {**LORA, "activation_checkpointing": "selective"}, "12,000 tokens/s"),
    "8b-lora-full-recomputation": Job(LLAMA_8B, {**LORA, "activation_checkpointing": "full"}),
    "3b-full": Job(LLAMA_3B, {"activation_checkpointing": "selective"}, "45 % MFU"),
    "3b-full-full-recomputation": Job(LLAMA_3B, {"activation_checkpointing": "full"}),
    "tiny-lora": Job(TINY, {**LORA, "activation_checkpointing": "selective", "precision": "fp32"}),
    "tiny-full": Job(TINY, {"activation_checkpointing": "full"}),
}
DEFAULT_JOBS = [name for name in JOBS if not name.startswith("tiny")]


@dataclass(frozen=True)
class Row:
    """One packed row."""

    batch: MicroBatch
    lengths: np.ndarray  # of its documents


def rows(vocab_size: int, max_seq_len: int) -> Iterator[Row]:
    """Rows without end, packed as the trainer packs them."""
    rng = np.random.default_rng(0)
    while True:
        lengths = np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, 1000).astype(int), 2, max_seq_len)
        for row in best_fit_decreasing(lengths.tolist(), max_seq_len)[:-10]:  # the last ones are not full
            chosen = lengths[row]
            positions = np.concatenate([np.arange(length) for length in chosen])
            ids = rng.integers(0, vocab_size, len(positions))
            answer = np.concatenate([np.arange(length) >= (1 - SHARE_TRAINED) * length for length in chosen])
            last = np.append(positions[1:] == 0, True)  # a document's last token predicts nothing
            labels = np.where(answer & ~last, np.roll(ids, -1), -100)
            yield Row(MicroBatch(*(torch.from_numpy(array)[None] for array in (ids, positions, labels))), chosen)


def make_module(job: Job, config: TrainConfig, device: torch.device) -> CausalLMWithLoss:
    """The model on its device, as `trainer.model.load.load_model` sets it up, but random."""
    settings = LlamaConfig(**job.shape, max_position_embeddings=config.max_seq_len)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(
            settings, dtype=DTYPES[config.precision], attn_implementation=config.attention
        )
    lm.config.use_cache = False
    configure_layers(lm, config)
    with tempfile.TemporaryDirectory() as nowhere, torch.device(device):
        adapted = adapt(lm, ModelConfig(path=nowhere), config, [])
    for parameter in adapted.parameters():  # peft makes adapters in float32, and DeepSpeed casts them
        parameter.data = parameter.data.to(DTYPES[config.precision])
    return CausalLMWithLoss(adapted, loss_settings(config)).to(device).train()


class MasterAdamW:
    """AdamW on float32 copies of the trained weights, which are written back to the model's own after each step."""

    def __init__(self, module: nn.Module, learning_rate: float):
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.weights = [parameter for _, parameter in named]
        self.masters = [parameter.detach().float().clone() for parameter in self.weights]
        decay = {True: 0.1, False: 0.0}
        groups = [
            {"params": [master], "weight_decay": decay[is_decayed(name, parameter)]}
            for (name, parameter), master in zip(named, self.masters, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)

    def step(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def step(module: CausalLMWithLoss, optimizer: MasterAdamW, batch: list[Row], device: torch.device) -> torch.Tensor:
    """One optimizer step over the rows. Returns the loss a label, without waiting for it."""
    num_trained_tokens = sum(row.batch.num_trained_tokens for row in batch)
    total = torch.zeros((), device=device)
    for row in batch:
        inputs: dict = dict(row.batch.inputs)
        if module.lm.config._attn_implementation.startswith(("flash", "varlen")):
            inputs |= flash_attention_kwargs(row.batch)
        on_device = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        loss = module(**on_device)
        (loss / num_trained_tokens).backward()
        total += loss.detach()
    optimizer.step()
    return total / num_trained_tokens


def measure(name: str, max_seq_len: int, arguments: argparse.Namespace, say: Callable[[str], None]) -> dict:
    job, on_gpu, rows_a_step = JOBS[name], torch.cuda.is_available(), arguments.rows
    device = torch.device("cuda" if on_gpu else "cpu")
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    settings = {"micro_batch_size": 1, "global_batch_size": rows_a_step, "max_seq_len": max_seq_len, "zero_stage": 1,
                "attention": arguments.attention}  # fmt: skip
    config = TrainConfig(**settings | job.train)
    with torch.device("meta"):
        config, _ = choose_attention(config, AutoModelForCausalLM.from_config(LlamaConfig(**job.shape)))
    torch.manual_seed(0)
    module = make_module(job, config, device)
    flops, peak = model_flops(module.lm), peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    optimizer, source = MasterAdamW(module, 1e-4), rows(job.shape["vocab_size"], max_seq_len)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rates, shares, losses = [], [], []
    for number in range(NUM_WARM_UP + arguments.steps):
        batch = list(itertools.islice(source, rows_a_step))
        wait()
        started = time.perf_counter()
        loss = step(module, optimizer, batch, device)
        wait()
        seconds = time.perf_counter() - started
        losses.append(float(loss))
        lengths = np.concatenate([row.lengths for row in batch])
        say(f"{name}: step {number + 1}, {lengths.sum() / seconds:,.0f} tokens/s, loss {losses[-1]:.3f}")
        if number >= NUM_WARM_UP:
            rates.append(float(lengths.sum() / seconds))
            labels = sum(row.batch.num_trained_tokens for row in batch)
            shares += [flops.count(lengths, labels) / seconds / peak] if peak else []
    if arguments.profile:
        with torch.profiler.profile() as profile:
            step(module, optimizer, batch, device)
            wait()
        say(profile.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60))
    return {
        "job": name, "device": torch.cuda.get_device_name() if on_gpu else "CPU", "attention": config.attention,
        "liger": uses_liger(config), "max_seq_len": max_seq_len, "rows_a_step": rows_a_step,
        "tokens_per_second": round(statistics.median(rates)), "slowest": round(min(rates)),
        "mfu": round(statistics.median(shares), 4) if shares else None, "target": job.target,
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "first_loss": losses[0], "last_loss": losses[-1], "torch": torch.__version__,
    }  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=DEFAULT_JOBS)
    parser.add_argument("--max-seq-len", type=int, nargs="+", default=[8192])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="rows a step, one to a forward pass")
    parser.add_argument("--attention", default="auto", help="train.attention")
    parser.add_argument("--profile", action="store_true", help="print the kernels that took most of one more step")
    arguments = parser.parse_args(words)
    found = []
    for name, max_seq_len in itertools.product(arguments.jobs, arguments.max_seq_len):
        try:
            result = measure(name, max_seq_len, arguments, lambda text: print(text, flush=True))
        except torch.cuda.OutOfMemoryError as error:
            result = {"job": name, "max_seq_len": max_seq_len, "error": str(error).splitlines()[0]}
        found.append(result)
        print(json.dumps(result), flush=True)
        torch.cuda.empty_cache()
        if folder := os.environ.get("OUT"):
            (Path(folder) / "throughput.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
