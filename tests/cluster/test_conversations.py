"""Rows of every format in use become conversations, and what a format says beside its texts counts."""

import json

import pytest

from cluster.data.conversations import NoFormat, find_format, first_exchange, read_conversation
from cluster.data.turns import UnusableRow

TURNS = [("user", "q"), ("assistant", "a")]
TWICE = [*TURNS, ("user", "r"), ("assistant", "b")]
TOOL = {"name": "weather", "description": "Of a city.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


def chat(turns: list[tuple[str, str]], **extra: object) -> list[dict]:
    return [{"role": role, "content": content, **extra} for role, content in turns]


def sharegpt(turns: list[tuple[str, str]]) -> list[dict]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


@pytest.mark.parametrize(
    ("row", "turns", "name"),
    [
        ({"messages": chat(TWICE)}, TWICE, "messages"),
        ({"messages": sharegpt(TURNS)}, TURNS, "messages"),
        ({"messages": json.dumps(chat(TURNS))}, TURNS, "messages"),
        ({"messages": chat(TURNS), "instruction": "x", "output": "y"}, TURNS, "messages"),
        ({"messages": None, "instruction": "q", "output": "a"}, TURNS, "alpaca"),
        ({"conversations": sharegpt([("human", "q"), ("gpt", "a")])}, TURNS, "sharegpt"),
        ({"conversations": sharegpt([("USER", "q"), ("Assistant", "a")])}, TURNS, "sharegpt"),
        ({"conversation": chat(TURNS)}, TURNS, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a"}, TURNS, "alpaca"),
        ({"instruction": "q", "input": "x", "output": "a"}, [("user", "q\n\nx"), TURNS[1]], "alpaca"),
        ({"instruction": "", "input": "q", "output": "a"}, TURNS, "alpaca"),
        ({"instruction": "q", "context": "x", "response": "a", "category": "open_qa"},
         [("user", "q\n\nx"), TURNS[1]], "instruction/response"),
        ({"prompt": "q", "completion": "a"}, TURNS, "prompt_completion"),
        ({"prompt": chat(TURNS[:1]), "completion": chat(TURNS[1:])}, TURNS, "prompt_completion"),
        ({"prompt": chat(TURNS[:1]), "completion": "a"}, TURNS, "prompt_completion"),
        ({"prompt": "q", "response": "a"}, TURNS, "prompt/response"),
        ({"question": "q", "answer": "a"}, TURNS, "question/answer"),
        ({"query": "q", "response": "a", "history": [["p", "o"]]},
         [("user", "p"), ("assistant", "o"), *TURNS], "query/response"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), *TURNS], "question/response"),
        ({"input": "q", "output": "a"}, TURNS, "input/output"),
        ({"problem": "q", "solution": "a", "answer": "1"}, TURNS, "problem/solution"),
        ({"instruction": "q", "output": "a", "system": "s", "history": '[["p", "o"]]'},
         [("system", "s"), ("user", "p"), ("assistant", "o"), *TURNS], "alpaca"),
        ({"system": "s", "conversations": sharegpt(TURNS)}, [("system", "s"), *TURNS], "sharegpt"),
        ({"system": "s", "messages": chat([("system", "own"), *TURNS])}, [("system", "own"), *TURNS], "messages"),
        ({"messages": chat([("developer", "s"), *TURNS])}, [("system", "s"), *TURNS], "messages"),
    ],
)  # fmt: skip
def test_rows_of_every_shape(row: dict, turns: list, name: str) -> None:
    found = read_conversation(row)
    assert [(message["role"], message["content"]) for message in found.messages] == turns
    assert (found.tools, found.untrained, found.is_finished) == ([], frozenset(), True)
    assert find_format(row)[0] == name


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training", "loss"])
@pytest.mark.parametrize("off", [0, 0.0, False])
def test_an_answer_of_weight_0_is_not_trained(key: str, off: object) -> None:
    messages = chat(TWICE)
    messages[0][key], messages[1][key], messages[3][key] = off, off, True
    found = read_conversation({"system": "s", "messages": messages})
    assert found.untrained == {2}
    assert all(set(message) == {"role", "content"} for message in found.messages)


def test_turns_of_a_prompt_are_not_trained_and_those_of_a_history_are() -> None:
    prompt = read_conversation({"prompt": chat(TWICE[:3]), "completion": chat(TWICE[3:])})
    assert prompt.untrained == {1}
    assert not read_conversation({"instruction": "r", "output": "b", "history": [["q", "a"]]}).untrained


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q", "output": ""}, "an answer is empty"),
        ({"instruction": "q", "output": None}, "an answer is empty"),
        ({"prompt": "q", "completion": " \n"}, "an answer is empty"),
        ({"messages": chat([TURNS[0], ("assistant", "")])}, "an answer is empty"),
        ({"messages": [*chat(TURNS[:1]), {"role": "assistant", "content": []}]}, "an answer is empty"),
        ({"messages": chat([TURNS[0], ("assistant", " "), *TURNS])}, "an answer is empty"),
        ({"conversations": sharegpt([("human", "q"), ("gpt", "")])}, "an answer is empty"),
        ({"query": "q", "response": "a", "history": [["p", ""]]}, "an answer is empty"),
        ({"instruction": " ", "output": "a"}, "`instruction` is empty"),
        ({"instruction": "q", "output": 4}, "`output` is a number, not text"),
        ({"question": "q", "answer": True}, "`answer` is a boolean, not text"),
        ({"instruction": "q", "input": {"a": 1}, "output": "a"}, "`input` is an object, not text"),
        ({"messages": [{"role": "user", "content": 4}]}, "`content` is a number, not text"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn has no text"),
        ({"messages": [{"content": "q"}]}, "a turn has no role"),
        ({"messages": [{"role": 7, "content": "q"}]}, "`role` is a number, not text"),
        ({"messages": chat([("narrator", "q")])}, "the speaker 'narrator' is unknown"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "a turn has a part of type 'image_url', which is no text"),
        ({"messages": chat(TURNS, weight=0.5)}, "an answer has the weight 0.5, where only 0 and 1 are possible"),
        ({"messages": chat(TURNS, train=False)}, "no answer is to be trained: their weights are 0"),
        ({"messages": chat(TURNS[:1])}, "no assistant turn"),
        ({"messages": chat(TURNS[1:])}, "the assistant starts the conversation"),
        ({"messages": "hello"}, "`messages` is text, but not JSON"),
        ({"messages": []}, "`messages` is not a list of turns"),
        ({"prompt": "q", "completion": "a", "label": False}, "`label` is false: the answer is one to avoid"),
        ({"conversations": sharegpt(TWICE), "chosen": {}, "rejected": {}},
         "`chosen` and `rejected` are preferences, which are not trained"),
        ({"instruction": "q", "output": "a", "history": ["p", "o"]}, "`history` is not a list of pairs"),
        ({"messages": chat(TURNS), "tools": "weather"}, "`tools` is text, but not JSON"),
        ({"messages": chat(TURNS), "tools": [7]}, "`tools` is not a list of tools"),
        ({"conversations": sharegpt([("human", "q"), ("function_call", "weather")])},
         "`tool_calls` is text, but not JSON"),
        ({"text": "a", "id": 1}, "its columns fit no format"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_has_its_reason(row: dict, reason: str) -> None:
    with pytest.raises(UnusableRow) as caught:
        read_conversation(row)
    assert str(caught.value) == reason


def test_an_empty_answer_without_a_loss_stays() -> None:
    messages = [*chat(TURNS[:1]), {"role": "assistant", "content": "", "weight": 0}, *chat(TURNS)]
    assert len(read_conversation({"messages": messages}).messages) == 4


@pytest.mark.parametrize(
    "content",
    [["q"], [{"type": "text", "text": "q"}], [{"type": "text", "value": "q"}], [{"type": "text", "text": ""}, "q"]],
)
def test_a_content_in_parts_is_their_text(content: list) -> None:
    messages = [{"role": "user", "content": content}, *chat(TURNS[1:])]
    assert read_conversation({"messages": messages}).messages == chat(TURNS)


def test_parts_may_hold_thoughts_and_calls() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "tool_call", "value": json.dumps(CALL)}]
    turn = read_conversation({"messages": [*chat(TURNS[:1]), {"role": "assistant", "content": parts}]}).messages[1]
    assert turn == {**CALLED, "reasoning_content": "hm"}


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps([CALL])},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": [{"function": {**CALL, "arguments": '{"city": "Paris"}'}}]},
        {"role": "assistant", "content": None, "tool_calls": None, "function_call": CALL},
    ],
)
@pytest.mark.parametrize(
    "tools", [{"tools": [TOOL]}, {"tools": json.dumps([WRAPPED])}, {"functions": [json.dumps(TOOL)]}]
)
def test_calls_tools_and_results_have_one_form(turn: dict, tools: dict) -> None:
    result = [{"from": "observation", "value": "rain"}, {"role": "function", "name": "weather", "content": "rain"}]
    found = read_conversation({"messages": [*chat(TURNS[:1]), turn, *result], **tools})
    assert found.tools == [WRAPPED]
    assert found.messages[1:3] == [CALLED, {"role": "tool", "content": "rain"}]
    assert found.messages[3] == {"role": "tool", "content": "rain", "name": "weather"}


def test_what_an_answer_says_and_calls_is_one_turn() -> None:
    messages = [*chat(TURNS), {"role": "tool_call", "content": json.dumps(CALL)}]
    assert read_conversation({"messages": messages}).messages[1:] == [{**CALLED, "content": "a"}]


def test_nulls_and_keys_of_other_software() -> None:
    messages = [{**turn, "name": None, "tool_calls": None, "tool_call_id": "x"} for turn in chat(TURNS)]
    assert read_conversation({"messages": messages}).messages == chat(TURNS, tool_call_id="x")


def test_a_stated_format_needs_its_columns() -> None:
    row = {"messages": chat(TURNS), "prompt": "p", "completion": "c"}
    assert find_format(row, "prompt_completion")[1] == ("prompt", "completion")
    with pytest.raises(NoFormat, match="there is no column `instruction`"):
        find_format(row, "alpaca")


@pytest.mark.parametrize(
    ("row", "exchange"),
    [
        ({"prompt": "q"}, ("q", "", "")),
        ({"prompt": "q", "response": "a"}, ("q", "", "a")),
        ({"prompt": chat(TURNS[:1]), "completion": chat(TURNS[1:])}, ("q", "", "a")),
        ({"instruction": "q", "input": "x", "output": None}, ("q", "x", "")),
        (
            {"conversations": sharegpt([("system", "s"), ("human", "q"), ("gpt", "a"), ("narrator", "x")])},
            ("q", "", "a"),
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, ("q", "", "")),
        ({"messages": [*chat(TURNS[:1]), {"role": "assistant", "content": None}]}, ("q", "", "")),
    ],
)
def test_the_first_exchange_of_a_row(row: dict, exchange: tuple) -> None:
    assert first_exchange(row) == exchange


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q", "output": 0}, "`output` is a number, not text"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn has no text"),
        ({"messages": chat(TURNS[1:])}, "`messages` has no turn of a user"),
        ({"text": "q"}, "no column holds a question"),
    ],
)
def test_a_row_without_a_first_exchange_has_its_reason(row: dict, reason: str) -> None:
    with pytest.raises(UnusableRow, match=reason):
        first_exchange(row)
