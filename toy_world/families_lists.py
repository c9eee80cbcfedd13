"""Families about a list of words: its order, its members, its length."""

from random import Random

from toy_world.family import Family, Slots, content, some
from toy_world.words import ORDINALS, SPELLED_WORDS


def _words(slots: Slots) -> list[str]:
    return slots["c"].split()


def _make_repeat(rng: Random) -> dict[str, str]:
    chosen = some(rng, 1, 2)
    return content(chosen, n=str(rng.randint(2, 4 if len(chosen) == 1 else 3)))


def _make_nth(rng: Random) -> dict[str, str]:
    name = rng.choice(tuple(ORDINALS))
    return content(some(rng, max(3, ORDINALS[name]), 5), o=name)


def _solve_nth(slots: Slots) -> str | None:
    place, chosen = ORDINALS.get(slots["o"]), _words(slots)
    return chosen[place - 1] if place and place <= len(chosen) else None


def _make_count_word(rng: Random) -> dict[str, str]:
    chosen = some(rng, 3, 3)
    repeated = [chosen[0]] * rng.randint(1, 3) + [rng.choice(chosen[1:]) for _ in range(rng.randint(1, 3))]
    rng.shuffle(repeated)
    return content(repeated, w=chosen[0])


def _make_repeats(rng: Random) -> dict[str, str]:
    chosen = some(rng, 2, 3)
    repeated = chosen + rng.sample(chosen, rng.randint(1, 2))
    rng.shuffle(repeated)
    return content(repeated)


def _make_contains(rng: Random) -> dict[str, str]:
    chosen = some(rng, 4, 5)
    return content(chosen[1:], w=rng.choice(chosen[1:]) if rng.random() < 0.5 else chosen[0])


COPY = Family(
    "copy",
    lambda rng: content(some(rng, 3, 5)),
    lambda slots: slots["c"],
    seen=(
        "Repeat the words: {c}",
        "Repeat this list: {c}",
        "Copy the words: {c}",
        "Copy the whole list: {c}",
        "Say these words: {c}",
        "Say this again: {c}",
        "Write the same words: {c}",
        "Write this again: {c}",
        "Give the same list: {c}",
        "Keep the words as they are: {c}",
        "Write {c} again.",
        "Write down the list: {c}",
    ),
    held_out=("Copy this list: {c}", "Say the same words: {c}", "Repeat these words again: {c}"),
)
REPEAT = Family(
    "repeat",
    _make_repeat,
    lambda slots: " ".join([slots["c"]] * int(slots["n"])) if 0 < int(slots["n"]) < 10 else None,
    seen=(
        "Write {c} {n} times.",
        "Repeat {c} {n} times.",
        "Say {c} {n} times.",
        "Copy {c} {n} times.",
        "Write {n} times: {c}",
        "Repeat {n} times: {c}",
        "Say {n} times: {c}",
        "Write {n} copies of {c}.",
        "Give {n} copies of {c}.",
        "Repeat this {n} times: {c}",
    ),
    held_out=("Copy {n} times: {c}", "Say this {n} times: {c}", "Give {c} {n} times."),
)
REVERSE = Family(
    "reverse",
    lambda rng: content(some(rng, 3, 4)),
    lambda slots: " ".join(reversed(_words(slots))),
    seen=(
        "Reverse the words: {c}",
        "Reverse this list: {c}",
        "Write {c} in reverse order.",
        "Put in reverse order: {c}",
        "Flip the order of: {c}",
        "Flip this list: {c}",
        "Write {c} backwards.",
        "Say these words backwards: {c}",
        "Read the list backwards: {c}",
        "List {c} from last to first.",
        "Give the reverse of: {c}",
        "Turn around the list: {c}",
        "Reverse the words in the input.",
        "Write the input backwards.",
    ),
    held_out=(
        "Flip the words: {c}",
        "Say {c} in reverse order.",
        "Write the list backwards: {c}",
        "Reverse the whole input.",
    ),
    weight=2.5,
)
SORT = Family(
    "sort words",
    lambda rng: content(some(rng, 3, 4, SPELLED_WORDS)),
    lambda slots: " ".join(sorted(_words(slots))),
    seen=(
        "Sort the words: {c}",
        "Sort alphabetically: {c}",
        "Put {c} in alphabetical order.",
        "Sort {c} from a to z.",
        "Arrange alphabetically: {c}",
        "Arrange {c} from a to z.",
        "Order the words alphabetically: {c}",
        "List in alphabetical order: {c}",
        "Write {c} in alphabetical order.",
        "Put this list in dictionary order: {c}",
        "Sort in dictionary order: {c}",
        "Sort the words of the input.",
        "Arrange the input in alphabetical order.",
    ),
    held_out=(
        "Arrange in alphabetical order: {c}",
        "Put the words in dictionary order: {c}",
        "Order {c} from a to z.",
        "Sort the input alphabetically.",
    ),
    weight=3,
)
COUNT = Family(
    "count words",
    lambda rng: content(some(rng, 3, 7)),
    lambda slots: str(len(_words(slots))),
    seen=(
        "How many words are here: {c}",
        "How many words: {c}",
        "Count the words: {c}",
        "Count the words in: {c}",
        "Give the number of words: {c}",
        "Tell how many words: {c}",
        "How long is the list: {c}",
        "Count how many words: {c}",
        "What is the word count of: {c}",
        "Say how many words this has: {c}",
        "How many words does the input have?",
        "Count the words of the input.",
    ),
    held_out=(
        "Say the number of words in: {c}",
        "Tell the word count: {c}",
        "How many words are in the list: {c}",
        "Give the number of words in the input.",
    ),
    weight=1.5,
)
COUNT_WORD = Family(
    "count a word",
    _make_count_word,
    lambda slots: str(_words(slots).count(slots["w"])),
    seen=(
        "How many times is {w} in: {c}",
        "Count {w} in: {c}",
        "Count the word {w} in: {c}",
        "How often is {w} in: {c}",
        "How often does {w} come in: {c}",
        "Tell how many times {w} is in: {c}",
        "Number of {w} in: {c}",
        "How many {w} are in: {c}",
        "Count every {w} in: {c}",
        "Say how often {w} is in: {c}",
    ),
    held_out=(
        "Say how many times {w} is in: {c}",
        "Count how often {w} is in: {c}",
        "Give the number of times {w} is in: {c}",
    ),
    weight=1.5,
)
FIRST = Family(
    "first word",
    lambda rng: content(some(rng, 3, 5)),
    lambda slots: _words(slots)[0],
    seen=(
        "Give the first word: {c}",
        "Give the first word of: {c}",
        "What comes first: {c}",
        "Which word is first: {c}",
        "Say only the first word: {c}",
        "Pick the first of: {c}",
        "Write the first word of {c}.",
        "Take the first item: {c}",
        "First word of: {c}",
        "Find the first item in: {c}",
        "Write only the first word of the input.",
        "Which word comes first in the input?",
    ),
    held_out=(
        "Pick the first word: {c}",
        "What is the first item of: {c}",
        "Which word comes first: {c}",
        "Give the first word of the input.",
    ),
)
LAST = Family(
    "last word",
    lambda rng: content(some(rng, 3, 5)),
    lambda slots: _words(slots)[-1],
    seen=(
        "Give the last word: {c}",
        "Give the last word of: {c}",
        "What comes last: {c}",
        "Which word is last: {c}",
        "Say only the last word: {c}",
        "Pick the last of: {c}",
        "Write the last word of {c}.",
        "Take the last item: {c}",
        "Which word ends this: {c}",
        "Find the last item in: {c}",
        "Write only the last word of the input.",
        "Which word comes last in the input?",
    ),
    held_out=(
        "Pick the last word: {c}",
        "What is the last item of: {c}",
        "Which word ends the list: {c}",
        "Give the last word of the input.",
    ),
)
NTH = Family(
    "nth word",
    _make_nth,
    _solve_nth,
    seen=(
        "Give the {o} word: {c}",
        "Give the {o} word of: {c}",
        "What comes {o}: {c}",
        "Which word is {o}: {c}",
        "Say only the {o} word: {c}",
        "Pick the {o} of: {c}",
        "Write the {o} word of {c}.",
        "Take the {o} item: {c}",
        "Find the {o} item in: {c}",
        "Find word {o} in: {c}",
    ),
    held_out=("Pick the {o} word: {c}", "What is the {o} item of: {c}", "Which word comes {o}: {c}"),
    weight=1.5,
)
UNIQUE = Family(
    "drop repeats",
    _make_repeats,
    lambda slots: " ".join(dict.fromkeys(_words(slots))),
    seen=(
        "Remove repeated words: {c}",
        "Remove the repeats: {c}",
        "Drop repeated words from: {c}",
        "Drop the repeats in: {c}",
        "Delete repeats: {c}",
        "Delete repeated words: {c}",
        "Write each word once: {c}",
        "List every different word: {c}",
        "Keep one of each word: {c}",
        "Give only the different words: {c}",
        "Say each different word once: {c}",
        "Remove repeated words from the input.",
    ),
    held_out=("Drop all the repeats: {c}", "Say each word once: {c}", "Remove repeats from: {c}"),
    weight=1.5,
)
CONTAINS = Family(
    "contains",
    _make_contains,
    lambda slots: "yes" if slots["w"] in _words(slots) else "no",
    seen=(
        "Is {w} in: {c}",
        "Is {w} in the list: {c}",
        "Is {w} one of: {c}",
        "Does this have {w}: {c}",
        "Does the list contain {w}: {c}",
        "Yes or no, is {w} in: {c}",
        "Can you find {w} in: {c}",
        "Tell if {w} is in: {c}",
        "Say if {w} is one of: {c}",
        "Check for {w} in: {c}",
        "Does the input contain {w}, yes or no?",
        "Is {w} in the input?",
    ),
    held_out=(
        "Does this contain {w}: {c}",
        "Say if {w} is in: {c}",
        "Check if {w} is one of: {c}",
        "Does the input have {w}, yes or no?",
    ),
    is_classification=True,
)
PATTERN = Family(
    "next word",
    lambda rng: (lambda w, n: content((w * 4)[:n]))(some(rng, 2, 3), rng.randint(5, 7)),
    lambda slots: _next_in_cycle(_words(slots)),
    seen=(
        "What word comes next: {c}",
        "Continue the pattern: {c}",
        "Give the next word: {c}",
        "Which word comes next: {c}",
        "Complete the pattern: {c}",
        "Say the next word after: {c}",
        "Find the next word: {c}",
        "Next word of the pattern: {c}",
        "Continue with one word: {c}",
        "What follows in the pattern: {c}",
    ),
    held_out=("Say what word comes next: {c}", "Give the next word of the pattern: {c}", "Which word follows: {c}"),
)


def _next_in_cycle(chosen: list[str]) -> str | None:
    for period in (2, 3):
        if len(chosen) > period and all(chosen[i] == chosen[i - period] for i in range(period, len(chosen))):
            return chosen[-period]
    return None


FAMILIES = (COPY, REPEAT, REVERSE, SORT, COUNT, COUNT_WORD, FIRST, LAST, NTH, UNIQUE, CONTAINS, PATTERN)
