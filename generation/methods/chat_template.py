"""What a model's chat template puts around a user's turn."""

from dataclasses import dataclass

from cluster.config import ModelConfig
from cluster.errors import InputError

SENTINEL = "\N{OBJECT REPLACEMENT CHARACTER}user\N{OBJECT REPLACEMENT CHARACTER}"  # no template writes this itself


@dataclass(frozen=True, slots=True)
class TurnOpening:
    """All that comes before what a user says, and what ends it."""

    token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]  # the token of its own that follows a user's turn, where one does
    stop: tuple[str, ...]  # the text that follows it, else; none if the template ends there


def user_turn_opening(model: ModelConfig, system: str | None = None) -> TurnOpening:
    """The opening of the first user's turn, after the system's if one is given.

    Raises InputError if the model has no chat template, or one that takes no system's turn or changes the user's.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer  # slow to import, and most methods need no tokenizer here

    tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise InputError(
            f"{model.path} has no chat template, and this method draws users' turns from one. Name an aligned model "
            "in synthesize.models.writer.path."
        )
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": SENTINEL})
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # some templates refuse a system's turn
        raise InputError(f"{model.path}: its chat template cannot be rendered: {error}.") from error
    before, found, after = rendered.partition(SENTINEL)
    if not found:
        raise InputError(f"{model.path}: its chat template does not keep what the user says as it is.")
    # A space before a word is part of the word's first token, so it is the model that writes it.
    token_ids = tuple(tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"])
    if not token_ids:
        raise InputError(f"{model.path}: its chat template writes nothing before the user's turn to draw one from.")
    following = after.lstrip()
    tokens = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    if found := max((text for text in tokens if text and following.startswith(text)), key=len, default=""):
        return TurnOpening(token_ids, (tokens[found],), ())
    line_break = "\n" if "\n" in after[: len(after) - len(following)] else ""
    return TurnOpening(token_ids, (), tuple(line_break + line for line in following.splitlines()[:1]))
