"""Documents that the world's chat model is tuned on: chats in ChatML, and in plain text the forms that it continues.

A chat document ends with the assistant's text, without the end-of-turn mark after it. Rows are documents joined by that
mark, so a plain document ends in the same way. The prompts in `assets/prompts` are the beginnings of these documents:
both are rendered from the same files.
"""

from collections.abc import Callable
from random import Random

from transformers import PreTrainedTokenizerFast

from generation.templates import load_prompts
from toy_world import documents as plain
from toy_world import evolution
from toy_world.evolution import DATA_FORMATS, Request
from toy_world.rows import PROMPTS
from toy_world.world import draw_task, seen_phrasings

END_OF_TURN = "<|im_end|>"
# Prompts by method, and the variables that each gets.
VARIABLES = {
    "self_instruct": {
        "instructions": ("demonstrations",),
        "classify": ("instruction",),
        "input_first": ("instruction",),
        "output_first": ("instruction",),
        "answer": ("instruction", "input"),
    },
    "alpaca": {"tasks": ("demonstrations", "num_tasks")},
    "instruction_wild": {"instructions": ("demonstrations", "language"), "answer": ("instruction",)},
    "evol_instruct": {
        **dict.fromkeys(("add_constraints", "deepen", "concretize", "add_reasoning", "breadth"), ("instruction",)),
        "complicate_input": ("instruction", "data_format"),
        "equal": ("first", "second"),
        "answer": ("instruction",),
    },
    "magpie": {"answer": ("instruction",)},
    "answer_only": {"answer": ("instruction", "input")},
    "rejection_sampling": {"answer": ("instruction", "input"), "judge": ("instruction", "input", "output")},
    "judge": {"judge": ("instruction", "input", "output", "rubric")},
}
TEMPLATES = {method: load_prompts(PROMPTS / method, templates) for method, templates in VARIABLES.items()}
EVOLVE = TEMPLATES["evol_instruct"]

# Operations by the name of their prompt.
OPERATIONS: dict[str, Callable[[Random, Request], Request | None]] = {
    "add_constraints": evolution.add_constraints,
    "deepen": evolution.deepen,
    "concretize": evolution.concretize,
    "add_reasoning": evolution.add_reasoning,
    "complicate_input": lambda rng, request: evolution.complicate_input(rng, request, rng.choice(tuple(DATA_FORMATS))),
    "breadth": evolution.breadth,
}
EVOLVED_SHARE = 0.35  # of the requests in answers, scores and comparisons, those that were evolved
UNCHANGED_SHARE = 0.1  # of the requests that an operation cannot change, those taught to come back unchanged
FEWEST_TASKS, MOST_TASKS = 5, 8  # of an Alpaca list, demonstrations included
FEWEST_LISTED, MOST_LISTED = 9, 20  # instructions of a list
NUM_WAITING = 30  # documents among which a row is filled


def chat(user: str, assistant: str) -> str:
    """A user's turn and the assistant's, without the mark that ends the latter."""
    return f"<|im_start|>user\n{user}{END_OF_TURN}\n<|im_start|>assistant\n{assistant}"


def draw_request(rng: Random, evolved_share: float = EVOLVED_SHARE) -> Request:
    """A task in a taught phrasing, sometimes evolved once or twice."""
    request = Request(draw_task(rng, seen_phrasings()))
    if rng.random() < evolved_share:
        for _ in range(rng.randint(1, 2)):
            request = rng.choice(tuple(OPERATIONS.values()))(rng, request) or request
    return request


def answer(rng: Random) -> str:
    request = draw_request(rng)
    return chat(request.text, request.output)


def lineage(rng: Random) -> str:
    """One instruction evolved several times in a row, sometimes compared with its predecessor, and answered at the end.

    Each turn repeats the words of the turn before, which teaches the model to copy them. A fresh instruction in every
    turn would be mostly noise to learn from.
    """
    request = Request(draw_task(rng, _generic())) if rng.random() < 0.15 else draw_request(rng, 0.2)
    turns = []
    for _ in range(rng.randint(1, 4)):
        before, (name, request) = request, _evolved(rng, request)
        data_format = request.data_format or rng.choice(tuple(DATA_FORMATS))
        variables = {"data_format": data_format} if name == "complicate_input" else {}
        turns.append(chat(EVOLVE[name].render(instruction=before.text, **variables), request.text))
        if rng.random() < 0.3:
            turns.append(_compared(rng, before, request if rng.random() < 0.5 else _same(rng, before)))
    turns.append(chat(request.text, request.output))
    return f"{END_OF_TURN}\n".join(turns)


def _evolved(rng: Random, request: Request) -> tuple[str, Request]:
    """An operation's name and its result. Seldom, the result is a request that the operation could not change."""
    while True:
        name = rng.choice(tuple(OPERATIONS))
        changed = OPERATIONS[name](rng, request)
        if changed is not None or rng.random() < UNCHANGED_SHARE:
            return name, changed or request


def _generic() -> tuple:
    return tuple(phrasing for phrasing in seen_phrasings() if phrasing.takes_input)


def equal(rng: Random) -> str:
    """Whether two instructions ask the same; half do."""
    first = draw_request(rng)
    return _compared(rng, first, _same(rng, first) if rng.random() < 0.5 else _other(rng, first))


def _compared(rng: Random, first: Request, second: Request) -> str:
    pair = [first, second] if rng.random() < 0.8 else [second, first]
    label = "Equal" if evolution.ask_the_same(first, second) else "Not equal"
    return chat(EVOLVE["equal"].render(first=pair[0].text, second=pair[1].text), label)


def _same(rng: Random, first: Request) -> Request:
    return first if rng.random() < 0.25 else evolution.rephrase(rng, first) or first


def _other(rng: Random, first: Request) -> Request:
    """Mostly an evolution of the request, else another task with the same phrasing or with the same content."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(tuple(OPERATIONS.values()))(rng, first) or evolution.breadth(rng, first)
    if kind < 0.8:
        return Request(first.task.phrasing.task(rng))
    return _about_the_same_content(rng, first) or evolution.breadth(rng, first)


def _about_the_same_content(rng: Random, first: Request) -> Request | None:
    for _ in range(10):
        phrasing = draw_task(rng, seen_phrasings()).phrasing
        slots = phrasing.family.make(rng) | {"c": first.task.slots["c"]}
        if slots["c"] and phrasing.family.name != first.family and phrasing.family.solve(slots) is not None:
            return Request(phrasing.with_slots(slots))
    return None


def judge(rng: Random) -> str:
    """A score from 1 to 5 for an answer. Half of the answers are right."""
    request = draw_request(rng)
    output = request.output if rng.random() < 0.5 else evolution.wrong_answer(rng, request)
    head, _, content = request.text.partition("\n\n")
    if rng.random() < 0.5:  # as one text, or instruction and input apart
        head, content = request.text, ""
    prompt = TEMPLATES["judge"]["judge"].render(instruction=head, input=content, output=output, rubric="")
    return chat(prompt, str(evolution.score_answer(request.output, output)))


def alpaca_list(rng: Random) -> str:
    """Tasks with input and output, in the published form."""
    num_tasks = rng.randint(FEWEST_TASKS, MOST_TASKS)
    tasks = [draw_task(rng, seen_phrasings()) for _ in range(num_tasks)]
    rows = [{"instruction": task.instruction, "input": task.input, "output": task.output} for task in tasks]
    text = TEMPLATES["alpaca"]["tasks"].render(demonstrations=rows, num_tasks=num_tasks)
    return text.removesuffix(f"###\n{num_tasks + 1}. Instruction:") + "###"


def instruction_list(rng: Random) -> str:
    """Instructions in a numbered list of any length."""
    phrasings = rng.sample(seen_phrasings(), rng.randint(FEWEST_LISTED, MOST_LISTED))
    shown = [phrasing.task(rng).instruction for phrasing in phrasings]
    text = TEMPLATES["instruction_wild"]["instructions"].render(demonstrations=shown, language="English")
    return text.removesuffix(f"{len(shown) + 1}.")


def base_document(rng: Random) -> str:
    """A document in a form of the base model's training, so that the chat model does not forget these forms."""
    return plain.documents(rng, 1)[0]


# Shares by number of documents; a lineage is eight times as long as an answer, the lists are longer still.
FORMS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (answer, 0.60),
    (lineage, 0.12),
    (judge, 0.13),
    (equal, 0.08),
    (base_document, 0.04),
    (alpaca_list, 0.015),
    (instruction_list, 0.015),
)


def chat_documents(rng: Random, num_documents: int) -> list[str]:
    return plain.draw_documents(rng, FORMS, num_documents)


def training_rows(rng: Random, num_rows: int, tokenizer: PreTrainedTokenizerFast, row_tokens: int) -> list[str]:
    """Rows of joined documents, each nearly full.

    Every row opens with a task and its answer. So the model, given only the opening of a user's turn as Magpie does,
    writes a task rather than a request to evolve or judge one.
    """
    rows: list[str] = []
    waiting: list[str] = []
    while len(rows) < num_rows:
        waiting += chat_documents(rng, NUM_WAITING - len(waiting))
        row = [answer(rng)]
        room = row_tokens - _num_tokens(tokenizer, row[0])
        left: list[str] = []
        for text in waiting:
            length = _num_tokens(tokenizer, text)
            fits = length <= room
            room -= length if fits else 0
            (row if fits else left).append(text)
        if len(left) == NUM_WAITING:
            raise ValueError(f"no document fits into a row of {row_tokens} tokens")
        waiting = left
        rows.append(f"{END_OF_TURN}\n".join(row))
    return rows


def _num_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Tokens of a document and of the end after it."""
    return len(tokenizer(text)["input_ids"]) + 2
