"""Tasks to start from, or to answer: Self-Instruct's JSON lines, plain rows of instructions, and our own datasets.

Three forms of a row are read, told apart by their keys:
    instances     Self-Instruct's: id, name, instruction, instances [{input, output}], is_classification
    instruction   Alpaca's: instruction, and where known input, output and language; an id if there is one
    messages      a conversation: its first user's turn is the instruction, the reply to it the output
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from cluster.errors import InputError
from cluster.files import read_jsonl, sha256_json
from generation.filters import Instance
from generation.store import read_rows

SEED_KEYS = {"id": str, "name": str, "instruction": str, "instances": list, "is_classification": bool}
ID_CHARS = 16


@dataclass(frozen=True, slots=True)
class SeedTask:
    """One task with its instances. An instance whose output is not known has an empty one."""

    id: str
    name: str
    instruction: str
    instances: tuple[Instance, ...]
    is_classification: bool
    language: str = ""  # its name in English; empty: not known


def load_seed_tasks(path: Path) -> list[SeedTask]:
    """Read tasks from JSON lines, a Parquet file or a dataset folder.

    Raises InputError naming the file, line or row and the key that is wrong, or if there are none.
    """
    tasks: list[SeedTask] = []
    first_places: dict[str, str] = {}
    for place, row in _rows(path):
        task = _parse(row, place)
        if task.id in first_places:
            number = first_places[task.id].rpartition(":")[2]
            raise InputError(f"{place}: id {task.id!r} is also that of line {number}.")
        first_places[task.id] = place
        tasks.append(task)
    if not tasks:
        raise InputError(f"{path}: holds no seed task. Self-Instruct starts from at least one; its own set has 175.")
    return tasks


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row."""
    if path.is_dir():
        return _numbered(path, read_rows(path))
    if not path.is_file():
        raise InputError(
            f"{path}: no such file. `synthesize.seeds` is `auto`, a file of tasks (JSON lines, Parquet) or a dataset."
        )
    if path.suffix == ".parquet":
        return _numbered(path, pq.read_table(path).to_pylist())
    rows = read_jsonl(path)
    with open(path, encoding="utf-8") as file:
        line_numbers = [number for number, line in enumerate(file, 1) if line.strip()]
    return ((f"{path}:{number}", row) for number, row in zip(line_numbers, rows, strict=True))


def _numbered(path: Path, rows: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    return ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))


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
        task_id = sha256_json([instruction, instance.input, instance.output, place.rpartition(":")[2]])[:ID_CHARS]
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
