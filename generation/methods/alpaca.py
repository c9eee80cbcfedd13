"""Alpaca (Taori et al., 2023): whole tasks in one call.

    3 seeds -> one request -> up to 17 tasks of instruction, input and output -> filters -> rows

Unlike Self-Instruct, what the machine wrote is never shown to it again, and there is no branch for classification.
"""

from collections.abc import Coroutine, Sequence
from typing import ClassVar

from cluster.errors import InputError
from generation.accepted import Demonstration
from generation.config import AlpacaConfig, Role
from generation.filters import Draft, Rejection
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.methods.parsing import MalformedTask, parse_tasks
from generation.methods.seeds import one_line, seed_drafts, seed_records
from generation.records import GenerationResult, Origin, Record, RejectedRecord, machine_record, user_turn
from generation.requester import UNANSWERED


class Alpaca:
    """Instruction, input and output of many tasks in one completion."""

    NAME = "alpaca"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {"tasks": ("demonstrations", "num_tasks")}
    FORMS: ClassVar[dict[Role, str]] = {"writer": "completion"}

    def __init__(self, config: AlpacaConfig, inputs: MethodInputs) -> None:
        """Raises InputError if no seed task has an output to show."""
        self.num_wanted = config.num_instructions
        self.max_proposals = config.max_requests
        self.exhausted = f"max_requests={config.max_requests} reached"
        self._config = config
        self._inputs = inputs
        self._seeds_to_show = [task for task in inputs.seeds if task.instances and task.instances[0].output]
        if not self._seeds_to_show:
            raise InputError("synthesize.seeds: none of the tasks has an output, and this method shows whole tasks.")

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        return seed_drafts(self._inputs.seeds)

    def seed_rows(self) -> Sequence[Record]:
        return seed_records(self._inputs.seeds, self._config.seed_license) if self._config.include_seed_tasks else ()

    def propose(self, number: int, visible: Sequence[Demonstration]) -> Coroutine[None, None, Proposal]:
        """Demonstrations: human tasks alone, each with its first instance (released `encode_prompt`)."""
        seeds = self._seeds_to_show
        drawn = self._inputs.draw(number).sample(seeds, min(self._config.num_demonstrations, len(seeds)))
        demonstrations = [
            {
                "instruction": one_line(task.instruction),
                "input": task.instances[0].input,
                "output": task.instances[0].output,
            }
            for task in drawn
        ]
        return self._propose(number, demonstrations, tuple(sorted(task.id for task in drawn)))

    async def _propose(self, number: int, demonstrations: list[dict], seed_ids: tuple[str, ...]) -> Proposal:
        prompt = self._inputs.prompts["tasks"]
        text = prompt.render(demonstrations=demonstrations, num_tasks=self._config.num_tasks)
        response = await self._inputs.requester.ask(
            "writer", "tasks", prompt, text, self._config.task_sampling, replica=number
        )
        items = self._items(response, first_number=len(demonstrations) + 1)
        return Proposal(f"{self.NAME}-{response.request_id[:16]}", items, response, (), seed_ids)

    def _items(self, response: GenerationResult, first_number: int) -> tuple[Draft | RejectedRecord, ...]:
        completion = response.completion
        if completion.finish_reason in UNANSWERED:
            why = Rejection(completion.finish_reason)
            return (RejectedRecord("response", why, response.request_id, 0, Draft("")),)
        with self._inputs.timers.measure("parse"):
            parsed = parse_tasks(completion.text, first_number, was_cut=completion.finish_reason == "length")
        return tuple(
            RejectedRecord("response", Rejection(task.reason), response.request_id, position, Draft("", "", task.text))
            if isinstance(task, MalformedTask)
            else task
            for position, task in enumerate(parsed)
        )

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """Nothing more to ask: the task came whole. One without an output teaches nothing (published: it stays)."""
        draft, response = accepted.draft, accepted.proposal.response
        if not draft.output:
            why = Rejection("empty_output")
            return InstructionResult(
                rejected=(RejectedRecord("instance", why, response.request_id, accepted.position, draft),)
            )
        origin = Origin(self.NAME, accepted.id, 0, (), accepted.proposal.seed_ids, self._config.license)
        user = user_turn(draft.instruction, draft.input)
        return InstructionResult((machine_record(origin, response, user, draft.output, accepted.position),))
