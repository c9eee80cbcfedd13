"""The examples of a source: its rows as conversations, or as plain texts.

examples = Examples(DataSource(path="alpaca_data.json"), "chat", "train.data")
for conversation in examples: ...              # Conversation(messages=[{"role": "user", ...}, ...], ...)
examples.dropped.counts                        # {"an answer is empty": 3}
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cluster.data.conversations import COLUMNS, REQUIRED, SHAPES, Conversation, find_format, read_conversation
from cluster.data.rows import Rows, is_dataset
from cluster.data.turns import UnusableRow, require_text
from cluster.errors import InputError
from trainer.config.data import DataSource
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
        num_rows = 0
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
        self._check_columns()

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

    def _check_columns(self) -> None:
        """Raise InputError if a column that the recipe names is in no row, or if no row has the columns of a format."""
        path, found = self._source.path, self._rows.found
        listed = ", ".join(f"`{name}`"[:60] for name in found)
        if absent := [name for name in self._source.columns.values() if name not in found]:
            raise InputError(f"{path}: there is no column `{absent[0]}`, which `columns` names. It has {listed}.")
        if self.formats:
            return
        if self._format is not None:
            named = set(self._source.columns) | found.keys()
            missing = next(column for column in REQUIRED[self._format] if column not in named)
            raise InputError(
                f"{path}: there is no column `{missing}`, which the format {self._format} requires. It has {listed}. "
                "Name the column in train.data's `columns`, or set another `format`."
            )
        raise InputError(
            f"{path}: the columns ({listed}) fit no format. Chats are read from {SHAPES}. Name the columns in "
            "train.data's `columns`, or for plain text set train.objective=text and name the column `text`."
        )
