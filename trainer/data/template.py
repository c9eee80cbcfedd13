"""Chat templates: which one is used, what it writes for a conversation, and which tokens end a turn.

What a template can do is found out by rendering small conversations with it, before any row is encoded.
"""

import datetime
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cluster.data.conversations import Conversation
from cluster.data.turns import UnusableRow
from cluster.errors import InputError
from trainer.data.calls import CALL_FORMS, CallForm

CHATML_TEMPLATE = Path(__file__).with_name("chatml.jinja")
CHATML = "chatml"  # its name in a recipe
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# What a template raises that was not written for a conversation: `raise_exception`, or an operation on None.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
FIX = f"Set train.chat_template to a file with another template, or to {CHATML}."

QUESTION, ANSWER = {"role": "user", "content": "fig"}, {"role": "assistant", "content": "plum"}
THOUGHT = {**ANSWER, "reasoning_content": "pear"}
NEXT_QUESTION, NEXT_ANSWER = {"role": "user", "content": "date"}, {"role": "assistant", "content": "lime"}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "call_1", "type": "function", "function": {"name": "pick", "arguments": {"fruit": "quince"}}}]}  # fmt: skip
RESULT = {"role": "tool", "content": "kiwi", "name": "pick", "tool_call_id": "call_1"}
TOOLS = [{"type": "function", "function": {"name": "pick", "description": "Picks one.", "parameters": {
    "type": "object", "properties": {"fruit": {"type": "string", "description": "Which."}}}}}]  # fmt: skip


class Unmaskable(UnusableRow):
    """The template does not show a conversation, or it cannot be masked correctly."""


class ChatTemplate:
    """The chat template of a tokenizer, and what is known of it.

    kwargs, fold_system: see `TrainConfig`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, kwargs: Mapping[str, object] | None = None, fold_system: bool = False
    ):
        self.tokenizer, self.kwargs, self.fold_system = tokenizer, kwargs or {}, fold_system
        # One moment for all rows, so that two renderings never have different dates.
        self._strftime = datetime.datetime.now().strftime
        self._shown: dict[str, bool] = {}  # role or part of a conversation -> whether the template writes it

    def prepare(self, conversation: Conversation) -> list[dict]:
        """The messages as the template takes them, with `train: False` in answers that get no loss.

        Raises Unmaskable if the template would leave out a turn or a call.
        """
        messages = list(conversation.messages)
        for turn in conversation.untrained:
            messages[turn] = {**messages[turn], "train": False}
        if self.fold_system:
            messages = _fold_system_turns(messages)
        for role in {message["role"] for message in messages} - {"user", "assistant"}:
            if not self._shows_role(role):
                fix = f"train.chat_template={CHATML} writes it"
                if role == "system":
                    fix = "train.fold_system=true puts its text into the user's turn"
                raise Unmaskable(f"the chat template has no {role} turn ({fix})")
        if any("tool_calls" in message for message in messages):
            if self.call_form is None:
                raise Unmaskable(f"the chat template leaves out tool calls (train.chat_template={CHATML} writes them)")
            messages = self.call_form.adapt(messages)
        return messages

    def render(self, messages: Sequence[dict], tools: Sequence[dict] = (), add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises Unmaskable if the template refuses it."""
        try:
            return self.tokenizer.apply_chat_template(
                [{key: value for key, value in message.items() if key != "train"} for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **{"strftime_now": self._strftime, **self.kwargs},
            )
        except TEMPLATE_ERRORS as error:
            raise Unmaskable(f"the chat template refuses the conversation: {str(error)[:200]}") from error

    def tokenize(self, text: str, borders: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of T tokens, int32 [T], and the first and last character of each, int64 [T].

        No token crosses one of `borders`, which are the ends of prompts: a prompt is encoded alone at inference. Raises
        Unmaskable if the tokenizer cannot encode the text from a border on.
        """
        ids, starts, stops = self._encode(text)
        crossed = [border for border in borders if ((starts < border) & (border < stops)).any()]
        if not crossed:
            return ids, starts, stops
        if self._adds_space:
            raise Unmaskable("a token crosses the border of an assistant turn")
        parts = []
        for begin, end in zip([0, *crossed], [*crossed, len(text)], strict=True):
            part_ids, part_starts, part_stops = self._encode(text[begin:end])
            parts.append((part_ids, part_starts + begin, part_stops + begin))
        ids, starts, stops = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ids, starts, stops

    @cached_property
    def call_form(self) -> CallForm | None:
        """The first form of calls that the template writes as JSON or in tags. None means that it leaves calls out."""
        second_best = None
        for form in CALL_FORMS:
            try:
                text = self.render(form.adapt([QUESTION, CALL, RESULT, ANSWER]), TOOLS)
            except Unmaskable:
                continue
            if "quince" in text:
                if not any(odd in text for odd in ("None", '\\"fruit', "'fruit'")):
                    return form
                second_best = second_best or form
        return second_best

    @cached_property
    def ends(self) -> dict[str, int]:
        """The tokens that may end an assistant's turn, and their ids: the template's and the tokenizer's end token.

        Raises InputError if the template ends a turn without a special token.
        """
        ends = self._ends_after(*self._tails_of_answers)
        if not ends:
            eos = "" if self.tokenizer.eos_token_id is not None else ", and the tokenizer has no eos token"
            raise InputError(
                f"the chat template ends an assistant turn without a special token{eos}, so the model could not learn "
                f"to stop. {FIX}"
            )
        ends |= self._ends_after(*self._tails_of_calls)
        if self.tokenizer.eos_token_id is not None:
            ends.add(self.tokenizer.eos_token)
        return {end: self._special[end] for end in ends}

    def opener_after(self, message: dict) -> int | None:
        """The token that opens the turn after the assistant's `message`, if only this token ends the message.

        Such templates, as those of GLM, write nothing at the end of a conversation. The model has to write the token.
        """
        if not self._is_open_ended:
            return None
        tails = self._tails_of_calls if "tool_calls" in message else self._tails_of_answers
        return next((self._special[opener] for opener in self._ends_after(*tails)), None)

    def left_out(self, conversation: Conversation) -> list[str]:
        """What the template does not show of a conversation. Generated answers lack it too, so this is no error."""
        messages = conversation.messages
        parts = {
            "tools": bool(conversation.tools),
            "reasoning_content": any(message.get("reasoning_content") for message in messages),
            "text beside tool calls": any("tool_calls" in message and message["content"] for message in messages),
        }
        return [part for part, is_there in parts.items() if is_there and not self._shows_part(part)]

    def _shows_part(self, part: str) -> bool:
        if part not in self._shown:
            turns, word = {
                "tools": ([QUESTION], "Picks one."),
                "reasoning_content": ([QUESTION, THOUGHT], "pear"),
                "text beside tool calls": ([QUESTION, {**CALL, "content": "olive"}], "olive"),
            }[part]
            tools = TOOLS if part == "tools" else ()
            form = self.call_form or CALL_FORMS[0]
            self._shown[part] = word in (self._try_to_render(form.adapt(turns), tools) or word)
        return self._shown[part]

    def _shows_role(self, role: str) -> bool:
        """Whether a turn of `role`, which is neither the user nor the assistant, is in the text.

        Also true if the template refuses it here, except for a system turn: the row's own rendering has the reason.
        """
        if role not in self._shown:
            turn = {**RESULT, "role": role}
            form = self.call_form or CALL_FORMS[0]
            first = self._try_to_render([turn, QUESTION, ANSWER])
            later = None if role == "system" else self._try_to_render(form.adapt([QUESTION, CALL, turn, ANSWER]), TOOLS)
            texts = [text for text in (first, later) if text is not None]
            self._shown[role] = any("kiwi" in text for text in texts) or (not texts and role != "system")
        return self._shown[role]

    def _try_to_render(self, messages: Sequence[dict], tools: Sequence[dict] = ()) -> str | None:
        """The text of a conversation, or None if the template refuses it."""
        try:
            return self.render(messages, tools)
        except Unmaskable:
            return None

    @cached_property
    def _tails_of_answers(self) -> tuple[str, str]:
        """What follows an answer that is the last turn, and what follows one before the next question.

        Raises InputError if the template refuses a question and its answer.
        """
        try:
            final = self.render([QUESTION, ANSWER]).rpartition(ANSWER["content"])[2]
        except Unmaskable as error:
            raise InputError(f"{error}. It was a question and its answer. {FIX}") from error
        longer = self._try_to_render([QUESTION, ANSWER, NEXT_QUESTION, NEXT_ANSWER])
        if longer is None:
            return final, final
        return final, longer.partition(ANSWER["content"])[2].partition(NEXT_QUESTION["content"])[0]

    @cached_property
    def _tails_of_calls(self) -> tuple[str, str]:
        """The same for a turn that calls a tool, before the tool's result. Two empty texts if there are no calls."""
        if self.call_form is None:
            return "", ""
        turns = self.call_form.adapt([QUESTION, CALL, RESULT, ANSWER])
        final = (self._try_to_render(turns[:2], TOOLS) or "").rpartition("quince")[2]
        return final, self.render(turns, TOOLS).rpartition("quince")[2].partition("kiwi")[0]

    @cached_property
    def _is_open_ended(self) -> bool:
        final, between = self._tails_of_answers
        return not final.strip() and self._leading(between) is not None

    def _ends_after(self, final: str, between: str) -> set[str]:
        if self._is_open_ended:
            return {self._leading(between.removeprefix(final.rstrip()))} - {None}
        ends = {self._trailing(final)}
        if not ends & {None} and not any(end in between for end in ends):
            ends.add(self._leading(between))  # another token than at the end of a conversation
        return ends - {None}

    @cached_property
    def _special(self) -> dict[str, int]:
        """All tokens that are not found by splitting text, and their ids."""
        added = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items()}
        return dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)) | added

    def _leading(self, text: str) -> str | None:
        return max(
            (token for token in self._special if token and text.lstrip().startswith(token)), key=len, default=None
        )

    def _trailing(self, text: str) -> str | None:
        found = (token for token in self._special if token and text.rstrip().endswith(token))
        return max(found, key=len, default=None)

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        starts, stops = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        return np.asarray(encoding.ids, dtype=np.int32), starts, stops

    @cached_property
    def _backend(self) -> Tokenizer:
        """The tokenizer, with offsets that include spaces. Some tokenizers leave them out (`trim_offsets`)."""
        backend = self.tokenizer.backend_tokenizer
        begin, _ = backend.encode("a b", add_special_tokens=False).offsets[-1]
        if begin == 2 and backend.post_processor is not None:
            backend = Tokenizer.from_str(backend.to_str())
            backend.post_processor = None
        return backend

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before every text. It cannot encode the middle of a text alone then."""
        return self._backend.encode("fig", add_special_tokens=False).tokens[0][0] in "▁Ġ"


def _fold_system_turns(messages: list[dict]) -> list[dict]:
    """The messages with the text of every system turn at the start of the user's turn that follows it."""
    folded: list[dict] = []
    for message in messages:
        if folded and folded[-1]["role"] == "system":
            if message["role"] not in ("system", "user"):
                raise Unmaskable("no user turn follows a system turn")
            message = {**message, "content": f"{folded.pop()['content']}\n\n{message['content']}"}
        folded.append(message)
    if folded[-1]["role"] == "system":
        raise Unmaskable("no user turn follows a system turn")
    return folded


def set_chat_template(tokenizer: PreTrainedTokenizerFast, chosen: str | None) -> int:
    """Set the template that the recipe chooses, or ChatML if `tokenizer` has none. Returns the number of added tokens.

    chosen: the name of one of the tokenizer's templates, `chatml`, or a Jinja file.

    Raises InputError if there is no such name or file, or if the tokenizer has several templates and no default.
    """
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if chosen in named:
        tokenizer.chat_template = named[chosen]
    elif chosen not in (None, CHATML):
        tokenizer.chat_template = _read_template(Path(chosen), named)
    elif chosen is None and named and "default" not in named:
        raise InputError(
            f"the tokenizer has the chat templates {', '.join(sorted(named))}, and none of them is the default. Set "
            f"train.chat_template to one of these names, to a Jinja file or to {CHATML}."
        )
    elif chosen == CHATML or not tokenizer.chat_template:
        tokenizer.chat_template = CHATML_TEMPLATE.read_text()
        missing = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
        return tokenizer.add_special_tokens({"additional_special_tokens": missing}) if missing else 0
    return 0


def _read_template(file: Path, named: dict[str, str]) -> str:
    try:
        text = file.read_text(encoding="utf-8")
        if text.strip():
            return text
        reason = "is empty"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        reason = "is not UTF-8 text"
    names = f", or to one of the tokenizer's templates ({', '.join(sorted(named))})" if named else ""
    raise InputError(f"train.chat_template: {file} {reason}. Set it to a Jinja file, to {CHATML}{names}.")
