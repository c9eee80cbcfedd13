"""Conversations to tokens and labels. Only the assistant's messages and their end-of-turn tokens get labels.

The mask does not depend on a template's markers, and nothing is searched for in the text. Each assistant turn is the
difference between two renderings of the conversation, one that stops before the turn and one that stops after it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.data.conversations import Conversation
from cluster.errors import InputError
from trainer.data.dropped import TOO_LONG
from trainer.data.template import ANSWER, FIX, QUESTION, THOUGHT, ChatTemplate, Unmaskable

IGNORE = -100  # the label that cross-entropy ignores


@dataclass(frozen=True)
class Encoded:
    """One document of T tokens. `labels[t]` is the token that position t has to predict, or IGNORE."""

    input_ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T]
    is_cut: bool = False  # whether max_seq_len cut off tokens that would have been trained


def check_template(template: ChatTemplate) -> list[Encoded]:
    """The documents of a question with a simple answer. Raises InputError if no such answer can be masked.

    An assistant's message is what follows the generation prompt. If a turn starts with other text, that text would be
    trained as part of the message. Some templates write the start of a thought into the generation prompt, so an answer
    with a thought is tried too.
    """
    _ = template.ends  # raises InputError
    prompt = template.render([QUESTION], add_generation_prompt=True)
    answered = [template.render([QUESTION, answer]) for answer in (ANSWER, THOUGHT)]
    if not any(text.startswith(prompt) for text in answered):
        raise InputError(
            "the chat template starts an assistant's turn with other text than its generation prompt "
            f"({prompt[-40:]!r}), so training would differ from later use. {FIX}"
        )
    opening = answered[0][len(prompt) :].partition(ANSWER["content"])[0]
    if prompt == template.render([QUESTION]) and opening.strip():
        raise InputError(
            f"the chat template has no generation prompt, but starts an assistant's turn with {opening.strip()!r}, "
            f"which would be trained. Write it under `add_generation_prompt` too. Or {FIX[0].lower()}{FIX[1:]}"
        )
    reasons = []
    for answer in (ANSWER, THOUGHT):
        try:
            return encode_chat(template, Conversation([QUESTION, answer]), max_seq_len=1 << 20)
        except Unmaskable as error:
            reasons.append(str(error))
    raise InputError(
        f"the chat template and the tokenizer do not fit together: {reasons[0]} (the generation prompt ends with "
        f"{prompt[-20:]!r}). {FIX}"
    )


def encode_chat(template: ChatTemplate, conversation: Conversation, max_seq_len: int) -> list[Encoded]:
    """Tokens and labels of one conversation, each document cut at `max_seq_len` tokens.

    A document trains the turns that the template writes as if the conversation ended there. Some templates write
    earlier turns otherwise, for example without their thoughts. Such an answer is trained in a document of its own,
    which ends with it, because that is what the model sees in use.

    Raises Unmaskable if the template refuses the conversation or leaves a turn out, if a token crosses the start of an
    answer, if an end-of-turn token is missing or is inside a message, or if the cut leaves no label.
    """
    messages, tools = template.prepare(conversation), conversation.tools
    pending = [
        turn for turn, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)
    ]
    if not pending:
        raise Unmaskable("no assistant turn")
    if any(end in text for turn in pending for text in _texts(messages[turn]) for end in template.ends):
        raise Unmaskable("an assistant turn contains an end token")
    prompts = {turn: template.render(messages[:turn], tools, add_generation_prompt=True) for turn in pending}
    answered = {turn: _without_end(template.render(messages[: turn + 1], tools), template.ends) for turn in pending}
    if not all(answered[turn].startswith(prompts[turn]) for turn in pending):
        raise Unmaskable("the chat template starts an answer with other text than its generation prompt")
    documents: list[Encoded] = []
    length = len(messages)
    while pending:
        text = template.render(messages[:length], tools)
        spans = {
            turn: slice(len(prompts[turn]), len(answered[turn]))
            for turn in pending
            if turn < length and _goes_on(text, answered[turn], template.ends)
        }
        if spans:
            is_finished = conversation.is_finished
            documents.append(_encode_spans(template, messages[:length], text, spans, max_seq_len, is_finished))
        elif length == pending[-1] + 1:
            raise Unmaskable("an assistant turn has no end token")
        pending = [turn for turn in pending if turn not in spans]
        length = pending[-1] + 1 if pending else 0
    kept = [document for document in documents if (document.labels != IGNORE).any()]
    if not kept:
        raise Unmaskable(TOO_LONG)
    return [replace(kept[0], is_cut=any(document.is_cut for document in documents)), *kept[1:]]


def encode_text(ids: Sequence[int], end_id: int, max_seq_len: int) -> Encoded:
    """Tokens and labels of plain text: of every token but the first, and of the end if the text is not cut.

    ids: as the tokenizer encodes a text, with a token for its begin if the model has one, and perhaps with `end_id`.
    """
    ids = ids[:-1] if len(ids) and ids[-1] == end_id else ids
    whole = np.asarray([*ids, end_id], dtype=np.int32)
    kept = whole[:max_seq_len]
    return Encoded(kept, _shift(kept, np.ones(len(kept), dtype=bool)), is_cut=len(kept) < len(whole))


def _encode_spans(
    template: ChatTemplate, messages: Sequence[dict], text: str, spans: dict[int, slice], max_seq_len: int,
    is_finished: bool,
) -> Encoded:  # fmt: skip
    """The document of a rendered `text`. The cut may leave no label.

    spans: turn -> its characters without the token that ends it.
    """
    ids, starts, stops = template.tokenize(text, [span.start for span in spans.values()])
    if len(messages) - 1 in spans and (opener := template.opener_after(messages[-1])) is not None:
        ids, starts, stops = np.append(ids, opener), np.append(starts, len(text)), np.append(stops, len(text) + 1)
    is_end = np.isin(ids, list(template.ends.values()))
    trained = np.zeros(len(ids), dtype=bool)
    for turn, span in spans.items():
        ends = np.flatnonzero(is_end & (stops > span.stop))
        if not len(ends) or text[span.stop : starts[ends[0]]].strip():
            raise Unmaskable("an assistant turn has no end token")
        trained[np.searchsorted(starts, span.start) : ends[0] + 1] = True
        if turn == len(messages) - 1 and not is_finished:
            ids, trained = ids[: ends[0]], trained[: ends[0]]
    ids, is_cut = ids[:max_seq_len].astype(np.int32), bool(trained[max_seq_len:].any())
    return Encoded(ids, _shift(ids, trained[:max_seq_len]), is_cut)


def _goes_on(text: str, answered: str, ends: Iterable[str]) -> bool:
    """Whether `text` begins with `answered` and the answer ends there: with an end token or with the text."""
    rest = text[len(answered) :].lstrip()
    return text.startswith(answered) and (not rest or rest.startswith(tuple(ends)))


def _without_end(text: str, ends: Iterable[str]) -> str:
    """`text` without the end tokens at its end. A template may write one for the turn and one for the conversation."""
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(end)
    return text


def _texts(message: dict) -> list[str]:
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in message.values()]


def _shift(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The labels of tokens of which some are trained: position t predicts token t + 1."""
    labels = np.full(len(ids), IGNORE, dtype=np.int32)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORE)
    return labels
