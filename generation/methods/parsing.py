"""What a model wrote, taken apart: lists of instructions, yes or no, and instances in either form.

The rules are Self-Instruct's (Wang et al., 2023, appendix A.2 for the forms; the released `bootstrap_instructions.py`,
`identify_clf_or_not.py` and `prepare_for_finetuning.py` for the splitting) and, for whole tasks, Alpaca's. A model that
is asked in a chat may repeat the end of the prompt, with a word of its own before it; there the text begins anew.
"""

import re
from dataclasses import dataclass

from generation.filters import Draft, Instance

LIST_MARK = r"\s?[.．、](?!\d) ?"  # also the marks of Chinese lists; "3.5" begins no item
LIST_ITEM = re.compile(rf"\n\d+{LIST_MARK}")
EXAMPLE = re.compile(r"Example\s?\d*\.?")
OUTPUT = re.compile(r"Output\s*\d*\s*:")
INPUT = re.compile(r"Input\s*\d*\s*:")
LEADING_INPUT = re.compile(rf"^{INPUT.pattern}")
NEXT_TASK = re.compile(r"Task\s*\d*\s*:")
CLASS_LABEL = "Class label:"
NO_INPUT = "<noinput>"


def parse_instructions(text: str, first_number: int, capitalize: bool) -> list[str]:
    """Split a numbered list that goes on at `first_number` into instructions, whitespace collapsed.

    Empty items stay, as "". capitalize: first letter upper case and all others lower, as published (acronyms are lost).
    """
    if opening := re.search(rf"^\s*{first_number}{LIST_MARK}", text, re.MULTILINE):
        text = text[opening.end() :]
    items = (re.sub(r"\s+", " ", item).strip() for item in LIST_ITEM.split(text))
    return [item.capitalize() if capitalize else item for item in items]


def parse_yes(text: str) -> bool:
    """Is the answer yes? Anything else counts as no, as published."""
    return text.strip() in ("Yes", "yes", "YES")


def parse_input_first(text: str, was_cut: bool) -> list[Instance]:
    """Instances of a task that is not classification: "Example k" blocks, or an output alone.

    Text without any marker gives none. If the text was cut at max_tokens, its last instance is dropped.
    """
    text = text.strip()
    if EXAMPLE.search(text):
        blocks = [block.strip() for block in EXAMPLE.split(text)]
        instances = [_parse_block(block) for block in blocks if block]
    elif OUTPUT.search(text):
        instances = [_parse_block(text)]
    else:
        return []
    return instances[:-1] if was_cut else instances


def parse_output_first(text: str, was_cut: bool) -> list[Instance]:
    """Instances of a classification task: after each "Class label:" a label, and below it an input that has it.

    `text` continues a prompt that ends at "Class label:", so its first block has no marker of its own.
    """
    instances = []
    for block in text.split(CLASS_LABEL):
        label, _, given = block.strip().partition("\n")
        instances.append(Instance(LEADING_INPUT.sub("", given.strip()).strip(), label.strip()))
    return instances[:-1] if was_cut else instances


def _parse_block(block: str) -> Instance:
    parts = OUTPUT.split(block)
    given, output = (parts[0], parts[1]) if len(parts) > 1 else ("", block)
    output = NEXT_TASK.split(INPUT.split(output)[0])[0]  # of several pairs in one block, the first
    return Instance(LEADING_INPUT.sub("", given.strip()).strip(), output.strip())


@dataclass(frozen=True, slots=True)
class MalformedTask:
    """A piece of a list of tasks that is none, and why."""

    reason: str
    text: str


def parse_tasks(text: str, first_number: int, was_cut: bool) -> list[Draft | MalformedTask]:
    """Alpaca's list of tasks, by the strict rules of its `post_process_gpt3_response`.

    Items stand between "###" and are numbered on from `first_number`; each has an instruction, an input ("<noinput>"
    for none) and an output under the number that is expected at its place. `text` continues a prompt that ends at
    "<first_number>. Instruction:". If it was cut at max_tokens, what stands last is dropped. A place with nothing in
    it is passed over, but counts.
    """
    repeated = re.search(rf"(?<!\d){first_number}\.\s+Instruction:", text)
    if repeated and f"{first_number}. Input:" not in text[: repeated.start()]:
        text = text[repeated.end() :]
    pieces = f"{first_number}. Instruction:{text}".split("###")
    if was_cut:
        pieces = pieces[:-1]
    numbered = [(number, piece) for number, piece in enumerate(pieces, first_number) if piece.strip("# \n")]
    return [_parse_task(piece, number) for number, piece in numbered]


def _parse_task(piece: str, number: int) -> Draft | MalformedTask:
    parts = re.split(rf"{number}\.\s+(Instruction|Input|Output):", piece)
    if len(parts) != 7:
        return MalformedTask("malformed_task", piece.strip())
    instruction, given, output = (parts[place].strip() for place in (2, 4, 6))
    return Draft(instruction, "" if given.lower() == NO_INPUT else given, output)
