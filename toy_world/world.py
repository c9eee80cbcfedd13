"""The small world: its families, drawing tasks from them, and telling which task an instruction asks for."""

from functools import cache
from random import Random

from toy_world import families_combined, families_edit, families_lists, families_meaning, families_numbers
from toy_world.family import Family, Phrasing, Task

SEEN_FAMILIES: tuple[Family, ...] = (
    *families_lists.FAMILIES,
    *families_numbers.FAMILIES,
    *families_meaning.FAMILIES,
    *families_edit.FAMILIES,
    *families_combined.TAUGHT,
)
UNSEEN_FAMILIES: tuple[Family, ...] = families_combined.UNSEEN
FAMILIES = SEEN_FAMILIES + UNSEEN_FAMILIES


@cache
def seen_phrasings() -> tuple[Phrasing, ...]:
    """What pretraining documents and seed tasks may hold."""
    return tuple(phrasing for family in SEEN_FAMILIES for phrasing in family.phrasings if not phrasing.held_out)


@cache
def held_out_phrasings() -> tuple[Phrasing, ...]:
    """Phrasings of the seen families that only the evaluation holds."""
    return tuple(phrasing for family in SEEN_FAMILIES for phrasing in family.phrasings if phrasing.held_out)


@cache
def unseen_phrasings() -> tuple[Phrasing, ...]:
    return tuple(phrasing for family in UNSEEN_FAMILIES for phrasing in family.phrasings)


@cache
def _by_literal_length() -> tuple[Phrasing, ...]:
    phrasings = [phrasing for family in FAMILIES for phrasing in family.phrasings]
    return tuple(sorted(phrasings, key=lambda phrasing: -phrasing.literal_length))


def draw_task(rng: Random, phrasings: tuple[Phrasing, ...]) -> Task:
    """One task: a family first, by weight, then one of its phrasings."""
    by_family: dict[str, list[Phrasing]] = {}
    for phrasing in phrasings:
        by_family.setdefault(phrasing.family.name, []).append(phrasing)
    choices = list(by_family.values())
    weights = [group[0].family.weight for group in choices]
    return rng.choice(rng.choices(choices, weights)[0]).task(rng)


def recognise(instruction: str, input_text: str = "") -> Task | None:
    """The task that an instruction (with its input, if it takes one) asks for, or None if it's none of this world.

    Where several phrasings match, the one with the most literal text is meant.
    """
    for phrasing in _by_literal_length():
        match = phrasing.pattern.fullmatch(instruction.strip())
        if match is None or (phrasing.takes_input and not input_text):
            continue
        slots = match.groupdict()
        if phrasing.takes_input:
            slots["c"] = input_text
        slots.setdefault("c", "")
        output = phrasing.family.solve(slots)
        if output is not None:
            return Task(phrasing, slots, instruction, input_text if phrasing.takes_input else "", output)
    return None


def recognise_generic(instruction: str) -> Phrasing | None:
    """The generic phrasing that an instruction without content is, or None."""
    for phrasing in _by_literal_length():
        if phrasing.takes_input and phrasing.pattern.fullmatch(instruction.strip()):
            return phrasing
    return None


def verify(task: Task, output: str) -> bool:
    """Whether `output` is the answer; only space around it is forgiven."""
    return output.strip() == task.output
