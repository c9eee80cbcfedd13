"""The accepted instructions, and how many of them a proposal may see."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Demonstration:
    """An accepted instruction as later prompts show it."""

    id: str
    instruction: str


class AcceptedList:
    """Grows by proposals. Instructions of an earlier attempt stay in Arrow columns: loading a million takes no time."""

    def __init__(self, max_concurrent_proposals: int) -> None:
        self._delay = max_concurrent_proposals
        self._lengths: deque[int] = deque(maxlen=max_concurrent_proposals)  # after each of the last proposals
        self._num_proposals = 0
        self._old: tuple[pa.ChunkedArray, pa.ChunkedArray] | None = None  # ids, instructions
        self._num_old = 0
        self._new: list[Demonstration] = []

    def __len__(self) -> int:
        return self._num_old + len(self._new)

    def restore(self, batches: Iterable[pa.RecordBatch], num_proposals: int, lengths: Sequence[int]) -> None:
        """Continue from a checkpoint.

        batches: the committed instructions, with the columns `id` and `instruction`. lengths: what `end_proposal`
        returned after proposal `num_proposals - 1`.
        """
        columns = list(batches)
        if columns:
            table = pa.Table.from_batches(columns)
            self._old = (table["id"], table["instruction"])
            self._num_old = table.num_rows
        self._num_proposals = num_proposals
        self._lengths.extend(lengths)

    def append(self, demonstration: Demonstration) -> None:
        self._new.append(demonstration)

    def end_proposal(self) -> list[int]:
        """Close a proposal. Returns the list's length after each of the last `max_concurrent_proposals` proposals."""
        self._num_proposals += 1
        self._lengths.append(len(self))
        return list(self._lengths)

    def visible_to(self, number: int) -> Sequence[Demonstration]:
        """What proposal `number` may draw on: the list as of proposal `number - max_concurrent_proposals`.

        Call it when proposal `number` starts: only the last `max_concurrent_proposals` lengths are kept.
        """
        if number < self._delay:
            return _Prefix(self, 0)
        first = self._num_proposals - len(self._lengths)  # the proposal that _lengths[0] belongs to
        return _Prefix(self, self._lengths[number - self._delay - first])

    def at(self, index: int) -> Demonstration:
        if index >= self._num_old:
            return self._new[index - self._num_old]
        ids, instructions = self._old
        return Demonstration(ids[index].as_py(), instructions[index].as_py())


class _Prefix(Sequence[Demonstration]):
    """The first `length` entries of a list that only grows."""

    def __init__(self, accepted: AcceptedList, length: int) -> None:
        self._accepted, self._length = accepted, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Demonstration:
        return self._accepted.at(range(self._length)[index])
