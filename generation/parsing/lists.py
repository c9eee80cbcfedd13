"""Lists of instructions, as models write them.

Items begin with `1.`, `1)`, `(1)`, `**1.**`, `#1`, `Task 1:`, `-`, `*` and the like, at the beginning of a line. The
prompt ends with the number of the first item, so a model may go on without a number, repeat the number, or begin at 1.
An item may have several lines, and a list inside it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from generation.parsing.chat import (
    REFUSAL,
    TRUNCATED,
    Dropped,
    fenced_lines,
    is_closer,
    is_opener,
    is_refusal,
    is_rule,
    unwrap,
)

ITEM_NAME = r"(?:task|instruction|request|question|prompt|item|任务|指令)"
NUMBER_MARK = re.compile(
    rf"""(?P<indent>[ \t]*)(?:>\ ?)?(?:[-*•]\ +)?(?:\#{{1,6}}\ +)?(?:\*\*|__)?
    (?:(?:{ITEM_NAME}\ *)?\#?[(\[]?(?P<plain>\d{{1,3}})                             # 1.  1)  (1)  **1.**  Task 1:
        \s?(?:\\?[.．、)\]）:：]\)?(?!\d)|[-–—]\ )
      |(?P<circled>[①-⑳])
      |(?:{ITEM_NAME}\ *\#?|\#|№\ ?)(?P<named>\d{{1,3}})(?:\s*[-–—]|(?=\s|$|\*))     # #1  Task 1 -  **Task 1**
    )(?:\*\*|__)?[ \t]*[:：]?[ \t]*""",
    re.IGNORECASE | re.VERBOSE,
)
BULLET = re.compile(
    rf"""(?P<indent>[ \t]*)
    (?:[-*+–—‣◦▪●](?:\s+|$) | [•·]\s* | (?:\*\*)?{ITEM_NAME}\s*[:：](?:\*\*)?\s*)(?!-)(?:\[[ x]\]\s+)?""",
    re.IGNORECASE | re.VERBOSE,
)
ITEM_LABEL = re.compile(rf"(?:\*\*|__)?{ITEM_NAME}\s*(?:\*\*|__)?\s*[:：]\s*(?:\*\*|__)?\s*", re.IGNORECASE)
HEADING = re.compile(r"#{1,6}\s+\S.*|(?:\*\*|__)[^*\n]*[^*.?!。？！\n](?:\*\*|__)[:：]?")
LEADING_BOLD = re.compile(r"(\*\*|__)(\S[^\n]*?)\1")
COLONS = (":", "：")
SENTENCE_ENDS = (".", "?", "!", "。", "？", "！")
MAX_PATHS = 16  # readings of a list to go on with; garbage has thousands
MAX_HEADER_WORDS = 8  # of a line that ends with a colon, directly before the next item


@dataclass(frozen=True, slots=True)
class _Mark:
    """The mark at the beginning of `line`. number: None means a bullet. length: of the mark, with its indentation."""

    line: int
    indent: int
    length: int
    number: int | None


@dataclass(frozen=True, slots=True)
class _Path:
    """One reading of the numbered marks so far: which begin items, and how many irregularities that takes."""

    cost: float
    opening_is_item: bool
    num_items: int = 0
    last: "tuple[_Mark, tuple | None] | None" = None  # the items' marks as a linked list, the last one first


def parse_list(
    text: str, first_number: int, was_cut: bool = False, is_continued: bool = True, prompt: str = ""
) -> list[str | Dropped]:
    """The items of a list that goes on at `first_number`, and what is not an item, in the order of the text.

    is_continued: the text continues the prompt, so that what is before the first mark is an item rather than a header.
    prompt: its lines are no items. If the text was cut, its last item is incomplete and dropped. White space in an item
    becomes single spaces, unless the item has a code block. An empty item is "".
    """
    known = {line.strip() for line in prompt.split("\n")} - {""}
    return list(_parse(text, first_number, was_cut, is_continued, known))


def _parse(text: str, first_number: int, was_cut: bool, is_continued: bool, known: set[str]) -> Iterator[str | Dropped]:
    lines = _without_outer_fence(text.split("\n"), known)
    marks = _find_marks(lines) or ([] if is_continued else _find_sentences(lines, known))
    first_mark = marks[0].line if marks else len(lines)
    start = next((n for n in range(first_mark) if lines[n].strip() and not _is_header(lines[n], known)), first_mark)
    tops, opening_is_item = _choose(lines, marks, first_number, is_continued, start < first_mark, known)
    starts = [(start, 0)] if opening_is_item else []
    starts += [(mark.line, mark.length) for mark in tops]
    header = "\n".join(lines[: starts[0][0] if starts else len(lines)]).strip()
    if header:
        yield Dropped(header)
    ends = [line for line, _ in starts[1:]] + [len(lines)] * bool(starts)
    pieces = [[lines[line][length:], *lines[line + 1 : end]] for (line, length), end in zip(starts, ends, strict=True)]
    for piece in pieces[:-1]:
        end = _end_before_header(piece, known)
        yield _clean(piece[:end])
        yield from _dropped(piece[end:])
    if was_cut:
        yield Dropped("\n".join(pieces[-1] if pieces else []).strip(), TRUNCATED)
    elif pieces:
        end = _end_of_last(pieces[-1], any(_has_blank_line(piece) for piece in pieces[:-1]))
        item = _clean(pieces[-1][:end])
        yield Dropped(item, REFUSAL) if not tops and is_refusal(item) else item
        yield from _dropped(pieces[-1][end:])
    elif not header:
        yield ""


# -- marks


def _find_marks(lines: list[str]) -> list[_Mark]:
    """The marks of the outermost list: numbers, or bullets if there are no numbers or they are inside the bullets."""
    numbers, bullets = [], []
    for position, (line, fence) in enumerate(zip(lines, fenced_lines(lines), strict=True)):
        if fence:
            continue
        if found := NUMBER_MARK.match(line):
            number = int(found["plain"] or found["named"] or ord(found["circled"]) - ord("①") + 1)
            numbers.append(_Mark(position, len(found["indent"]), found.end(), number))
        elif (found := BULLET.match(line)) and not is_rule(line):
            bullets.append(_Mark(position, len(found["indent"]), found.end(), None))
    if len(numbers) > 1 and len({mark.number for mark in numbers}) == 1:  # 1. 1. 1. in Markdown
        numbers, bullets = [], [_Mark(mark.line, mark.indent, mark.length, None) for mark in numbers]
    if numbers and bullets and bullets[0].line < numbers[0].line and bullets[0].indent < numbers[0].indent:
        numbers = []
    marks = numbers or bullets
    outermost = min((mark.indent for mark in marks), default=0)
    return [mark for mark in marks if mark.indent <= outermost + 1]


def _find_sentences(lines: list[str], known: set[str]) -> list[_Mark]:
    """A mark of no length for each line of a list without marks, if each of several lines is a sentence."""
    written = [
        n for n, line in enumerate(lines) if line.strip() and not _is_header(line, known) and not is_closer(line)
    ]
    is_list = len(written) > 1 and all(lines[n].rstrip().endswith(SENTENCE_ENDS) for n in written)
    return [_Mark(n, 0, 0, None) for n in written] if is_list else []


def _choose(
    lines: list[str], marks: list[_Mark], first_number: int, is_continued: bool, has_opening: bool, known: set[str]
) -> tuple[list[_Mark], bool]:
    """The marks that begin items, and whether the text before the first mark is an item too."""
    if not marks or marks[0].number is None:
        announced = not is_continued and marks and _text_before(lines, marks[0]).endswith(COLONS)
        return ([], True) if has_opening and not announced else (marks, False)
    goes_on = is_continued or marks[0].number == first_number + 1
    paths = {(None, 0): _Path(1.5 if has_opening and goes_on else 0, False)}
    if has_opening:
        paths[first_number, 0] = _Path(0 if goes_on else 1, True)
    for mark in marks:
        paths = _extend(paths, mark, _Surroundings.of(lines, mark, known), first_number)
    best = min(paths.values(), key=lambda path: (path.cost, -path.num_items))
    tops, link = [], best.last
    while link:
        tops.append(link[0])
        link = link[1]
    return tops[::-1], best.opening_is_item


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What is before and after a mark."""

    after_blank: bool
    after_header: bool
    after_colon: bool  # and not after a header: a list inside an item is announced
    before_lower: bool  # its text begins in lower case, which instructions seldom do

    @classmethod
    def of(cls, lines: list[str], mark: _Mark, known: set[str]) -> "_Surroundings":
        before = _text_before(lines, mark)
        after_header = bool(before) and _is_header(before, known)
        after_blank = mark.line > 0 and not lines[mark.line - 1].strip()
        before_lower = lines[mark.line][mark.length :][:1].islower()
        return cls(after_blank, after_header, before.endswith(COLONS) and not after_header, before_lower)


def _extend(
    paths: dict[tuple[int | None, int], _Path], mark: _Mark, around: _Surroundings, first_number: int
) -> dict[tuple[int | None, int], _Path]:
    """Read one more mark as an item or as part of a list inside an item. Keep the cheapest readings.

    The keys are the numbers of the last item and of the last mark inside it (0: none).
    """
    extended: dict[tuple[int | None, int], _Path] = {}

    def offer(key: tuple[int | None, int], path: _Path) -> None:
        known = extended.get(key)
        if known is None or (path.cost, -path.num_items) < (known.cost, -known.num_items):
            extended[key] = path

    for (top, inner), path in paths.items():
        cost = path.cost + _cost_of_item(mark.number, top, first_number, around)
        offer((mark.number, 0), _Path(cost, path.opening_is_item, path.num_items + 1, (mark, path.last)))
        if top is not None:
            cost = path.cost + _cost_inside(mark.number, inner, around)
            offer((top, mark.number), _Path(cost, path.opening_is_item, path.num_items, path.last))
    best = sorted(extended, key=lambda key: (extended[key].cost, -extended[key].num_items))[:MAX_PATHS]
    return {key: extended[key] for key in best}


def _cost_of_item(number: int, last: int | None, first_number: int, around: _Surroundings) -> float:
    lower = 0.25 if around.before_lower else 0
    if last is None:
        return lower + (0 if number in (1, first_number, first_number + 1) else 1)
    if number > last:
        return lower + (0 if number == last + 1 else 2)
    is_restart = number in (1, first_number) and (around.after_blank or around.after_header)
    return lower + (1 if is_restart else 4)


def _cost_inside(number: int, last: int, around: _Surroundings) -> float:
    upper = 0 if around.before_lower else 0.15
    if last:
        return upper + (0 if number == last + 1 else 2) + (0.5 if number > 8 else 0)  # such lists are short
    unannounced = 0 if around.after_colon else 2 if around.after_blank else 1
    return upper + unannounced + (0 if number == 1 else 2)


# -- what is around and inside an item


def _is_header(line: str, known: set[str]) -> bool:
    line = line.strip()
    return line in known or is_rule(line) or is_opener(line) or HEADING.fullmatch(line) is not None


def _text_before(lines: list[str], mark: _Mark) -> str:
    """The last line with a text before a mark."""
    return next((line.strip() for line in reversed(lines[: mark.line]) if line.strip()), "")


def _without_outer_fence(lines: list[str], known: set[str]) -> list[str]:
    """The lines without the marks of a code fence, if the whole list is in it."""
    fences = fenced_lines(lines)
    if 1 not in fences:
        return lines
    start = fences.index(1)
    end = len(fences) - fences[::-1].index(1)
    inside = lines[start + 1 : end]
    is_list = any(NUMBER_MARK.match(line) or BULLET.match(line) for line in inside if line.strip())
    if not is_list or any(line.strip() and not _is_header(line, known) for line in lines[:start]):
        return lines
    if inside and set(inside[-1].strip()) in ({"`"}, {"~"}):
        inside[-1] = ""
    return [*lines[:start], "", *inside, *lines[end:]]


def _end_before_header(piece: list[str], known: set[str]) -> int:
    """Where an item ends, if headers of the next items follow it. `piece` begins with the item's first line."""
    end = len(piece)
    while end > 1:
        line, before = piece[end - 1].strip(), piece[end - 2].strip()
        is_announcement = not before and line.endswith(COLONS) and len(line.split()) <= MAX_HEADER_WORDS
        if line and not is_announcement and not _is_header(line, known):
            break
        end -= 1
    return end


def _end_of_last(piece: list[str], may_have_paragraphs: bool) -> int:
    """Where the last item ends: before a closer, and before a paragraph of its own if no other item has several."""
    fences = fenced_lines(piece)
    for position in range(1, len(piece)):
        line, before = piece[position], piece[position - 1]
        if fences[position] or not line.strip() or not "".join(piece[:position]).strip():
            continue
        if is_closer(line) or (not before.strip() and not may_have_paragraphs and not _goes_on(piece, position)):
            return position
    return len(piece)


def _goes_on(piece: list[str], position: int) -> bool:
    """Whether the paragraph at this line belongs to the item before it: it is announced, quoted, or a list."""
    line = piece[position]
    before = "\n".join(piece[:position]).strip()
    return before.endswith(COLONS) or line[:1] in ' \t>"“|' or bool(NUMBER_MARK.match(line) or BULLET.match(line))


def _has_blank_line(piece: list[str]) -> bool:
    return "" in [line.strip() for line in "\n".join(piece).strip().split("\n")]


def _dropped(lines: list[str]) -> Iterator[Dropped]:
    text = "\n".join(line for line in lines if not is_rule(line)).strip()
    if text:
        yield Dropped(text)


def _clean(lines: list[str]) -> str:
    """An item's text without its label and marks of emphasis, on one line unless it has a code block."""
    text = "\n".join(line for line in lines if not is_rule(line) or any(fenced_lines(lines))).strip()
    if text.count("**") % 2:  # the other one was at the number: **1. Write a poem.**
        text = text.replace("**", "", 1).strip()
    text = ITEM_LABEL.sub("", text, count=1) if ITEM_LABEL.match(text) else text
    text = LEADING_BOLD.sub(r"\2", unwrap(text), count=1) if LEADING_BOLD.match(unwrap(text)) else unwrap(text)
    return text.strip() if any(fenced_lines(text.split("\n"))) else re.sub(r"\s+", " ", text).strip()
