"""The forms in which chat templates take tool calls."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class CallForm:
    """How a template wants tool calls. Templates differ in what they do with OpenAI's form."""

    text_arguments: bool = False  # the arguments as JSON in a text; False: as a dict
    empty_content: str | None = ""  # the content of a turn that has calls and no text
    short_ids: bool = False  # ids have nine letters or digits, and results have them too

    def adapt(self, messages: Sequence[dict]) -> list[dict]:
        """The messages with their calls and results in this form."""
        adapted: list[dict] = []
        ids: dict[object, str] = {}  # id in the row -> short id
        unanswered: list[str] = []  # short ids of the last calls
        for message in messages:
            if "tool_calls" in message:
                calls = [self._call(call, ids) for call in message["tool_calls"]]
                unanswered = [call.get("id") for call in calls]
                message = {**message, "content": message["content"] or self.empty_content, "tool_calls": calls}
            elif self.short_ids and message["role"] == "tool" and unanswered:
                in_order = unanswered.pop(0)
                message = {**message, "tool_call_id": ids.get(message.get("tool_call_id"), in_order)}
            adapted.append(message)
        return adapted

    def _call(self, call: dict, ids: dict[object, str]) -> dict:
        if self.text_arguments:
            function = call["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        if self.short_ids:
            given = call.get("id", len(ids))
            is_short = isinstance(given, str) and len(given) == 9 and given.isalnum()
            ids[given] = given if is_short else f"call{len(ids):05d}"
            call = {**call, "id": ids[given]}
        return call


# The first ones are nearest to OpenAI's form.
CALL_FORMS = [CallForm(*choices) for choices in product((False, True), ("", None), (False, True))]
