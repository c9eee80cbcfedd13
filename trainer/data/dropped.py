"""Rows that cannot be trained on: their reasons, each with its number of rows and its first row.

dropped = DroppedRows()
dropped.add("an answer is empty", "data/my.jsonl:7")
dropped.describe()      # "an answer is empty: 1, in my.jsonl:7"
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import InputError

MAX_REASONS = 8  # shown in a message; the result of the stage has all of them
TOO_LONG = "no label within max_seq_len"
# A part of a reason -> the fix. The first that fits is taken.
FIXES = {
    "the chat template": "Set another train.chat_template.",
    TOO_LONG: "The prompts alone are longer. Raise train.max_seq_len.",
    ", not text": "Make it text: write it in quotes.",
    "is empty": "Fill it in. If another column has the text, name that one in train.data's `columns`.",
    "no assistant turn": "Add an answer to each conversation, as a turn with the role assistant.",
    "the assistant starts": "Begin each conversation with a turn of the user.",
    "weights are 0": "Give one answer of each row the weight 1.",
    "is not a list of turns": 'Write turns as [{"role": "user", "content": "..."}, ...].',
    "the speaker": "Name the speakers user, assistant, system and tool.",
    "are preferences": "To train on `chosen`, set 'train.data={path: FILE, columns: {completion: chosen}}'.",
    "an end token": "Remove end tokens from the answers, or set another train.chat_template.",
    "a token crosses": "Set another train.chat_template.",
}


@dataclass(frozen=True)
class DroppedRows:
    """The rows of one source that are no examples. A reason may have a part of a row's text in it."""

    counts: Counter[str] = field(default_factory=Counter)  # reason -> number of rows
    first: dict[str, str] = field(default_factory=dict)  # reason -> place of the first such row

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, place)

    def describe(self) -> str:
        """The most frequent reasons. Places are without their folder. Empty if nothing was dropped."""
        shown = self.counts.most_common(MAX_REASONS)
        parts = [f"{reason}: {count}{self._where(reason, count)}" for reason, count in shown]
        if rest := self.counts.total() - sum(count for _, count in shown):
            parts.append(f"other reasons: {rest}")
        return "; ".join(parts)

    def _where(self, reason: str, count: int) -> str:
        place = self.first.get(reason)
        return "" if place is None else f", {'in' if count == 1 else 'the first in'} {Path(place).name}"

    def untrainable(self, path: str, key: str) -> InputError:
        """The error if no row of a source is left. Its fix is that of the most frequent reason."""
        reason = next(iter(self.counts.most_common(1)), ("", 0))[0]
        fix = next((fix for part, fix in FIXES.items() if part in reason), "Change these rows, or use another dataset.")
        return InputError(f"{key}: no row of {path} can be trained on ({self.describe()}). {fix}")
