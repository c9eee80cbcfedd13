"""Templates as models have them, written here: what is trained of calls, results, thoughts and odd ends of turns.

Each template has one habit of a family. What has to be trained is written out, from how such a model is used.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cluster.data.conversations import Conversation
from cluster.errors import InputError
from tests.trainer.tools import END, make_tokenizer
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig
from trainer.data.chat import IGNORE, Encoded, check_template, encode_chat
from trainer.data.mixture import document_hashes
from trainer.data.template import ChatTemplate, Unmaskable, set_chat_template
from trainer.data.tokens import Tokens, load_tokens, prepare_tokens

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip
ARGUMENTS = {"city": "Paris"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "call_9f2d11", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}]}  # fmt: skip
TOOL_CHAT = [
    {"role": "user", "content": "Weather?"}, CALLING,
    {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "call_9f2d11"},
    {"role": "assistant", "content": "It rains."},
]  # fmt: skip
TWO_ROUNDS = [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "fig"},
    {"role": "user", "content": "b"}, {"role": "assistant", "content": "plum"},
]  # fmt: skip
PROMPTED = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"

# Tools in a system turn, calls as JSON in tags, results in a turn of the user.
TAGGED = (
    """
{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|im_start|>user\\n<result>' + m.content + '</result><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls %}
{{- '<call>{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}</call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}"""
    + PROMPTED
)

# Thoughts are in the text after the last question only, and the answer to it always begins with one.
THINKING = (
    """
{%- set ns = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endfor %}
{%- set users = namespace(seen=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set users.seen = users.seen + 1 %}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and users.seen == ns.last and (loop.last or m.reasoning_content) %}
{{- '<think>' + (m.reasoning_content or '') + '</think>' }}
{%- endif %}
{{- m.content }}
{%- for call in m.tool_calls %}{{- '<call>' + (call.function | tojson) + '</call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}"""
    + PROMPTED
)

# Checks ids, shows the tools before the last question, writes calls as a list, and has no generation prompt.
STRICT = """
{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and m == users[-1] %}{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{%- endif %}
{{- '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.tool_calls is defined %}
{{- '[CALLS][' }}
{%- for call in m.tool_calls %}
{%- if (call.id or '') | length != 9 %}{{ raise_exception('ids have nine letters or digits') }}{%- endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']') }}
{%- endfor %}
{{- eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine letters or digits') }}{%- endif %}
{{- '[RESULT]{"id": "' + m.tool_call_id + '", "content": "' + m.content + '"}[/RESULT]' }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
{%- else %}{{ raise_exception('there is no role ' + m.role) }}
{%- endif %}
{%- endfor %}"""

# Arguments are text, and a turn calls only if its content is none.
TEXTUAL = (
    """
{%- for m in messages %}
{%- if m.role == 'assistant' and m.content is none %}
{{- '<|im_start|>assistant\\n' }}
{%- for call in m.tool_calls %}{{- call.function.name + ' ' + call.function.arguments }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}"""
    + PROMPTED
)

# Nothing ends a turn but the token that opens the next one.
OPEN_ENDED = """
{{- '<|begin|>' }}
{%- if tools %}{{- '<|system|>\\n' + (tools | tojson) }}{%- endif %}
{%- for m in messages %}
{{- '<|observation|>\\n' if m.role == 'tool' else '<|' + m.role + '|>\\n' }}
{{- m.content }}
{%- for call in m.tool_calls %}{{- '<call>' + (call.function | tojson) + '</call>' }}{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

# The tokenizer's end token is at the end of the conversation only.
ENDED_ONCE = """
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# The assistant is called otherwise, turns alternate, and there is no system turn.
ALTERNATING = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>model\\n' }}{%- endif %}"""

# Writes only what it knows, as templates do that were made before tools.
IGNORANT = (
    """
{%- for m in messages if m.role in ('user', 'assistant') %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}"""
    + PROMPTED
)

# The prompt ends in a blank, which most tokenizers join with the word after it.
BLANK = """
{%- for m in messages %}
{{- ('USER: ' + m.content + ' ') if m.role == 'user' else ('ASSISTANT: ' + m.content + eos_token) }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT: ' }}{%- endif %}"""

SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|end|>")


def tokenizer_with(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(*SPECIAL)
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template
    return tokenizer


def encode(template: ChatTemplate, messages: list[dict], tools: list[dict] = ()) -> list[Encoded]:
    check_template(template)
    return encode_chat(template, Conversation(messages, list(tools)), 4096)


def trained(template: ChatTemplate, document: Encoded) -> list[str]:
    """The stretches of text that are trained."""
    labels = document.labels
    stretches = np.split(labels, np.flatnonzero(np.diff((labels != IGNORE).astype(int))) + 1)
    return [template.tokenizer.decode(part.tolist()) for part in stretches if part[0] != IGNORE]


def check_prompts(template: ChatTemplate, document: Encoded, messages: list[dict], tools: list[dict] = ()) -> None:
    """The tokens up to the first label are those of the prompt as it is encoded at inference."""
    prompt = template.render(messages, tools, add_generation_prompt=True)
    expected = template.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    first = int(np.flatnonzero(document.labels != IGNORE)[0])
    assert document.input_ids[: first + 1].tolist() == expected


def test_calls_are_trained_behind_the_tools() -> None:
    template = ChatTemplate(tokenizer_with(TAGGED))
    (document,) = encode(template, TOOL_CHAT, TOOLS)
    call = '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call><|im_end|>'
    assert trained(template, document) == [call, "It rains.<|im_end|>"]
    check_prompts(template, document, TOOL_CHAT[:1], TOOLS)
    assert "Tools: " in template.tokenizer.decode(document.input_ids.tolist())
    (without,) = encode(template, TOOL_CHAT)
    assert "Tools: " not in template.tokenizer.decode(without.input_ids.tolist())


def test_an_answer_that_is_written_otherwise_later_has_its_own_document() -> None:
    template = ChatTemplate(tokenizer_with(THINKING))
    whole, first = encode(template, TWO_ROUNDS)
    assert trained(template, whole) == ["<think></think>plum<|im_end|>"]
    assert trained(template, first) == ["<think></think>fig<|im_end|>"]
    check_prompts(template, whole, TWO_ROUNDS[:3])
    check_prompts(template, first, TWO_ROUNDS[:1])
    thoughtful = [{**turn, "reasoning_content": "hm"} if turn["role"] == "assistant" else turn for turn in TWO_ROUNDS]
    texts = [trained(template, document) for document in encode(template, thoughtful)]
    assert texts == [["<think>hm</think>plum<|im_end|>"], ["<think>hm</think>fig<|im_end|>"]]
    assert template.left_out(Conversation(thoughtful)) == []
    calls = [text for document in encode(template, TOOL_CHAT, TOOLS) for text in trained(template, document)]
    call = '<think></think><call>{"name": "weather", "arguments": {"city": "Paris"}}</call><|im_end|>'
    assert calls == ["<think></think>It rains.<|im_end|>", call]


def test_variables_of_the_template_are_those_of_the_recipe(tmp_path: Path) -> None:
    silent = THINKING.replace("assistant\\n' }}", "assistant\\n' + ('<think></think>' if quiet else '') }}")
    template = ChatTemplate(tokenizer_with(silent), {"quiet": True})
    texts = [trained(template, document) for document in encode(template, TWO_ROUNDS)]
    assert texts == [["plum<|im_end|>"], ["fig<|im_end|>"]]
    tokenizer = tokenizer_with(silent)
    quiet, loud = (
        prepare(tokenizer, [TWO_ROUNDS[:2]], tmp_path, chat_template_kwargs={"quiet": q}) for q in (True, False)
    )
    assert (quiet.num_trained, quiet.input_ids.tolist()) != (loud.num_trained, quiet.input_ids.tolist())


def test_documents_of_one_row_are_held_out_together(tmp_path: Path) -> None:
    rows = [TWO_ROUNDS, TWO_ROUNDS[:2], [{"role": "user", "content": "c"}, *TWO_ROUNDS[1:]]]
    tokens = prepare(tokenizer_with(THINKING), rows, tmp_path)
    assert tokens.rows.tolist() == [0, 0, 2, 3, 3]
    hashes = document_hashes(tokens, 0)
    assert [hashes[0] == hashes[1], hashes[3] == hashes[4], hashes[0] == hashes[3]] == [True, True, False]
    assert list(tokens.sources[0].notes.values()) == [2]


def test_ids_and_the_place_of_the_tools_are_as_a_strict_template_wants_them() -> None:
    template = ChatTemplate(tokenizer_with(STRICT))
    (document,) = encode(template, TOOL_CHAT, TOOLS)
    call = '[CALLS][{"name": "weather", "arguments": {"city": "Paris"}, "id": "call00000"}]' + END
    assert trained(template, document) == [call, " It rains." + END]
    assert '[RESULT]{"id": "call00000"' in template.tokenizer.decode(document.input_ids.tolist())
    own = json.loads(json.dumps(TOOL_CHAT).replace("call_9f2d11", "AbCd01234"))
    assert '"id": "AbCd01234"' in trained(template, encode(template, own, TOOLS)[0])[0]
    later, earlier = encode(template, [*TWO_ROUNDS[:2], *TOOL_CHAT], TOOLS)
    assert trained(template, later) == [call, " It rains." + END]
    assert trained(template, earlier) == [" fig" + END]
    check_prompts(template, earlier, TWO_ROUNDS[:1], TOOLS)


def test_arguments_are_text_and_content_is_none_where_a_template_wants_it() -> None:
    template = ChatTemplate(tokenizer_with(TEXTUAL))
    (document,) = encode(template, TOOL_CHAT, TOOLS)
    assert trained(template, document) == ['weather {"city": "Paris"}<|im_end|>', "It rains.<|im_end|>"]
    assert template.left_out(Conversation(TOOL_CHAT, TOOLS)) == ["tools"]


def test_the_opening_of_the_next_turn_is_trained_where_nothing_else_ends_a_turn() -> None:
    template = ChatTemplate(tokenizer_with(OPEN_ENDED))
    (document,) = encode(template, TWO_ROUNDS)
    assert trained(template, document) == ["\nfig<|user|>", "\nplum<|user|>"]
    (document,) = encode(template, TOOL_CHAT, TOOLS)
    call = '\n<call>{"name": "weather", "arguments": {"city": "Paris"}}</call><|observation|>'
    assert trained(template, document) == [call, "\nIt rains.<|user|>"]
    (alone,) = encode(template, TOOL_CHAT[:2], TOOLS)
    assert trained(template, alone) == [call]
    assert set(template.ends) == {"<|user|>", "<|observation|>", END}


def test_every_answer_ends_with_the_token_of_its_turn_if_the_conversation_has_another_one() -> None:
    template = ChatTemplate(tokenizer_with(ENDED_ONCE))
    (document,) = encode(template, TWO_ROUNDS)
    assert trained(template, document) == ["fig<|end|>", "plum<|end|>"]
    assert template.tokenizer.decode(document.input_ids.tolist()) == template.render(TWO_ROUNDS)


def test_a_system_turn_goes_into_the_users_where_the_recipe_wants_it() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *TWO_ROUNDS]
    with pytest.raises(Unmaskable, match=r"has no system turn \(train\.fold_system=true puts its text into the user's"):
        encode(ChatTemplate(tokenizer_with(ALTERNATING)), messages)
    with pytest.raises(Unmaskable, match=r"has no system turn \(train\.fold_system=true"):
        encode(ChatTemplate(tokenizer_with(IGNORANT)), messages)
    template = ChatTemplate(tokenizer_with(ALTERNATING), fold_system=True)
    (document,) = encode(template, messages)
    assert trained(template, document) == ["fig<|im_end|>", "plum<|im_end|>"]
    folded = {"role": "user", "content": "Be brief.\n\na"}
    assert template.tokenizer.decode(document.input_ids.tolist()) == template.render([folded, *TWO_ROUNDS[1:]])
    (document,) = encode_chat(template, Conversation(messages, untrained=frozenset({2})), 4096)
    assert trained(template, document) == ["plum<|im_end|>"]
    with pytest.raises(Unmaskable, match="no user turn follows a system turn"):
        encode(template, [*TWO_ROUNDS, {"role": "system", "content": "Stop."}])


def test_what_a_template_would_leave_out_is_not_trained() -> None:
    template = ChatTemplate(tokenizer_with(IGNORANT))
    with pytest.raises(Unmaskable, match="the chat template has no tool turn"):
        encode(template, TOOL_CHAT)
    with pytest.raises(Unmaskable, match=r"leaves out tool calls \(train\.chat_template=chatml writes them\)"):
        encode(template, TOOL_CHAT[:2])
    thoughtful = [TWO_ROUNDS[0], {**TWO_ROUNDS[1], "reasoning_content": "hm"}]
    assert template.left_out(Conversation(thoughtful, TOOLS)) == ["tools", "reasoning_content"]


def test_an_error_of_any_kind_in_a_template_leaves_that_conversation_out() -> None:
    broken = TAGGED.replace(
        "m.role + '\\n' + m.content", "m.role + '\\n' + m.content + (1 // (m.content | length)) | string"
    )
    template = ChatTemplate(tokenizer_with(broken))
    with pytest.raises(Unmaskable, match="refuses the conversation: integer division"):
        encode(template, [TWO_ROUNDS[0], {"role": "assistant", "content": ""}])
    with pytest.raises(InputError, match=r"refuses the conversation: unexpected.*Set train\.chat_template to a file"):
        encode(ChatTemplate(tokenizer_with("{% for m in messages %}{{ m.content }")), TWO_ROUNDS)


@pytest.mark.parametrize("trims", [False, True])
def test_a_prompt_that_ends_in_a_blank_is_encoded_as_in_use(trims: bool) -> None:
    tokenizer = tokenizer_with(BLANK)
    if trims:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    template = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": "Say the words"}, {"role": "assistant", "content": "cedar dune"}]
    (document,) = encode(template, messages)
    assert trained(template, document) == ["cedar dune" + END]
    check_prompts(template, document, messages[:1])


def test_a_tokenizer_that_begins_every_text_with_a_space_cannot_split_there() -> None:
    tokenizer = tokenizer_with(BLANK)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    messages = [{"role": "user", "content": "Say the words"}, {"role": "assistant", "content": "cedar dune"}]
    with pytest.raises(Unmaskable, match="a token crosses the border of an assistant turn"):
        encode(ChatTemplate(tokenizer), messages)


def test_white_space_at_the_start_of_an_answer_is_trained() -> None:
    code = "\n\n    def f():\n        pass"
    template = ChatTemplate(tokenizer_with(TAGGED))
    messages = [TWO_ROUNDS[0], {"role": "assistant", "content": code}]
    (document,) = encode(template, messages)
    assert trained(template, document) == [code + "<|im_end|>"]
    check_prompts(template, document, messages[:1])


def test_all_rows_of_a_day_have_one_date() -> None:
    dated = "{{- strftime_now('%f') }}" + TAGGED
    template = ChatTemplate(tokenizer_with(dated))
    assert trained(template, encode(template, TWO_ROUNDS)[0]) == ["fig<|im_end|>", "plum<|im_end|>"]


def test_one_of_several_named_templates_is_chosen_by_its_name() -> None:
    named = {"tool_use": TAGGED, "rag": ALTERNATING}
    with pytest.raises(
        InputError, match=r"templates rag, tool_use, and none of them is the default.*train\.chat_template"
    ):
        set_chat_template(tokenizer_with(named), None)
    with pytest.raises(
        InputError, match=r"chat_template: tools cannot be read .*or to one of .* templates \(rag, tool_use"
    ):
        set_chat_template(tokenizer_with(named), "tools")
    tokenizer = tokenizer_with(named)
    set_chat_template(tokenizer, "tool_use")
    assert tokenizer.chat_template == TAGGED
    both = ChatTemplate(tokenizer_with({"default": IGNORANT, "tool_use": TAGGED}))
    assert trained(both, encode(both, TOOL_CHAT, TOOLS)[0])[0].startswith("<call>")
    assert trained(both, encode(both, TWO_ROUNDS)[0]) == ["fig<|im_end|>", "plum<|im_end|>"]


def test_chatml_writes_tools_and_calls_and_is_chosen_by_its_name() -> None:
    tokenizer = tokenizer_with(IGNORANT)
    assert set_chat_template(tokenizer, "chatml") == 0
    template = ChatTemplate(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, *TOOL_CHAT]
    (document,) = encode(template, messages, TOOLS)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert trained(template, document) == [call, "It rains.<|im_end|>"]
    text = tokenizer.decode(document.input_ids.tolist())
    assert text.startswith("<|im_start|>system\nBe brief.\n\n") and json.dumps(TOOLS[0]) in text
    assert template.left_out(Conversation(messages, TOOLS)) == []


def test_a_template_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.jinja").write_text("\n")
    for name, reason in (("binary", "is not UTF-8"), ("empty", "is empty")):
        with pytest.raises(
            InputError, match=rf"train\.chat_template: .*{name}\.jinja {reason}.*Set it to a Jinja file"
        ):
            set_chat_template(make_tokenizer(), str(tmp_path / f"{name}.jinja"))


def prepare(tokenizer: PreTrainedTokenizerFast, rows: list[list[dict]], folder: Path, **settings: object) -> Tokens:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = TrainConfig(max_seq_len=512, **settings)
    return load_tokens(prepare_tokens(config, tokenizer, [DataSource(path=str(path))], folder / "tokens"))


def test_calls_in_parquet_have_only_their_own_arguments(tmp_path: Path) -> None:
    from datasets import Dataset

    def row(name: str, arguments: dict) -> dict:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        parameters = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        tool = {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}
        calling = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "go"}, calling], "tools": [tool]}

    rows = [row("weather", {"city": "Paris"}), row("add", {"first": 1, "second": 2})]
    Dataset.from_list(rows).to_parquet(tmp_path / "calls.parquet")
    tokenizer = tokenizer_with(TAGGED)
    source = DataSource(path=str(tmp_path / "calls.parquet"))
    tokens = load_tokens(prepare_tokens(TrainConfig(max_seq_len=512), tokenizer, [source], tmp_path / "tokens"))
    texts = [tokenizer.decode(tokens.input_ids[tokens.span(document)].tolist()) for document in range(2)]
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in texts[0]
    assert '{"name": "add", "arguments": {"first": 1, "second": 2}}' in texts[1]
    assert not any("null" in text or "None" in text for text in texts)


def test_plain_text_begins_as_the_tokenizer_begins_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TAGGED)
    begin, end = tokenizer.convert_tokens_to_ids(["<s>", END])
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "apple brook"}\n')
    words = tokenizer("apple brook")["input_ids"]
    for single, expected in (
        ("<s> $A", [begin, *words, end]),
        (f"<s> $A {END}", [begin, *words, end]),
        ("$A", [*words, end]),
    ):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", begin), (END, end)]
        )
        config = TrainConfig(objective="text")
        tokens = load_tokens(prepare_tokens(config, tokenizer, [DataSource(path=str(path))], tmp_path / single[:6]))
        assert tokens.input_ids.tolist() == expected
        assert tokens.labels.tolist() == [*expected[1:], IGNORE]
