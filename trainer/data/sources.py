"""Datasets of several shapes, opened and read as conversations, or as plain texts.

dataset, format = open_source(DataSource(path="alpaca_data.json"), "chat")
messages = format.messages(dataset[0])        # [{"role": "user", ...}, {"role": "assistant", ...}]
"""

import contextlib
import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from cluster.errors import InputError
from cluster.files import read_jsonl
from cluster.run.manifest import is_sealed, verify_manifest
from trainer.config.data import DataSource
from trainer.data.chat import Unmaskable, user_turn

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
# Who speaks in ShareGPT's files and those made after them. What was written by any model is the assistant's.
SPEAKERS = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A shape of rows: the columns it needs, those it reads if they are there, and how a row becomes messages."""

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    messages: Callable[[dict], object]  # raises Unmaskable; its answer may still be malformed


def _own(row: dict) -> object:
    return row["messages"]


def _alpaca(row: dict) -> list[dict]:
    instruction, input_text, output = row["instruction"], row.get("input"), row["output"]
    if not isinstance(instruction, str) or not instruction.strip():
        raise Unmaskable("no instruction")
    if not isinstance(output, str) or not output.strip():
        raise Unmaskable("no output")
    if input_text is not None and not isinstance(input_text, str):
        raise Unmaskable("the input is not text")
    return [
        {"role": "user", "content": user_turn(instruction, input_text)},
        {"role": "assistant", "content": output},
    ]


def _sharegpt(row: dict) -> list[dict]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Unmaskable("`conversations` is not a list of turns")
    messages = []
    for turn in turns:
        speaker = turn.get("from") or turn.get("role")
        if speaker not in SPEAKERS:
            raise Unmaskable("a turn's speaker is unknown")
        text = turn.get("value")
        messages.append({"role": SPEAKERS[speaker], "content": turn.get("content") if text is None else text})
    return messages


# Told by their columns in this order; `finish_reason` says of our own rows whether the answer came to its end.
CHAT_FORMATS = (
    Format("messages", ("messages",), ("finish_reason",), _own),
    Format("sharegpt", ("conversations",), (), _sharegpt),
    Format("alpaca", ("instruction", "output"), ("input",), _alpaca),
)
TEXT_FORMAT = Format("text", ("text",), (), lambda row: row["text"])
FORMATS = {form.name: form for form in (*CHAT_FORMATS, TEXT_FORMAT)}


def open_source(source: DataSource, objective: str, key: str = "train.data") -> tuple[Dataset, Format]:
    """Open a source; its columns get the names that its format gives them.

    Raises InputError if it is missing, corrupt, empty, or has not the columns of its format or of any.
    """
    path = Path(source.path)
    dataset = _open(path, key)
    if dataset.num_rows == 0:
        raise InputError(f"{path}: the dataset is empty. Give one with rows.")
    found = dataset.column_names
    if absent := [theirs for theirs in source.columns.values() if theirs not in found]:
        raise InputError(f"train.data: {path} has no column `{absent[0]}`, which `columns` names ({_listed(found)}).")
    named = {theirs: ours for ours, theirs in source.columns.items()}
    if clashing := [ours for theirs, ours in named.items() if ours in found and ours != theirs and ours not in named]:
        dataset = dataset.remove_columns(clashing)
    dataset = dataset.rename_columns({theirs: ours for theirs, ours in named.items() if theirs != ours})
    form = _format_of(source, objective, dataset.column_names)
    if missing := [column for column in form.needed if column not in dataset.column_names]:
        raise InputError(
            f"{path}: no column `{missing[0]}` (found: {', '.join(found)}), which the format {form.name} needs. "
            "Say what it is called here by `columns`, or give another `format`."
        )
    kept = [column for column in (*form.needed, *form.optional) if column in dataset.column_names]
    return dataset.select_columns(kept), form


def _format_of(source: DataSource, objective: str, columns: list[str]) -> Format:
    if source.format is not None:
        return FORMATS[source.format]
    if objective == "text":
        return TEXT_FORMAT
    for form in CHAT_FORMATS:
        if all(column in columns for column in form.needed):
            return form
    raise InputError(
        f"{source.path}: no column `messages` (found: {', '.join(columns)}), nor those of another format: "
        "`conversations`, or `instruction` and `output`. Say by train.data's `columns` what they are called here; for "
        "plain text set train.objective=text and name the column `text`."
    )


def _listed(columns: list[str]) -> str:
    return f"found: {', '.join(columns)}"


def _open(path: Path, key: str) -> Dataset:
    if not path.exists():
        raise InputError(f"{key}: {path} does not exist. Give a dataset folder or a .jsonl, .parquet or .arrow file.")
    if not path.is_dir():
        return _open_file(path)
    if is_sealed(path):
        verify_manifest(path)
    elif not (path / "state.json").is_file():
        raise InputError(f"{path}: not a dataset folder (no manifest.json and no state.json). Give one, or a file.")
    dataset = _open_folder(path)
    if not isinstance(dataset, Dataset):
        raise InputError(f"{path}: holds several splits ({', '.join(dataset)}). Give the folder of one of them.")
    return dataset


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
        # It takes a pattern, and would look for other files where a folder's name has brackets.
        return load_dataset(loader, data_files=glob.escape(str(path.absolute())), split="train")
    except Exception as error:
        if path.suffix == ".jsonl":
            with contextlib.suppress(UnicodeDecodeError):
                read_jsonl(path)  # names the line that is broken
        cause = error.__cause__ or error
        raise InputError(
            f"{path}: cannot be read as {loader} ({str(cause).splitlines()[0]}). Fix or replace it."
        ) from error
