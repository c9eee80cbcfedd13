"""Templates of the families in use: for any conversation, labels spell the answers and their ends, as written out here.

What a template trains is stated by hand for each, from how a model is asked later, and not read off the template.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cluster.data.conversations import Conversation
from cluster.data.turns import UnusableRow
from cluster.errors import InputError
from tests.trainer.tools import END, make_tokenizer
from trainer.data.chat import IGNORE, Encoded, check_template, encode_chat
from trainer.data.template import ChatTemplate, set_chat_template

CHATML = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Strips every text, has no generation prompt, and puts the system's words into the user's first turn.
INST = """
{%- set first = messages[0].content | trim if messages[0].role == 'system' else none %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}
{{- bos_token + '[INST] ' }}
{%- if loop.first and first is not none %}{{- '<<SYS>>\\n' + first + '\\n<</SYS>>\\n\\n' }}{%- endif %}
{{- message.content | trim + ' [/INST]' }}
{%- else %}{{- ' ' + message.content | trim + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

# Ends turns with a token that is not the tokenizer's end token, and trims.
HEADERS = """
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Headers are plain text, ends are the end token, which is the padding token too.
ZEPHYR = """
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""


def inst_chat(system: str | None, rounds: list[tuple[str, str]]) -> str:
    before = "" if system is None else f"<<SYS>>\n{system.strip()}\n<</SYS>>\n\n"
    text = ""
    for number, (question, answer) in enumerate(rounds):
        text += f"<s>[INST] {before if number == 0 else ''}{question.strip()} [/INST] {answer.strip()} </s>"
    return text


@dataclass(frozen=True)
class Family:
    template: str
    special_tokens: tuple[str, ...]
    eos: str
    trained: Callable[[str], str]  # answer -> what of it is trained
    bos: str | None = None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(*self.special_tokens)
        tokenizer.eos_token = tokenizer.pad_token = self.eos
        if self.bos:
            tokenizer.bos_token = self.bos
        tokenizer.chat_template = self.template
        return tokenizer


FAMILIES = {
    "chatml": Family(CHATML, ("<|im_start|>", "<|im_end|>"), END, lambda answer: answer + "<|im_end|>"),
    "inst": Family(INST, ("<s>", "</s>"), "</s>", lambda answer: f" {answer.strip()} </s>", bos="<s>"),
    "headers": Family(
        HEADERS, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), END,
        lambda answer: answer.strip() + "<|eot_id|>", bos="<|begin_of_text|>",
    ),
    "zephyr": Family(ZEPHYR, (), END, lambda answer: answer + END),
}  # fmt: skip
TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}

# Spaces at the ends, line breaks, what looks like a header, other scripts: never a token that ends a turn.
WORDS = st.sampled_from(
    ["fig", " ", "\n", "\t", "  pear ", "user", "[INST]", "<|assistant|>", "assistant\n", "日本", "é", "🙂"]
)
TEXT = st.lists(WORDS, max_size=6).map("".join)
ROUNDS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


def conversation(system: str | None, rounds: list[tuple[str, str]]) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in rounds:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[dict], max_seq_len: int = 4096) -> Encoded:
    template = ChatTemplate(tokenizer)
    check_template(template)
    (encoded,) = encode_chat(template, Conversation(messages), max_seq_len)
    return encoded


def trained_text(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.labels[encoded.labels != IGNORE].tolist())


@pytest.mark.parametrize("name", FAMILIES)
@given(st.none() | TEXT, ROUNDS)
def test_labels_spell_the_answers_and_their_ends(name: str, system: str | None, rounds: list) -> None:
    tokenizer, family = TOKENIZERS[name], FAMILIES[name]
    messages = conversation(system, rounds)
    encoded = encode(tokenizer, messages)
    assert tokenizer.decode(encoded.input_ids.tolist()) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert trained_text(tokenizer, encoded) == "".join(family.trained(answer) for _, answer in rounds)
    labeled = encoded.labels[:-1] != IGNORE
    assert (encoded.labels[:-1][labeled] == encoded.input_ids[1:][labeled]).all()
    assert encoded.labels[-1] == IGNORE


@pytest.mark.parametrize("name", FAMILIES)
@given(ROUNDS, st.integers(4, 60))
def test_a_cut_conversation_has_the_ends_it_got_to_and_no_other(name: str, rounds: list, max_seq_len: int) -> None:
    tokenizer, messages = TOKENIZERS[name], conversation(None, rounds)
    whole = encode(tokenizer, messages)
    ends = set(ChatTemplate(tokenizer).ends.values())
    try:
        cut = encode(tokenizer, messages, max_seq_len)
    except UnusableRow:
        assert (whole.labels[: max_seq_len - 1] == IGNORE).all()
        return
    assert cut.labels.tolist()[:-1] == whole.labels.tolist()[: len(cut.labels) - 1]
    ended = [t for t, label in enumerate(cut.labels.tolist()) if label in ends]
    assert all(whole.labels[t] == cut.labels[t] and t + 1 < max_seq_len for t in ended)


@pytest.mark.parametrize("name", FAMILIES)
@given(ROUNDS)
def test_an_unfinished_answer_has_all_but_its_end(name: str, rounds: list) -> None:
    tokenizer, messages = TOKENIZERS[name], conversation(None, rounds)
    whole, ends = encode(tokenizer, messages), set(ChatTemplate(tokenizer).ends.values())
    try:
        (cut,) = encode_chat(ChatTemplate(tokenizer), Conversation(messages, is_finished=False), 4096)
    except UnusableRow:
        assert [label for label in whole.labels.tolist() if label not in {IGNORE, *ends}] == []
        assert len(rounds) == 1
        return
    expected = [label for label in whole.labels.tolist() if label != IGNORE][:-1]
    assert [label for label in cut.labels.tolist() if label != IGNORE] == expected
    assert whole.input_ids.tolist()[: len(cut.input_ids)] == cut.input_ids.tolist()


def test_the_system_of_an_inst_template_is_in_the_users_turn() -> None:
    rounds = [("fig ", " pear"), ("a", "b")]
    encoded = encode(TOKENIZERS["inst"], conversation("  brief ", rounds))
    assert TOKENIZERS["inst"].decode(encoded.input_ids.tolist()) == inst_chat("  brief ", rounds)


def test_an_end_token_that_swallows_the_space_after_it_is_still_trained() -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokens = [AddedToken(text, rstrip=True, special=True) for text in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = """
{%- for message in messages %}{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""
    encoded = encode(tokenizer, conversation(None, [("fig", "pear"), ("a", "b")]))
    assert trained_text(tokenizer, encoded) == "pear<|end|>b<|end|>"


def test_an_answer_with_an_end_token_within_is_left_out() -> None:
    """It would teach the model to stop there and to go on."""
    for name, end in (("chatml", "<|im_end|>"), ("chatml", END), ("headers", "<|eot_id|>"), ("zephyr", END)):
        with pytest.raises(UnusableRow, match="contains an end token"):
            encode(TOKENIZERS[name], conversation(None, [("a", f"fig{end}pear")]))
        assert encode(TOKENIZERS[name], conversation(None, [(f"fig{end}pear", "a")])).input_ids.size


def with_template(template: str, *special_tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(*special_tokens)
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_without_a_generation_prompt_is_an_error_where_it_opens_the_turn_with_words() -> None:
    unprompted = CHATML.replace("{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}", "")
    with pytest.raises(InputError, match=r"no generation prompt, but starts an assistant's turn with '<\|im_start"):
        encode(with_template(unprompted, "<|im_start|>", "<|im_end|>"), conversation(None, [("a", "b")]))


def test_a_generation_prompt_that_turns_do_not_begin_with_is_an_error() -> None:
    thinking = CHATML.replace("assistant\\n' }}{%- endif %}", "assistant\\n<think>' }}{%- endif %}")
    with pytest.raises(
        InputError, match=r"starts an assistant's turn with other text than its generation prompt .*think"
    ):
        encode(with_template(thinking, "<|im_start|>", "<|im_end|>"), conversation(None, [("a", "b")]))


def test_a_template_that_fails_on_a_plain_exchange_is_an_error() -> None:
    with pytest.raises(
        InputError, match=r"refuses the conversation: no\. It was a question and its answer\. Set train"
    ):
        encode(with_template("{{ raise_exception('no') }}"), conversation(None, [("a", "b")]))


def test_a_tokenizer_without_a_pad_token_is_enough_and_one_without_an_end_is_not() -> None:
    tokenizer = FAMILIES["zephyr"].tokenizer()
    tokenizer.pad_token = None
    rounds = [("fig", "pear")]
    assert trained_text(tokenizer, encode(tokenizer, conversation(None, rounds))) == "pear" + END
    endless = FAMILIES["zephyr"].tokenizer()
    endless.eos_token = endless.pad_token = None
    with pytest.raises(
        InputError, match=r"a question and its answer|without a special token, and the tokenizer has no eos token"
    ):
        encode(endless, conversation(None, rounds))
    own_end = FAMILIES["chatml"].tokenizer()
    own_end.eos_token = own_end.pad_token = None
    assert trained_text(own_end, encode(own_end, conversation(None, rounds))) == "pear<|im_end|>"


def test_a_bare_tokenizer_gets_the_template_that_is_checked_here() -> None:
    bare = make_tokenizer()
    set_chat_template(bare, None)
    reference, messages = TOKENIZERS["chatml"], conversation("s", [("a", "b")])
    assert bare.apply_chat_template(messages, tokenize=False) == reference.apply_chat_template(messages, tokenize=False)
