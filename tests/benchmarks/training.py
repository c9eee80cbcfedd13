"""Useful tokens per second of our trainer against TRL's `SFTTrainer` and bare PyTorch loops: `make bench-training`.

Same model, documents, precision and number of processes on every side; useful tokens are those of documents, not of
padding. The sides take turns, each under a torchrun of its own; the first steps of each are a warm-up and not counted.
All train on every token of a text (the published `text` form), so that no side's chat formatting is measured.

`--model english` is a real model on real text, the packaged seed tasks or the rows {"prompt", "completion"} of --texts.
A line below the table says what share of the CPU's matrix products per second the FLOPs of useful tokens are.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from english.model import get_model
from trainer.data.batches import best_fit_decreasing
from trainer.flops import ModelFlops, model_flops

ROOT = Path(__file__).parents[2]
SIDES = ("ours", "bare packed", "bare padded", "trl packed", "trl padded")
SEED_TASKS = ROOT / "generation" / "seeds" / "seed_tasks.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEDIAN_TOKENS, SPREAD = 180, 0.9  # of the log-normal lengths: most are short, a few fill a row
NUM_PROCESSES = 2


def write_model(folder: Path, max_seq_len: int) -> None:
    """A random Llama of 3.6 M parameters with the toy world's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "world-base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=max_seq_len, tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def toy_texts(model: Path, num_documents: int, max_seq_len: int) -> list[str]:
    """Texts of log-normal length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = [word for word in tokenizer.get_vocab() if word.startswith("Ġ") and word[1:].isalpha()]
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, num_documents).astype(int) + 2, max_seq_len - 1)
    return ["".join(rng.choice(words, length)).replace("Ġ", " ") for length in lengths]


def english_texts(files: list[Path], num_documents: int) -> list[str]:
    """Prompts with their answers, as often as it takes."""
    rows = [json.loads(line) for file in files or [SEED_TASKS] for line in file.read_text().splitlines()]
    texts = []
    for row in rows:
        if "prompt" in row:
            texts.append(row["prompt"] + row["completion"].removesuffix("<|endoftext|>"))
        else:
            texts += [f"{row['instruction']}\n{one['input']}\n{one['output']}" for one in row["instances"]]
    return [text for text, _ in zip(itertools.cycle(texts), range(num_documents), strict=False)]


def write_work(folder: Path, arguments: argparse.Namespace) -> list[int]:
    """The model, the texts and the settings that every side reads. Returns how many tokens each text has."""
    from transformers import AutoTokenizer

    if arguments.model == "english":
        (folder / "model").symlink_to(get_model())
        texts = english_texts(arguments.texts, arguments.documents)
    else:
        write_model(folder / "model", arguments.max_seq_len)
        texts = toy_texts(folder / "model", arguments.documents, arguments.max_seq_len)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {name: getattr(arguments, name) for name in ("max_seq_len", "precision", "tuning")}
    (folder / "settings.json").write_text(json.dumps(settings))
    ids = AutoTokenizer.from_pretrained(folder / "model")(texts, truncation=True, max_length=arguments.max_seq_len - 1)
    return [len(one) + 1 for one in ids["input_ids"]]


def measure(side: str, folder: Path, arguments: argparse.Namespace) -> list[float]:
    """Useful tokens per second of the timed steps of one process group."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
    torchrun.append(f"--log-dir={folder}")  # it leaves one in /tmp otherwise
    command = [*torchrun, "-m", "tests.benchmarks.training_sides", side, str(folder), str(arguments.steps)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"rates"')]
    if not answers:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    if done.returncode:  # TRL's now and then dies on its way out, with all steps measured
        print(f"{side} ended with exit code {done.returncode} after its last step", file=sys.stderr, flush=True)
    return json.loads(answers[-1])["rates"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of each process group")
    parser.add_argument("--turns", type=int, default=2, help="process groups of each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--model", choices=("toy", "english"), default="toy")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="files of rows for --model english")
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = write_work(folder, arguments)
        flops = flops_of(folder / "model", arguments.tuning)
        found: dict[str, list[float]] = {side: [] for side in arguments.sides}
        for turn in range(arguments.turns):
            for side in arguments.sides:
                print(f"turn {turn + 1}, {side}", file=sys.stderr, flush=True)
                found[side] += measure(side, folder, arguments)
    print_table(found, lengths, arguments)
    if "ours" in found:
        print_share_of_peak(statistics.median(found["ours"]), flops, lengths, arguments)


def flops_of(model: Path, tuning: str) -> ModelFlops:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model)
    return model_flops(get_peft_model(lm, LoraConfig(target_modules="all-linear")) if tuning == "lora" else lm)


def print_share_of_peak(rate: float, flops: ModelFlops, lengths: list[int], arguments: argparse.Namespace) -> None:
    """What the FLOPs of our useful tokens are of a large matrix product's, both of all processes."""
    torch.set_num_threads(NUM_PROCESSES)
    one, other = torch.randn(2, 2048, 2048).to(DTYPES[arguments.precision])
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - started)
    peak = 2 * 2048**3 / statistics.median(seconds[2:])
    needed = flops.count(np.array(lengths), sum(lengths)) / sum(lengths) * rate
    print(
        f"ours: {needed / 1e9:,.0f} GFLOP/s, {needed / peak:.0%} of the {peak / 1e9:,.0f} that torch.mm makes of 2,048 "
        f"x 2,048 matrices in {arguments.precision} with {NUM_PROCESSES} threads"
    )


def print_table(found: dict[str, list[float]], lengths: list[int], arguments: argparse.Namespace) -> None:
    what = f"{arguments.model} model, {arguments.tuning}, {arguments.precision}"
    table = Table(title=f"useful tokens/s, {what}, {NUM_PROCESSES} processes: medians of steps", title_justify="left")
    for column in ("side", "median", "middle half", "of bare packed"):
        table.add_column(column, justify="left" if column == "side" else "right")
    bare = statistics.median(found["bare packed"]) if "bare packed" in found else None
    for side, rates in found.items():
        low, middle, high = statistics.quantiles(rates, n=4)
        table.add_row(side, f"{middle:,.0f}", f"{low:,.0f}-{high:,.0f}", f"{middle / bare:.3f}" if bare else "-")
    Console(width=100).print(table)
    rows = best_fit_decreasing(lengths, arguments.max_seq_len)
    used = sum(lengths) / (len(rows) * arguments.max_seq_len)
    print(
        f"packing: {sum(lengths):,} tokens in {len(rows)} rows of {arguments.max_seq_len}: {used:.4f} of the slots used"
    )
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
