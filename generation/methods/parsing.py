"""Parsers of what a model wrote: lists of instructions, yes or no, instances, and lists of whole tasks.

The rules are Self-Instruct's (Wang et al., 2023, appendix A.2 for the forms; the released `bootstrap_instructions.py`,
`identify_clf_or_not.py` and `prepare_for_finetuning.py` for the splitting). Those of whole tasks are Alpaca's. A chat
model may repeat the end of the prompt after some text of its own. Then parsing starts after the repetition.
"""

import re

from generation.filters.drafts import Draft, Instance

LIST_MARK = r"\s?[.．、](?!\d) ?"  # also the marks of Chinese lists. "3.5" does not begin an item
LIST_ITEM = re.compile(rf"\n\d+{LIST_MARK}")
EXAMPLE = re.compile(r"Example\s?\d*\.?")
OUTPUT = re.compile(r"Output\s*\d*\s*:")
INPUT = re.compile(r"Input\s*\d*\s*:")
LEADING_INPUT = re.compile(rf"^{INPUT.pattern}")
NEXT_TASK = re.compile(r"Task\s*\d*\s*:")
CLASS_LABEL = "Class label:"
NO_INPUT = "<noinput>"


def parse_instructions(text: str, first_number: int, capitalize: bool) -> list[str]:
    """Split a numbered list that continues at `first_number` into instructions with single spaces.

    Empty items are kept as "". `capitalize`: write the first letter in upper case and all others in lower case, as the
    released code does. Acronyms are lost.
    """
    if opening := re.search(rf"^\s*{first_number}{LIST_MARK}", text, re.MULTILINE):
        text = text[opening.end() :]
    items = (re.sub(r"\s+", " ", item).strip() for item in LIST_ITEM.split(text))
    return [item.capitalize() if capitalize else item for item in items]


def parse_yes(text: str) -> bool:
    """Whether the answer is yes. Anything else is no, as in the released code."""
    return text.strip() in ("Yes", "yes", "YES")


def parse_input_first(text: str, was_cut: bool) -> list[Instance]:
    """Instances of a task that is not classification: "Example k" blocks, or an output alone.

    Text without any marker has no instance. If the text was cut at max_tokens, its last instance is dropped.
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
    """Instances of a classification task: after each "Class label:" a label, and below it an input with this label.

    `text` continues a prompt that ends at "Class label:", so its first block has no marker of its own.
    """
    instances = []
    for block in text.split(CLASS_LABEL):
        label, _, input_text = block.strip().partition("\n")
        instances.append(Instance(LEADING_INPUT.sub("", input_text.strip()).strip(), label.strip()))
    return instances[:-1] if was_cut else instances


def _parse_block(block: str) -> Instance:
    parts = OUTPUT.split(block)
    input_text, output = (parts[0], parts[1]) if len(parts) > 1 else ("", block)
    output = NEXT_TASK.split(INPUT.split(output)[0])[0]  # the first of several pairs in one block
    return Instance(LEADING_INPUT.sub("", input_text.strip()).strip(), output.strip())


def parse_tasks(text: str, first_number: int, was_cut: bool) -> list[Draft | str]:
    """Parse Alpaca's list of tasks by the strict rules of its `post_process_gpt3_response`.

    "###" separates the items, which are numbered from `first_number`. Each has an instruction, an input ("<noinput>"
    means none) and an output, all under the number expected at its place. `text` continues a prompt that ends with
    "<first_number>. Instruction:". If the text was cut at max_tokens, its last item is dropped. An empty item is
    skipped, but counts. A piece that is not a task is returned as its text.
    """
    repeated = re.search(rf"(?<!\d){first_number}\.\s+Instruction:", text)
    if repeated and f"{first_number}. Input:" not in text[: repeated.start()]:
        text = text[repeated.end() :]
    pieces = f"{first_number}. Instruction:{text}".split("###")
    if was_cut:
        pieces = pieces[:-1]
    numbered = [(number, piece) for number, piece in enumerate(pieces, first_number) if piece.strip("# \n")]
    return [_parse_task(piece, number) for number, piece in numbered]


def _parse_task(piece: str, number: int) -> Draft | str:
    parts = re.split(rf"{number}\.\s+(Instruction|Input|Output):", piece)
    if len(parts) != 7:
        return piece.strip()
    instruction, input_text, output = (parts[place].strip() for place in (2, 4, 6))
    return Draft(instruction, "" if input_text.lower() == NO_INPUT else input_text, output)
