"""How an instruction and its input become the user turn, and how the input is cleaned before that.

Self-Instruct's released `prepare_for_finetuning.py` draws a form for every instance, also for those of the seeds: one
of seven with an input, one of six without. So a model learns the task rather than one layout of it.
"""

import re
from random import Random
from typing import Literal

from generation.records import user_turn

# The forms differ in their marks and line breaks, as the published ones do. {i} is the instruction, {x} the input.
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
    """The user turn. plain: instruction, empty line, input. published: one of the forms above, drawn at random."""
    if encoding == "plain":
        return user_turn(instruction, input_text)
    form = draw.choice(WITH_INPUT if input_text else WITHOUT_INPUT)
    return form.format(i=instruction, x=input_text)


def clean_input(input_text: str, draw: Random, probability: float) -> str:
    """With this probability, remove the only label of an input ("Sentence: ...") and its empty lines.

    The published probability is 0.5, so inputs occur in both forms. Here a label must begin the input. The released
    code takes any word before a colon for a label and loses the text before it ("at 10:30" becomes "30").
    """
    if draw.random() >= probability:
        return input_text
    label = FIELD_LABEL.match(input_text)
    if label and set(FIELD_LABEL.findall(input_text)) == {label[1]}:
        input_text = input_text[label.end() :]
    return input_text.strip().replace("\n\n", "\n")
