"""How an instruction and its input become the user's turn, and how an input is cleaned before.

Self-Instruct's released `prepare_for_finetuning.py` draws one of seven forms with an input and six without for every
instance, those of the seeds included, so that a model learns the task and not one layout of it.
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
    "{i}\n\n{x}\n\n",
    "{i}\n{x}\n\n",
    "Task: {i}\n\n{x}\n\n",
)
WITHOUT_INPUT = ("{i} Output:", "{i}\nOutput:", "{i}\n\nOutput:", "{i}\n", "{i}\n\n", "Task: {i}\n\n")
FIELD_LABEL = re.compile(r"(\w+):")


def encode(instruction: str, input_text: str, encoding: Literal["plain", "published"], draw: Random) -> str:
    """The user's turn. plain: instruction, empty line, input; published: one of the forms above, at random."""
    if encoding == "plain":
        return user_turn(instruction, input_text)
    form = draw.choice(WITH_INPUT if input_text else WITHOUT_INPUT)
    return form.format(i=instruction, x=input_text)


def clean_input(input_text: str, draw: Random, probability: float) -> str:
    """Now and then drop the label of an input that has just one ("Sentence: ..."), and close up its empty lines.

    Published with a probability of 0.5, so that inputs come in both forms. The label has to begin the input; the
    released code takes any word before a colon for one, and loses what comes before it ("at 10:30" becomes "30").
    """
    if draw.random() >= probability:
        return input_text
    label = FIELD_LABEL.match(input_text)
    if label and set(FIELD_LABEL.findall(input_text)) == {label[1]}:
        input_text = input_text[label.end() :]
    return input_text.strip().replace("\n\n", "\n")
