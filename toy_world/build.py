"""Make the training data of the toy world's two models, and their model folders from trained weights.

    python -m toy_world.build base-data --out runs/base-model/world
    python -m toy_world.build base-model --weights CHECKPOINT/weights --out models/world-base
    python -m toy_world.build chat-data --base models/world-base --out runs/chat-model/world
    python -m toy_world.build chat-model --weights CHECKPOINT/weights --out models/world-chat

The `-data` commands write `documents.parquet` (rows of joined documents, column `text`) and `start/`, the model
that training starts from. The `-model` commands write trained weights in bf16 with their tokenizer.

Documents are the same bytes for the same seed. The random initial weights of the base model are the same up to float32
rounding, which depends on the number of threads (OMP_NUM_THREADS).
"""

import argparse
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.errors import InputError
from toy_world.chat_documents import END_OF_TURN, training_rows
from toy_world.documents import documents
from toy_world.initial_weights import initialize_weights
from toy_world.tokenizer import build_tokenizer

MAX_SEQ_LEN = 1024
BASE_ROW_TOKENS = 384  # the longest documents have about 350
CHAT_ROW_TOKENS = 512  # the longest documents have about 460
NUM_BASE_DOCUMENTS = 92_000
NUM_CHAT_ROWS = 8_800
JOIN_WINDOW = 200  # documents that a row is filled from: enough for full rows, few enough to keep documents mixed
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def base_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer without a chat template."""
    return build_tokenizer(MAX_SEQ_LEN)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The base tokenizer with a chat template. The end of a turn is its end of text."""
    tokenizer = base_tokenizer()
    tokenizer.eos_token = END_OF_TURN
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    return tokenizer


def untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 1.3 million parameters. Heads of 32 are the smallest that vLLM's attention on CPUs supports."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    initialize_weights(model, tokenizer, seed)
    return model


def load_model(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} has no model.safetensors. Give a model folder, or a checkpoint's `weights` folder.")
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.config.use_cache = True
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def join_documents(texts: list[str], tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> list[str]:
    """Rows of at most `max_tokens` tokens, each of several documents with an end of text between them.

    A row of one text needs no attention mask that keeps documents apart. Without that mask, attention on a CPU is
    nearly twice as fast.
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
                raise ValueError(f"a document has {waiting[0][0]} tokens, but a row holds {max_tokens}")
            rows.append(end.join(row))
    return rows


def write_rows(rows: list[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": rows}), out / "documents.parquet", compression="zstd")


def write_base_data(out: Path, seed: int, num_documents: int) -> None:
    tokenizer = base_tokenizer()
    write_rows(join_documents(documents(Random(seed), num_documents), tokenizer, BASE_ROW_TOKENS), out)
    save_model(untrained_model(tokenizer, seed), tokenizer, out / "start")


def write_chat_data(base: Path, out: Path, seed: int, num_rows: int) -> None:
    tokenizer = chat_tokenizer()
    write_rows(training_rows(Random(seed), num_rows, tokenizer, CHAT_ROW_TOKENS), out)
    save_model(load_model(base, torch.float32), tokenizer, out / "start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("base-data", "base-model", "chat-data", "chat-model"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True)
        if name.endswith("-model"):
            command.add_argument("--weights", type=Path, required=True)
        else:
            command.add_argument("--seed", type=int, default=0)
        if name == "base-data":
            command.add_argument("--num-documents", type=int, default=NUM_BASE_DOCUMENTS)
        if name == "chat-data":
            command.add_argument("--base", type=Path, required=True)
            command.add_argument("--num-rows", type=int, default=NUM_CHAT_ROWS)
    arguments = parser.parse_args()
    if arguments.command == "base-data":
        write_base_data(arguments.out, arguments.seed, arguments.num_documents)
    elif arguments.command == "chat-data":
        write_chat_data(arguments.base, arguments.out, arguments.seed, arguments.num_rows)
    else:
        tokenizer = base_tokenizer() if arguments.command == "base-model" else chat_tokenizer()
        save_model(load_model(arguments.weights, torch.bfloat16), tokenizer, arguments.out)


if __name__ == "__main__":
    main()
