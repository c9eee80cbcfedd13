"""Datasets in several formats, opened and read as conversations or as plain texts.

dataset, format = open_source(DataSource(path="alpaca_data.json"), "chat")
messages = format.messages(dataset[0])        # [{"role": "user", ...}, {"role": "assistant", ...}]
"""

import contextlib
import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk

from cluster.errors import InputError
from cluster.files import read_jsonl
from cluster.run.manifest import is_sealed, verify_manifest
from trainer.config.data import DataSource
from trainer.data.conversation import Unmaskable, user_turn

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
# Speaker in ShareGPT's files and in files of the same format -> role. Every model is the assistant.
SPEAKERS = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A format of rows: required columns, optional columns, and how a row becomes messages."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    messages: Callable[[dict], object]  # raises Unmaskable; the messages may still be malformed


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


# The first format whose required columns exist is used. `finish_reason` of synthesized rows: whether the answer ended.
CHAT_FORMATS = (
    Format("messages", ("messages",), ("finish_reason", "tools"), lambda row: row["messages"]),
    Format("sharegpt", ("conversations",), ("tools",), _sharegpt),
    Format("alpaca", ("instruction", "output"), ("input",), _alpaca),
)
TEXT_FORMAT = Format("text", ("text",), (), lambda row: row["text"])
FORMATS = {form.name: form for form in (*CHAT_FORMATS, TEXT_FORMAT)}


def open_source(source: DataSource, objective: str, key: str = "train.data") -> tuple[Dataset, Format]:
    """Open a source, with its columns renamed to those of its format. `key` is the recipe's, for errors.

    Raises InputError if the source is missing, corrupt or empty, or lacks the columns of its format, or of any format.
    """
    path = Path(source.path)
    dataset = _open(path, key)
    if dataset.num_rows == 0:
        raise InputError(f"{path}: the dataset has no rows. Choose another one.")
    found = dataset.column_names
    if absent := [theirs for theirs in source.columns.values() if theirs not in found]:
        raise InputError(
            f"train.data: {path} has no column `{absent[0]}`, which `columns` names. It has {', '.join(found)}."
        )
    named = {theirs: ours for ours, theirs in source.columns.items()}
    if clashing := [ours for theirs, ours in named.items() if ours in found and ours != theirs and ours not in named]:
        dataset = dataset.remove_columns(clashing)
    dataset = dataset.rename_columns({theirs: ours for theirs, ours in named.items() if theirs != ours})
    form = _format_of(source, objective, dataset.column_names)
    if missing := [column for column in form.required if column not in dataset.column_names]:
        raise InputError(
            f"{path}: there is no column `{missing[0]}`, which the format {form.name} requires. It has "
            f"{', '.join(found)}. Name the column in train.data's `columns`, or set another `format`."
        )
    kept = [column for column in (*form.required, *form.optional) if column in dataset.column_names]
    return dataset.select_columns(kept), form


def _format_of(source: DataSource, objective: str, columns: list[str]) -> Format:
    if source.format is not None:
        return FORMATS[source.format]
    if objective == "text":
        return TEXT_FORMAT
    for form in CHAT_FORMATS:
        if all(column in columns for column in form.required):
            return form
    raise InputError(
        f"{source.path}: the columns ({', '.join(columns)}) fit no format. A format needs `messages`, or "
        "`conversations`, or `instruction` and `output`. Name the columns in train.data's `columns`, or for plain text "
        "set train.objective=text and name the column `text`."
    )


def _open(path: Path, key: str) -> Dataset:
    if not path.exists():
        raise InputError(
            f"{key}: {path} does not exist. Set a dataset folder or a .jsonl, .json, .parquet or .arrow file."
        )
    if not path.is_dir():
        return _open_file(path)
    if is_sealed(path):
        verify_manifest(path)
    elif not (path / "state.json").is_file():
        raise InputError(f"{path}: this is no dataset folder, because it has neither manifest.json nor state.json.")
    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:  # ArrowInvalid and JSONDecodeError are ValueErrors
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: the dataset folder cannot be read ({reason}). Fix or replace it.") from error
    if not isinstance(dataset, Dataset):
        raise InputError(f"{path}: there are several splits ({', '.join(dataset)}). Choose the folder of one of them.")
    return dataset


def _open_file(path: Path) -> Dataset:
    loader = LOADERS.get(path.suffix)
    if loader is None:
        raise InputError(f"{path}: the type of the file is unknown. Use {', '.join(LOADERS)}, or a dataset folder.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the dataset has no rows. Choose another one.")
    try:
        # load_dataset takes a pattern: brackets in a folder's name would match other files.
        return load_dataset(loader, data_files=glob.escape(str(path.absolute())), split="train")
    except Exception as error:
        if path.suffix == ".jsonl":
            with contextlib.suppress(UnicodeDecodeError):
                read_jsonl(path)  # its error names the line
        cause = error.__cause__ or error
        raise InputError(
            f"{path}: the file cannot be read as {loader} ({str(cause).splitlines()[0]}). Fix or replace it."
        ) from error
