"""Rules for one draft. Each function makes the check of one filter of a recipe.

The first ones, up to `first_character` and in this order, are the heuristics of Self-Instruct (Wang et al., 2023, §2.2
and its released code, `bootstrap_instructions.py`), which Alpaca took over. Others are about failures of a model: a
copied prompt, a refusal, no content, repetition, a wrong language.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import groupby

from rapidfuzz import fuzz

from cluster.errors import InputError
from generation.config.filters import (
    BeginsWithConfig,
    BlacklistConfig,
    EmptyConfig,
    FieldName,
    FirstCharacterConfig,
    FormatLeakageConfig,
    LanguageConfig,
    LengthConfig,
    OnlyStopwordsConfig,
    ReasoningConfig,
    RefusalConfig,
    RepeatsInstructionConfig,
    RepetitionConfig,
    SameAsInputConfig,
    TruncationConfig,
)
from generation.filters.drafts import Draft, Instance, Rejection
from generation.filters.reasoning import marks as reasoning_marks
from generation.filters.words import UNSPACED_CHARACTER, split_words

Check = Callable[[Draft], Rejection | None]
WORD = re.compile(r"\w+(?:'\w+)*")
QUOTATION = re.compile(r'"[^"\n]*"|“[^”]*”|«[^»]*»|「[^」]*」')
STRAIGHT = str.maketrans("‘’", "''")  # models write either apostrophe


def check_fields(fields: tuple[FieldName, ...], check_text: Callable[[str], Rejection | None]) -> Check:
    """Make a check of drafts from a check of texts. The first rejected field decides; the detail names the field.

    An output that is not written yet is skipped.
    """

    def check(draft: Draft) -> Rejection | None:
        for name in fields:
            text: str | None = getattr(draft, name)
            if text is None or (rejection := check_text(text)) is None:
                continue
            if name == "instruction":
                return rejection
            return Rejection(rejection.reason, f"{name}: {rejection.detail}" if rejection.detail else name)
        return None

    return check


def any_phrase(phrases: Iterable[str], whole_words: bool = True) -> re.Pattern:
    """A pattern of the phrases in upper or lower case. At one place it finds the longest phrase.

    In scripts without spaces, a phrase is whole wherever it is.
    """

    def pattern(phrase: str) -> str:
        begin, end = ("" if UNSPACED_CHARACTER.match(edge) else r"(?{}\w)" for edge in (phrase[:1], phrase[-1:]))
        return begin.format("<!") + re.escape(phrase) + end.format("!") if whole_words else re.escape(phrase)

    choices = "|".join(map(pattern, sorted(phrases, key=len, reverse=True))) or "(?!)"  # never found
    return re.compile(choices, re.IGNORECASE)


def _reject_found(fields: tuple[FieldName, ...], pattern: re.Pattern, reason: str) -> Check:
    def check_text(text: str) -> Rejection | None:
        found = pattern.search(text)
        return Rejection(reason, found.group()) if found else None

    return check_fields(fields, check_text)


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
            (len(split_words(text)), "words", config.min_words, config.max_words),
            (len(text), "characters", config.min_characters, config.max_characters),
        ):
            if num < low:
                return Rejection("too_short", f"{num} {unit}")
            if high is not None and num > high:
                return Rejection("too_long", f"{num} {unit}")
        return None

    return check_fields(config.fields, check_text)


def blacklist(config: BlacklistConfig) -> Check:
    return _reject_found(config.fields, any_phrase(config.words), "blacklisted_word")


def begins_with(config: BeginsWithConfig) -> Check:
    def fold(text: str) -> str:
        return text.casefold() if config.ignore_case else text

    def check_text(text: str) -> Rejection | None:
        found = next((start for start in config.texts if fold(text).startswith(fold(start))), None)
        return Rejection("begins_with", found) if found is not None else None

    return check_fields(config.fields, check_text)


def first_character(config: FirstCharacterConfig) -> Check:
    def check_text(text: str) -> Rejection | None:
        if config.reject_punctuation and text[:1] and is_mark(text[0]):
            return Rejection("starts_with_punctuation", text[0])
        if config.reject_non_ascii and not text[:1].isascii():
            return Rejection("starts_with_non_ascii", text[0])
        return None

    return check_fields(config.fields, check_text)


def is_mark(character: str) -> bool:
    """Whether a character is punctuation of ASCII, or another mark or symbol that does not open a sentence or quote."""
    if character in string.punctuation:
        return True
    category = unicodedata.category(character)
    return category[0] in "PS" and category not in ("Ps", "Pi") and character not in "¿¡"


def truncation(config: TruncationConfig) -> Check:
    return lambda draft: Rejection("truncated") if draft.finish_reason == "length" else None


def same_as_input(config: SameAsInputConfig) -> Check:
    def check(draft: Draft) -> Rejection | None:
        is_same = draft.output is not None and draft.output.strip() == draft.input.strip()
        return Rejection("input_equals_output") if is_same else None

    return check


def format_leakage(config: FormatLeakageConfig) -> Check:
    # A marker may touch other characters: "####Instruction:Sort" leaks too.
    return _reject_found(config.fields, any_phrase(config.markers, whole_words=False), "format_leakage")


def refusal(config: RefusalConfig) -> Check:
    phrases = [phrase.translate(STRAIGHT).lower() for phrase in config.phrases]
    anywhere = any_phrase(phrases)
    in_short_texts = any_phrase(phrase.translate(STRAIGHT) for phrase in config.short_phrases)

    def check_text(text: str) -> Rejection | None:
        text = QUOTATION.sub(" ", text.translate(STRAIGHT))
        lowered = text.lower()
        may_be = any(phrase in lowered for phrase in phrases)  # fifty times as fast as the pattern
        found = anywhere.search(text) if may_be else None
        if not found and len(split_words(text)) < config.max_words:
            found = in_short_texts.search(text)
        return Rejection("refusal", found.group()) if found else None

    return check_fields(config.fields, check_text)


def reasoning(config: ReasoningConfig) -> Check:
    beginning = re.compile(rf"\s*(?:{'|'.join(map(re.escape, config.beginnings)) or '(?!)'})\b", re.IGNORECASE)

    def check_text(text: str) -> Rejection | None:
        found = beginning.match(text) or next(reasoning_marks(text), None)
        return Rejection("reasoning", found.group().strip()) if found else None

    return check_fields(config.fields, check_text)


def repeats_instruction(config: RepeatsInstructionConfig) -> Check:
    def is_same(first: str, second: str) -> bool:
        return bool(first) and fuzz.ratio(first, second) >= 100 * config.min_similarity

    def check(draft: Draft) -> Rejection | None:
        if draft.output is None:
            return None
        instruction, output = _letters(draft.instruction), _letters(draft.output)
        whole = f"{instruction}{_letters(draft.input)}"
        is_repeated = is_same(instruction, output) or (output.startswith(instruction) and is_same(whole, output))
        return Rejection("repeats_instruction") if is_repeated else None

    return check


def _letters(text: str) -> str:
    return "".join(WORD.findall(text.translate(STRAIGHT).casefold()))


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
        words = _units_of_repetition(text.casefold())
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


def _units_of_repetition(text: str) -> list[str]:
    """Words, and in scripts without spaces groups of three characters, one from each character on."""
    characters = UNSPACED_CHARACTER.findall(text)
    if 2 * len(characters) <= len(text):
        return text.split()
    return ["".join(characters[place : place + 3]) for place in range(len(characters))]


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


# -- the instances of a task (Self-Instruct)


def check_instance(instance: Instance) -> Rejection | None:
    """Why this instance is rejected, or None. The rules of the released `prepare_for_finetuning.py`, in its order."""
    if instance.input == instance.output:
        return Rejection("input_equals_output")
    if not instance.output:
        return Rejection("empty_output")
    if instance.input.endswith(":") or instance.output.endswith(":"):
        return Rejection("ends_with_colon")
    return None


def check_instances(
    instances: list[Instance], drop_contradictions: bool = True, is_classification: bool = False
) -> list[tuple[Instance, Rejection | None]]:
    """Each instance of one task with why it is rejected, or None.

    If one input has two different outputs, no instance can be trusted: all are rejected if `drop_contradictions`. If
    there is no input, only outputs of classification contradict each other; other tasks may have several answers. The
    released code lets labels without inputs pass.
    """
    decisions: list[tuple[Instance, Rejection | None]] = []
    outputs: dict[str, set[str]] = {}
    seen: set[Instance] = set()
    for instance in instances:
        rejection = check_instance(instance)
        if rejection is None and instance in seen:
            rejection = Rejection("duplicate_instance")
        if rejection is None:
            seen.add(instance)
            outputs.setdefault(instance.input, set()).add(instance.output)
        decisions.append((instance, rejection))
    several = (text for text, found in outputs.items() if len(found) > 1)
    contradiction = next((text for text in several if text or is_classification), None)
    if contradiction is None or not drop_contradictions:
        return decisions
    why = Rejection("contradicting_outputs", f"input {contradiction!r} has {len(outputs[contradiction])} outputs")
    return [(instance, rejection or why) for instance, rejection in decisions]
