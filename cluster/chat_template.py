"""What a model's chat template puts around a user's turn."""

from dataclasses import dataclass

from cluster.config import ModelConfig
from cluster.errors import InputError

SENTINEL = "\N{OBJECT REPLACEMENT CHARACTER}user\N{OBJECT REPLACEMENT CHARACTER}"  # no template writes this itself


@dataclass(frozen=True, slots=True)
class TurnOpening:
    """All that comes before what a user says, and what ends it."""

    token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]  # the special tokens that may follow a user's turn
    stop: tuple[str, ...]  # the text that follows it, where no special token does


def user_turn_opening(model: ModelConfig, system: str | None = None) -> TurnOpening:
    """The opening of the first user's turn, after the system's if one is given.

    Raises InputError if the model has no chat template, or one that changes what the user says.
    """
    from transformers import AutoTokenizer  # slow to import, and most methods need no tokenizer here

    tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise InputError(
            f"{model.path} has no chat template, and this method draws users' turns from one. Name an aligned model "
            "in synthesize.models.writer.path."
        )
    turns = [{"role": "system", "content": system}] if system else []
    rendered = tokenizer.apply_chat_template([*turns, {"role": "user", "content": SENTINEL}], tokenize=False)
    before, found, after = rendered.partition(SENTINEL)
    if not found:
        raise InputError(f"{model.path}: its chat template does not keep what the user says as it is.")
    token_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    following = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    special = tuple(token for token in following[:1] if token in tokenizer.all_special_ids)
    text = () if special or not after.strip() else (after.strip().splitlines()[0],)
    return TurnOpening(tuple(token_ids), special, text)
