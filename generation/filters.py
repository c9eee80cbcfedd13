"""Rules that a synthesized instruction or instance must pass. Each returns why it fails, or None.

The rules are those of Self-Instruct (Wang et al., 2023, §2.2 and its released code, `bootstrap_instructions.py` and
`prepare_for_finetuning.py`), in their order.
"""

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why something was rejected: a reason to count by, and what exactly."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Instance:
    """One input (may be empty) and the output it asks for."""

    input: str
    output: str


class InstructionRules:
    """The heuristics for one instruction."""

    def __init__(self, min_words: int, max_words: int, blacklist: Iterable[str]) -> None:
        """Instructions of fewer than `min_words` or more than `max_words`, or with a blacklisted word, are rejected."""
        self._min_words = min_words
        self._max_words = max_words
        words = "|".join(re.escape(word) for word in sorted(blacklist, key=len, reverse=True))
        self._blacklist = re.compile(rf"\b(?:{words})\b", re.IGNORECASE) if words else None

    def check(self, instruction: str) -> Rejection | None:
        """Why this instruction is rejected, or None."""
        if not instruction:
            return Rejection("empty")
        num_words = len(instruction.split())
        if num_words < self._min_words:
            return Rejection("too_short", f"{num_words} words")
        if num_words > self._max_words:
            return Rejection("too_long", f"{num_words} words")
        if self._blacklist and (found := self._blacklist.search(instruction)):
            return Rejection("blacklisted_word", found.group())
        if instruction.startswith("Write a program"):
            return Rejection("write_a_program")
        if instruction[0] in string.punctuation:
            return Rejection("starts_with_punctuation", instruction[0])
        if not instruction[0].isascii():
            return Rejection("starts_with_non_ascii", instruction[0])
        return None


def check_instance(instance: Instance) -> Rejection | None:
    """Why this instance is rejected on its own, or None."""
    if instance.input == instance.output:
        return Rejection("input_equals_output")
    if not instance.output:
        return Rejection("empty_output")
    if instance.input.endswith(":") or instance.output.endswith(":"):
        return Rejection("ends_with_colon")
    return None


def check_instances(instances: list[Instance]) -> list[tuple[Instance, Rejection | None]]:
    """Judge all instances of one task, in order.

    An input that has two different outputs makes all of them untrustworthy: the task loses every instance.
    """
    verdicts: list[tuple[Instance, Rejection | None]] = []
    outputs: dict[str, set[str]] = {}
    seen: set[Instance] = set()
    for instance in instances:
        rejection = check_instance(instance)
        if rejection is None and instance in seen:
            rejection = Rejection("duplicate_instance")
        if rejection is None:
            seen.add(instance)
            outputs.setdefault(instance.input, set()).add(instance.output)
        verdicts.append((instance, rejection))
    contradiction = next((text for text, found in outputs.items() if text and len(found) > 1), None)
    if contradiction is None:
        return verdicts
    why = Rejection("contradicting_outputs", f"input {contradiction!r} has {len(outputs[contradiction])} outputs")
    return [(instance, rejection or why) for instance, rejection in verdicts]
