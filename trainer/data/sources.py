"""The examples of a source: its rows as conversations, or as plain texts.

examples = Examples(DataSource(path="alpaca_data.json"), "chat", "train.data")
for conversation in examples: ...              # Conversation(messages=[{"role": "user", ...}, ...], ...)
examples.dropped.counts                        # {"an answer is empty": 3}
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

from cluster.data.conversations import COLUMNS, REQUIRED, SHAPES, Conversation, find_format, read_conversation
from cluster.data.rows import Rows, is_dataset
from cluster.data.turns import UnusableRow, require_text
from cluster.errors import InputError
from trainer.config.data import Column, DataSource
from trainer.data.dropped import DroppedRows

PROBED_ROWS = 1000  # if so many rows fit no format, the others are not read


def check_source(source: DataSource, objective: str, key: str = "train.data") -> None:
    """Read a source up to its first example. Raises InputError if that shows that training would refuse the source."""
    if not is_dataset(Path(source.path).expanduser()):  # opening it would hash all its files
        examples = Examples(source, objective, key)
        if next(iter(examples), None) is None:
            raise examples.dropped.untrainable(source.path, key)


class Examples:
    """The examples of a source, in the order of its rows. Rows that are no example are counted with their reason.

    `key` is the recipe's, for errors. `objective` chat gives conversations, and text gives texts.

    Raises InputError if the source is missing; while it is read, if it is corrupt or empty, or fits no format.
    """

    def __init__(self, source: DataSource, objective: str, key: str = "train.data") -> None:
        self.dropped = DroppedRows()
        self.place = ""  # of the row that was read last
        self.formats: Counter[str] = Counter()  # format -> number of rows that have its columns
        self._source = source
        self._format = "text" if objective == "text" else source.format
        self._rows = Rows(Path(source.path).expanduser(), key, COLUMNS | set(source.columns.values()))

    def __iter__(self) -> Iterator[Conversation | str]:
        num_rows, row = 0, {}
        for num_rows, (place, row) in enumerate(self._rows, 1):
            self.place = place
            try:
                yield self._example(self._renamed(row))
            except UnusableRow as reason:
                self.dropped.add(str(reason), self.place)
            if num_rows == PROBED_ROWS and not self.formats:
                break
        if num_rows == 0:
            raise InputError(f"{self._source.path}: the dataset has no rows. Choose another one.")
        self._check_columns(row)

    def _renamed(self, row: dict) -> dict:
        """The row with its columns named as those of the format. Another column of such a name is left out."""
        columns = self._source.columns
        if not columns:
            return row
        theirs = set(columns.values())
        others = {name: value for name, value in row.items() if name not in theirs and name not in columns}
        return others | {our_name: row[name] for our_name, name in columns.items() if name in row}

    def _example(self, row: dict) -> Conversation | str:
        name, columns = find_format(row, self._format)
        self.formats[name] += 1
        if name != "text":
            return read_conversation(row, columns)
        if not (text := require_text(row["text"], "text")):
            raise UnusableRow("no text")
        return text

    def _check_columns(self, row: dict) -> None:
        """Raise InputError if a column that the recipe names is in no row, or if no row has the columns of a format.

        row: the last one that was read.
        """
        path, found = self._source.path, self._rows.found
        listed = ", ".join(f"`{name}`"[:60] for name in found)
        if absent := [name for name in self._source.columns.values() if name not in found]:
            near = _nearest(absent[0], found)
            hint = f" Did you mean `{near}`?" if near else ""
            raise InputError(f"{path}: there is no column `{absent[0]}`, which `columns` names. It has {listed}.{hint}")
        if self.formats:
            return
        if self._format is not None:
            named = set(self._source.columns) | found.keys()
            missing = next(column for column in REQUIRED[self._format] if column not in named)
            hint = columns_override(path, {missing: _nearest(missing, found) or next(iter(found), "NAME")})
            raise InputError(
                f"{path}: there is no column `{missing}`, which the format {self._format} requires. It has {listed}. "
                f"Name the column, for example {hint}, or set another `format`."
            )
        if {"chosen", "rejected"} <= found.keys():
            ours = "messages" if isinstance(row.get("chosen"), list) else "completion"
            hint = columns_override(path, {ours: "chosen"})
            raise InputError(f"{path}: this is preference data. To train on `chosen`, set {hint}.")
        hint = columns_override(path, _example_columns(list(found)))
        raise InputError(
            f"{path}: the columns ({listed}) fit no format. Chats are read from {SHAPES}. Name the columns, such as "
            f"{hint}, or for plain text set train.objective=text and name the column `text`."
        )


def columns_override(path: str, columns: dict[str, str]) -> str:
    """What to write on the command line so that columns are read under the names of a format."""
    listed = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    return f"'train.data={{path: {path}, columns: {{{listed}}}}}'"


def _nearest(name: str, found: Iterable[str]) -> str | None:
    """The column that is most like `name`, whether in capitals or not."""
    by_lower = {column.lower(): column for column in found}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[near[0]] if near else None


def _example_columns(found: list[str]) -> dict[str, str]:
    """Columns of a format with names out of a file: those that differ only in case, if there are any."""
    same = {name.lower(): name for name in found if name.lower() in get_args(Column)}
    return same or dict(zip(("instruction", "output"), [*found, "NAME", "NAME"], strict=False))
