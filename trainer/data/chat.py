"""Conversations to tokens and labels. Only the assistant's messages and their end-of-turn tokens get labels.

The mask does not depend on a template's markers, and nothing is searched for in the text. Each assistant turn is the
difference between two renderings of the conversation, one that stops before the turn and one that stops after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from cluster.errors import InputError

CHATML_TEMPLATE = Path(__file__).with_name("chatml.jinja")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
IGNORE = -100  # the label that cross-entropy ignores
TOO_LONG = "no label within max_seq_len"
PROBE = ({"role": "user", "content": "fig"}, {"role": "assistant", "content": "plum"})


@dataclass(frozen=True)
class Encoded:
    """One document of T tokens. `labels[t]` is the token that position t has to predict, or IGNORE."""

    input_ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T]


class Unmaskable(Exception):
    """A conversation cannot be masked correctly. The message is the reason under which the row is counted."""


def user_turn(instruction: str, input_text: str | None) -> str:
    """The user's message of a task: the instruction and, below it, the input if there is one."""
    return f"{instruction}\n\n{input_text}" if input_text else instruction


def set_chat_template(tokenizer: PreTrainedTokenizerFast, template_file: str | None) -> int:
    """Set the recipe's template, or ChatML if `tokenizer` has none of its own. Returns the number of added tokens.

    Raises InputError if the file does not exist.
    """
    if template_file is not None:
        path = Path(template_file)
        if not path.is_file():
            raise InputError(f"train.chat_template: {path} does not exist. Set it to the path of a Jinja file.")
        tokenizer.chat_template = path.read_text()
        return 0
    if tokenizer.chat_template:
        return 0
    tokenizer.chat_template = CHATML_TEMPLATE.read_text()
    missing = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
    return tokenizer.add_special_tokens({"additional_special_tokens": missing}) if missing else 0


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise InputError if the start of an assistant's turn is not the generation prompt.

    An assistant's message is what follows the generation prompt. If a turn starts with other text, that text would be
    trained as part of the message.
    """
    question, prompt = _probe(tokenizer, PROBE[:1]), _probe(tokenizer, PROBE[:1], add_generation_prompt=True)
    answered = _probe(tokenizer, PROBE)
    if not answered.startswith(prompt):
        raise InputError(
            "the chat template starts an assistant's turn with other text than its generation prompt "
            f"({prompt[-40:]!r}), so training would differ from later use. Set another train.chat_template."
        )
    opening = answered[len(prompt) :].partition(PROBE[1]["content"])[0]
    if prompt == question and opening.strip():
        raise InputError(
            f"the chat template has no generation prompt, but starts an assistant's turn with {opening.strip()!r}, "
            "which would be trained. Write it under `add_generation_prompt` too, or set another train.chat_template."
        )


def end_of_turn_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids of the tokens that may end an assistant turn: eos, and the special token with which the template ends a turn.

    Raises InputError if the template ends a turn without a special token.
    """
    last = tokenizer(_probe(tokenizer, PROBE).rstrip(), add_special_tokens=False)["input_ids"][-1]
    if last not in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder):
        eos = "" if tokenizer.eos_token_id is not None else ", and the tokenizer has no eos token"
        raise InputError(
            f"the chat template ends an assistant turn without a special token{eos}, so the model could not learn to "
            "stop. Set another train.chat_template."
        )
    return {last} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: object,
    max_seq_len: int,
    terminators: set[int],
    is_finished: bool = True,
) -> Encoded:
    """Tokens and labels of one conversation, cut at `max_seq_len` tokens.

    is_finished: False means that the last answer was cut off when it was generated. It then gets no end-of-turn token.

    Raises Unmaskable if the template refuses the conversation or rewrites earlier turns, if a token crosses the border
    of an assistant turn, if an end-of-turn token is missing or is inside a message, or if the cut leaves no label.
    """
    check_messages(messages)
    text = _render(tokenizer, messages)
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Unmaskable("no assistant turn")
    ends = tokenizer.convert_ids_to_tokens(sorted(terminators))
    if any(end in messages[turn]["content"] for turn in answers for end in ends):
        raise Unmaskable("an assistant turn contains an end token")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    starts, stops = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    closing = np.isin(ids, list(terminators))
    trained = np.zeros(len(ids), dtype=bool)
    for turn in answers:
        begin, end = _assistant_span(tokenizer, messages, turn, text)
        overlapping = (starts < end) & (stops > begin)
        inside = (
            overlapping & (starts >= begin) & ((stops <= end) | closing)
        )  # some end tokens include the space after them
        if (inside != overlapping).any():
            raise Unmaskable("a token crosses the border of an assistant turn")
        if not inside.any() or not closing[np.flatnonzero(inside)[-1]]:
            raise Unmaskable("an assistant turn has no end token")
        trained |= inside
    if not is_finished and answers[-1] == len(messages) - 1:
        without_end = int(np.flatnonzero(trained)[-1])
        ids, trained = ids[:without_end], trained[:without_end]
    return _shifted(ids[:max_seq_len], trained[:max_seq_len])


def encode_text(ids: Sequence[int], end_id: int, max_seq_len: int) -> Encoded:
    """Tokens and labels of plain text. Every token gets a label, and so does the end if the text is not cut."""
    whole = np.asarray([*ids, end_id], dtype=np.int32)[:max_seq_len]
    return _shifted(whole, np.ones(len(whole), dtype=bool))


def check_messages(messages: object) -> None:
    """Raise Unmaskable if `messages` is not a list of {role, content} with text in both, or starts with an answer."""
    if not isinstance(messages, list | tuple) or not messages:
        raise Unmaskable("`messages` is not a list of turns")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise Unmaskable("a turn has no role or no text")
    if messages[0]["role"] == "assistant":
        raise Unmaskable("the assistant starts the conversation")


def _assistant_span(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict], turn: int, text: str
) -> tuple[int, int]:
    """Character range of an assistant turn in the rendered `text`, including its end-of-turn token."""
    before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
    through = _render(tokenizer, messages[: turn + 1])
    if not (text.startswith(through) and through.startswith(before)):
        raise Unmaskable("the chat template rewrites earlier turns")
    return len(before), len(through.rstrip())


def _probe(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
    """A simple conversation as the template renders it. Raises InputError if the template refuses it."""
    try:
        return _render(tokenizer, messages, add_generation_prompt)
    except Unmaskable as error:
        raise InputError(f"{error} (for a simple conversation). Set another train.chat_template.") from error


def _render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise Unmaskable(f"the chat template refuses the conversation: {error}") from error


def _shifted(ids: np.ndarray, trained: np.ndarray) -> Encoded:
    labels = np.full(len(ids), IGNORE, dtype=np.int32)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORE)
    if (labels == IGNORE).all():
        raise Unmaskable(TOO_LONG)
    return Encoded(ids, labels)
