"""Many given tasks as columns: none is a Python object before it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import InputError
from cluster.files import sha256_json
from generation.filters import Instance

ID_CHARS = 16
MESSAGES = "'messages' is a list of {role, content}"


@dataclass(frozen=True, slots=True)
class SeedTask:
    """One task with its instances. An instance whose output is not known has an empty one."""

    id: str
    name: str
    instruction: str
    instances: tuple[Instance, ...]
    is_classification: bool
    language: str = ""  # its name in English; empty: not known


def content_id(instruction: str, instance: Instance, number: int) -> str:
    """The id of a row without one; `number`, its place in the file, keeps equal rows apart."""
    return sha256_json([instruction, instance.input, instance.output, str(number)])[:ID_CHARS]


class SeedColumns(Sequence[SeedTask]):
    """Tasks of one instance each, of the rows of a table."""

    def __init__(self, columns: pa.Table) -> None:
        """`columns`: id (null: none), instruction, input and output, all text."""
        self._ids, self._instructions, self._inputs, self._outputs = columns.columns

    @classmethod
    def of_table(cls, table: pa.Table, path: Path) -> "SeedColumns":
        """The tasks of a table in either plain form.

        Raises InputError naming the row of `path` whose instruction is missing or whose id was there before.
        """
        ids = _text(table, "id", path)
        if "messages" in table.column_names:
            instructions, inputs, outputs = _first_exchanges(table, path)
        elif "instruction" in table.column_names:
            instructions, inputs, outputs = (_text(table, name, path) for name in ("instruction", "input", "output"))
        else:
            raise InputError(f"{path}: no column 'instruction', 'messages' or 'instances'; they hold the tasks.")
        blank = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(instructions, "")), "")
        if (row := pc.index(blank, True).as_py()) >= 0:
            raise InputError(f"{path}:{row + 1}: 'instruction' is empty.")
        _check_unique(ids, path)
        columns = [ids, instructions, inputs, outputs]
        return cls(pa.table(columns, names=["id", "instruction", "input", "output"]))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> SeedTask:
        row = range(len(self))[index]
        instruction = self._instructions[row].as_py()
        instance = Instance(self._inputs[row].as_py() or "", self._outputs[row].as_py() or "")
        task_id = self._ids[row].as_py()
        task_id = content_id(instruction, instance, row + 1) if task_id is None else task_id
        return SeedTask(task_id, "", instruction, (instance,), False)


def _text(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    """A column of text, of nulls if there is none. Ids may also be numbers."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, pa.large_string())])
    column = table[name]
    is_id = name == "id" and pa.types.is_integer(column.type)
    if not (is_id or pa.types.is_null(column.type) or pa.types.is_string(column.type) or _is_large(column.type)):
        raise InputError(f"{path}: column {name!r} is {column.type}, expected text.")
    return column.cast(pa.large_string())


def _is_large(kind: pa.DataType) -> bool:
    return pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _check_unique(ids: pa.ChunkedArray, path: Path) -> None:
    given = ids.drop_null()
    if pc.count_distinct(given).as_py() == len(given):
        return
    first_rows: dict[str, int] = {}
    for number, task_id in enumerate(ids.to_pylist(), 1):
        if task_id is not None and first_rows.setdefault(task_id, number) != number:
            raise InputError(f"{path}:{number}: id {task_id!r} is also that of row {first_rows[task_id]}.")


def _first_exchanges(table: pa.Table, path: Path) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray]:
    """Of each conversation the first user's turn, no input, and the assistant's reply to it, empty if there is none."""
    instructions, outputs, num_rows = [], [], 0
    for batch in table.select(["messages"]).to_batches():
        asked, answered = _first_exchanges_of(batch["messages"], path, num_rows)
        instructions.append(asked)
        outputs.append(answered)
        num_rows += batch.num_rows
    text = pa.large_string()
    inputs = pa.chunked_array([pa.nulls(num_rows, text)])
    return pa.chunked_array(instructions, text), inputs, pa.chunked_array(outputs, text)


def _first_exchanges_of(messages: pa.Array, path: Path, num_before: int) -> tuple[pa.Array, pa.Array]:
    try:
        turns = pc.list_flatten(messages)
        roles, contents = pc.struct_field(turns, "role"), pc.struct_field(turns, "content").cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise InputError(f"{path}: {MESSAGES}.") from error
    row_of_turn = pc.list_parent_indices(messages).to_numpy()
    user_turns = np.flatnonzero(_are(roles, "user"))
    rows, first_of_row = np.unique(row_of_turn[user_turns], return_index=True)
    if len(rows) < len(messages):
        row = np.setdiff1d(np.arange(len(messages)), rows)[0]
        raise InputError(f"{path}:{num_before + row + 1}: 'messages' has no turn of a user.")
    asked = user_turns[first_of_row]
    replies = np.minimum(asked + 1, len(turns) - 1)
    is_answered = (row_of_turn[replies] == rows) & _are(roles, "assistant")[replies]
    answers = contents.take(pa.array(replies, mask=~is_answered))
    return contents.take(pa.array(asked)), answers


def _are(roles: pa.Array, wanted: str) -> np.ndarray:
    return pc.fill_null(pc.equal(roles, wanted), False).to_numpy(zero_copy_only=False)
