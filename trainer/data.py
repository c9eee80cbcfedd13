"""Datasets to token arrays on disk, once, by rank 0; every rank then maps the same files.

tokens = prepare_tokens(config, tokenizer, paths, cache_folder)
tokens.input_ids[tokens.offsets[d]:tokens.offsets[d + 1]]     # document d
"""

import contextlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerFast

from cluster.errors import InputError
from cluster.files import explain_full_disk, read_jsonl, sha256_file, sha256_json, write_json
from cluster.manifest import is_sealed, verify_manifest
from trainer.chat import Encoded, Unmaskable, encode_chat, encode_text, end_of_turn_ids
from trainer.config import TrainConfig

log = logging.getLogger(__name__)

COLUMN = {"chat": "messages", "text": "text"}
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class Tokens:
    """All documents of a job end to end. `offsets` [D + 1] says where each begins; the arrays are memory maps."""

    input_ids: np.ndarray  # int32 [N]
    labels: np.ndarray  # int32 [N]
    offsets: np.ndarray  # int64 [D + 1]
    dropped: dict[str, int]  # reason -> rows left out

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def num_trained(self) -> int:
        """Tokens with a label."""
        return int((self.labels != -100).sum())


def open_dataset(path: Path, column: str) -> Dataset:
    """Open a dataset folder of ours, one saved by `datasets`, or a JSONL, Parquet or Arrow file.

    Raises InputError if it is missing, corrupt, empty, or has no `column`.
    """
    if not path.exists():
        raise InputError(
            f"train.data: {path} does not exist. Give a dataset folder or a .jsonl, .parquet or .arrow file."
        )
    if path.is_dir():
        if is_sealed(path):
            verify_manifest(path)
        elif not (path / "state.json").is_file():
            raise InputError(f"{path}: not a dataset folder (no manifest.json and no state.json). Give one, or a file.")
        dataset = _open_folder(path)
        if not isinstance(dataset, Dataset):
            raise InputError(f"{path}: holds several splits ({', '.join(dataset)}). Give the folder of one of them.")
    else:
        dataset = _open_file(path)
    if dataset.num_rows == 0:
        raise InputError(f"{path}: the dataset is empty. Give one with rows.")
    if column not in dataset.column_names:
        found = ", ".join(dataset.column_names)
        raise InputError(
            f"{path}: no column `{column}` (found: {found}). `messages` is a list of {{role, content}}; "
            "for plain text set train.objective=text and name the column `text`."
        )
    return dataset.select_columns([column])


def _open_folder(path: Path) -> Dataset | DatasetDict:
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:  # ArrowInvalid and JSONDecodeError are ValueErrors
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read as a dataset folder ({reason}). Fix or replace it.") from error


def _open_file(path: Path) -> Dataset:
    loader = LOADERS.get(path.suffix)
    if loader is None:
        raise InputError(f"{path}: unknown kind of file. Known: {', '.join(LOADERS)}, or a dataset folder.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the dataset is empty. Give one with rows.")
    try:
        return load_dataset(loader, data_files=str(path), split="train")
    except Exception as error:
        if path.suffix == ".jsonl":
            with contextlib.suppress(UnicodeDecodeError):
                read_jsonl(path)  # names the line that is broken
        cause = error.__cause__ or error
        raise InputError(
            f"{path}: cannot be read as {loader} ({str(cause).splitlines()[0]}). Fix or replace it."
        ) from error


def cache_key(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, paths: Sequence[Path]) -> str:
    """What the tokens depend on: data, tokenizer, template and cut."""
    sources = []
    for path in paths:
        sealed = path / "manifest.json"
        if sealed.is_file():
            sources.append(sha256_file(sealed))
        else:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            sources.append([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()])
    tokenizer_state = sha256_json(json.loads(tokenizer.backend_tokenizer.to_str()))
    ends = [tokenizer.eos_token, tokenizer.chat_template]
    return sha256_json([sources, tokenizer_state, ends, config.max_seq_len, config.objective])[:16]


def prepare_tokens(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, paths: Sequence[Path], cache_folder: Path
) -> Path:
    """Encode every row of `paths` into a folder below `cache_folder`, unless it is there. Returns that folder.

    Rows that cannot be masked right are left out and counted by reason. Raises InputError if none is left.
    """
    folder = cache_folder / cache_key(config, tokenizer, paths)
    if (folder / "tokens.json").is_file():
        return folder
    partial = cache_folder / f".{folder.name}.partial"
    dropped: Counter[str] = Counter()
    offsets, num_tokens = [0], 0
    with explain_full_disk(cache_folder.parent):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    with (
        explain_full_disk(partial),
        open(partial / "input_ids.bin", "wb") as ids,
        open(partial / "labels.bin", "wb") as labels,
    ):
        for path in paths:
            for encoded in _encode_rows(config, tokenizer, open_dataset(path, COLUMN[config.objective]), dropped):
                ids.write(encoded.input_ids.tobytes())
                labels.write(encoded.labels.tobytes())
                num_tokens += len(encoded.input_ids)
                offsets.append(num_tokens)
        (partial / "offsets.bin").write_bytes(np.asarray(offsets, dtype=np.int64).tobytes())
    if num_tokens == 0:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
        raise InputError(f"no row of {', '.join(map(str, paths))} can be trained ({reasons}).")
    write_json(partial / "tokens.json", {"num_tokens": num_tokens, "dropped": dict(dropped)})
    os.rename(partial, folder)
    return folder


def load_tokens(folder: Path) -> Tokens:
    """Map what `prepare_tokens` wrote."""
    facts = json.loads((folder / "tokens.json").read_text())
    return Tokens(
        np.memmap(folder / "input_ids.bin", dtype=np.int32, mode="r"),
        np.memmap(folder / "labels.bin", dtype=np.int32, mode="r"),
        np.fromfile(folder / "offsets.bin", dtype=np.int64),
        facts["dropped"],
    )


def _encode_rows(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, dataset: Dataset, dropped: Counter
) -> Iterator[Encoded]:
    if config.objective == "text":
        yield from _encode_texts(config, tokenizer, dataset, dropped)
        return
    terminators = end_of_turn_ids(tokenizer)
    for row in dataset:
        try:
            yield encode_chat(tokenizer, row["messages"], config.max_seq_len, terminators)
        except Unmaskable as reason:
            dropped[str(reason)] += 1


def _encode_texts(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, dataset: Dataset, dropped: Counter
) -> Iterator[Encoded]:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "train.objective=text: the tokenizer has no eos token, so no text would ever end. Give it one."
        )
    for batch in dataset.iter(batch_size=1000):
        texts = [text for text in batch["text"] if isinstance(text, str) and text]
        if missing := len(batch["text"]) - len(texts):
            dropped["no text"] += missing
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
            yield encode_text(ids, tokenizer.eos_token_id, config.max_seq_len)
