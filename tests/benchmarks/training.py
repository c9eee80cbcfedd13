"""Useful tokens per second of our trainer against TRL's `SFTTrainer` and bare PyTorch loops: `make bench-training`.

Same model, documents, precision and number of processes on every side; useful tokens are those of documents, not of
padding. The sides take turns, each under a torchrun of its own; the first steps of each are a warm-up and not counted.
All train on every token of a text (the published `text` form), so that no side's chat formatting is measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from trainer.data.batches import best_fit_decreasing

ROOT = Path(__file__).parents[2]
SIDES = ("ours", "bare packed", "bare padded", "trl packed", "trl padded")
MAX_SEQ_LEN = 2048
MEDIAN_TOKENS, SPREAD = 180, 0.9  # of the log-normal lengths: most are short, a few fill a row
NUM_PROCESSES = 2


def write_model(folder: Path) -> None:
    """A random Llama of 3.6 M parameters with the toy world's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "world-base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=MAX_SEQ_LEN, tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_texts(file: Path, model: Path, num_documents: int) -> list[int]:
    """Texts of log-normal length; returns how many tokens each has with the end of text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = [word for word in tokenizer.get_vocab() if word.startswith("Ġ") and word[1:].isalpha()]
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, num_documents).astype(int) + 2, MAX_SEQ_LEN - 1)
    texts = ["".join(rng.choice(words, length)).replace("Ġ", " ") for length in lengths]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]


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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        lengths = write_texts(folder / "texts.jsonl", folder / "model", arguments.documents)
        found: dict[str, list[float]] = {side: [] for side in arguments.sides}
        for turn in range(arguments.turns):
            for side in arguments.sides:
                print(f"turn {turn + 1}, {side}", file=sys.stderr, flush=True)
                found[side] += measure(side, folder, arguments)
    print_table(found, lengths)


def print_table(found: dict[str, list[float]], lengths: list[int]) -> None:
    table = Table(title=f"useful tokens/s, {NUM_PROCESSES} processes, float32: medians of steps", title_justify="left")
    for column in ("side", "median", "middle half", "of bare packed"):
        table.add_column(column, justify="left" if column == "side" else "right")
    bare = statistics.median(found["bare packed"]) if "bare packed" in found else None
    for side, rates in found.items():
        low, middle, high = statistics.quantiles(rates, n=4)
        table.add_row(side, f"{middle:,.0f}", f"{low:,.0f}-{high:,.0f}", f"{middle / bare:.3f}" if bare else "-")
    Console(width=100).print(table)
    rows = best_fit_decreasing(lengths, MAX_SEQ_LEN)
    used = sum(lengths) / (len(rows) * MAX_SEQ_LEN)
    print(f"packing: {sum(lengths):,} tokens in {len(rows)} rows of {MAX_SEQ_LEN}: {used:.4f} of the slots used")
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
