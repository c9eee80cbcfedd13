"""What is trained of a conversation with the tokenizer and chat template of a real model, SmolLM2."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cluster.data.conversations import Conversation
from cluster.files import read_jsonl
from trainer.data.chat import IGNORE, encode_chat
from trainer.data.template import ChatTemplate

pytestmark = pytest.mark.real

SEEDS = Path(__file__).parents[2] / "generation" / "seeds" / "seed_tasks.jsonl"


def conversations() -> list[list[dict]]:
    """One of each seed task, and one of several turns with a system turn."""
    tasks = [(task["instruction"], task["instances"][0]) for task in read_jsonl(SEEDS)]
    chats = [
        [
            {"role": "user", "content": f"{instruction}\n\n{instance['input']}".strip()},
            {"role": "assistant", "content": instance["output"]},
        ]
        for instruction, instance in tasks
    ]
    return [*chats, [{"role": "system", "content": "Be brief."}, *chats[0], *chats[1], *chats[2]]]


def test_the_masks_are_those_of_a_walk_over_the_markers(english_model: Path) -> None:
    """Trained are the tokens after `<|im_start|>assistant` and a line break, up to and with `<|im_end|>`."""
    tokenizer = AutoTokenizer.from_pretrained(english_model)
    template = ChatTemplate(tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    opening = tokenizer.encode("assistant\n", add_special_tokens=False)
    for messages in conversations():
        (encoded,) = encode_chat(template, Conversation(messages), 8192)
        ids = encoded.input_ids.tolist()
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        trained, inside = [], False
        for place, token in enumerate(ids):
            trained.append(inside)
            if token in (start, end):
                inside = False
            elif ids[place - len(opening) : place + 1] == [start, *opening]:
                inside = True
        assert [label != IGNORE for label in encoded.labels.tolist()] == [*trained[1:], False]
