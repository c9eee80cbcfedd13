"""Tasks to start from, or to answer: Self-Instruct's JSON lines, plain rows of instructions, and our own datasets.

Three forms of a row are read, told apart by their keys:
    instances     Self-Instruct's: id, name, instruction, instances [{input, output}], is_classification
    instruction   Alpaca's: instruction, and where known input, output and language; an id if there is one
    messages      a conversation: its first user's turn is the instruction, the reply to it the output

Plain rows and conversations of a Parquet file or a dataset stay columns (seed_columns.py), so that a million load in
seconds.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import InputError
from cluster.files import read_jsonl
from generation.filters import Instance
from generation.records import SCHEMA
from generation.seed_columns import SeedColumns, SeedTask, content_id
from generation.store import read_columns

SEED_KEYS = {"id": str, "name": str, "instruction": str, "instances": list, "is_classification": bool}


def load_seed_tasks(path: Path) -> Sequence[SeedTask]:
    """Read tasks from JSON lines, a Parquet file or a dataset folder.

    Raises InputError naming the file, line or row and the key that is wrong, or if there are none.
    """
    if path.is_dir() or path.suffix == ".parquet":
        table = _read_table(path)
        is_plain = "instances" not in table.column_names
        tasks = SeedColumns.of_table(table, path) if is_plain else _parse_all(_numbered(path, table.to_pylist()))
    else:
        tasks = _parse_all(_lines(path))
    if len(tasks) == 0:
        raise InputError(f"{path}: holds no seed task. Self-Instruct starts from at least one; its own set has 175.")
    return tasks


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(
            f"{path}: no such file. `synthesize.seeds` is `auto`, a file of tasks (JSON lines, Parquet) or a dataset."
        )


def _read_table(path: Path) -> pa.Table:
    if path.is_dir():
        batches = list(read_columns(path))
        return pa.Table.from_batches(batches, None if batches else SCHEMA)
    _check_file(path)
    try:
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file ({error}).") from error


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of every line that is not empty."""
    _check_file(path)
    rows = read_jsonl(path)
    with open(path, encoding="utf-8") as file:
        line_numbers = [number for number, line in enumerate(file, 1) if line.strip()]
    return ((f"{path}:{number}", row) for number, row in zip(line_numbers, rows, strict=True))


def _numbered(path: Path, rows: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    return ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))


def _parse_all(rows: Iterable[tuple[str, dict]]) -> list[SeedTask]:
    tasks: list[SeedTask] = []
    first_places: dict[str, str] = {}
    for place, row in rows:
        task = _parse(row, place)
        if task.id in first_places:
            number = first_places[task.id].rpartition(":")[2]
            raise InputError(f"{place}: id {task.id!r} is also that of line {number}.")
        first_places[task.id] = place
        tasks.append(task)
    return tasks


def _parse(row: dict, place: str) -> SeedTask:
    if row.get("messages") is not None and "instances" not in row:
        return _parse_messages(row, place)
    if "instances" in row or "instruction" not in row:
        return _parse_published(row, place)
    fields = {key: row.get(key) or "" for key in ("instruction", "input", "output")}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise InputError(f"{place}: {key!r} is {type(value).__name__}, expected str.")
    return _plain_task(row, place, fields["instruction"], Instance(fields["input"], fields["output"]))


def _parse_messages(row: dict, place: str) -> SeedTask:
    try:
        turns = [(message["role"], message["content"]) for message in row["messages"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{place}: 'messages' is a list of {{role, content}}.") from error
    users = [number for number, (role, _) in enumerate(turns) if role == "user"]
    if not users:
        raise InputError(f"{place}: 'messages' has no turn of a user.")
    after = turns[users[0] + 1 : users[0] + 2]
    answer = after[0][1] if after and after[0][0] == "assistant" else ""
    return _plain_task(row, place, turns[users[0]][1], Instance("", answer))


def _plain_task(row: dict, place: str, instruction: str, instance: Instance) -> SeedTask:
    if not instruction.strip():
        raise InputError(f"{place}: 'instruction' is empty.")
    task_id = row.get("id")
    if task_id is None:  # equal rows stay apart by their place
        task_id = content_id(instruction, instance, int(place.rpartition(":")[2]))
    return SeedTask(str(task_id), "", instruction, (instance,), False, str(row.get("language") or ""))


def _parse_published(row: dict, place: str) -> SeedTask:
    for key, kind in SEED_KEYS.items():
        if key not in row:
            raise InputError(f"{place}: no key {key!r}. A seed task has {', '.join(SEED_KEYS)}.")
        if not isinstance(row[key], kind):
            raise InputError(f"{place}: {key!r} is {type(row[key]).__name__}, expected {kind.__name__}.")
    if not row["instruction"].strip():
        raise InputError(f"{place}: 'instruction' is empty.")
    instances = []
    for position, instance in enumerate(row["instances"]):
        for key in ("input", "output"):
            if not isinstance(instance, dict) or not isinstance(instance.get(key), str):
                raise InputError(f"{place}: 'instances'[{position}] needs the text {key!r}.")
        instances.append(Instance(instance["input"], instance["output"]))
    return SeedTask(row["id"], row["name"], row["instruction"], tuple(instances), row["is_classification"])
