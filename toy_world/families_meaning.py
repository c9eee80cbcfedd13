"""Families about what words mean: their category, their opposite."""

from random import Random

from toy_world.family import Family, Slots, content, some
from toy_world.words import (
    CATEGORY_OF,
    CATEGORY_OF_PLURAL,
    NAMED,
    OPPOSITE_OF,
    PLURAL_OF,
    QUALITIES,
    WORDS_OF,
)


def _mapped(slots: Slots, table: dict[str, str]) -> str | None:
    chosen = slots["c"].split()
    return " ".join(table[word] for word in chosen) if all(word in table for word in chosen) else None


def _make_odd_one_out(rng: Random) -> dict[str, str]:
    common, other = rng.sample(tuple(WORDS_OF), 2)
    chosen = [*rng.sample(WORDS_OF[common], rng.randint(2, 3)), rng.choice(WORDS_OF[other])]
    rng.shuffle(chosen)
    return content(chosen)


def _solve_odd_one_out(slots: Slots) -> str | None:
    chosen = slots["c"].split()
    if len(chosen) < 3 or not all(word in CATEGORY_OF for word in chosen):
        return None
    categories = [CATEGORY_OF[word] for word in chosen]
    alone = [word for word, category in zip(chosen, categories, strict=True) if categories.count(category) == 1]
    return alone[0] if len(alone) == 1 and len(set(categories)) == 2 else None


def make_select(rng: Random) -> dict[str, str]:
    category, second, third = rng.sample(tuple(WORDS_OF), 3)
    members = rng.sample(WORDS_OF[category], rng.randint(1, 2))
    others = rng.sample(WORDS_OF[second] + WORDS_OF[third], rng.randint(2, 4 - len(members) + 1))
    chosen = members + others
    rng.shuffle(chosen)
    return content(chosen, k=PLURAL_OF[category])


def members(slots: Slots) -> list[str] | None:
    """The words of the content that are of the category named in the plural; None where that's no category."""
    category = CATEGORY_OF_PLURAL.get(slots["k"])
    return [word for word in slots["c"].split() if CATEGORY_OF.get(word) == category] if category else None


def _make_label(rng: Random) -> dict[str, str]:
    labels = rng.sample(tuple(WORDS_OF), 3)
    return content([rng.choice(WORDS_OF[rng.choice(labels)])], l=f"{labels[0]}, {labels[1]} or {labels[2]}")


def _solve_label(slots: Slots) -> str | None:
    labels = slots["l"].replace(" or ", ", ").split(", ")
    category = CATEGORY_OF.get(slots["c"])
    return category if category in labels else None


CATEGORIES = Family(
    "categories",
    lambda rng: content(some(rng, 3, 4, NAMED)),
    lambda slots: _mapped(slots, CATEGORY_OF),
    seen=(
        "Name the category of each: {c}",
        "Give the category of each: {c}",
        "What kinds are these: {c}",
        "What kind is each: {c}",
        "Say what kind each is: {c}",
        "Tell the kind of each: {c}",
        "Label each with its kind: {c}",
        "Label each word by category: {c}",
        "Write the categories of {c}.",
        "List the categories of: {c}",
        "Give the category of each word in the input.",
    ),
    held_out=("Name the kind of each: {c}", "Write the category of each: {c}", "Give the categories of: {c}"),
)
OPPOSITES = Family(
    "opposites",
    lambda rng: content(some(rng, 2, 4, QUALITIES)),
    lambda slots: _mapped(slots, OPPOSITE_OF),
    seen=(
        "Give the opposites: {c}",
        "Give the opposite of each: {c}",
        "Name the opposites of: {c}",
        "Write the opposite of each: {c}",
        "What are the opposites of: {c}",
        "List opposites for: {c}",
        "Say the opposites of {c}.",
        "Replace with opposites: {c}",
        "Turn into opposites: {c}",
        "Swap each for its opposite: {c}",
        "Write the opposite of each word in the input.",
    ),
    held_out=("List the opposites of: {c}", "Name the opposite of each: {c}", "Write {c} as opposites."),
)
ODD_ONE_OUT = Family(
    "odd one out",
    _make_odd_one_out,
    _solve_odd_one_out,
    seen=(
        "Which word does not fit: {c}",
        "Find the odd one out: {c}",
        "Which is the odd one: {c}",
        "What does not belong: {c}",
        "Which word does not belong: {c}",
        "Pick the odd one out: {c}",
        "Name the odd one: {c}",
        "Find the word that differs: {c}",
        "Which one is different: {c}",
        "Say what does not fit: {c}",
        "Find the odd one out in the input.",
    ),
    held_out=("Name the odd one out: {c}", "Find the word that does not belong: {c}", "Pick what does not fit: {c}"),
    weight=1.5,
)
SELECT = Family(
    "select a category",
    make_select,
    lambda slots: " ".join(members(slots) or []) or None,
    seen=(
        "Pick the {k} from: {c}",
        "List the {k} in: {c}",
        "Which are {k}: {c}",
        "Keep only {k}: {c}",
        "Find the {k} in: {c}",
        "Name the {k} among: {c}",
        "Give only the {k}: {c}",
        "Write the {k} in: {c}",
        "Choose the {k} from: {c}",
        "Say which are {k}: {c}",
        "Keep only the {k} of the input.",
        "Which words of the input are {k}?",
    ),
    held_out=("Pick only the {k}: {c}", "Say the {k} in: {c}", "Choose {k} among: {c}", "List the {k} of the input."),
    weight=1.5,
)
LABEL_CATEGORY = Family(
    "label a category",
    _make_label,
    _solve_label,
    seen=(
        "Classify the word as {l}.",
        "Label the word {l}.",
        "Is the word {l}?",
        "Choose {l} for the word.",
        "Decide: {l}?",
        "Is the input {l}?",
        "Answer {l}.",
        "Tell if this is {l}.",
        "Give the label {l}.",
        "Say which it is: {l}.",
    ),
    held_out=("Classify the input as {l}.", "Say if the word is {l}.", "Choose the label {l}."),
    is_classification=True,
    weight=1.5,
)
LABEL_SAME = Family(
    "label same or different",
    lambda rng: (lambda pair: content(pair if rng.random() < 0.5 else [pair[0]] * 2))(some(rng, 2, 2)),
    lambda slots: "same" if len(set(slots["c"].split())) == 1 else "different",
    seen=(
        "Are the two words the same or different?",
        "Same or different words?",
        "Say same or different for the words.",
        "Classify the pair as same or different.",
        "Label the pair same or different.",
        "Compare the words: same or different?",
        "Is the pair the same or different?",
        "Tell if these are different or the same.",
        "Decide between same and different.",
        "Answer same or different for this pair.",
    ),
    held_out=(
        "Are these words the same or different?",
        "Compare the pair: same or different?",
        "Choose between same and different.",
    ),
    is_classification=True,
)

FAMILIES = (CATEGORIES, OPPOSITES, ODD_ONE_OUT, SELECT, LABEL_CATEGORY, LABEL_SAME)
