"""Rules about failures of a model: a copied prompt, a refusal, no content, repetition, a wrong language."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby

from cluster.errors import InputError
from generation.config.filters import (
    FormatLeakageConfig,
    LanguageConfig,
    OnlyStopwordsConfig,
    RefusalConfig,
    RepetitionConfig,
)
from generation.filters.drafts import Check, Rejection, check_fields
from generation.filters.heuristics import any_phrase

WORD = re.compile(r"\w+(?:'\w+)*")
STRAIGHT = str.maketrans("‘’", "''")  # models write either apostrophe


def format_leakage(config: FormatLeakageConfig) -> Check:
    # A marker may touch other characters: "####Instruction:Sort" leaks too.
    choices = "|".join(re.escape(marker) for marker in sorted(config.markers, key=len, reverse=True))
    pattern = re.compile(choices, re.IGNORECASE) if choices else None

    def check_text(text: str) -> Rejection | None:
        found = pattern.search(text) if pattern else None
        return Rejection("format_leakage", found.group()) if found else None

    return check_fields(config.fields, check_text)


def refusal(config: RefusalConfig) -> Check:
    anywhere = any_phrase(phrase.translate(STRAIGHT) for phrase in config.phrases)
    in_short_texts = any_phrase(phrase.translate(STRAIGHT) for phrase in config.short_phrases)

    def check_text(text: str) -> Rejection | None:
        text = text.translate(STRAIGHT)
        found = anywhere.search(text) if anywhere else None
        if not found and in_short_texts and len(text.split()) < config.max_words:
            found = in_short_texts.search(text)
        return Rejection("refusal", found.group()) if found else None

    return check_fields(config.fields, check_text)


def only_stopwords(config: OnlyStopwordsConfig) -> Check:
    stop_words = {word.casefold() for word in config.stop_words}

    def check_text(text: str) -> Rejection | None:
        if not text.strip():
            return None  # the filter `empty` decides
        words = WORD.findall(text.translate(STRAIGHT).casefold())
        return Rejection("only_stopwords") if all(word in stop_words for word in words) else None

    return check_fields(config.fields, check_text)


def repetition(config: RepetitionConfig) -> Check:
    def check_text(text: str) -> Rejection | None:
        words = text.casefold().split()
        run = max((len(list(group)) for _, group in groupby(words)), default=0)
        if run > config.max_run:
            return Rejection("repetition", f"one word {run} times in a row")
        if len(words) < config.min_words:
            return None
        share = duplicate_share(words, config.ngram_words)
        if share > config.max_duplicate_share:
            return Rejection("repetition", f"{share:.2f} inside repeated {config.ngram_words}-grams")
        return None

    return check_fields(config.fields, check_text)


def duplicate_share(words: list[str], ngram_words: int) -> float:
    """Share of characters in repeated n-grams. Each character is counted once; an n-gram's first occurrence is not."""
    num_characters = sum(map(len, words))
    repeated = set(_repeated_positions(words, ngram_words))
    return sum(len(words[position]) for position in repeated) / num_characters if num_characters else 0.0


def _repeated_positions(words: list[str], ngram_words: int) -> Iterator[int]:
    seen: set[tuple[str, ...]] = set()
    for start in range(len(words) - ngram_words + 1):
        ngram = tuple(words[start : start + ngram_words])
        if ngram in seen:
            yield from range(start, start + ngram_words)
        seen.add(ngram)


def language(config: LanguageConfig) -> Check:
    identifier = language_identifier()
    if unknown := set(config.allowed) - set(identifier.labels):
        raise InputError(
            f"filter language: py3langid does not know {', '.join(sorted(unknown))} in `allowed`; "
            f"it knows {', '.join(sorted(identifier.labels))}"
        )

    def check_text(text: str) -> Rejection | None:
        if sum(map(str.isalpha, text)) < config.min_letters:
            return None
        found, _ = identifier.classify(text)
        return Rejection("wrong_language", found) if found not in config.allowed else None

    return check_fields(config.fields, check_text)


@cache
def language_identifier():
    """py3langid's identifier with the model of its package. Loading takes half a second, once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
