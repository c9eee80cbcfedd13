"""What a model wrote, taken apart: lists of instructions, yes or no, and instances in either form.

The rules are Self-Instruct's (Wang et al., 2023, appendix A.2 for the forms; the released `bootstrap_instructions.py`,
`identify_clf_or_not.py` and `prepare_for_finetuning.py` for the splitting).
"""

import re
from dataclasses import dataclass

from generation.filters import Draft, Instance

LIST_ITEM = re.compile(r"\n\d+\s?\. ?")
EXAMPLE = re.compile(r"Example\s?\d*\.?")
OUTPUT = re.compile(r"Output\s*\d*\s*:")
LEADING_INPUT = re.compile(r"^Input\s*\d*\s*:")
NEXT_TASK = re.compile(r"Task\s*\d*\s*:")
CLASS_LABEL = "Class label:"
NO_INPUT = "<noinput>"


def parse_instructions(text: str, capitalize: bool) -> list[str]:
    """Split a continued numbered list into instructions, whitespace collapsed. Empty items stay, as "".

    capitalize: first letter upper case and all others lower, as published (acronyms are lost).
    """
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
    output = NEXT_TASK.split(output)[0]
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
    "<first_number>. Instruction:"; a model that was asked in a chat may have repeated that. If the text was cut at
    max_tokens, the last item is dropped.
    """
    opening = f"{first_number}. Instruction:"
    pieces = (text if text.lstrip("# \n").startswith(opening) else opening + text).strip("# \n").split("###")
    if was_cut:
        pieces = pieces[:-1]
    return [_parse_task(piece, number) for number, piece in enumerate(pieces, first_number)]


def _parse_task(piece: str, number: int) -> Draft | MalformedTask:
    parts = re.split(rf"{number}\.\s+(Instruction|Input|Output):", piece)
    if len(parts) != 7:
        return MalformedTask("malformed_task", piece.strip())
    instruction, given, output = (parts[place].strip() for place in (2, 4, 6))
    return Draft(instruction, "" if given.lower() == NO_INPUT else given, output)
