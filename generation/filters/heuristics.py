"""Rules about the surface of a text: its length, its beginning, forbidden words.

Together and in this order they are the heuristics of Self-Instruct (Wang et al., 2023, §2.2 and its released code,
`bootstrap_instructions.py`), which Alpaca took over.
"""

import re
import string
from collections.abc import Iterable

from generation.config.filters import (
    BeginsWithConfig,
    BlacklistConfig,
    EmptyConfig,
    FirstCharacterConfig,
    LengthConfig,
    SameAsInputConfig,
    TruncationConfig,
)
from generation.filters.drafts import Check, Draft, Rejection, check_fields


def any_phrase(phrases: Iterable[str]) -> re.Pattern | None:
    """A pattern of the phrases as whole words, in upper or lower case. At one place it finds the longest phrase."""
    choices = "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{choices})(?!\w)", re.IGNORECASE) if choices else None


def empty(config: EmptyConfig) -> Check:
    def check(draft: Draft) -> Rejection | None:
        for name in config.fields:
            text: str | None = getattr(draft, name)
            if text is not None and not text.strip():
                return Rejection("empty" if name == "instruction" else f"empty_{name}")
        return None

    return check


def length(config: LengthConfig) -> Check:
    def check_text(text: str) -> Rejection | None:
        for num, unit, low, high in (
            (len(text.split()), "words", config.min_words, config.max_words),
            (len(text), "characters", config.min_characters, config.max_characters),
        ):
            if num < low:
                return Rejection("too_short", f"{num} {unit}")
            if high is not None and num > high:
                return Rejection("too_long", f"{num} {unit}")
        return None

    return check_fields(config.fields, check_text)


def blacklist(config: BlacklistConfig) -> Check:
    pattern = any_phrase(config.words)

    def check_text(text: str) -> Rejection | None:
        found = pattern.search(text) if pattern else None
        return Rejection("blacklisted_word", found.group()) if found else None

    return check_fields(config.fields, check_text)


def begins_with(config: BeginsWithConfig) -> Check:
    def fold(text: str) -> str:
        return text.casefold() if config.ignore_case else text

    def check_text(text: str) -> Rejection | None:
        found = next((start for start in config.texts if fold(text).startswith(fold(start))), None)
        return Rejection("begins_with", found) if found is not None else None

    return check_fields(config.fields, check_text)


def first_character(config: FirstCharacterConfig) -> Check:
    def check_text(text: str) -> Rejection | None:
        if config.reject_punctuation and text[:1] and text[0] in string.punctuation:
            return Rejection("starts_with_punctuation", text[0])
        if config.reject_non_ascii and not text[:1].isascii():
            return Rejection("starts_with_non_ascii", text[0])
        return None

    return check_fields(config.fields, check_text)


def truncation(config: TruncationConfig) -> Check:
    def check(draft: Draft) -> Rejection | None:
        return Rejection("truncated") if draft.finish_reason == "length" else None

    return check


def same_as_input(config: SameAsInputConfig) -> Check:
    def check(draft: Draft) -> Rejection | None:
        is_same = draft.output is not None and draft.output.strip() == draft.input.strip()
        return Rejection("input_equals_output") if is_same else None

    return check
