"""Rows: their columns, and how rows of a dataset and of its rejects are made.

`messages` contains instruction, input and output: the user's turn is the instruction, followed by an empty line and the
input if there is one, and the assistant's turn is the output. The column `input` has the input by itself, `score` what
a judge or a verifier gave the row, and `reasoning_content` what a reasoning model thought before it wrote the output.
"""

import json
from dataclasses import asdict, dataclass

import pyarrow as pa

from cluster.engines.config import UNANSWERED, Completion, Sampling
from cluster.files import sha256_json
from generation.filters.drafts import Draft, Instance, Neighbor, Rejection

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("input", pa.string()),
        ("reasoning_content", pa.string()),
        ("score", pa.float64()),
        ("method", pa.string()),
        ("task", pa.string()),
        ("round", pa.int32()),
        ("parent_ids", pa.list_(pa.string())),
        ("seed_ids", pa.list_(pa.string())),
        ("model", pa.string()),
        ("model_revision", pa.string()),
        ("prompt_name", pa.string()),
        ("prompt_sha", pa.string()),
        ("sampling", pa.string()),
        ("num_prompt_tokens", pa.int64()),
        ("num_completion_tokens", pa.int64()),
        ("finish_reason", pa.string()),
        ("stop_reason", pa.string()),
        ("license", pa.string()),
    ]
)
NEIGHBOR = pa.struct([("id", pa.string()), ("score", pa.float64())])
REJECTED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("kind", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("filter", pa.string()),
        ("instruction", pa.string()),
        ("input", pa.string()),
        ("output", pa.string()),
        ("source", pa.string()),
        ("nearest", pa.list_(NEIGHBOR)),
    ]
)
INSTRUCTION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("instruction", pa.string()),
        ("input", pa.string()),
        ("is_classification", pa.bool_()),  # null if the model was not asked, or did not answer
        ("request_id", pa.string()),
        ("round", pa.int32()),
        ("parent_ids", pa.list_(pa.string())),
        ("seed_ids", pa.list_(pa.string())),
        ("nearest", pa.list_(NEIGHBOR)),
    ]
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row comes from; the same for all rows of one instruction.

    task: id of the seed task or of the accepted instruction. parent_ids: the accepted instructions among its
    demonstrations, or the rows that it evolved from, the oldest first. seed_ids: the seed tasks among its
    demonstrations, or the one that it evolved from.
    """

    method: str
    task: str
    round: int = 0
    parent_ids: tuple[str, ...] = ()
    seed_ids: tuple[str, ...] = ()
    license: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A request and the completion that a model wrote for it."""

    request_id: str
    model: str
    model_revision: str
    prompt_name: str
    prompt_sha: str
    sampling: Sampling
    completion: Completion


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a dataset. In a row that no model wrote, the columns about the model are null."""

    id: str
    messages: list[dict[str, str]]
    method: str
    task: str
    round: int
    parent_ids: tuple[str, ...]
    seed_ids: tuple[str, ...]
    license: str | None
    input: str = ""
    reasoning_content: str | None = None
    score: float | None = None
    model: str | None = None
    model_revision: str | None = None
    prompt_name: str | None = None
    prompt_sha: str | None = None
    sampling: str | None = None  # JSON
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    finish_reason: str | None = None
    stop_reason: str | None = None  # the stop string that ended the text; None means that the model ended it

    def to_row(self) -> dict:
        return {name: getattr(self, name) for name in SCHEMA.names}


@dataclass(frozen=True, slots=True)
class RejectedRecord:
    """Text of a model that did not pass a check.

    kind: response, instruction, classification, instance, evolution, answer or row. source: the id of the request, or
    of the row or proposal if there is no request.
    """

    kind: str
    rejection: Rejection
    source: str
    position: int  # among the items of the same source
    draft: Draft
    nearest: tuple[Neighbor, ...] = ()
    task: str = ""  # id of the accepted instruction it belongs to; empty if it was rejected before

    def to_row(self) -> dict:
        return {
            "id": sha256_json([self.source, self.task, self.kind, self.position]),
            "task": self.task,
            "kind": self.kind,
            "reason": self.rejection.reason,
            "detail": self.rejection.detail,
            "filter": self.rejection.filter,
            "instruction": self.draft.instruction,
            "input": self.draft.input,
            "output": self.draft.output or "",
            "source": self.source,
            "nearest": [asdict(neighbor) for neighbor in self.nearest],
        }


def draft_of(record: Record) -> Draft:
    """A finished row as the row filters see it."""
    instruction, output = instruction_and_output(record.messages, record.input)
    return Draft(instruction, record.input, output, record.finish_reason or "stop")


def instruction_and_output(messages: list[dict[str, str]], input_text: str) -> tuple[str, str]:
    """The last user's turn without the input at its end, and the last assistant's turn.

    In a layout of instruction and input other than `user_turn`, the instruction is the user's whole turn.
    """
    user, assistant = (message["content"] for message in messages[-2:])
    return (user.removesuffix(f"\n\n{input_text}") if input_text else user), assistant


def why_unanswered(response: GenerationResult, sample: int = 0) -> Rejection | None:
    """Why a sample has no text at all, or None: no engine answered, or the model did nothing but reason."""
    written = response.completion.samples[sample]
    if written.finish_reason in UNANSWERED:
        return Rejection(written.finish_reason, written.error)
    return Rejection("only_reasoning") if written.reasoning_content and not written.text.strip() else None


def user_turn(instruction: str, input_text: str) -> str:
    """The user's turn: the instruction, followed by an empty line and the input if there is one."""
    return f"{instruction}\n\n{input_text}" if input_text else instruction


def make_messages(user: str, assistant: str) -> list[dict[str, str]]:
    """A user's turn and an assistant's."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def human_record(
    origin: Origin, instruction: str, instance: Instance, position: int, user: str | None = None, input_text: str = ""
) -> Record:
    """The row of an instance that a person wrote. user: the user's turn; None means instruction and input.

    input_text: the input as it stands in `user`.
    """
    if user is None:
        user, input_text = user_turn(instruction, instance.input), instance.input
    return Record(
        id=sha256_json([origin.method, origin.task, position, instruction, instance.input, instance.output]),
        messages=make_messages(user, instance.output),
        input=input_text,
        **asdict(origin),
    )


def machine_record(
    origin: Origin,
    response: GenerationResult,
    user: str,
    assistant: str,
    position: int | None = None,
    sample: int = 0,
    input_text: str = "",
) -> Record:
    """The row of a sample, or the row at `position` among several in it. Token counts are those of the whole request.

    A text at a position is complete, whatever ended the sample. input_text: the input as it stands in `user`; empty if
    there is none.
    """
    written = response.completion.samples[sample]
    is_whole = position is None
    return Record(
        id=sha256_json([response.request_id, origin.task, origin.round, position or 0, sample]),
        messages=make_messages(user, assistant),
        input=input_text,
        reasoning_content=written.reasoning_content or None,
        **asdict(origin),
        model=response.model,
        model_revision=response.model_revision,
        prompt_name=response.prompt_name,
        prompt_sha=response.prompt_sha,
        sampling=json.dumps(response.sampling.model_dump(mode="json", exclude_none=True), sort_keys=True),
        num_prompt_tokens=response.completion.num_prompt_tokens,
        num_completion_tokens=response.completion.num_completion_tokens,
        finish_reason=written.finish_reason if is_whole else "stop",
        stop_reason=written.stop_reason if is_whole and isinstance(written.stop_reason, str) else None,
    )
