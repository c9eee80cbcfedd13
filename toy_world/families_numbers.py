"""Families about numbers from 0 to 99, written in digits."""

import itertools
from random import Random

from toy_world.family import Family, Slots, content, numbers


def _values(slots: Slots) -> list[int] | None:
    parts = slots["c"].split()
    return [int(part) for part in parts] if all(part.isdigit() for part in parts) else None


def _sorted(slots: Slots, reverse: bool = False) -> str | None:
    values = _values(slots)
    return None if values is None else " ".join(map(str, sorted(values, reverse=reverse)))


def _make_sequence(rng: Random) -> dict[str, str]:
    step = rng.choice((1, 2, 3, 5, 10))
    length = rng.randint(3, 4)
    start = rng.randrange(0, 60 if step < 10 else 40)
    return content([str(start + step * index) for index in range(length)])


def _solve_sequence(slots: Slots) -> str | None:
    values = _values(slots)
    if values is None or len(values) < 3:
        return None
    steps = {second - first for first, second in itertools.pairwise(values)}
    return str(values[-1] + steps.pop()) if len(steps) == 1 else None


def _make_sum(rng: Random) -> dict[str, str]:
    return {"n": str(rng.randint(0, 20)), "m": str(rng.randint(0, 20)), "c": ""}


def _make_difference(rng: Random) -> dict[str, str]:
    second = rng.randint(0, 20)
    return {"n": str(second + rng.randint(0, 20)), "m": str(second), "c": ""}


def _difference(slots: Slots) -> str | None:
    value = int(slots["n"]) - int(slots["m"])
    return str(value) if value >= 0 else None


def _parity(slots: Slots) -> str | None:
    values = _values(slots)
    return None if values is None else " ".join("odd" if value % 2 else "even" for value in values)


def _make_above(rng: Random) -> dict[str, str]:
    limit = rng.randint(10, 89)
    value = rng.randint(0, limit - 1) if rng.random() < 0.5 else rng.randint(limit + 1, 99)
    return content([str(value)], n=str(limit))


def _above(slots: Slots) -> str | None:
    values = _values(slots)
    if values is None or len(values) != 1 or values[0] == int(slots["n"]):
        return None
    return "above" if values[0] > int(slots["n"]) else "below"


SORT_UP = Family(
    "sort numbers up",
    lambda rng: content(numbers(rng, 3, 4)),
    _sorted,
    seen=(
        "Sort the numbers: {c}",
        "Sort from low to high: {c}",
        "Sort from small to large: {c}",
        "Put {c} in rising order.",
        "Arrange from small to large: {c}",
        "Arrange {c} from low to high.",
        "Order the numbers: {c}",
        "List in rising order: {c}",
        "Write {c} in rising order.",
        "Put the smallest number first: {c}",
        "Sort the numbers of the input.",
    ),
    held_out=(
        "Sort in rising order: {c}",
        "Order {c} from small to large.",
        "Arrange the numbers in rising order: {c}",
    ),
    weight=1.5,
)
SORT_DOWN = Family(
    "sort numbers down",
    lambda rng: content(numbers(rng, 3, 4)),
    lambda slots: _sorted(slots, reverse=True),
    seen=(
        "Sort from high to low: {c}",
        "Sort from large to small: {c}",
        "Put {c} in falling order.",
        "Arrange from large to small: {c}",
        "Arrange {c} from high to low.",
        "List in falling order: {c}",
        "Write {c} in falling order.",
        "Put the largest number first: {c}",
        "Order from high to low: {c}",
        "Order from large to small: {c}",
        "Sort the input from high to low.",
    ),
    held_out=(
        "Sort in falling order: {c}",
        "List {c} from large to small.",
        "Arrange the numbers in falling order: {c}",
    ),
    weight=1.5,
)
LARGEST = Family(
    "largest number",
    lambda rng: content(numbers(rng, 2, 4)),
    lambda slots: None if _values(slots) is None else str(max(_values(slots))),
    seen=(
        "Give the largest number: {c}",
        "Which number is largest: {c}",
        "Find the largest of: {c}",
        "Pick the highest number: {c}",
        "What is the highest of: {c}",
        "Largest number of: {c}",
        "Say the maximum of: {c}",
        "Find the maximum: {c}",
        "Give the highest of: {c}",
        "Write only the largest number: {c}",
        "What is the largest number of the input?",
    ),
    held_out=("Find the highest number: {c}", "Which number is the maximum: {c}", "Say the largest number: {c}"),
)
SMALLEST = Family(
    "smallest number",
    lambda rng: content(numbers(rng, 2, 4)),
    lambda slots: None if _values(slots) is None else str(min(_values(slots))),
    seen=(
        "Give the smallest number: {c}",
        "Which number is smallest: {c}",
        "Find the smallest of: {c}",
        "Pick the lowest number: {c}",
        "What is the lowest of: {c}",
        "Smallest number of: {c}",
        "Say the minimum of: {c}",
        "Find the minimum: {c}",
        "Give the lowest of: {c}",
        "Write only the smallest number: {c}",
        "What is the smallest number of the input?",
    ),
    held_out=("Find the lowest number: {c}", "Which number is the minimum: {c}", "Say the smallest number: {c}"),
)
ADD = Family(
    "add",
    _make_sum,
    lambda slots: str(int(slots["n"]) + int(slots["m"])),
    seen=(
        "Add {n} and {m}.",
        "Add {m} to {n}.",
        "What is {n} plus {m}?",
        "Compute {n} plus {m}.",
        "Give the sum of {n} and {m}.",
        "What is the sum of {n} and {m}?",
        "Find the sum: {n} + {m}",
        "How much is {n} + {m}?",
        "Compute {n} + {m} now.",
        "Work out {n} plus {m}.",
    ),
    held_out=("How much is {n} plus {m}?", "Compute the sum of {n} and {m}.", "Find {n} plus {m}."),
    weight=2.5,
)
SUBTRACT = Family(
    "subtract",
    _make_difference,
    _difference,
    seen=(
        "Subtract {m} from {n}.",
        "Take {m} from {n}.",
        "What is {n} minus {m}?",
        "Compute {n} minus {m}.",
        "Take {m} away from {n}.",
        "What is {n} less {m}?",
        "How much is {n} - {m}?",
        "Compute {n} - {m} now.",
        "Work out {n} minus {m}.",
        "What remains of {n} minus {m}?",
    ),
    held_out=("How much is {n} minus {m}?", "Work out {n} - {m} now.", "Find {n} minus {m}."),
    weight=2.5,
)
PARITY = Family(
    "even or odd",
    lambda rng: content(numbers(rng, 3, 4)),
    _parity,
    seen=(
        "Even or odd: {c}",
        "Say even or odd: {c}",
        "Mark even or odd: {c}",
        "Label each number even or odd: {c}",
        "Write even or odd for: {c}",
        "Which are even or odd: {c}",
        "Are these even or odd: {c}",
        "Tell even from odd: {c}",
        "Is each number even or odd: {c}",
        "Give even or odd for: {c}",
    ),
    held_out=("Are the numbers even or odd: {c}", "Mark each number even or odd: {c}", "Tell if even or odd: {c}"),
)
LABEL_PARITY = Family(
    "label even or odd",
    lambda rng: content(numbers(rng, 1, 1)),
    _parity,
    seen=(
        "Is the number even or odd?",
        "Classify the number as even or odd.",
        "Label this number even or odd.",
        "Tell if the input is odd or even.",
        "Decide between even and odd.",
        "Even or odd number?",
        "Answer even or odd for the number.",
        "Say even or odd for this number.",
        "Give the label odd or even.",
        "Choose the label even or odd.",
    ),
    held_out=("Is the input odd or even?", "Classify this as odd or even.", "Choose between even and odd."),
    is_classification=True,
)
LABEL_ABOVE = Family(
    "label above or below",
    _make_above,
    _above,
    seen=(
        "Is the number above or below {n}?",
        "Say if the input is above or below {n}.",
        "Label the number above or below {n}.",
        "Tell if this is above or below {n}.",
        "Compare with {n}: above or below?",
        "Above or below {n}?",
        "Answer above or below for {n}.",
        "Classify the number as above or below {n}.",
        "Decide: above {n} or below {n}?",
        "Choose above or below {n} for this number.",
    ),
    held_out=(
        "Is the input above or below {n}?",
        "Classify this as above or below {n}.",
        "Choose: above or below {n}?",
    ),
    is_classification=True,
    weight=1.5,
)
SEQUENCE = Family(
    "next number",
    _make_sequence,
    _solve_sequence,
    seen=(
        "What number comes next: {c}",
        "Continue the sequence: {c}",
        "Give the next number: {c}",
        "Which number comes next: {c}",
        "Complete the sequence: {c}",
        "Say the next number after: {c}",
        "Find the next number: {c}",
        "Next number of the sequence: {c}",
        "Continue with one number: {c}",
        "What follows in the sequence: {c}",
    ),
    held_out=(
        "Say what number comes next: {c}",
        "Give the next number of the sequence: {c}",
        "Which number follows: {c}",
    ),
    weight=1.5,
)

FAMILIES = (
    SORT_UP,
    SORT_DOWN,
    LARGEST,
    SMALLEST,
    ADD,
    SUBTRACT,
    PARITY,
    LABEL_PARITY,
    LABEL_ABOVE,
    SEQUENCE,
)
