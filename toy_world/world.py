"""The toy world: its families, how to draw a task, to recognize the task of an instruction and to verify an answer."""

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
    """Phrasings that training documents and seed tasks may contain."""
    return tuple(phrasing for family in SEEN_FAMILIES for phrasing in family.phrasings if not phrasing.held_out)


@cache
def held_out_phrasings() -> tuple[Phrasing, ...]:
    """Phrasings of the seen families that only the evaluation contains."""
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


def recognize(instruction: str, input_text: str = "") -> Task | None:
    """The task that an instruction asks for, with its input if it takes one. None means it is no task of this world.

    If several phrasings match, the one with the most literal text is taken.
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


def verify(task: Task, output: str) -> bool:
    """Whether `output` is the answer, apart from white space around it."""
    return output.strip() == task.output


def score(instruction: str, input_text: str, output: str, reference: str) -> float:
    """1 if the instruction is a task of this world and `output` is its answer, else 0.

    A verifier for recipes: `synthesize.verifier=toy_world.world:score`. It computes the answer, `reference` is unused.
    """
    task = recognize(instruction, input_text)
    return float(task is not None and verify(task, output))
