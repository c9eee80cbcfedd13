"""Seed tasks: instructions to start from, or to answer.

A row has one of these forms, recognized by its columns:
    instances       Self-Instruct's: id, name, instruction, instances [{input, output}], is_classification
    messages        or conversations: the first user turn is the instruction, the reply to it is the output
    instruction     or another name of a question, such as prompt; optionally id, input, output and language
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.data.conversations import COLUMNS, NoFormat, first_exchange
from cluster.data.rows import BATCH_ROWS, Rows, is_dataset, open_dataset, to_rows
from cluster.data.text import named_type
from cluster.data.turns import UnusableRow
from cluster.errors import InputError
from cluster.files import sha256_json
from generation.filters.drafts import Instance

if TYPE_CHECKING:
    from datasets import Dataset

SEED_KEYS = {"id": str, "name": str, "instruction": str, "instances": list, "is_classification": bool}
SEED_COLUMNS = COLUMNS | SEED_KEYS.keys() | {"language"}
ID_CHARS = 16


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
        read = [name for name in dataset.column_names if name in SEED_COLUMNS]
        self._dataset = (dataset.select_columns(read) if read else dataset).with_format("arrow")
        self._path = path

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> SeedTask:
        index = range(len(self))[index]
        (row,) = to_rows(self._dataset[index : index + 1])
        return parse_seed_task(row, f"{self._path}:{index + 1}", index + 1)

    def __iter__(self) -> Iterator[SeedTask]:
        return (parse_seed_task(row, place, number) for number, (place, row) in enumerate(self.rows(), 1))

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Every row with its place."""
        rows = (row for batch in self._dataset.iter(BATCH_ROWS) for row in to_rows(batch))
        return ((f"{self._path}:{number}", row) for number, row in enumerate(rows, 1))


def load_seed_tasks(path: Path) -> Sequence[SeedTask]:
    """Load seed tasks from any file that is read, or from a dataset folder. Rows of Parquet and datasets stay columns.

    Raises InputError naming the file, the line or row, and the key that is wrong, or if the file holds no task.
    """
    tasks: Sequence[SeedTask]
    if is_dataset(path) or (path.is_file() and named_type(path) == ".parquet"):
        tasks = SeedDataset(_open_columns(path), path)
        _check_rows(tasks.rows())
    else:
        rows = list(Rows(path, "synthesize.seeds", SEED_COLUMNS))
        _check_rows(rows)
        tasks = [parse_seed_task(row, place, number) for number, (place, row) in enumerate(rows, 1)]
    if len(tasks) == 0:
        raise InputError(f"{path}: holds no seed task. Give at least one; Self-Instruct's published set has 175.")
    return tasks


def _open_columns(path: Path) -> "Dataset":
    if path.is_dir():
        return open_dataset(path)
    from datasets import Dataset  # takes a second, and other files do not need it

    try:
        return Dataset(pq.read_table(path))
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file ({error}).") from error


def _check_rows(rows: Iterable[tuple[str, dict]]) -> None:
    first_places: dict[str, str] = {}
    for place, row in rows:
        parse_seed_task({"id": ""} | row, place, 0)  # with an id, a row need not be hashed for one
        task_id = row.get("id")
        if task_id is not None and (first := first_places.setdefault(str(task_id), place)) != place:
            raise InputError(f"{place}: id {task_id!r} is already used in {Path(first).name}.")


def parse_seed_task(row: dict, place: str, number: int) -> SeedTask:
    """The seed task of a row, which is the `number`th. Raises InputError naming its `place`."""
    try:
        if row.get("instances") is not None:
            return _parse_published(row)
        instruction, input_text, output = first_exchange(row)
        if not instruction.strip():
            raise ValueError("the instruction is empty")
    except NoFormat as error:
        columns = ", ".join(name for name in row if name != "id")
        raise InputError(
            f"{place}: the columns ({columns}) hold no task. A seed task needs `instances`, `messages`, "
            "`conversations`, or a question, such as `instruction` or `prompt`."
        ) from error
    except (ValueError, UnusableRow) as error:
        raise InputError(f"{place}: {error}. Fix or remove this row.") from error
    task_id = row.get("id")
    if task_id is None:  # the number keeps equal rows apart
        task_id = sha256_json([instruction, input_text, output, str(number)])[:ID_CHARS]
    return SeedTask(
        str(task_id), "", instruction, (Instance(input_text, output),), False, str(row.get("language") or "")
    )


def _parse_published(row: dict) -> SeedTask:
    for key, kind in SEED_KEYS.items():
        if key not in row:
            raise ValueError(f"no key {key!r}; a seed task with instances has {', '.join(SEED_KEYS)}")
        if not isinstance(row[key], kind):
            raise ValueError(f"{key!r} is {type(row[key]).__name__}, expected {kind.__name__}")
    if not row["instruction"].strip():
        raise ValueError("the instruction is empty")
    instances = []
    for position, instance in enumerate(row["instances"]):
        for key in ("input", "output"):
            if not isinstance(instance, dict) or not isinstance(instance.get(key), str):
                raise ValueError(f"'instances'[{position}] has no text {key!r}")
        instances.append(Instance(instance["input"], instance["output"]))
    return SeedTask(row["id"], row["name"], row["instruction"], tuple(instances), row["is_classification"])
