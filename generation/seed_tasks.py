"""Human-written tasks to start from, in Self-Instruct's JSONL: id, name, instruction, instances, is_classification."""

from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from cluster.files import read_jsonl
from generation.filters import Instance

SEED_KEYS = {"id": str, "name": str, "instruction": str, "instances": list, "is_classification": bool}


@dataclass(frozen=True, slots=True)
class SeedTask:
    """One human-written task with its instances."""

    id: str
    name: str
    instruction: str
    instances: tuple[Instance, ...]
    is_classification: bool


def load_seed_tasks(path: Path) -> list[SeedTask]:
    """Read seed tasks. Raises InputError naming the file, line and key that is wrong, or if there are none."""
    if not path.is_file():
        raise InputError(f"{path}: no such file. `synthesize.seeds` is `auto` or a file of seed tasks (JSON lines).")
    rows = read_jsonl(path)
    with open(path, encoding="utf-8") as file:
        line_numbers = [number for number, line in enumerate(file, 1) if line.strip()]
    tasks = []
    first_lines: dict[str, int] = {}
    for number, row in zip(line_numbers, rows, strict=True):
        task = _parse(row, f"{path}:{number}")
        if task.id in first_lines:
            raise InputError(f"{path}:{number}: id {task.id!r} is also that of line {first_lines[task.id]}.")
        first_lines[task.id] = number
        tasks.append(task)
    if not tasks:
        raise InputError(f"{path}: holds no seed task. Self-Instruct starts from at least one; its own set has 175.")
    return tasks


def _parse(row: dict, place: str) -> SeedTask:
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
