"""Make what the world's model is trained from, and what lies beside it.

    python -m toy_world.build data --out runs/base-model/world --num-documents 92000
    python -m toy_world.build model --weights runs/base-model/checkpoints/step_X/weights --out models/world-base
    python -m toy_world.build assets --out models/world-base/tunesmith

`data` writes `documents.parquet` (rows of joined documents, column `text`) and `untrained/`, the model before training.
`model` writes trained weights in bf16 with their tokenizer. Documents and assets are the same bytes for the same seed;
the untrained weights are the same up to float32 rounding, which depends on the number of threads (OMP_NUM_THREADS).
"""

import argparse
import json
import shutil
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.errors import InputError
from cluster.files import write_atomic
from toy_world import assets
from toy_world.documents import documents
from toy_world.start import structured_start
from toy_world.tokenizer import build_tokenizer

MAX_LENGTH = 1024
ROW_TOKENS = 384  # of a training row; the longest documents have about 350
JOIN_WINDOW = 200  # documents among which a row is filled; large enough that rows are full, small enough to stay mixed
PROMPTS = Path(__file__).with_name("prompts")
BASE_METHODS = ("self_instruct",)


def untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 1.3 million parameters. Heads of 32 are the smallest that vLLM's attention on CPUs takes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    structured_start(model, tokenizer, seed)
    return model


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def join_documents(texts: list[str], tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> list[str]:
    """Documents end to end, an end of text between them, so that each line fills a row of `max_tokens` well.

    Rows of one text need no mask that keeps documents apart, and without it attention on a CPU is nearly twice as fast.
    """
    rows: list[str] = []
    end = tokenizer.eos_token
    for start in range(0, len(texts), JOIN_WINDOW):
        window = texts[start : start + JOIN_WINDOW]
        waiting = [(len(ids) + 1, text) for ids, text in zip(tokenizer(window)["input_ids"], window, strict=True)]
        while waiting:
            room, row = max_tokens, []
            while fitting := [place for place, (length, _) in enumerate(waiting) if length <= room]:
                length, text = waiting.pop(fitting[0])
                room -= length
                row.append(text)
            if not row:
                raise ValueError(f"a document has {waiting[0][0]} tokens, a row holds {max_tokens}")
            rows.append(end.join(row))
    return rows


def write_data(out: Path, seed: int, num_documents: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(MAX_LENGTH)
    texts = join_documents(documents(Random(seed), num_documents), tokenizer, ROW_TOKENS)
    pq.write_table(pa.table({"text": texts}), out / "documents.parquet", compression="zstd")
    save_model(untrained_model(tokenizer, seed), tokenizer, out / "untrained")


def write_model(weights: Path, out: Path) -> None:
    """Trained weights to a model folder in bf16. The tokenizer carries no chat template: this is a base model."""
    if not (weights / "model.safetensors").is_file():
        raise InputError(f"--weights: {weights} holds no model.safetensors. Give the `weights` folder of a checkpoint.")
    model = LlamaForCausalLM.from_pretrained(weights, dtype=torch.bfloat16)
    save_model(model, build_tokenizer(MAX_LENGTH), out)


def write_assets(out: Path, seed: int, methods: tuple[str, ...]) -> None:
    """Seed tasks, evaluation rows, and the prompts of the synthesis methods that the model knows."""
    rng = Random(seed)
    for name, rows in (("seed_tasks", assets.seed_tasks(rng)), ("eval", assets.evaluation_rows(rng))):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for method in methods:
        shutil.copytree(PROMPTS / method, out / "prompts" / method, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("data", "model", "assets"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True)
        if name == "model":
            command.add_argument("--weights", type=Path, required=True)
        else:
            command.add_argument("--seed", type=int, default=0)
        if name == "data":
            command.add_argument("--num-documents", type=int, default=92_000)
    arguments = parser.parse_args()
    if arguments.command == "data":
        write_data(arguments.out, arguments.seed, arguments.num_documents)
    elif arguments.command == "model":
        write_model(arguments.weights, arguments.out)
    else:
        write_assets(arguments.out, arguments.seed, BASE_METHODS)


if __name__ == "__main__":
    main()
