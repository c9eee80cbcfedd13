"""How an instruction and its input become the user's turn, and how an input is cleaned before.

Self-Instruct's released `prepare_for_finetuning.py` draws one of seven forms with an input and six without for every
instance, so that a model learns the task and not one layout of it.
"""

import re
from random import Random
from typing import Literal

from generation.records import user_turn

# Forms that differ in their marks and line breaks, as the published ones do; {i} is the instruction, {x} the input.
WITH_INPUT = (
    "{i}\nInput: {x}\nOutput:",
    "{i}\n\nInput: {x}\n\nOutput:",
    "Task: {i}\nInput: {x}\nOutput:",
    "{i}\n\n{x}\n\nOutput:",
    "{i}\n\n{x}\n",
    "{i}\n{x}\n\n",
    "Task: {i}\n\n{x}\n\n",
)
WITHOUT_INPUT = ("{i} Output:", "{i}\nOutput:", "{i}\n\nOutput:", "{i}\n", "{i}\n\n", "Task: {i}\n\n")
FIELD_LABEL = re.compile(r"^(\w+):", re.MULTILINE)


def encode(instruction: str, input_text: str, encoding: Literal["plain", "published"], draw: Random) -> str:
    """The user's turn. plain: instruction, empty line, input; published: one of the forms above, at random."""
    if encoding == "plain":
        return user_turn(instruction, input_text)
    form = draw.choice(WITH_INPUT if input_text else WITHOUT_INPUT)
    return form.format(i=instruction, x=input_text)


def clean_input(input_text: str, draw: Random, probability: float) -> str:
    """Now and then drop the label of an input that has just one ("Sentence: ..."), and close up its empty lines.

    Published with a probability of 0.5 each, so that inputs come in both forms.
    """
    if draw.random() < probability and len(set(FIELD_LABEL.findall(input_text))) == 1:
        input_text = FIELD_LABEL.sub("", input_text).strip()
    if draw.random() < probability:
        input_text = input_text.replace("\n\n", "\n")
    return input_text
