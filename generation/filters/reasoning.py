"""What a reasoning model thinks before it answers, apart from its answer.

    "<think>\nParis, I recall.\n</think>\n\nIt is Paris." -> answer "It is Paris.", reasoning "Paris, I recall."

The marks are those of the chat templates and of vLLM's reasoning parsers (`vllm/reasoning`). Those need the model's
tokens and an engine that is set up for one of them; these read the text, of any model and from the request log too.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_NAMES = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad)"
_OPENING = rf"<{_NAMES}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>"
_CLOSING = rf"</{_NAMES}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>"
MARK = re.compile(rf"(?P<opening>{_OPENING})|(?P<closing>{_CLOSING})", re.IGNORECASE)
QUOTES = ("`", "'", '"')
AT_END = re.compile(rf"(?:{_OPENING})\s*\Z", re.IGNORECASE)
# Forms without such marks: gpt-oss's channels, whose special tokens vLLM leaves out, and Granite's sentences.
_WHOLE = (
    re.compile(r"\s*analysis(?P<reasoning>.*?)assistantfinal(?P<answer>.*)", re.DOTALL),
    re.compile(
        r"\s*Here(?: i|')s my thought process:(?P<reasoning>.*?)Here(?: i|')s my response:(?P<answer>.*)", re.DOTALL
    ),
)
_WRAPPED = re.compile(
    r"\s*(?:<answer>|<\|begin_of_solution\|>)(.*?)(?:(?:</answer>|<\|end_of_solution\|>)\s*)?", re.DOTALL
)


class Split(NamedTuple):
    """A text without its reasoning, and the reasoning."""

    answer: str
    reasoning: str


def opened_by(prompt: str) -> str:
    """The mark at the end of a rendered prompt, with which its template begins the reasoning; else an empty text."""
    found = AT_END.search(prompt)
    return found.group().strip() if found else ""


def split_reasoning(text: str) -> Split:
    """Take the reasoning off a text. A text without reasoning stays as it is.

    Reasoning begins with a mark at the beginning of a line, outside of a block of code, and ends with the mark that
    closes it, or with the text if that was cut. A mark that closes what nothing has opened belongs to a template that
    opened it: all before it is reasoning. Other marks, and those in quotes, are text.
    """
    for form in _WHOLE:
        if found := form.fullmatch(text):
            return Split(found["answer"].strip(), found["reasoning"].strip())
    kept, reasoning, position = [], [], 0
    while start := _next_reasoning(text, position):
        end = _end_of_reasoning(text, start.end)
        kept.append(text[position : start.begin])
        reasoning.append(text[start.end : end.begin].strip())
        position = end.end
    if not reasoning:
        return Split(text, "")
    answer = "".join([*kept, text[position:]]).strip()
    wrapped = _WRAPPED.fullmatch(answer)
    return Split(wrapped[1].strip() if wrapped else answer, "\n\n".join(filter(None, reasoning)))


class _Place(NamedTuple):
    """A mark in a text; of no characters where a template wrote it or the text was cut."""

    begin: int
    end: int


def marks(text: str, position: int = 0) -> Iterator[re.Match]:
    """The marks that are not in quotes."""
    for mark in MARK.finditer(text, position):
        before, after = text[: mark.start()][-1:], text[mark.end() :][:1]
        if before not in QUOTES or before != after:
            yield mark


def _next_reasoning(text: str, position: int) -> _Place | None:
    """The mark that opens the next reasoning. None means that there is none."""
    is_open = False  # by a mark that is text
    for mark in marks(text, position):
        before = text[position : mark.start()]
        if mark["opening"]:
            if not before.rpartition("\n")[2].strip() and before.count("```") % 2 == 0:
                return _Place(*mark.span())
            is_open = True
        elif not is_open and (position == 0 or not before.strip()):
            return _Place(position, position)
    return None


def _end_of_reasoning(text: str, position: int) -> _Place:
    """The mark that closes the reasoning from `position` on. Marks inside the reasoning may come in pairs."""
    depth, last = 1, _Place(len(text), len(text))
    for mark in marks(text, position):
        if mark["opening"]:
            depth += 1
            continue
        depth -= 1
        last = _Place(*mark.span())
        if depth == 0:
            break
    return last
