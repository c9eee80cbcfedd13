"""The turns of a conversation and its tools, as OpenAI, ShareGPT, LLaMA-Factory, axolotl and ms-swift write them.

turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No", "train": False}]
parse_turns(turns, "conversations")
# [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}], {1}
"""

import json

# Speaker in lower case -> role in chat templates.
SPEAKERS = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "ai": "assistant", "chatbot": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
    "function_response": "tool",
}  # fmt: skip
CALLERS = ("function_call", "tool_call")  # what they write are tool calls as JSON
SPEAKER_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value")
# 0 or false at an answer means no loss. The keys of OpenAI, LLaMA-Factory, axolotl (two) and ms-swift.
WEIGHT_KEYS = ("weight", "loss_weight", "train", "training", "loss")
OWN_KEYS = frozenset({*SPEAKER_KEYS, *TEXT_KEYS, *WEIGHT_KEYS, "tool_calls", "function_call"})
TEXT_PARTS, THOUGHT_PARTS = ("text", "input_text", "output_text"), ("reasoning", "thinking")
KINDS_OF_VALUES = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}


class UnusableRow(Exception):
    """A row cannot be trained on. The message is the reason under which the row is counted."""


def parse_turns(turns: object, column: str) -> tuple[list[dict], set[int]]:
    """The turns as chat templates take them, and the indices of answers that are not trained.

    Raises UnusableRow if `turns` is no list of turns, or naming what a turn lacks.
    """
    messages: list[dict] = []
    untrained: set[int] = set()
    for turn in list_of_turns(turns, column):
        message, is_trained = parse_turn(turn)
        if not is_trained:
            untrained.add(len(messages))
        if _speaker(turn) in CALLERS and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])  # what one answer says and calls
        else:
            messages.append(message)
    return messages, untrained


def list_of_turns(turns: object, column: str) -> list[dict]:
    """The list of turns in a cell, which is one turn, a list, or JSON text."""
    turns = parse_json(turns, column)
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UnusableRow(f"`{column}` is not a list of turns")
    return turns


def parse_turn(turn: dict) -> tuple[dict, bool]:
    """The turn with `role` and `content`, and whether it is trained if it is an answer."""
    speaker = _speaker(turn)
    if speaker not in SPEAKERS:
        raise UnusableRow(f"the speaker {speaker[:40]!r} is unknown" if speaker else "a turn has no role")
    role = SPEAKERS[speaker]
    message = {"role": role, **{key: value for key, value in turn.items() if key not in OWN_KEYS and value is not None}}
    content = next((turn[key] for key in TEXT_KEYS if turn.get(key) is not None), None)
    calls = turn.get("tool_calls") or turn.get("function_call") or []
    if speaker in CALLERS:
        content, calls = "", content
    elif isinstance(content, list):
        content, part_calls = _join_parts(content, message)
        calls = calls or part_calls
    elif content is None and role != "assistant":
        raise UnusableRow("a turn has no text")
    message["content"] = require_text(content, "content")
    if calls:
        message["tool_calls"] = _parse_calls(calls)
    return message, role != "assistant" or _is_trained(turn)


def parse_tools(tools: object, column: str) -> list[dict]:
    """Descriptions of tools, each as {"type": "function", "function": ...}. All of them or each may be JSON text."""
    tools = parse_json(tools, column) or []
    found = [parse_json(tool, column) for tool in (tools if isinstance(tools, list) else [tools])]
    if not all(isinstance(tool, dict) for tool in found):
        raise UnusableRow(f"`{column}` is not a list of tools")
    return [tool if "name" not in tool else {"type": "function", "function": tool} for tool in found]


def require_text(value: object, column: str) -> str:
    """The text, empty if there is none. Raises UnusableRow naming what `value` is if it is no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = KINDS_OF_VALUES.get(type(value), f"a {type(value).__name__}")
        raise UnusableRow(f"`{column}` is {kind}, not text")
    return value


def parse_json(value: object, column: str) -> object:
    """What the JSON in `value` holds, if `value` is text: Parquet and CSV often keep lists so."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise UnusableRow(f"`{column}` is text, but not JSON") from error


def _speaker(turn: dict) -> str:
    speaker = next((turn[key] for key in SPEAKER_KEYS if turn.get(key) is not None), None)
    return require_text(speaker, "role").strip().lower()


def _is_trained(turn: dict) -> bool:
    weights = [turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None]
    if unknown := [weight for weight in weights if weight not in (0, 1)]:
        raise UnusableRow(f"an answer has the weight {unknown[0]!r}, where only 0 and 1 are possible")
    return all(weights)


def _join_parts(parts: list, message: dict) -> tuple[str, list]:
    """The joined text of a content in parts, and its tool calls. Thoughts go to `reasoning_content` of `message`."""
    texts, thoughts, calls = [], [], []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get("text", part.get("value", part.get(kind))) if isinstance(part, dict) else part
        if kind in TEXT_PARTS:
            texts.append(require_text(value, "content"))
        elif kind in THOUGHT_PARTS:
            thoughts.append(require_text(value, "content"))
        elif kind in CALLERS:
            calls.append(value)
        else:
            raise UnusableRow(f"a turn has a part of type {str(kind)[:40]!r}, which is no text")
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return "".join(texts), calls


def _parse_calls(calls: object) -> list[dict]:
    """Tool calls with their arguments as objects: chat templates write them as JSON themselves."""
    calls = parse_json(calls, "tool_calls")
    parsed = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = parse_json(call, "tool_calls")
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableRow("a tool call has no name")
        arguments = parse_json(function.get("arguments"), "arguments") or {}
        if not isinstance(arguments, dict):
            raise UnusableRow("the arguments of a tool call are not an object")
        own_keys = {key: value for key, value in call.items() if value is not None} if function is not call else {}
        parsed.append({"type": "function", **own_keys, "function": {**function, "arguments": arguments}})
    return parsed
