"""Families that combine skills of the others. Some are taught, the rest only evaluated.

The taught ones show that an instruction can name two steps. The others ask for pairs of steps that never occur together
in the documents, in words that do.
"""

from toy_world.families_meaning import make_select, members
from toy_world.family import Family, Slots, content, some
from toy_world.words import SPELLED_WORDS


def _words(slots: Slots) -> list[str]:
    return slots["c"].split()


FIRST_UPPER = Family(
    "first word in upper case",
    lambda rng: content(some(rng, 3, 4, SPELLED_WORDS)),
    lambda slots: _words(slots)[0].upper(),
    seen=(
        "Give the first word in upper case: {c}",
        "Write the first word in capital letters: {c}",
        "Shout the first word: {c}",
        "Shout only the first word of: {c}",
        "Say the first word in upper case: {c}",
        "Write the first word of {c} in upper case.",
        "First word in upper case: {c}",
        "Take the first word in capital letters: {c}",
        "Pick the first word in upper case: {c}",
        "First of these in capital letters: {c}",
    ),
    held_out=("Give the first word in capital letters: {c}", "First word in capital letters: {c}"),
)
REVERSE_COMMAS = Family(
    "reverse with commas",
    lambda rng: content(some(rng, 3, 3)),
    lambda slots: ", ".join(reversed(_words(slots))),
    seen=(
        "Reverse with commas: {c}",
        "Reverse and join with commas: {c}",
        "Write {c} backwards with commas.",
        "Write backwards with commas: {c}",
        "Reverse the words with commas: {c}",
        "Flip and join with commas: {c}",
        "Reverse the list and add commas: {c}",
        "Flip this list with commas: {c}",
        "Join backwards with commas: {c}",
        "Join in reverse order with commas: {c}",
    ),
    held_out=("Reverse {c} with commas.", "Flip with commas: {c}"),
)
REVERSE_UPPER = Family(
    "reverse in upper case",
    lambda rng: content(some(rng, 3, 3, SPELLED_WORDS)),
    lambda slots: " ".join(reversed(_words(slots))).upper(),
    seen=(
        "Reverse in upper case: {c}",
        "Reverse the words in capital letters: {c}",
        "Write {c} backwards in upper case.",
    ),
    only_unseen=True,
)
LAST_UPPER = Family(
    "last word in upper case",
    lambda rng: content(some(rng, 3, 4, SPELLED_WORDS)),
    lambda slots: _words(slots)[-1].upper(),
    seen=(
        "Give the last word in upper case: {c}",
        "Write the last word in capital letters: {c}",
        "Shout the last word: {c}",
    ),
    only_unseen=True,
)
SECOND_LAST = Family(
    "second to last word",
    lambda rng: content(some(rng, 3, 4)),
    lambda slots: _words(slots)[-2] if len(_words(slots)) > 1 else None,
    seen=(
        "Give the second to last word: {c}",
        "Which word is second to last: {c}",
        "Say only the second to last word: {c}",
    ),
    only_unseen=True,
)
COUNT_CATEGORY = Family(
    "count a category",
    make_select,
    lambda slots: None if members(slots) is None else str(len(members(slots))),
    seen=(
        "How many {k} are here: {c}",
        "Count the {k} in: {c}",
        "Give the number of {k} in: {c}",
    ),
    only_unseen=True,
)

TAUGHT = (FIRST_UPPER, REVERSE_COMMAS)
UNSEEN = (REVERSE_UPPER, LAST_UPPER, SECOND_LAST, COUNT_CATEGORY)
