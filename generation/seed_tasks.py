"""Seed tasks: instructions to start from, or to answer.

A row has one of three forms, recognized by its keys:
    instances     Self-Instruct's: id, name, instruction, instances [{input, output}], is_classification
    messages      a conversation: the first user turn is the instruction, the reply to it is the output
    instruction   Alpaca's: instruction, and optionally id, input, output and language
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import InputError
from cluster.files import read_jsonl, sha256_json
from cluster.run.manifest import verify_manifest
from generation.filters.drafts import Instance

if TYPE_CHECKING:
    from datasets import Dataset

SEED_KEYS = {"id": str, "name": str, "instruction": str, "instances": list, "is_classification": bool}
COLUMNS = (*SEED_KEYS, "input", "output", "language", "messages")
ID_CHARS = 16
BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True)
class SeedTask:
    """One task with its instances. An empty output means that the output is not known."""

    id: str
    name: str
    instruction: str
    instances: tuple[Instance, ...]
    is_classification: bool
    language: str = ""  # its English name; empty means not known


class SeedDataset(Sequence[SeedTask]):
    """The rows of a dataset as seed tasks. A row becomes a Python object only when it is read."""

    def __init__(self, dataset: "Dataset", path: Path) -> None:
        read = [name for name in COLUMNS if name in dataset.column_names]
        self._dataset = dataset.select_columns(read) if read else dataset
        self._path = path

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> SeedTask:
        index = range(len(self))[index]
        return parse_seed_task(self._dataset[index], self._path, index + 1)

    def __iter__(self) -> Iterator[SeedTask]:
        return (parse_seed_task(row, self._path, number) for number, row in self.numbered_rows())

    def numbered_rows(self) -> Iterator[tuple[int, dict]]:
        """Every row with its number, from 1."""
        batches = self._dataset.with_format("arrow").iter(BATCH_ROWS)
        return enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def load_seed_tasks(path: Path) -> Sequence[SeedTask]:
    """Load seed tasks from JSON Lines, a Parquet file or a dataset folder. Rows of the last two stay columns.

    Raises InputError naming the file, the line or row, and the key that is wrong, or if the file holds no task.
    """
    if not path.exists():
        raise InputError(
            f"{path}: no such file. `synthesize.seeds` is `auto`, a JSON Lines or Parquet file, or a dataset folder."
        )
    tasks: Sequence[SeedTask]
    if path.is_dir() or path.suffix == ".parquet":
        tasks = SeedDataset(_open_dataset(path), path)
        _check_rows(tasks.numbered_rows(), path)
    else:
        rows = _numbered_lines(path)
        _check_rows(rows, path)
        tasks = [parse_seed_task(row, path, number) for number, row in rows]
    if len(tasks) == 0:
        raise InputError(f"{path}: holds no seed task. Give at least one; Self-Instruct's published set has 175.")
    return tasks


def _open_dataset(path: Path) -> "Dataset":
    from datasets import Dataset, load_from_disk  # takes a second, and JSON Lines do not need it

    if path.is_dir():
        verify_manifest(path)
        return load_from_disk(str(path))
    try:
        return Dataset(pq.read_table(path))
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file ({error}).") from error


def _numbered_lines(path: Path) -> list[tuple[int, dict]]:
    """Line number and row of every line that is not empty."""
    rows = read_jsonl(path)
    with open(path, encoding="utf-8") as file:
        line_numbers = [number for number, line in enumerate(file, 1) if line.strip()]
    return list(zip(line_numbers, rows, strict=True))


def _check_rows(rows: Iterable[tuple[int, dict]], path: Path) -> None:
    first_numbers: dict[str, int] = {}
    for number, row in rows:
        parse_seed_task({"id": ""} | row, path, number)  # with an id, a row need not be hashed for one
        task_id = row.get("id")
        if task_id is not None and (first := first_numbers.setdefault(str(task_id), number)) != number:
            raise InputError(f"{path}:{number}: id {task_id!r} is already used in {path.name}:{first}.")


def parse_seed_task(row: dict, path: Path, number: int) -> SeedTask:
    """The seed task of a row. Raises InputError naming the row by `path` and its line or row `number`."""
    try:
        if row.get("instances") is not None:
            return _parse_published(row)
        if row.get("messages") is not None:
            instruction, instance = _first_exchange(row["messages"])
        elif "instruction" in row:
            instruction, instance = _text(row, "instruction"), Instance(_text(row, "input"), _text(row, "output"))
        else:
            raise ValueError("no key 'instruction', 'messages' or 'instances'; one of them holds the task")
        if not instruction.strip():
            raise ValueError("'instruction' is empty")
    except ValueError as error:
        raise InputError(f"{path}:{number}: {error}.") from error
    task_id = row.get("id")
    if task_id is None:  # the number keeps equal rows apart
        content = [instruction, instance.input, instance.output, str(number)]
        task_id = sha256_json(content)[:ID_CHARS]
    return SeedTask(str(task_id), "", instruction, (instance,), False, str(row.get("language") or ""))


def _text(row: dict, key: str) -> str:
    value = row.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {type(value).__name__}, expected str")
    return value


def _first_exchange(messages: object) -> tuple[str, Instance]:
    """The first user turn, and the assistant's reply to it as an output; the output is empty without a reply."""
    try:
        turns = [(message["role"], message["content"]) for message in messages]
    except (KeyError, TypeError) as error:
        raise ValueError("'messages' is not a list of {role, content}") from error
    users = [number for number, (role, _) in enumerate(turns) if role == "user"]
    if not users:
        raise ValueError("'messages' has no turn of a user")
    reply = turns[users[0] + 1 : users[0] + 2]
    output = reply[0][1] if reply and reply[0][0] == "assistant" else ""
    return turns[users[0]][1] or "", Instance("", output or "")


def _parse_published(row: dict) -> SeedTask:
    for key, kind in SEED_KEYS.items():
        if key not in row:
            raise ValueError(f"no key {key!r}; a seed task with instances has {', '.join(SEED_KEYS)}")
        if not isinstance(row[key], kind):
            raise ValueError(f"{key!r} is {type(row[key]).__name__}, expected {kind.__name__}")
    if not row["instruction"].strip():
        raise ValueError("'instruction' is empty")
    instances = []
    for position, instance in enumerate(row["instances"]):
        for key in ("input", "output"):
            if not isinstance(instance, dict) or not isinstance(instance.get(key), str):
                raise ValueError(f"'instances'[{position}] has no text {key!r}")
        instances.append(Instance(instance["input"], instance["output"]))
    return SeedTask(row["id"], row["name"], row["instruction"], tuple(instances), row["is_classification"])
