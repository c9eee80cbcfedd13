"""A family of tasks: how its content is drawn, how its answer is computed, and the phrasings that ask for it.

A phrasing is a template. If it contains `{c}`, it asks about the content inside the instruction. If not, it is generic,
and the content comes as the input. Other slots: `{w}` and `{x}` a word, `{n}` and `{m}` a number (a sum's
content is `{n}` and `{m}`), `{o}` an ordinal, `{k}` a category in the plural, `{l}` labels.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random

from toy_world import words

Slots = Mapping[str, str]

_SLOT_PATTERNS = {
    "c": r"(?P<c>[a-z0-9]+(?: [a-z0-9]+)*)",
    "w": r"(?P<w>[a-z]+)",
    "x": r"(?P<x>[a-z]+)",
    "n": r"(?P<n>[0-9]+)",
    "m": r"(?P<m>[0-9]+)",
    "o": r"(?P<o>[a-z]+)",
    "k": r"(?P<k>[a-z]+)",
    "l": r"(?P<l>[a-z]+, [a-z]+ or [a-z]+)",
}


def some(rng: Random, low: int, high: int, pool: tuple[str, ...] = words.CONTENT_WORDS) -> list[str]:
    """`low` to `high` different words of `pool`."""
    return rng.sample(pool, rng.randint(low, high))


def numbers(rng: Random, low: int, high: int, below: int = 100) -> list[str]:
    """`low` to `high` different numbers from 0 to `below` - 1."""
    return [str(number) for number in rng.sample(range(below), rng.randint(low, high))]


def content(words_: list[str], **others: str) -> dict[str, str]:
    """Slots of a task about these words."""
    return {"c": " ".join(words_), **others}


@dataclass(frozen=True)
class Family:
    """`make` draws the slots of a task; `solve` gives the answer, or None if the slots make no sense."""

    name: str
    make: Callable[[Random], dict[str, str]]
    solve: Callable[[Slots], str | None]
    seen: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    is_classification: bool = False  # only its generic phrasings ask for one of a fixed set of labels
    weight: float = 1.0  # how often it is drawn, relative to the other families
    only_unseen: bool = False  # the whole family is only evaluated

    @cached_property
    def phrasings(self) -> tuple["Phrasing", ...]:
        seen = tuple(Phrasing(self, template, held_out=self.only_unseen) for template in self.seen)
        return seen + tuple(Phrasing(self, template, held_out=True) for template in self.held_out)


@dataclass(frozen=True)
class Phrasing:
    family: Family
    template: str
    held_out: bool

    @property
    def takes_input(self) -> bool:
        return "{c}" not in self.template and "{m}" not in self.template

    @property
    def is_classification(self) -> bool:
        return self.family.is_classification and self.takes_input

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the whole instruction, whatever its end mark and in upper or lower case."""
        parts = re.split(r"\{(\w)\}", self.template.rstrip(".?:"))
        expression = ""
        for index, part in enumerate(parts):
            is_slot, again = index % 2 == 1, part in parts[1:index:2]
            expression += (f"(?P={part})" if again else _SLOT_PATTERNS[part]) if is_slot else re.escape(part)
        return re.compile(expression + r"[.?:]?", re.IGNORECASE)

    @property
    def literal_length(self) -> int:
        return len(re.sub(r"\{\w\}", "", self.template))

    def task(self, rng: Random) -> "Task":
        return self.with_slots(self.family.make(rng))

    def with_slots(self, slots: Slots) -> "Task":
        instruction = self.template.format_map(slots)
        output = self.family.solve(slots)
        if output is None:
            raise ValueError(f"{self.family.name}: no answer for {dict(slots)}")
        return Task(self, dict(slots), instruction, slots["c"] if self.takes_input else "", output)


@dataclass(frozen=True)
class Task:
    phrasing: Phrasing
    slots: Slots
    instruction: str
    input: str  # empty where the content is in the instruction
    output: str
