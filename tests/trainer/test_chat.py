"""What is trained of a conversation: the assistant's words and the token that ends its turn, and nothing else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.data.conversations import Conversation, read_conversation
from cluster.data.turns import UnusableRow
from cluster.errors import InputError
from tests.trainer.tools import END, IM_END, IM_START, make_tokenizer
from trainer.data.chat import IGNORE, Encoded, check_template, encode_chat, encode_text
from trainer.data.template import ChatTemplate, set_chat_template

STRIPPING = """
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# As reasoning models do: what the assistant thought is only kept in its last turn.
REWRITING = """
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{{- (message['content'] if loop.last else message['content'].split('</think>')[-1]) + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

PLAIN = """
{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""

ALTERNATING = """
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def chat(*turns: str, system: str | None = None) -> list[dict]:
    """User and assistant in turn."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(turns)
    return messages + [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def encode(tokenizer, messages: list[dict], max_seq_len: int = 4096) -> Encoded:
    (encoded,) = encode_chat(ChatTemplate(tokenizer), Conversation(messages), max_seq_len)
    return encoded


def trained_text(tokenizer, encoded: Encoded) -> str:
    """The text of the labels; also checks that each is the token that follows."""
    labeled = encoded.labels[:-1] != IGNORE
    assert (encoded.labels[:-1][labeled] == encoded.input_ids[1:][labeled]).all()
    assert encoded.labels[-1] == IGNORE
    return tokenizer.decode(encoded.labels[encoded.labels != IGNORE].tolist())


def with_template(template: str):
    tokenizer = make_tokenizer(IM_START, IM_END)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (chat("Say fig", "fig"), "fig<|im_end|>"),
        (chat("one", "two", "three", "four"), "two<|im_end|>four<|im_end|>"),
        (chat("hi", "ho", system="Be brief."), "ho<|im_end|>"),
        (chat("same", "same", "same", "same"), "same<|im_end|>same<|im_end|>"),
        (chat("naïve 日本語 🙂", "🙂 日本 é"), "🙂 日本 é<|im_end|>"),
        (chat("q", "  padded\n\n"), "  padded\n\n<|im_end|>"),
        (chat("say it", "<|im_start|>user\nno"), "<|im_start|>user\nno<|im_end|>"),
        (chat("say nothing", ""), "<|im_end|>"),
    ],
)
def test_only_the_assistants_words_and_the_end_of_its_turn_are_trained(chatml, messages, expected) -> None:
    assert trained_text(chatml, encode(chatml, messages)) == expected


def test_the_document_is_the_rendered_conversation(chatml) -> None:
    encoded = encode(chatml, chat("one", "two", system="Be brief."))
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
    assert chatml.decode(encoded.input_ids.tolist()) == expected + "<|im_start|>assistant\ntwo<|im_end|>\n"


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(
    lambda text: END not in text and IM_END not in text  # an answer with one of them is left out
)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.none() | TEXTS)
def test_labels_spell_the_assistants_turns_for_any_text(chatml, rounds, system) -> None:
    messages = chat(*(text for both in rounds for text in both), system=system)
    expected = "".join(answer + IM_END for _, answer in rounds)
    assert trained_text(chatml, encode(chatml, messages)) == expected


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.integers(8, 60))
def test_a_cut_conversation_is_a_prefix_and_gets_no_end_it_did_not_have(chatml, rounds, max_seq_len) -> None:
    messages = chat(*(text for both in rounds for text in both))
    whole = encode(chatml, messages)
    try:
        cut = encode(chatml, messages, max_seq_len)
    except UnusableRow as reason:
        assert "no label within" in str(reason)
        assert (whole.labels[: max_seq_len - 1] == IGNORE).all()
        return
    kept = len(cut.input_ids)
    assert kept == min(max_seq_len, len(whole.input_ids))
    assert (cut.input_ids == whole.input_ids[:kept]).all()
    assert (cut.labels[:-1] == whole.labels[: kept - 1]).all()
    assert cut.labels[-1] == IGNORE


def test_a_template_that_strips_is_followed() -> None:
    tokenizer = with_template(STRIPPING)
    assert trained_text(tokenizer, encode(tokenizer, chat("q", "  a b \n"))) == "a b<|im_end|>"


def test_an_answer_that_the_template_writes_otherwise_later_is_trained_in_its_own_document() -> None:
    tokenizer = with_template(REWRITING)
    thoughtful = chat("q", "hm</think>a", "r", "b")
    whole, first = encode_chat(ChatTemplate(tokenizer), Conversation(thoughtful), 4096)
    assert tokenizer.decode(whole.input_ids.tolist()) == tokenizer.apply_chat_template(thoughtful, tokenize=False)
    assert trained_text(tokenizer, whole) == "b<|im_end|>"
    assert tokenizer.decode(first.input_ids.tolist()) == tokenizer.apply_chat_template(thoughtful[:2], tokenize=False)
    assert trained_text(tokenizer, first) == "hm</think>a<|im_end|>"
    assert trained_text(tokenizer, encode(tokenizer, chat("q", "a", "r", "b"))) == "a<|im_end|>b<|im_end|>"


def test_a_template_that_raises_leaves_that_conversation_out() -> None:
    tokenizer = with_template(ALTERNATING)
    with pytest.raises(UnusableRow, match="template refuses"):
        encode(tokenizer, [{"role": "user", "content": "a"}, *chat("b", "c")])


def test_a_template_without_an_end_token_is_an_error() -> None:
    with pytest.raises(InputError, match="without a special token"):
        check_template(ChatTemplate(with_template(PLAIN)))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat("alone"), "no assistant turn"),
        ([], "not a list of turns"),
        (None, "not a list of turns"),
        ("text", "text, but not JSON"),
        ([{"role": "user"}], "no text"),
        ([{"role": None, "content": "a"}], "no role"),
        ([{"content": "a"}], "no role"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "an answer is empty"),
        (["turn"], "not a list of turns"),
        # There is no prompt before such a turn, so where it begins cannot be seen from the header.
        ([{"role": "assistant", "content": "hello"}, *chat("a", "b")], "assistant starts"),
    ],
)
def test_malformed_conversations_are_refused_with_their_reason(messages, reason) -> None:
    with pytest.raises(UnusableRow, match=reason):
        read_conversation({"messages": messages})


def test_the_models_own_template_is_kept_and_the_recipes_comes_before_it(tmp_path: Path) -> None:
    own = with_template(STRIPPING)
    assert set_chat_template(own, None) == 0
    assert own.chat_template == STRIPPING
    file = tmp_path / "mine.jinja"
    file.write_text(REWRITING)
    assert set_chat_template(own, str(file)) == 0
    assert own.chat_template == REWRITING
    with pytest.raises(InputError, match=r"chat_template: .*absent\.jinja cannot be read \(No such file"):
        set_chat_template(own, str(tmp_path / "absent.jinja"))


def test_a_tokenizer_without_chatml_gets_its_tokens_once() -> None:
    bare = make_tokenizer()
    before = len(bare)
    assert set_chat_template(bare, None) == 2
    assert len(bare) == before + 2
    assert ChatTemplate(bare).ends == {end: bare.convert_tokens_to_ids(end) for end in (IM_END, END)}
    assert trained_text(bare, encode(bare, chat("q", "a"))) == "a<|im_end|>"


def test_plain_text_is_trained_whole_and_ends_unless_cut() -> None:
    whole = encode_text([5, 6, 7], 0, 8)
    assert whole.input_ids.tolist() == [5, 6, 7, 0]
    assert whole.labels.tolist() == [6, 7, 0, IGNORE]
    cut = encode_text(list(range(1, 20)), 0, 8)
    assert cut.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert cut.labels.tolist() == [2, 3, 4, 5, 6, 7, 8, IGNORE]
