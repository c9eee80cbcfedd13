"""The accepted instructions, and how many of them a proposal may see."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demonstration:
    """An accepted instruction as later prompts show it."""

    id: str
    instruction: str


class AcceptedList:
    """Grows by proposals."""

    def __init__(self, max_concurrent_proposals: int) -> None:
        self._delay = max_concurrent_proposals
        self._lengths: deque[int] = deque(maxlen=max_concurrent_proposals)  # after each of the last proposals
        self._num_proposals = 0
        self._entries: list[Demonstration] = []

    def restore(self, entries: Iterable[Demonstration], num_proposals: int, lengths: Sequence[int]) -> None:
        """Continue from a checkpoint. lengths: what `end_proposal` returned after proposal `num_proposals - 1`."""
        self._entries = list(entries)
        self._num_proposals = num_proposals
        self._lengths.extend(lengths)

    def append(self, demonstration: Demonstration) -> None:
        self._entries.append(demonstration)

    def end_proposal(self) -> list[int]:
        """Close a proposal. Returns the list's length after each of the last `max_concurrent_proposals` proposals."""
        self._num_proposals += 1
        self._lengths.append(len(self._entries))
        return list(self._lengths)

    def visible_to(self, number: int) -> Sequence[Demonstration]:
        """What proposal `number` may draw on: the list as of proposal `number - max_concurrent_proposals`.

        Call it when proposal `number` starts: only the last `max_concurrent_proposals` lengths are kept.
        """
        if number < self._delay:
            return ()
        first = self._num_proposals - len(self._lengths)  # the proposal that _lengths[0] belongs to
        return _Prefix(self._entries, self._lengths[number - self._delay - first])


class _Prefix(Sequence[Demonstration]):
    """The first `length` entries of a list that only grows, without a copy of them."""

    def __init__(self, entries: list[Demonstration], length: int) -> None:
        self._entries, self._length = entries, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Demonstration:
        return self._entries[range(self._length)[index]]
