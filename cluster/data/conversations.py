"""Rows of every format in use as conversations.

read_conversation({"instruction": "Say fig", "output": "fig"}).messages
# [{"role": "user", "content": "Say fig"}, {"role": "assistant", "content": "fig"}]

What a format says beside its texts counts, as in the software that the format comes from: system prompts and histories
(LLaMA-Factory), the `weight` of an answer (OpenAI), its `train` (axolotl), a prompt in turns (TRL).
"""

from dataclasses import dataclass, field

from cluster.data.turns import (
    UnusableRow,
    list_of_turns,
    parse_json,
    parse_tools,
    parse_turn,
    parse_turns,
    require_text,
)

# Columns that hold turns -> the format's name.
TURNS = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
# A row with a question and an answer is a task. If it has several of each, the first ones of these lists are taken.
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "inputs", "user", "input")
ANSWERS = ("output", "completion", "response", "solution", "answer", "targets", "assistant")
INPUTS = ("input", "context")  # what an instruction is about: Alpaca's and Dolly's names
SYSTEMS, TOOLS = ("system", "system_prompt"), ("tools", "functions")
TASKS = {("instruction", "output"): "alpaca", ("prompt", "completion"): "prompt_completion"}
# Columns of the formats that a recipe may set.
REQUIRED = {
    "messages": ("messages",), "sharegpt": ("conversations",), "text": ("text",),
    **{name: pair for pair, name in TASKS.items()},
}  # fmt: skip
COLUMNS = frozenset(
    {
        *TURNS,
        *QUESTIONS,
        *ANSWERS,
        *INPUTS,
        *SYSTEMS,
        *TOOLS,
        "history",
        "label",
        "chosen",
        "rejected",
        "finish_reason",
        "text",
    }
)
SHAPES = (
    "`messages`, `conversations`, or a question and an answer, such as `instruction` and `output`, or `prompt` and "
    "`completion`"
)


@dataclass(frozen=True)
class Conversation:
    """The turns of a row and its tools, as chat templates take them.

    messages: dicts with `role` (user, assistant, system or tool) and `content`, which is a text. What else the file has
        in a turn is kept, such as `name`; `tool_calls` have their arguments as dicts. No value is None.
    tools: each as transformers takes it: {"type": "function", "function": {name, description, parameters}}.
    untrained: the indices of answers without a loss.
    is_finished: False means that the last answer was cut off when it was generated.
    """

    messages: list[dict]
    tools: list[dict] = field(default_factory=list)
    untrained: frozenset[int] = frozenset()
    is_finished: bool = True


class NoFormat(UnusableRow):
    """A row lacks a column that its format requires, or fits no format."""


def user_turn(instruction: str, input_text: str | None) -> str:
    """The user's message of a task: the instruction and, below it, the input if there is one."""
    return f"{instruction}\n\n{input_text}" if input_text else instruction


def find_format(row: dict, stated: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The name of a row's format and the columns that it is read from. `stated`: the format that a recipe sets.

    Raises NoFormat if the row lacks the columns.
    """
    if stated is not None:
        if missing := [column for column in REQUIRED[stated] if column not in row]:
            raise NoFormat(f"there is no column `{missing[0]}`")
        return stated, REQUIRED[stated]
    given = {column for column, value in row.items() if value is not None}
    for columns in (given, row.keys()):  # in a table of mixed rows, columns of other formats are null
        for column, name in TURNS.items():
            if column in columns:
                return name, (column,)
        for question in QUESTIONS:
            for answer in ANSWERS if question in columns else ():
                if answer in columns:
                    return TASKS.get((question, answer), f"{question}/{answer}"), (question, answer)
    raise NoFormat("its columns fit no format")


def read_conversation(row: dict, columns: tuple[str, ...] | None = None) -> Conversation:
    """The conversation of a row that can be trained on. `columns`: what `find_format` gave.

    Raises UnusableRow with the reason why the row cannot be trained on.
    """
    columns = columns or find_format(row)[1]
    if len(columns) == 1:
        messages, untrained = parse_turns(row[columns[0]], columns[0])
    else:
        messages, untrained = _task(row, *columns)
    system = _first_text(row, SYSTEMS)
    if system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        untrained = {index + 1 for index in untrained}
    _check_answers(messages, untrained)
    if row.get("label") is False:  # TRL's KTO
        raise UnusableRow("`label` is false: the answer is one to avoid")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise UnusableRow("`chosen` and `rejected` are preferences, which are not trained")
    tools = next((parse_tools(row[column], column) for column in TOOLS if row.get(column) is not None), [])
    return Conversation(messages, tools, frozenset(untrained), row.get("finish_reason") != "length")


def first_exchange(row: dict) -> tuple[str, str, str]:
    """Instruction, input and output of a row: of a conversation, the first user turn and the answer to it.

    Input and output are empty if the row has none. Raises UnusableRow, which is NoFormat if nothing holds a question.
    """
    for column in TURNS:
        if row.get(column) is not None:
            return _first_question(row[column], column)
    given = [column for column in QUESTIONS if row.get(column) is not None]
    question = next(iter(given or [column for column in QUESTIONS if column in row]), None)
    if question is None:
        raise NoFormat("no column holds a question")
    answer = next((column for column in ANSWERS if row.get(column) is not None), ANSWERS[0])
    if isinstance(row[question], list):
        replies = row.get(answer) or []
        turns = replies if isinstance(replies, list) else [{"role": "assistant", "content": replies}]
        return _first_question([*row[question], *turns], question)
    return require_text(row[question], question), _input(row, question), require_text(row.get(answer), answer)


def _first_question(turns: object, column: str) -> tuple[str, str, str]:
    messages = (parse_turn(turn)[0] for turn in list_of_turns(turns, column))
    for message in messages:
        if message["role"] == "user":
            reply = next(messages, {"role": ""})
            return message["content"], "", reply["content"] if reply["role"] == "assistant" else ""
    raise UnusableRow(f"`{column}` has no turn of a user")


def _task(row: dict, question: str, answer: str) -> tuple[list[dict], set[int]]:
    """The turns of a question and its answer, each of them a text or a list of turns. A prompt's turns get no loss."""
    messages, untrained = _history(row)
    if isinstance(row[question], list):
        turns, _ = parse_turns(row[question], question)
        untrained |= {len(messages) + index for index, turn in enumerate(turns) if turn["role"] == "assistant"}
        messages += turns
    else:
        asked = [require_text(row[question], question), _input(row, question)]
        if not any(text.strip() for text in asked):
            raise UnusableRow(f"`{question}` is empty")
        messages.append({"role": "user", "content": user_turn(*asked) if asked[0].strip() else asked[1]})
    if isinstance(row[answer], list | dict):
        turns, masked = parse_turns(row[answer], answer)
        untrained |= {len(messages) + index for index in masked}
        messages += turns
    else:
        messages.append({"role": "assistant", "content": require_text(row[answer], answer)})
    return messages, untrained


def _history(row: dict) -> tuple[list[dict], set[int]]:
    """Earlier turns: pairs of a question and an answer, which is trained like the last one, or turns."""
    pairs = parse_json(row.get("history"), "history") or []
    if isinstance(pairs, list) and all(isinstance(pair, dict) for pair in pairs):
        return parse_turns(pairs, "history") if pairs else ([], set())
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UnusableRow("`history` is not a list of pairs")
    roles = ("user", "assistant")
    turns = [(role, text) for pair in pairs for role, text in zip(roles, pair, strict=True)]
    return [{"role": role, "content": require_text(text, "history")} for role, text in turns], set()


def _input(row: dict, question: str) -> str:
    return _first_text(row, [column for column in INPUTS if column != question])


def _first_text(row: dict, columns: tuple[str, ...] | list[str]) -> str:
    return next((text for column in columns if (text := require_text(row.get(column), column)).strip()), "")


def _check_answers(messages: list[dict], untrained: set[int]) -> None:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UnusableRow("no assistant turn")
    if answers[0] == 0:
        raise UnusableRow("the assistant starts the conversation")
    trained = [messages[index] for index in answers if index not in untrained]
    if not trained:
        raise UnusableRow("no answer is to be trained: their weights are 0")
    if any(not message["content"].strip() and not message.get("tool_calls") for message in trained):
        raise UnusableRow("an answer is empty")
