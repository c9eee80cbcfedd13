"""Magpie (Xu et al., 2024): an aligned model continues its chat template up to the user turn, so it writes that turn.

template prefix -> drawn again and again -> filters -> each answered by the model -> rows
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cluster.config import ModelConfig
from cluster.errors import InputError
from generation.accepted import Demonstration
from generation.config.common import Role
from generation.config.methods import MagpieConfig
from generation.filters.drafts import Draft
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.methods.base import GeneratedInstructions
from generation.parsing.chat import TRUNCATED, Dropped
from generation.records import GenerationResult


class Magpie(GeneratedInstructions):
    """Instructions from nothing but the chat template."""

    NAME = "magpie"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {"answer": ("instruction", "input")}
    FORMS: ClassVar[dict[Role, str]] = {"writer": "chat", "answerer": "chat"}

    def __init__(self, config: MagpieConfig, inputs: MethodInputs) -> None:
        """Raises InputError if the writer has no chat template."""
        super().__init__(config, inputs)
        writer = inputs.requester.model("writer")
        self._opening = user_turn_opening(writer.source, config.system_prompt, writer.chat_template_kwargs)
        sampling = config.instruction_sampling
        self._sampling = sampling.model_copy(
            update={
                "stop": (*sampling.stop, *self._opening.stop),
                "stop_token_ids": (*sampling.stop_token_ids, *self._opening.stop_token_ids),
            }
        )

    async def propose(self, number: int, visible: Sequence[Demonstration]) -> Proposal:
        """No demonstrations: every request is the same and differs in its random seed alone."""
        token_ids = list(self._opening.token_ids)
        response = await self._inputs.requester.continue_tokens(
            "writer", "instructions", token_ids, "chat template", self._sampling, replica=number
        )
        return self._proposal(response)

    def _parse(self, response: GenerationResult, first_number: int, prompt: str) -> Iterable[Draft | Dropped]:
        text = response.completion.text.strip()
        return (Dropped(text, TRUNCATED) if response.completion.was_cut else Draft(text),)

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        return await self._answer(accepted, self._config.answer_sampling, self._config.system_prompt)


SENTINEL = "\N{OBJECT REPLACEMENT CHARACTER}user\N{OBJECT REPLACEMENT CHARACTER}"  # no template contains this


@dataclass(frozen=True, slots=True)
class TurnOpening:
    """The chat template before the user's text, and what ends that text."""

    token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]  # the special token after the user's text, if there is one
    stop: tuple[str, ...]  # else the text after it; empty if the template ends there


def user_turn_opening(
    model: ModelConfig, system: str | None = None, chat_template_kwargs: Mapping[str, object] | None = None
) -> TurnOpening:
    """The opening of the first user turn, after a system turn if `system` is set.

    Raises InputError if the model has no chat template, or if that allows no system turn or changes the user's text.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer  # slow to import, and most methods need no tokenizer here

    tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise InputError(
            f"{model.path} has no chat template, and magpie generates user turns from one. Set "
            "synthesize.models.writer.path to an aligned model."
        )
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": SENTINEL})
    try:
        rendered = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
        )
    except TemplateError as error:  # some templates refuse a system turn
        raise InputError(f"{model.path}: its chat template cannot be rendered: {error}.") from error
    before, found, after = rendered.partition(SENTINEL)
    if not found:
        raise InputError(f"{model.path}: its chat template changes the user's text, so magpie cannot use it.")
    # A space before a word is part of the word's first token, so the model has to write it.
    token_ids = tuple(tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"])
    if not token_ids:
        raise InputError(f"{model.path}: its chat template has no text before the user turn, so magpie cannot use it.")
    following = after.lstrip()
    tokens = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    if found := max((text for text in tokens if text and following.startswith(text)), key=len, default=""):
        return TurnOpening(token_ids, (tokens[found],), ())
    line_break = "\n" if "\n" in after[: len(after) - len(following)] else ""
    return TurnOpening(token_ids, (), tuple(line_break + line for line in following.splitlines()[:1]))
