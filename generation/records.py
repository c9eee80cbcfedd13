"""A row of a dataset and a row of its rejects: the columns, and how they are stored.

Instruction, input and output are a view of `messages`: the user's text is the instruction, or the instruction, an
empty line and the input; the assistant's text is the output.
"""

import json
from dataclasses import asdict, dataclass

import pyarrow as pa

from cluster.engines.config import Completion, Sampling
from cluster.files import sha256_json
from generation.filters import Draft, Instance, Neighbor, Rejection

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
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("instruction", pa.string()),
        ("input", pa.string()),
        ("output", pa.string()),
        ("request_id", pa.string()),
        ("nearest", pa.list_(NEIGHBOR)),
    ]
)
INSTRUCTION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("instruction", pa.string()),
        ("input", pa.string()),
        ("is_classification", pa.bool_()),  # null: it was not asked, or not answered
        ("request_id", pa.string()),
        ("round", pa.int32()),
        ("parent_ids", pa.list_(pa.string())),
        ("seed_ids", pa.list_(pa.string())),
        ("nearest", pa.list_(NEIGHBOR)),
    ]
)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a row comes from, the same for all rows of one instruction.

    task: id of the seed task or of the kept instruction; parent_ids: machine instructions among the demonstrations it
    was drawn from, each the `task` of its own rows, or the rows of earlier rounds that it was evolved through, the
    oldest first; seed_ids: the seed tasks among the demonstrations, or the one that it began as.
    """

    method: str
    task: str
    round: int = 0
    parent_ids: tuple[str, ...] = ()
    seed_ids: tuple[str, ...] = ()
    license: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Which request wrote a row."""

    request_id: str
    model: str
    model_revision: str
    prompt_name: str
    prompt_sha: str
    sampling: Sampling
    completion: Completion


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a dataset. The columns of a row that no model wrote are null where they speak of the model."""

    id: str
    messages: list[dict[str, str]]
    method: str
    task: str
    round: int
    parent_ids: tuple[str, ...]
    seed_ids: tuple[str, ...]
    model: str | None
    model_revision: str | None
    prompt_name: str | None
    prompt_sha: str | None
    sampling: str | None  # JSON
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    finish_reason: str | None
    license: str | None

    def to_row(self) -> dict:
        return {name: getattr(self, name) for name in SCHEMA.names}


@dataclass(frozen=True, slots=True)
class RejectedRecord:
    """Something a model wrote that did not pass.

    stage: response, instruction, classification, instance, evolution, answer or row. source: the request it came from,
    or what else names it.
    """

    stage: str
    rejection: Rejection
    source: str
    position: int  # among what came of the same source
    draft: Draft
    nearest: tuple[Neighbor, ...] = ()
    task: str = ""  # the kept instruction whose rows it would have been among; none before that

    def to_row(self) -> dict:
        return {
            "id": sha256_json([self.source, self.task, self.stage, self.position]),
            "task": self.task,
            "stage": self.stage,
            "reason": self.rejection.reason,
            "detail": self.rejection.detail,
            "instruction": self.draft.instruction,
            "input": self.draft.input,
            "output": self.draft.output or "",
            "request_id": self.source,
            "nearest": [asdict(neighbor) for neighbor in self.nearest],
        }


def draft_of(record: "Record") -> Draft:
    """A finished row as row filters see it: the whole of the user's turn, and the assistant's."""
    user, assistant = record.messages[-2:]
    return Draft(user["content"], "", assistant["content"], record.finish_reason or "stop")


def user_turn(instruction: str, input_text: str) -> str:
    """What the user says: the instruction, and below it the input if there is one."""
    return f"{instruction}\n\n{input_text}" if input_text else instruction


def make_messages(user: str, assistant: str) -> list[dict[str, str]]:
    """One turn of a user and one of an assistant."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def human_record(
    origin: Origin, instruction: str, instance: Instance, position: int, user: str | None = None
) -> Record:
    """The row of an instance that a person wrote. user: the user's turn; none: instruction and input."""
    user = user_turn(instruction, instance.input) if user is None else user
    return Record(
        id=sha256_json([origin.method, origin.task, position, instruction, instance.input, instance.output]),
        messages=make_messages(user, instance.output),
        method=origin.method,
        task=origin.task,
        round=origin.round,
        parent_ids=origin.parent_ids,
        seed_ids=origin.seed_ids,
        model=None,
        model_revision=None,
        prompt_name=None,
        prompt_sha=None,
        sampling=None,
        num_prompt_tokens=None,
        num_completion_tokens=None,
        finish_reason=None,
        license=origin.license,
    )


def machine_record(
    origin: Origin, response: GenerationResult, user: str, assistant: str, position: int = 0, sample: int = 0
) -> Record:
    """The row at `position` of what a request wrote in sample `sample`. Token counts are the whole request's."""
    return Record(
        id=sha256_json([response.request_id, origin.task, origin.round, position, sample]),
        messages=make_messages(user, assistant),
        method=origin.method,
        task=origin.task,
        round=origin.round,
        parent_ids=origin.parent_ids,
        seed_ids=origin.seed_ids,
        model=response.model,
        model_revision=response.model_revision,
        prompt_name=response.prompt_name,
        prompt_sha=response.prompt_sha,
        sampling=json.dumps(response.sampling.model_dump(mode="json", exclude_none=True), sort_keys=True),
        num_prompt_tokens=response.completion.num_prompt_tokens,
        num_completion_tokens=response.completion.num_completion_tokens,
        finish_reason=response.completion.samples[sample].finish_reason,
        license=origin.license,
    )
