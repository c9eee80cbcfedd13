"""The instructions kept so far, and how many of them a proposal may see."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Shown:
    """A kept instruction as a demonstration needs it."""

    id: str
    instruction: str


class KeptList:
    """Grows by proposals. Those of an earlier attempt stay columns, so that a million take no time to load."""

    def __init__(self, lookahead: int) -> None:
        self._lookahead = lookahead
        self._kept_after: deque[int] = deque(maxlen=lookahead)  # of the last `lookahead` proposals
        self._num_proposals = 0
        self._old: tuple[pa.ChunkedArray, pa.ChunkedArray] | None = None  # ids, instructions
        self._num_old = 0
        self._new: list[Shown] = []

    def __len__(self) -> int:
        return self._num_old + len(self._new)

    def restore(self, batches: Iterable[pa.RecordBatch], num_proposals: int, kept_after: list[int]) -> None:
        """Take over what an earlier attempt committed: columns `id` and `instruction`, and where it stood."""
        columns = list(batches)
        if columns:
            table = pa.Table.from_batches(columns)
            self._old = (table["id"], table["instruction"])
            self._num_old = table.num_rows
        self._num_proposals = num_proposals
        self._kept_after.extend(kept_after)

    def append(self, shown: Shown) -> None:
        self._new.append(shown)

    def end_proposal(self) -> list[int]:
        """All of a proposal is in. Returns the list's length after each of the last `lookahead` proposals."""
        self._num_proposals += 1
        self._kept_after.append(len(self))
        return list(self._kept_after)

    def visible_to(self, number: int) -> Sequence[Shown]:
        """What proposal `number` may draw on: all that was kept up to proposal `number - lookahead`.

        To be asked when that proposal is in, and not more than `lookahead` proposals later.
        """
        if number < self._lookahead:
            return _Prefix(self, 0)
        first_remembered = self._num_proposals - len(self._kept_after)
        return _Prefix(self, self._kept_after[number - self._lookahead - first_remembered])

    def at(self, index: int) -> Shown:
        if index >= self._num_old:
            return self._new[index - self._num_old]
        ids, instructions = self._old
        return Shown(ids[index].as_py(), instructions[index].as_py())


class _Prefix(Sequence[Shown]):
    """The first `length` entries of a list that only grows."""

    def __init__(self, kept: KeptList, length: int) -> None:
        self._kept, self._length = kept, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Shown:
        return self._kept.at(range(self._length)[index])
