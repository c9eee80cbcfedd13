"""Harder instructions: tasks with steps added after them, or with their content in a data format, and how to get there.

    request = read_request("Reverse the words: cow red sun. Use commas.")
    request.output                        # "sun, red, cow"
    deepen(rng, request).text             # "Reverse the words: cow red sun fig. Use commas."

What Evol-Instruct asks for (Xu et al. 2023, arXiv 2304.12244, section 3.2), in a world whose answers a program checks.
An operation returns None if it cannot change an instruction.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from toy_world import words
from toy_world.family import Phrasing, Task
from toy_world.world import SEEN_FAMILIES, draw_task, recognize, seen_phrasings

MAX_STEPS = 2
EXTRA_WORDS = 1  # by which deepened content may exceed the longest of its family
MAX_LARGER_NUMBER = 30  # of a sum or difference, after one deepening of the largest that the base was taught


@dataclass(frozen=True)
class Step:
    """One more thing to do with an answer. `apply` returns None if the step makes no sense for an answer."""

    text: str
    apply: Callable[[str], str | None]


def _plain(answer: str) -> list[str] | None:
    return answer.split() if re.fullmatch(r"[A-Za-z0-9 ]+", answer) else None


def _joined(mark: str) -> Callable[[str], str | None]:
    return lambda answer: mark.join(_plain(answer)) if _plain(answer) else None


def _repeated(times: int) -> Callable[[str], str | None]:
    return lambda answer: " ".join([answer] * times) if len(_plain(answer) or ()) == 1 else None


USE_COMMAS = Step("Use commas.", _joined(", "))
USE_DASHES = Step("Use dashes.", _joined(" - "))
SAY_TWICE = Step("Say it 2 times.", _repeated(2))
SAY_THRICE = Step("Say it 3 times.", _repeated(3))
ONLY_FIRST = Step("Give only the first.", lambda answer: (_plain(answer) or [None])[0])
ADD_ONE = Step("Add 1 to it.", lambda answer: str(int(answer) + 1) if answer.isdigit() else None)
STEPS = (USE_COMMAS, USE_DASHES, SAY_TWICE, SAY_THRICE, ONLY_FIRST, ADD_ONE)

# The format's name, what stands before the content and what after it.
DATA_FORMATS = {
    "JSON": ('{"c": "', '"}'),
    "XML": ("<c>", "</c>"),
    "HTML": ("<p>", "</p>"),
    "Python": ('c = "', '"'),
    "SQL": ('SELECT "', '"'),
    "shell": ('echo "', '"'),
}

# Families by what their answers are: several words, a number, or one word. Others take no step.
LISTS = {
    *("copy", "reverse", "sort words", "drop repeats", "sort numbers up", "sort numbers down", "even or odd"),
    *("categories", "opposites", "select a category", "upper case", "title case"),
    *("replace a word", "remove a word", "add at the end", "add at the start"),
}
NUMBERS = {
    *("count words", "count a word", "largest number", "smallest number", "add", "subtract", "next number"),
}
SINGLES = {
    *("first word", "last word", "nth word", "contains", "next word", "odd one out", "first word in upper case"),
}


@dataclass(frozen=True)
class Request:
    """What a user asks for: a task, the steps after it, and the data format of its content; empty means plain text."""

    task: Task
    steps: tuple[Step, ...] = ()
    data_format: str = ""

    @property
    def text(self) -> str:
        """As a user writes it: the instruction, and after a blank line the input if there is one."""
        instruction, content = self.task.instruction, self.task.input
        if self.data_format:
            before, after = DATA_FORMATS[self.data_format]
            instruction = self.task.phrasing.template.removesuffix(" {c}").format_map(self.task.slots)
            content = before + self.task.slots["c"] + after
        for step in self.steps:
            end = "" if instruction[-1] in ".?" else "."
            instruction = f"{instruction}{end} {step.text}"
        return f"{instruction}\n\n{content}" if content else instruction

    @property
    def output(self) -> str | None:
        answer: str | None = self.task.output
        for step in self.steps:
            answer = step.apply(answer) if answer is not None else None
        return answer

    @property
    def family(self) -> str:
        return self.task.phrasing.family.name


def read_request(text: str) -> Request | None:
    """The request that `text` is, or None if it is no request of this world."""
    head, _, content = text.strip().partition("\n\n")
    steps: list[Step] = []
    while found := next((step for step in STEPS if head.endswith(f" {step.text}")), None):
        head = head.removesuffix(found.text).rstrip()
        steps.insert(0, found)
    name = ""
    for data_format, (before, after) in DATA_FORMATS.items():
        if content.startswith(before) and content.endswith(after):
            name, content = data_format, content[len(before) : -len(after)]
    task = recognize(f"{head} {content}") if head.endswith(":") else recognize(head, content)
    if task is None or (content and not task.input and not name) or (not content and "input" in head):
        return None  # also if an instruction about an input comes without one
    request = Request(task, tuple(steps), name)
    return request if request.output is not None else None


def _with_step(request: Request, step: Step) -> Request | None:
    if len(request.steps) == MAX_STEPS or step in request.steps or request.data_format:
        return None
    changed = replace(request, steps=(*request.steps, step))
    return changed if changed.output is not None else None


def add_constraints(rng: Random, request: Request) -> Request | None:
    """How the answer is to be written: a list with commas or dashes, one word twice."""
    if request.family in LISTS and ONLY_FIRST not in request.steps:
        is_joined = bool({USE_COMMAS, USE_DASHES} & set(request.steps))
        return None if is_joined else _with_step(request, rng.choice((USE_COMMAS, USE_DASHES)))
    return _with_step(request, SAY_TWICE) if request.family in LISTS | NUMBERS | SINGLES else None


def add_reasoning(rng: Random, request: Request) -> Request | None:
    """One more step on the answer: the first of a list, one more than a number, one word three times."""
    del rng  # nothing to choose
    if request.family in LISTS and len(request.task.output.split()) > 1:
        return _with_step(request, ONLY_FIRST)
    if request.family in NUMBERS:
        return _with_step(request, ADD_ONE)
    return _with_step(request, SAY_THRICE) if request.family in SINGLES else None


@cache
def longest_content(family: str) -> int:
    """Words in the longest content that a family draws."""
    make = next(other.make for other in SEEN_FAMILIES if other.name == family)
    rng = Random(0)
    return max(len(make(rng)["c"].split()) for _ in range(200))


def deepen(rng: Random, request: Request) -> Request | None:
    """One word or number more in the content; a sum of larger numbers."""
    task, slots = request.task, dict(request.task.slots)
    if request.family in ("add", "subtract"):
        larger = int(slots["n"]) + 10
        changed = slots | {"n": str(larger)} if larger <= MAX_LARGER_NUMBER else None
    else:
        changed = _longer(rng, task)
    if changed is None or task.phrasing.family.solve(changed) is None:
        return None
    deeper = replace(request, task=task.phrasing.with_slots(changed))
    return deeper if deeper.output is not None else None


def _longer(rng: Random, task: Task) -> dict[str, str] | None:
    family, content = task.phrasing.family, task.slots["c"].split()
    if longest_content(family.name) < 2 or len(content) > longest_content(family.name) - 1 + EXTRA_WORDS:
        return None
    if family.name in ("next word", "next number"):
        return {**task.slots, "c": " ".join([*content, task.output])}
    for _ in range(20):
        for word in family.make(rng)["c"].split():
            changed = {**task.slots, "c": " ".join([*content, word])}
            is_new = word not in {*content, *task.slots.values()} or family.name in ("drop repeats", "count a word")
            if is_new and family.solve(changed) is not None:
                return changed
    return None


def concretize(rng: Random, request: Request) -> Request | None:
    """An instruction about an input becomes one with the words inside."""
    if not request.task.phrasing.takes_input or request.data_format:
        return None
    slots, family = request.task.slots, request.task.phrasing.family
    inside = [phrasing for phrasing in _seen(family.name) if not phrasing.takes_input]
    return replace(request, task=rng.choice(inside).with_slots(slots)) if inside else None


def complicate_input(rng: Random, request: Request, data_format: str) -> Request | None:
    """The content in a data format, on lines of its own."""
    del rng  # nothing to choose
    phrasing = request.task.phrasing
    if request.steps or request.data_format or not (phrasing.takes_input or phrasing.template.endswith(": {c}")):
        return None
    return replace(request, data_format=data_format)


def breadth(rng: Random, request: Request) -> Request:
    """A task of another family."""
    while True:
        task = draw_task(rng, seen_phrasings())
        if task.phrasing.family.name != request.family:
            return Request(task)


@cache
def _seen(family: str) -> tuple[Phrasing, ...]:
    return tuple(phrasing for phrasing in seen_phrasings() if phrasing.family.name == family)


def rephrase(rng: Random, request: Request) -> Request | None:
    """The same in other words: another phrasing of the family, with the content in the same place."""
    task = request.task
    others = [
        phrasing
        for phrasing in _seen(request.family)
        if phrasing != task.phrasing
        and phrasing.takes_input == task.phrasing.takes_input
        and (not request.data_format or phrasing.takes_input or phrasing.template.endswith(": {c}"))
        and phrasing.family.solve(task.slots) is not None
    ]
    return replace(request, task=rng.choice(others).with_slots(task.slots)) if others else None


def ask_the_same(first: Request, second: Request) -> bool:
    """Whether two requests are equal: the same question about the same content, in the same place and format."""

    def key(request: Request) -> tuple:
        task = request.task
        return request.family, dict(task.slots), request.steps, request.data_format, task.phrasing.takes_input

    return key(first) == key(second)


def score_answer(right: str, answer: str) -> int:
    """5 if right, 1 without a word of what is right; else by F1 of the bags of words: 4 from 0.8, 3 from 0.5, 2."""
    if answer.strip() == right:
        return 5
    remaining, shared = right.split(), 0
    for word in answer.split():
        if word in remaining:
            remaining.remove(word)
            shared += 1
    overlap = 2 * shared / max(1, len(right.split()) + len(answer.split()))
    return 1 if shared == 0 else 2 if overlap < 0.5 else 3 if overlap < 0.8 else 4


def wrong_answer(rng: Random, request: Request) -> str:
    """An answer that is not right: in another order, with a word changed or left out, of another task, unrelated."""
    right = request.output.split()
    content = request.task.slots["c"].split() or [request.task.slots.get("n", "7")]
    pool = words.NUMBERS if right[0].isdigit() else words.CONTENT_WORDS
    while True:
        place, kind = rng.randrange(len(right)), rng.randrange(5)
        answer = list(right)
        if kind == 0:
            rng.shuffle(answer)
        elif kind == 1:
            answer[place] = rng.choice(pool)
        elif kind == 2:
            del answer[place]
        elif kind == 3:
            answer = content if rng.random() < 0.5 else [rng.choice(content)]
        else:
            answer = draw_task(rng, seen_phrasings()).output.split()
        if answer and " ".join(answer) != request.output:
            return " ".join(answer)
