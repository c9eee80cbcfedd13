"""Conversations as rows hold them become conversations as chat templates take them.

conversation = read_conversation(row["messages"], row.get("tools"))
"""

import json
from dataclasses import dataclass, field

NOT_TOOLS = "`tools` is not a list of tools"


class Unmaskable(Exception):
    """A conversation cannot be masked correctly. The message is the reason under which the row is counted."""


@dataclass(frozen=True)
class Conversation:
    """Turns in the form that chat templates take at inference.

    Every message has a role and text as `content`, and no key whose value is None. Calls and tools have OpenAI's form,
    {"type": "function", "function": {...}}, and a call's `arguments` are a dict.
    """

    messages: list[dict]
    tools: list[dict] = field(default_factory=list)
    untrained: frozenset[int] = frozenset()  # indices of answers that get no loss
    is_finished: bool = True  # False: the last answer was cut when it was generated, and gets no end-of-turn token


def user_turn(instruction: str, input_text: str | None) -> str:
    """The user's message of a task: the instruction and, below it, the input if there is one."""
    return f"{instruction}\n\n{input_text}" if input_text else instruction


def read_conversation(messages: object, tools: object = None, is_finished: bool = True) -> Conversation:
    """The conversation of a row. `tools` and a call's `arguments` may be JSON in a text.

    Raises Unmaskable if `messages` is not a list of {role, content}, if a turn has neither text nor calls, if calls or
    tools are in another form, or if the assistant starts the conversation.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise Unmaskable("`messages` is not a list of turns")
    turns = [_message(message) for message in messages]
    if turns[0]["role"] == "assistant":
        raise Unmaskable("the assistant starts the conversation")
    return Conversation(turns, _tools(tools), is_finished=is_finished)


def without_nulls(value: object) -> object:
    """`value` without the keys whose value is None, at any depth.

    Arrow gives every struct of a column the same keys, so a call has the arguments of all other tools, as None.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _message(message: object) -> dict:
    if not isinstance(message, dict):
        raise Unmaskable("a turn has no role or no text")
    turn = {key: value for key, value in message.items() if value is not None}
    if calls := _parsed(turn.pop("tool_calls", None), "`tool_calls` is not a list of calls"):
        turn["tool_calls"] = [_call(call) for call in calls]
        turn.setdefault("content", "")
    if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        raise Unmaskable("a turn has no role or no text")
    return turn


def _call(call: object) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unmaskable("a tool call has no name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise Unmaskable("a tool call's arguments are not a JSON object")
    own_keys = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
    return {"type": "function", **own_keys, "function": {**function, "arguments": arguments}}


def _tools(tools: object) -> list[dict]:
    found = []
    for item in _parsed(tools, NOT_TOOLS):
        parsed = _parsed(item, NOT_TOOLS)
        if len(parsed) != 1 or not isinstance(parsed[0], dict):
            raise Unmaskable(NOT_TOOLS)
        (tool,) = parsed
        found.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return found


def _parsed(value: object, reason: str) -> list:
    """A list, which may be JSON in a text. A dict is a list of one. None and an empty text are an empty list.

    Raises Unmaskable with `reason` for anything else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Unmaskable(reason) from error
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list | tuple):
        raise Unmaskable(reason)
    return list(value)
