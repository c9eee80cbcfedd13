"""What chat models put around a text that they were asked for: openers, closers, code fences, quotation marks, echoes.

    Sure! Here is a harder version: "Explain the tides." I hope this helps!  ->  Explain the tides.

What is taken off is returned too, so that it can be recorded.
"""

import re
from dataclasses import dataclass

SURROUNDING_TEXT = "surrounding_text"  # what a chat model wrote around the text that was asked for
REFUSAL = "refusal"  # the model says that it cannot do what it was asked for
TRUNCATED = "truncated_response"  # incomplete, because the response was cut


@dataclass(frozen=True, slots=True)
class Dropped:
    """A piece of a response that does not become data. `reason` is a name to count by."""

    text: str
    reason: str = SURROUNDING_TEXT


AGREEMENT = (
    r"(?:sure(?:\ thing)?|certainly|of\ course|absolutely|definitely|gladly|great|okay|ok|alright|all\ right|understood"
    r"|got\ it|no\ problem|with\ pleasure|好的|当然(?:可以)?|没问题)"
)
FIRST_PERSON = r"(?:i\b|i['’](?:d|ll|m)\b|let\b|let['’]s\b|here\b|here['’]s\b|below\b|these\b|this\b|the\ following\b)"
POINTER = (
    r"(?:here(?:['’]s|\ is|\ are|\ come)|below\ (?:is|are)|(?:these|the\ following|this)\ (?:is|are)"
    r"|以下是|下面是|这里是)"
)
CHANGED = (
    r"(?:harder|tougher|complex|challenging|difficult|complicated|advanced|detailed|specific|new|brand-new|revised"
    r"|modified|updated|improved|enhanced|evolved|expanded|possible|suggested|alternative|similar|different|rarer?)"
)
ASKED_FOR = r"(?:prompts?|instructions?|tasks?|questions?|requests?|challenges?|problems?|queries|query|examples?)"
# A version, or a new task: what a rewrite is announced as. "Here is a list of numbers:" belongs to an instruction.
REWRITE = (
    rf"(?:\b(?:version|variation|variant|rewr\w+|revis\w+|rephras\w+)\b|\b{CHANGED}\b[^:：\n]{{0,60}}\b{ASKED_FOR}\b)"
)

CHAT_LINE = re.compile(
    rf"""[*_\s]*(?:
        {AGREEMENT}\s*(?:[!.,:，。！]|[-–—]\s)+\s*(?:(?:{FIRST_PERSON}).*)?      # Sure! I can help you with that.
      | {AGREEMENT}\b[^\n]*[:：]                                                # Sure, ten tasks of many kinds:
      | (?:i['’]d|i\ would|i['’]ll|i\ will|i['’]m|i\ am)\ (?:be\ )?(?:happy|glad|delighted)\ to\b.*
      | as\ (?:you\ )?requested\b.*[:：.]
    )[*_\s]*""",
    re.IGNORECASE | re.VERBOSE,
)
ANNOUNCEMENT = re.compile(  # Here are some more tasks:  Here are ten tasks of many kinds.
    rf"[*_\s]*{POINTER}(?:[^\n]{{0,300}}[:：]|[^\n]{{0,150}}\b{ASKED_FOR}\b[^\n]{{0,150}}\.)[*_\s]*",
    re.IGNORECASE | re.VERBOSE,
)
# Sure! Here is a harder version of it: Explain ...
INLINE_OPENER = re.compile(
    rf"""(?:{AGREEMENT}\s*[!,.，！]+\s*)?(?:
        {POINTER}[^:：\n]{{0,80}}?{REWRITE}[^:：\n]{{0,80}}[:：]
      | i(?:['’]ve|\ have)\ (?:rewritten|revised|rephrased|made|created)\b[^:：\n]{{0,80}}[:：]
      | (?:how\ about|what\ about|try)\ (?:this|the\ following)(?:\ one)?\s*[:：?？]
      | (?:the\ )?(?:{CHANGED}|rewritten|created|final)(?:\ (?:{ASKED_FOR}|version))?\s*[:：]
    )\s*""",
    re.IGNORECASE | re.VERBOSE,
)
EXCLAMATION = re.compile(rf"{AGREEMENT}\s*[!！]+\s+", re.IGNORECASE | re.VERBOSE)
CLOSER = re.compile(
    r"""[*_(\s]*(?:
        (?:i\ )?hope\ (?:this|these|that|it|you)\b
      | (?:please\ )?let\ me\ know\ (?:if|how|whether|what)\b
      | (?:please\ )?feel\ free\ to\ (?:ask|reach|let|modify|adjust|adapt|use\ (?:these|this)|tweak|custom|change)
      | if\ you\ (?:need|have|want|would\ like|['’]d\ like)\ (?:any|more|further|another|additional|me\ to|help)\b
      | if\ you['’]d\ like\b
      | (?:would|do)\ you\ (?:like|want|need)\ (?:me|any|more|another|further)\b
      | is\ there\ anything\ else\b
      | (?:please\ )?don['’]t\ hesitate\b
      | these\ (?:\d+\ |new\ |additional\ )?(?:tasks|instructions|requests|prompts|questions|examples)
        \ (?:are|cover|should)\b
      | this\ (?:version|rewrite|rewritten|revised|revision|modified|updated)\b
      | i(?:['’]ve|\ have)\ (?:added|made|rewritten|tried|included|changed|kept)\b
      | note\b[:*_]*\ (?:that\ )?(?:i|this\ version|these\ (?:tasks|instructions|requests))\b
      | (?:best\ of|good)\ luck\b | happy\ (?:writing|learning|coding)\b
      | 希望(?:这|以上|对你) | 如果(?:你|您)(?:还)?(?:需要|有)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
# What follows is about the rewrite, to the end of the text.
EXPLANATION = re.compile(
    r"""[*_(\s#]*(?:
        (?:in\ )?this\ (?:new\ )?(?:version|rewrite|rewritten|revised|revision|modified|updated|evolved)\b
      | (?:explanation|rationale|changes(?:\ made)?|what\ i\ changed)[*_]*[:：]
      | (?:the\ )?(?:added|new)\ (?:constraints?|requirements?)\ (?:is|are|here|makes?|ensures?)\b
      | this\ (?:adds|makes|introduces|increases)\b
      | note\b[:*_]*\ (?:that\ )?(?:i|this\ version)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
REFUSED = re.compile(
    r"""(?:i['’]m\ (?:so\ |very\ )?|i\ am\ (?:so\ |very\ )?|)sorry,?\ (?:but\b|i\b|as\b)
      | (?:i\ )?apologi(?:ze|es)\b | i\ (?:cannot|can\ ?not|can['’]t|could\ not|couldn['’]t|am\ not\ able|am\ unable)\b
      | i['’]m\ (?:unable|not\ able)\b | as\ an?\ (?:ai\ |large\ )?(?:language\ model|assistant)\b
      | unfortunately,?\ i\b""",
    re.IGNORECASE | re.VERBOSE,
)
RULE = re.compile(r"\s*(?:[-*_=]\s*){3,}|\s*#+\s*")  # a horizontal rule, or a heading without a text
FENCE = re.compile(r"\s*(`{3,}|~{3,})[^`]*")
QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "「": "」", "'": "'", "‘": "’", "`": "`"}
# As in "#Rewritten Prompt#:", "**Created Prompt:**" and "### New instruction:".
ECHOED_LABEL = re.compile(
    r"^[#*_ \t]*(?P<kind>rewritten|re-written|created|new|revised|evolved|given|original)[ ](?:prompt|instruction)"
    r"[ \t]*(?:[#*_]+[ \t]*[:：]?|[:：])[#*_ \t]*",
    re.IGNORECASE | re.MULTILINE,
)


def is_opener(line: str) -> bool:
    """Whether a chat model announces here what follows: "Sure! Here are ten more:"."""
    return bool(CHAT_LINE.fullmatch(line) or ANNOUNCEMENT.fullmatch(line))


def is_closer(line: str) -> bool:
    """Whether a chat model takes leave here: "I hope this helps!"."""
    return CLOSER.match(line) is not None


def is_refusal(text: str) -> bool:
    """Whether a text begins as a model that cannot do what it was asked for does."""
    return REFUSED.match(text.lstrip()) is not None


def is_rule(line: str) -> bool:
    return RULE.fullmatch(line) is not None


def fenced_lines(lines: list[str]) -> list[int]:
    """For each line the number of its code fence, from 1; 0 outside. The lines of the marks belong to the fence."""
    fence, number, result = "", 0, []
    for line in lines:
        mark = FENCE.fullmatch(line)
        if not fence and mark:
            fence, number = mark[1], number + 1
            result.append(number)
        elif fence:
            result.append(number)
            if line.strip() == fence:
                fence = ""
        else:
            result.append(0)
    return result


def unframe(text: str) -> tuple[str, list[Dropped]]:
    """A text without what a chat model put around it, and the lines taken off in their order.

    The whole text may be fenced, in quotation marks or in bold; these marks are taken off and not returned.
    """
    openers: list[Dropped] = []
    closers: list[Dropped] = []
    while True:
        before, text = text, unwrap(_after_echoed_label(text.strip()))
        first, _, rest = text.partition("\n")
        opener = INLINE_OPENER.match(text) or CHAT_LINE.fullmatch(first) or EXCLAMATION.match(first)
        if opener:
            openers.append(Dropped(opener[0].strip()))
            text = text[opener.end() :]
        elif is_rule(first):
            text = rest
        rest, _, last = text.rstrip().rpartition("\n")
        if rest.strip() and (is_rule(last) or is_closer(last)):
            closers += [Dropped(last)] if not is_rule(last) else []
            text = rest
        lines = text.split("\n")
        ends = (n for n in range(2, len(lines)) if EXPLANATION.match(lines[n]) and not lines[n - 1].strip(" -*_"))
        if (end := next(ends, None)) is not None:
            closers.append(Dropped("\n".join(lines[end:]).strip()))
            text = "\n".join(lines[:end])
        if text == before:
            return text, [*openers, *reversed(closers)]


def unwrap(text: str) -> str:
    """A text without the code fence, quotation marks or bold marks that are around the whole of it."""
    text = text.strip()
    lines = text.split("\n")
    if len(lines) > 2 and lines[-1].strip() and set(fenced_lines(lines)) == {1} and FENCE.fullmatch(lines[-1]):
        return "\n".join(lines[1:-1]).strip()
    if re.fullmatch(r"(\*\*|__)(?:(?!\1).)+\1", text, re.DOTALL):
        return text[2:-2].strip()
    end = QUOTES.get(text[:1])
    if end and len(text) > 2 and text.endswith(end) and not {text[0], end} & set(text[1:-1]):
        return text[1:-1].strip()
    return text


def _after_echoed_label(text: str) -> str:
    """What follows "#Rewritten Prompt#:", if only openers or the repeated prompt are before it."""
    given = False
    for label in ECHOED_LABEL.finditer(text):
        if label["kind"].lower() in ("given", "original"):
            given = True
        elif given or all(is_opener(line) or not line.strip() for line in text[: label.start()].split("\n")):
            return text[label.end() :]
    return text
