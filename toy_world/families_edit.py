"""Families that change the words of a list or how it is written."""

from random import Random

from toy_world.family import Family, Slots, content, some
from toy_world.words import SPELLED_WORDS


def _words(slots: Slots) -> list[str]:
    return slots["c"].split()


def _make_replace(rng: Random) -> dict[str, str]:
    chosen = some(rng, 4, 5)
    return content(chosen[1:], w=rng.choice(chosen[1:]), x=chosen[0])


def _solve_replace(slots: Slots) -> str | None:
    if slots["w"] not in _words(slots):
        return None
    return " ".join(slots["x"] if word == slots["w"] else word for word in _words(slots))


def _make_remove(rng: Random) -> dict[str, str]:
    chosen = some(rng, 3, 5)
    return content(chosen, w=rng.choice(chosen))


def _solve_remove(slots: Slots) -> str | None:
    if slots["w"] not in _words(slots):
        return None
    return " ".join(word for word in _words(slots) if word != slots["w"]) or None


def _make_add_word(rng: Random) -> dict[str, str]:
    chosen = some(rng, 4, 5)
    return content(chosen[1:], w=chosen[0])


def _spelled(rng: Random) -> dict[str, str]:
    return content(some(rng, 3, 4, SPELLED_WORDS))


UPPER = Family(
    "upper case",
    _spelled,
    lambda slots: slots["c"].upper(),
    seen=(
        "Write in upper case: {c}",
        "Write {c} in upper case.",
        "Put in capital letters: {c}",
        "Turn into upper case: {c}",
        "Change to capital letters: {c}",
        "Write {c} in capital letters.",
        "Say in upper case: {c}",
        "Shout these words: {c}",
        "Make all letters capital: {c}",
        "Write in big letters: {c}",
        "Write the input in upper case.",
    ),
    held_out=("Put in upper case: {c}", "Turn {c} into capital letters.", "Say {c} in big letters."),
)
TITLE = Family(
    "title case",
    _spelled,
    lambda slots: slots["c"].title(),
    seen=(
        "Capitalize each word: {c}",
        "Capitalize the words: {c}",
        "Write in title case: {c}",
        "Write {c} in title case.",
        "Put in title case: {c}",
        "Turn into title case: {c}",
        "Write as a title: {c}",
        "Capitalize every word: {c}",
        "Make a title of: {c}",
        "Capitalize the list: {c}",
        "Capitalize each word of the input.",
    ),
    held_out=("Capitalize these words: {c}", "Say in title case: {c}", "Turn {c} into a title."),
)
COMMAS = Family(
    "join with commas",
    lambda rng: content(some(rng, 3, 5)),
    lambda slots: ", ".join(_words(slots)),
    seen=(
        "Join with commas: {c}",
        "Join {c} with commas.",
        "Put commas between: {c}",
        "Separate with commas: {c}",
        "Write {c} with commas.",
        "Add commas to: {c}",
        "Use commas between: {c}",
        "List with commas: {c}",
        "Put a comma after each: {c}",
        "Make a comma list: {c}",
        "Join the words of the input with commas.",
    ),
    held_out=("Write with commas: {c}", "Separate {c} with commas.", "Add commas between: {c}"),
)
AND = Family(
    "join with and",
    lambda rng: content(some(rng, 2, 4)),
    lambda slots: " and ".join(_words(slots)),
    seen=(
        "Join with and: {c}",
        "Join {c} with the word and.",
        "Put and between: {c}",
        "Write {c} with and between.",
        "Use and between: {c}",
        "Add and between: {c}",
        "Link with and: {c}",
        "Link {c} with the word and.",
        "Connect with and: {c}",
        "Connect by and: {c}",
    ),
    held_out=("Link by and: {c}", "Connect {c} with the word and.", "Write and between: {c}"),
)
DASHES = Family(
    "join with dashes",
    lambda rng: content(some(rng, 3, 4)),
    lambda slots: " - ".join(_words(slots)),
    seen=(
        "Join with dashes: {c}",
        "Join {c} with dashes.",
        "Put dashes between: {c}",
        "Separate with dashes: {c}",
        "Write {c} with dashes.",
        "Add dashes to: {c}",
        "Use dashes between: {c}",
        "List with dashes: {c}",
        "Put a dash after each: {c}",
        "Make a dash list: {c}",
    ),
    held_out=("Write with dashes: {c}", "Separate {c} with dashes.", "Add dashes between: {c}"),
)
NUMBERED = Family(
    "numbered list",
    lambda rng: content(some(rng, 3, 4)),
    lambda slots: " ".join(f"{index}. {word}" for index, word in enumerate(_words(slots), 1)),
    seen=(
        "Write as a numbered list: {c}",
        "Make a numbered list: {c}",
        "List with numbers: {c}",
        "Number the words: {c}",
        "Number each word: {c}",
        "Write {c} as numbered items.",
        "Turn into numbered items: {c}",
        "Give a numbered list: {c}",
        "Use numbers to list: {c}",
        "Put a number before each: {c}",
    ),
    held_out=("Turn into a numbered list: {c}", "Write {c} as a numbered list.", "Give numbered items: {c}"),
)
REPLACE = Family(
    "replace a word",
    _make_replace,
    _solve_replace,
    seen=(
        "Replace {w} with {x}: {c}",
        "Replace {w} with {x} in: {c}",
        "Change {w} to {x}: {c}",
        "Change {w} to {x} in: {c}",
        "Put {x} for {w}: {c}",
        "Write {x} instead of {w}: {c}",
        "Use {x} instead of {w}: {c}",
        "Swap {w} for {x}: {c}",
        "Swap {w} for {x} in: {c}",
        "Turn {w} into {x}: {c}",
        "In the input, replace {w} with {x}.",
    ),
    held_out=("Turn {w} into {x} in: {c}", "Put {x} instead of {w}: {c}", "In the input, change {w} to {x}."),
    weight=1.5,
)
REMOVE = Family(
    "remove a word",
    _make_remove,
    _solve_remove,
    seen=(
        "Remove {w} from: {c}",
        "Remove the word {w}: {c}",
        "Delete {w} from: {c}",
        "Delete the word {w}: {c}",
        "Drop {w} from: {c}",
        "Leave out {w}: {c}",
        "Take out {w}: {c}",
        "Write without {w}: {c}",
        "Say {c} without {w}.",
        "Skip the word {w}: {c}",
        "Remove {w} from the input.",
    ),
    held_out=("Drop the word {w}: {c}", "Take {w} out of: {c}", "Write {c} without {w}.", "Delete {w} from the input."),
    weight=1.5,
)
APPEND = Family(
    "add at the end",
    _make_add_word,
    lambda slots: f"{slots['c']} {slots['w']}",
    seen=(
        "Add {w} to the end: {c}",
        "Add {w} at the end: {c}",
        "Put {w} last: {c}",
        "Put {w} at the end of: {c}",
        "Append {w} to: {c}",
        "Append {w} to the list: {c}",
        "End with {w}: {c}",
        "End the list with {w}: {c}",
        "Write {w} after: {c}",
        "Put {w} after: {c}",
        "Add {w} to the end of the input.",
    ),
    held_out=("Write {w} at the end: {c}", "Put {w} at the end: {c}", "Add {w} after: {c}"),
)
PREPEND = Family(
    "add at the start",
    _make_add_word,
    lambda slots: f"{slots['w']} {slots['c']}",
    seen=(
        "Add {w} to the start: {c}",
        "Add {w} at the start: {c}",
        "Put {w} first: {c}",
        "Put {w} at the start of: {c}",
        "Begin with {w}: {c}",
        "Begin the list with {w}: {c}",
        "Start with {w}: {c}",
        "Start the list with {w}: {c}",
        "Write {w} before: {c}",
        "Put {w} before: {c}",
        "Add {w} to the start of the input.",
    ),
    held_out=("Write {w} at the start: {c}", "Put {w} at the start: {c}", "Add {w} before: {c}"),
)

FAMILIES = (UPPER, TITLE, COMMAS, AND, DASHES, NUMBERED, REPLACE, REMOVE, APPEND, PREPEND)
