"""Rows: their columns, and how rows of a dataset and of its rejects are made.

`messages` contains instruction, input and output: the user's turn is the instruction, followed by an empty line and the
input if there is one, and the assistant's turn is the output.
"""

import json
from dataclasses import asdict, dataclass

import pyarrow as pa

from cluster.engines.config import Completion, Sampling
from cluster.files import sha256_json
from generation.filters.drafts import Draft, Instance, Neighbor, Rejection

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(MESSAGE)),
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
    model: str | None = None
    model_revision: str | None = None
    prompt_name: str | None = None
    prompt_sha: str | None = None
    sampling: str | None = None  # JSON
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    finish_reason: str | None = None

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
            "instruction": self.draft.instruction,
            "input": self.draft.input,
            "output": self.draft.output or "",
            "source": self.source,
            "nearest": [asdict(neighbor) for neighbor in self.nearest],
        }


def draft_of(record: Record) -> Draft:
    """A finished row as the row filters see it: the user's whole turn as instruction, and the assistant's turn."""
    user, assistant = record.messages[-2:]
    return Draft(user["content"], "", assistant["content"], record.finish_reason or "stop")


def user_turn(instruction: str, input_text: str) -> str:
    """The user's turn: the instruction, followed by an empty line and the input if there is one."""
    return f"{instruction}\n\n{input_text}" if input_text else instruction


def make_messages(user: str, assistant: str) -> list[dict[str, str]]:
    """A user's turn and an assistant's."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def human_record(
    origin: Origin, instruction: str, instance: Instance, position: int, user: str | None = None
) -> Record:
    """The row of an instance that a person wrote. user: the user's turn; None means instruction and input."""
    user = user_turn(instruction, instance.input) if user is None else user
    return Record(
        id=sha256_json([origin.method, origin.task, position, instruction, instance.input, instance.output]),
        messages=make_messages(user, instance.output),
        **asdict(origin),
    )


def machine_record(
    origin: Origin, response: GenerationResult, user: str, assistant: str, position: int = 0, sample: int = 0
) -> Record:
    """The row at `position` in a sample of a response. Token counts are those of the whole request."""
    return Record(
        id=sha256_json([response.request_id, origin.task, origin.round, position, sample]),
        messages=make_messages(user, assistant),
        **asdict(origin),
        model=response.model,
        model_revision=response.model_revision,
        prompt_name=response.prompt_name,
        prompt_sha=response.prompt_sha,
        sampling=json.dumps(response.sampling.model_dump(mode="json", exclude_none=True), sort_keys=True),
        num_prompt_tokens=response.completion.num_prompt_tokens,
        num_completion_tokens=response.completion.num_completion_tokens,
        finish_reason=response.completion.samples[sample].finish_reason,
    )
