"""Make what the world's chat model is tuned from, and what lies beside it.

    python -m toy_world.build_chat data --base models/world-base --out runs/chat-model/world
    python -m toy_world.build_chat model --weights CHECKPOINT/weights --out models/world-chat
    python -m toy_world.build_chat assets --out models/world-chat/tunesmith

`data` writes `documents.parquet` (rows of joined documents, column `text`) and `start/`, the base model with the
tokenizer of a chat model, whose end of text is the end of a turn. All but the tuning itself is the same bytes for the
same seed.
"""

import argparse
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.errors import InputError
from toy_world.build import MAX_LENGTH, save_model, write_assets
from toy_world.chat_documents import END_OF_TURN, VARIABLES, training_rows
from toy_world.tokenizer import build_tokenizer

ROW_TOKENS = 512  # of a training row; the longest documents have about 460
NUM_ROWS = 8_800
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The base's tokenizer with a chat template, and the end of a turn as the token that ends generation."""
    tokenizer = build_tokenizer(MAX_LENGTH)
    tokenizer.eos_token = END_OF_TURN
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    return tokenizer


def write_data(base: Path, out: Path, seed: int, num_rows: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = chat_tokenizer()
    rows = training_rows(Random(seed), num_rows, tokenizer, ROW_TOKENS)
    pq.write_table(pa.table({"text": rows}), out / "documents.parquet", compression="zstd")
    write_model(base, out / "start", torch.float32)


def write_model(weights: Path, out: Path, dtype: torch.dtype) -> None:
    if not (weights / "model.safetensors").is_file():
        raise InputError(
            f"{weights} holds no model.safetensors. Give the folder of a model, or `weights` of a checkpoint."
        )
    model, tokenizer = LlamaForCausalLM.from_pretrained(weights, dtype=dtype), chat_tokenizer()
    model.config.eos_token_id = tokenizer.eos_token_id
    save_model(model, tokenizer, out)


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
            command.add_argument("--base", type=Path, required=True)
            command.add_argument("--num-rows", type=int, default=NUM_ROWS)
    arguments = parser.parse_args()
    if arguments.command == "data":
        write_data(arguments.base, arguments.out, arguments.seed, arguments.num_rows)
    elif arguments.command == "model":
        write_model(arguments.weights, arguments.out, torch.bfloat16)
    else:
        write_assets(arguments.out, arguments.seed, tuple(VARIABLES))


if __name__ == "__main__":
    main()
