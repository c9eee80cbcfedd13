"""Labelled texts, as models write them: Alpaca's tasks, and Self-Instruct's instances of one task.

A label counts at the beginning of a line: `Input:`, `**Input:**`, `### Input`, `4. Input:`, `Input 4:`, in any case and
with either colon. If the labels of a task have its number, others are text. So an answer may speak of an "Example",
and may have headings.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from generation.filters.drafts import Draft, Instance
from generation.parsing.chat import TRUNCATED, Dropped, fenced_lines, is_closer, is_opener, is_rule, unwrap

MALFORMED_TASK, MALFORMED_INSTANCE, NO_INSTANCE = "malformed_task", "malformed_instance", "no_instance"
# If the text never uses the word itself.
SYNONYMS = {"response": "output", "answer": "output", "label": "class label", "task": "instruction"}
LABEL = re.compile(
    r"""[ \t]*(?P<bullet>[-*•>]\ +)?(?P<heading>\#{1,6}\ *)?(?P<bold>\*\*|__)?[ \t]*
    (?:(?P<before>\d{1,3})[ ]?[.．、)）:：-]?(?:\*\*|__)?[ \t]*)?(?:\*\*|__)?
    (?P<name>instruction|input|output|response|answer|class\ label|label|task|example)(?:[ ]*\#?(?P<after>\d{1,3}))?[.]?
    [ \t]*(?:\*\*|__)?[ \t]*(?P<colon>[:：])?[ \t]*(?:\*\*|__)?[ \t]*""",
    re.IGNORECASE | re.VERBOSE,
)
TASK_HEADING = re.compile(
    r"[#*_ \t]*(?:task|example|item)\s*#?\d{1,3}\s*[.:：)]?[*_# \t]*|(?:#{1,6} |\*\*)?\d{1,3}[.:)](?:\*\*)?[ \t]*",
    re.IGNORECASE,
)
NO_INPUT = re.compile(
    r"""no[ -]?(?:(?:additional|further|specific|extra|other|explicit)[ ])?inputs?
        (?:[ ](?:is[ ]|was[ ]|are[ ])?(?:required|needed|necessary|provided|given|available|specified))?
        (?:[ ](?:for|in)[ ]this[ ](?:task|instruction|case|question))?
      | (?:none|not)[ ]?(?:(?:is[ ])?(?:required|needed|necessary|provided|given|available|applicable|specified))?
      | n/?a | n\.a | nil | null | blank | without[ ]input | [-—–]+ | 无 | 无需?输入 | 没有输入 | 不需要输入""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class _Label:
    """A label at text[start:end]. bullet: it is an item of a list, or has a number before it."""

    name: str
    number: int | None
    start: int
    end: int
    bullet: bool = False


def no_input(text: str) -> bool:
    """Whether an input says that there is none: "<noinput>", "(none)", "No input required."."""
    return not text.strip() or NO_INPUT.fullmatch(text.strip(" \t\n<>()[]{}*_\"'`.")) is not None


def parse_yes(text: str) -> bool:
    """Whether an answer begins with yes. Anything else is no."""
    return re.match(r"[\W_]*yes\b", text, re.IGNORECASE) is not None


# -- whole tasks


def parse_tasks(text: str, first_number: int, was_cut: bool = False) -> list[Draft | Dropped]:
    """Tasks of instruction, input and output, and what is none of them, in the order of the text.

    `text` continues a prompt that ends with "<first_number>. Instruction:", or begins the list anew. `N. Instruction:`
    begins a task wherever it stands; without numbers, `Instruction:` does. If the text was cut, its last task is
    dropped unless a separator follows it.
    """
    return list(_parse_tasks(unwrap(text), first_number, was_cut))


def _parse_tasks(text: str, first_number: int, was_cut: bool) -> Iterator[Draft | Dropped]:
    labels = _find_labels(text, ("instruction", "input", "output"))
    instructions = [label for label in labels if label.name == "instruction"]
    has_numbers = any(label.number is not None for label in instructions or labels)
    starts = [label for label in instructions if (label.number is not None) == has_numbers]
    segments = [(label.number, label.end) for label in starts]
    if not starts or labels[0].name != "instruction":  # the first task has the label of the prompt
        segments.insert(0, (first_number if has_numbers or not starts else None, 0))
        ends = [label.start for label in starts] + [len(text)]
    else:
        yield from _surrounding(_without_separator(text[: starts[0].start]))
        ends = [label.start for label in starts[1:]] + [len(text)]
    for (number, start), end in zip(segments[:-1], ends[:-1], strict=True):
        piece = _without_separator(text[start:end])
        if piece.strip():
            yield _parse_task(piece, number) or Dropped(_shown(piece, number), MALFORMED_TASK)
    number, start = segments[-1]
    piece = text[start:]
    if was_cut and not is_rule(piece.rstrip().rpartition("\n")[2] or "."):
        yield Dropped(_shown(piece, number), TRUNCATED)
        return
    piece, closer = _without_closer(piece)
    if piece.strip(" \t\n#"):
        yield _parse_task(piece, number) or Dropped(_shown(piece, number), MALFORMED_TASK)
    yield from _surrounding(closer)


def _parse_task(piece: str, number: int | None) -> Draft | None:
    """The task after "N. Instruction:".

    None if it has no instruction or no output, if a label is there twice, or if one has the number of the next task.
    """
    labels = _find_labels(piece, ("input", "output"))
    if not any(label.name == "output" for label in labels):
        labels = _inline_labels(piece, number)
    own = [label for label in labels if label.number == number]
    if number is not None:
        is_mixed = any(label.number == number + 1 for label in labels)
        if is_mixed or len({label.name for label in own}) < len(own):
            return None
        own += [label for label in labels if label.number is None]
    output = next((label for label in own if label.name == "output"), None)
    if output and output.number is None and sum(label.name == "output" and not label.bullet for label in own) > 1:
        return None
    given = next((label for label in own if label.name == "input"), None)
    if output is None:
        return None
    if given and given.start > output.start:
        if given.number is not None:
            return None
        given = None  # it belongs to the answer
    instruction = _text(piece[: (given or output).start])
    input_text = _input(piece[given.end : output.start]) if given else ""
    return Draft(instruction, input_text, _text(piece[output.end :])) if instruction else None


def _inline_labels(piece: str, number: int | None) -> list[_Label]:
    """Labels inside lines, if they have the task's number: "4. Instruction: a 4. Input: b 4. Output: c"."""
    found = () if number is None else re.finditer(rf"(?<!\S){number}\.\s+(Input|Output):", piece)
    return [_Label(each[1].lower(), number, each.start(), each.end()) for each in found]


def _without_separator(piece: str) -> str:
    """A task without what parts it from the next one: "###", "---", "### Task 5", "5."."""
    lines = piece.rstrip().split("\n")
    while len(lines) > 1 and (is_rule(lines[-1]) or not lines[-1].strip() or _is_task_heading(lines)):
        lines.pop()
    return "\n".join(lines)


def _is_task_heading(lines: list[str]) -> bool:
    """Whether the last line announces a task. A number alone is an answer, unless it is a paragraph of its own."""
    last, before = lines[-1], lines[-2].strip()
    is_paragraph = not before or is_rule(before)
    return TASK_HEADING.fullmatch(last) is not None and (is_paragraph or not last.strip()[0].isdigit())


def _shown(piece: str, number: int | None) -> str:
    """A rejected task with the label that it begins with."""
    return f"{'' if number is None else f'{number}. '}Instruction: {piece.strip()}"


# -- instances of one task


def parse_input_first(text: str, was_cut: bool = False, instruction: str = "") -> list[Instance | Dropped]:
    """Instances of a task that is not classification: "Example k" blocks of `Input:` and `Output:`, or an output alone.

    Text without any label has no instance. If the text was cut, its last instance is dropped. "Task: <instruction>"
    before the instances is left out; any other task ends them.
    """
    return list(_parse_input_first(unwrap(text), was_cut, instruction))


def _parse_input_first(text: str, was_cut: bool, instruction: str) -> Iterator[Instance | Dropped]:
    echo, text, rest = _of_this_task(text, instruction)
    yield from _surrounding(echo)
    fields = _fields_of_one_style(_find_labels(text, ("input", "output")))
    starts = _find_examples(text, fields)
    starts += [field for last, field in pairwise(fields) if (last.name, field.name) == ("output", "input")]
    if fields and fields[0].start < min((label.start for label in starts), default=len(text)):
        starts.append(fields[0])
    starts.sort(key=lambda label: label.start)
    starts = [each for last, each in pairwise([None, *starts]) if not last or text[last.end : each.start].strip()]
    if not starts:
        yield Dropped((text + rest).strip(), TRUNCATED if was_cut else NO_INSTANCE)
        return
    yield from _surrounding(text[: starts[0].start])
    bounds = [*(label.start for label in starts[1:]), len(text)]
    begins = [label.end if label.name == "example" else label.start for label in starts]
    blocks = [text[begin:end] for begin, end in zip(begins, bounds, strict=True)]
    yield from map(_parse_block, blocks[:-1])
    yield from _last_instance(blocks[-1], rest, was_cut)


def _last_instance(block: str, rest: str, was_cut: bool) -> Iterator[Instance | Dropped]:
    """The last block, and what follows the instances. A next task in `rest` shows that the block is complete."""
    if was_cut and not rest:
        yield Dropped(block.strip(), TRUNCATED)
        return
    block, closer = _without_closer(block)
    yield _parse_block(block)
    yield from _surrounding(closer)
    yield from _surrounding(rest)


def _find_examples(text: str, fields: list[_Label]) -> list[_Label]:
    """The labels "Example k" that begin an instance: before a field; without fields, 1, 2, ... from the beginning."""
    examples = _find_labels(text, ("example",))
    if fields or any(_begins_with_field(text[each.end :]) for each in examples):
        return [each for each in examples if _begins_with_field(text[each.end :])]
    if not examples or text[: examples[0].start].strip():
        return []
    numbers = iter(range(1, len(examples) + 1))
    expected = next(numbers)
    found = []
    for each in examples:
        if each.number == expected:
            found.append(each)
            expected = next(numbers, 0)
    return found


def _begins_with_field(text: str) -> bool:
    label = LABEL.match(text.lstrip())
    return bool(label) and label["name"].lower() in ("input", "output", "class label")


def _fields_of_one_style(fields: list[_Label]) -> list[_Label]:
    """Fields that are list items only if the first one is: an answer may have a list with "- Input: the keyboard"."""
    return [field for field in fields if field.bullet == fields[0].bullet]


def _parse_block(block: str) -> Instance | Dropped:
    """An instance of `Input:` and `Output:`, of `Output:` alone, or of an output without a label."""
    block = block.strip()
    fields = _fields_of_one_style(_find_labels(block, ("input", "output")))
    names = [field.name for field in fields]
    if names == ["input"]:  # both on one line
        input_text, found, output = block[fields[0].end :].partition(" Output:")
        return Instance(_input(input_text), _text(output)) if found else Dropped(block, MALFORMED_INSTANCE)
    if not names:
        return Instance("", _text(block))
    if names not in (["output"], ["input", "output"]) or block[: fields[0].start].strip():
        return Dropped(block, MALFORMED_INSTANCE)
    given = block[fields[0].end : fields[1].start] if len(fields) > 1 else ""
    return Instance(_input(given), _text(block[fields[-1].end :]))


def parse_output_first(text: str, was_cut: bool = False, instruction: str = "") -> list[Instance | Dropped]:
    """Instances of a classification task: labels after `Class label:`, with an input below or above each.

    `text` continues a prompt that ends at "Class label:", so its first label may have no marker of its own.
    """
    return list(_parse_output_first(unwrap(text), was_cut, instruction))


def _parse_output_first(text: str, was_cut: bool, instruction: str) -> Iterator[Instance | Dropped]:
    echo, text, rest = _of_this_task(text, instruction)
    yield from _surrounding(echo)
    if not text.strip():
        yield Dropped(rest.strip(), TRUNCATED if was_cut and not rest else NO_INSTANCE)
        return
    fields = _fields_of_one_style(_find_labels(text, ("class label", "input", "output", "example")))
    before = text[: fields[0].start] if fields else text
    if is_opener(before.strip().partition("\n")[0]) and fields:
        yield from _surrounding(before)
    elif before.strip() or not fields:
        fields.insert(0, _Label("class label", None, 0, 0))
    first = next((field.name for field in fields if field.name != "example"), "")
    starts = [n for n, field in enumerate(fields) if field.name == first] if first in ("class label", "input") else [0]
    groups = [fields[start:end] for start, end in pairwise([*starts, len(fields)])]
    for group in groups:
        end = fields[fields.index(group[-1]) + 1].start if group[-1] is not fields[-1] else len(text)
        block = text[group[0].start : end]
        if group is groups[-1] and was_cut and not rest:
            yield Dropped(block.strip(), TRUNCATED)
            return
        closer = ""
        if group is groups[-1]:
            block, closer = _without_closer(block)
        yield _classified(text[: group[0].start] + block, group)
        yield from _surrounding(closer)
    yield from _surrounding(rest)


def _classified(text: str, group: list[_Label]) -> Instance | Dropped:
    """The instance in the last part of `text`, which the labels of `group` part into fields."""
    bounds = [label.start for label in group[1:]] + [len(text)]
    fields = {label.name: text[label.end : end].strip() for label, end in zip(group, bounds, strict=True)}
    names = [label.name for label in group if label.name != "example"]
    label = fields.get("class label") or fields.get("output")
    if label is None or len(set(names)) < len(names) or fields.get("output", label) != label:
        return Dropped(text[group[0].start :].strip(), MALFORMED_INSTANCE)
    if "input" not in fields:
        label, _, fields["input"] = label.partition("\n")
    return Instance(_input(fields["input"]), _text(label))


# -- labels and fields


def _find_labels(text: str, names: tuple[str, ...]) -> list[_Label]:
    """The labels of these names at the beginning of lines, outside code fences, in their order."""
    labels, synonyms, position = [], [], 0
    lines = text.split("\n")
    for line, fence in zip(lines, fenced_lines(lines), strict=True):
        found = None if fence else LABEL.match(line)
        if found and _is_label(found, line):
            word = found["name"].lower()
            number = found["before"] or found["after"]
            label = _Label(
                word if word in names else SYNONYMS.get(word, word),
                int(number) if number else None,
                position,
                position + found.end(),
                bool(found["bullet"] or found["before"]),
            )
            if label.name in names:
                labels.append(label)
                synonyms += [label] if label.name != word else []
        position += len(line) + 1
    own = {label.name for label in labels if label not in synonyms}
    return [label for label in labels if label not in synonyms or label.name not in own]


def _is_label(found: re.Match, line: str) -> bool:
    """A label has a colon; or it is a heading or in bold, alone on its line; or it is "Example 3"."""
    if found["name"].lower() == "example":
        return bool(found["after"] or found["colon"]) and not found["before"]
    return bool(found["colon"]) or (bool(found["heading"] or found["bold"]) and found.end() == len(line))


def _of_this_task(text: str, instruction: str) -> tuple[str, str, str]:
    """The repeated "Task: <instruction>" before the instances, the instances, and the next task after them."""
    tasks = [label for label in _find_labels(text, ("task",)) if not label.bullet]
    start = 0
    if tasks and not text[: tasks[0].start].strip():
        first = tasks[0]
        line_end = (text + "\n").index("\n", first.start)
        if text[first.end : line_end].strip(" *").casefold() == " ".join(instruction.split()).casefold():
            start = line_end
            tasks = tasks[1:]
    end = tasks[0].start if tasks else len(text)
    return text[:start], text[start:end], text[end:]


def _without_closer(text: str) -> tuple[str, str]:
    """A text, and the leave that a chat model takes after it."""
    lines = text.split("\n")
    start = len(lines)
    while start > 1 and (not lines[start - 1].strip() or is_rule(lines[start - 1]) or is_closer(lines[start - 1])):
        start -= 1
    closer = "\n".join(lines[start:])
    return ("\n".join(lines[:start]), closer) if any(map(is_closer, lines[start:])) else (text, "")


def _surrounding(text: str) -> Iterator[Dropped]:
    text = "\n".join(line for line in text.split("\n") if not is_rule(line)).strip()
    if text:
        yield Dropped(text)


def _text(text: str) -> str:
    """A field without the separators and the half of a pair of bold marks around it."""
    lines = text.strip().split("\n")
    while lines and (is_rule(lines[-1]) or not lines[-1].strip()):
        lines.pop()
    text = "\n".join(lines).strip()
    return text.removesuffix("**").rstrip() if text.count("**") % 2 else text


def _input(text: str) -> str:
    return "" if no_input(text) else _text(text)
