"""Plain-text documents about the toy world, in the forms of the Self-Instruct prompts.

No document is a chat: each is a work sheet, a list of tasks, or a list of questions about tasks.
"""

from collections.abc import Callable, Sequence
from random import Random

from toy_world.family import Phrasing, Task
from toy_world.world import draw_task, seen_phrasings

LIST_HEADER = "Come up with a series of tasks:"
TASKS_PER_LIST = 16


def _some_tasks(rng: Random, low: int, high: int, phrasings: tuple[Phrasing, ...] | None = None) -> list[Task]:
    return [draw_task(rng, phrasings or seen_phrasings()) for _ in range(rng.randint(low, high))]


def task_list(rng: Random) -> str:
    """Sixteen instructions, numbered. Every phrasing is as likely as every other."""
    phrasings = rng.sample(seen_phrasings(), TASKS_PER_LIST)
    lines = [f"{number}. {phrasing.task(rng).instruction}" for number, phrasing in enumerate(phrasings, 1)]
    return "\n".join([LIST_HEADER, *lines]) + "\n"


def is_classification_sheet(rng: Random) -> str:
    """Tasks, each with whether its answer is one of a few labels."""
    blocks = []
    for _ in range(rng.randint(4, 8)):
        wanted = rng.random() < 0.4
        choices = tuple(phrasing for phrasing in seen_phrasings() if phrasing.is_classification == wanted)
        task = rng.choice(choices).task(rng)
        blocks.append(f"Task: {task.instruction}\nIs it classification? {'Yes' if wanted else 'No'}\n")
    return "\n".join(blocks)


def work_sheet(rng: Random) -> str:
    """Tasks with their answers, inputs first."""
    return "\n".join(input_first(rng, task) for task in _some_tasks(rng, 4, 7))


def input_first(rng: Random, task: Task) -> str:
    if not task.phrasing.takes_input:
        return f"Task: {task.instruction}\nOutput: {task.output}\n"
    lines = [f"Task: {task.instruction}"]
    for number, example in enumerate(_examples(rng, task, rng.choice((1, 1, 2, 3, 5))), 1):
        lines += [f"Example {number}", f"Input: {example.input}", f"Output: {example.output}"]
    return "\n".join(lines) + "\n"


def label_sheet(rng: Random) -> str:
    """Classification tasks with their labels first."""
    choices = tuple(phrasing for phrasing in seen_phrasings() if phrasing.is_classification)
    blocks = []
    for task in _some_tasks(rng, 2, 4, choices):
        lines = [f"Task: {task.instruction}"]
        for example in _examples(rng, task, rng.randint(2, 5)):
            lines += [f"Class label: {example.output}", f"Input: {example.input}"]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def plain_sheet(rng: Random) -> str:
    """Tasks with the answer on the next line, without any marks."""
    blocks = []
    for task in _some_tasks(rng, 4, 8):
        middle = f"\n\n{task.input}\n" if task.phrasing.takes_input else "\n"
        blocks.append(f"{task.instruction}{middle}{task.output}\n")
    return "\n".join(blocks)


def _examples(rng: Random, task: Task, count: int) -> list[Task]:
    """`task` and others that differ from it and from each other only in their input."""
    examples = {task.input: task}
    for _ in range(20 * count):
        if len(examples) == count:
            break
        slots = task.phrasing.family.make(rng)
        fixed = [name for name in task.slots if f"{{{name}}}" in task.phrasing.template]
        fixed_slots = {name: task.slots[name] for name in fixed}
        if task.phrasing.family.solve(slots | fixed_slots) is not None:
            examples.setdefault(slots["c"], task.phrasing.with_slots(slots | fixed_slots))
    return list(examples.values())


# Shares by number of documents. Answers teach the skills, so the forms that hold them come first.
FORMS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (work_sheet, 0.42),
    (plain_sheet, 0.32),
    (task_list, 0.13),
    (label_sheet, 0.07),
    (is_classification_sheet, 0.06),
)


def draw_documents(
    rng: Random, forms_and_shares: Sequence[tuple[Callable[[Random], str], float]], num_documents: int
) -> list[str]:
    """Documents whose forms are drawn by their shares."""
    forms, shares = zip(*forms_and_shares, strict=True)
    return [rng.choices(forms, shares)[0](rng) for _ in range(num_documents)]


def documents(rng: Random, num_documents: int) -> list[str]:
    return draw_documents(rng, FORMS, num_documents)
