"""Alpaca (Taori et al., 2023): whole tasks in one call.

    3 seeds -> one request -> up to 17 tasks of instruction, input and output -> filters -> rows

Unlike Self-Instruct, what the machine wrote is never shown to it again, and there is no branch for classification.
"""

from collections.abc import Coroutine, Sequence
from typing import ClassVar

from cluster.errors import InputError
from generation.config import AlpacaConfig, Role
from generation.filters import Draft, Rejection
from generation.kept import Shown
from generation.method import Kept, MethodInputs, Outcome, Proposal
from generation.methods.parsing import MalformedTask, parse_tasks
from generation.methods.seeds import one_line, seed_drafts, seed_records
from generation.records import Origin, Production, Record, RejectedRecord, machine_record, user_turn
from generation.requester import UNANSWERED


class Alpaca:
    """Instruction, input and output of many tasks in one completion."""

    NAME = "alpaca"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {"tasks": ("demonstrations", "num_tasks")}
    FORMS: ClassVar[dict[Role, str]] = {"writer": "plain"}

    def __init__(self, config: AlpacaConfig, inputs: MethodInputs) -> None:
        """Raises InputError if no seed task has an output to show."""
        self.num_wanted = config.num_instructions
        self.max_proposals = config.max_requests
        self.exhausted = f"max_requests={config.max_requests} reached"
        self._config = config
        self._inputs = inputs
        self._shown_seeds = [task for task in inputs.seeds if task.instances and task.instances[0].output]
        if not self._shown_seeds:
            raise InputError("synthesize.seeds: none of the tasks has an output, and this method shows whole tasks.")

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        return seed_drafts(self._inputs.seeds)

    def seed_rows(self) -> Sequence[Record]:
        return seed_records(self._inputs.seeds, self._config.seed_license) if self._config.include_seed_tasks else ()

    def propose(self, number: int, visible: Sequence[Shown]) -> Coroutine[None, None, Proposal]:
        """Demonstrations: human tasks alone, each with its first instance (released `encode_prompt`)."""
        seeds = self._shown_seeds
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
        made_by = await self._inputs.requester.ask(
            "writer", "tasks", prompt, text, self._config.task_sampling, replica=number
        )
        items = self._items(made_by, first_number=len(demonstrations) + 1)
        return Proposal(f"{self.NAME}-{made_by.request_id[:16]}", items, made_by, (), seed_ids)

    def _items(self, made_by: Production, first_number: int) -> tuple[Draft | RejectedRecord, ...]:
        completion = made_by.completion
        if completion.finish_reason in UNANSWERED:
            why = Rejection(completion.finish_reason)
            return (RejectedRecord("response", why, made_by.request_id, 0, Draft("")),)
        with self._inputs.attribution.spent_on("parse"):
            parsed = parse_tasks(completion.text, first_number, was_cut=completion.finish_reason == "length")
        return tuple(
            RejectedRecord("response", Rejection(task.reason), made_by.request_id, position, Draft("", "", task.text))
            if isinstance(task, MalformedTask)
            else task
            for position, task in enumerate(parsed)
        )

    async def finish(self, kept: Kept) -> Outcome:
        """Nothing more to ask: the task came whole. One without an output teaches nothing (published: it stays)."""
        draft, made_by = kept.draft, kept.proposal.made_by
        if not draft.output:
            why = Rejection("empty_output")
            return Outcome(rejected=(RejectedRecord("instance", why, made_by.request_id, kept.position, draft),))
        origin = Origin(self.NAME, kept.id, 0, (), kept.proposal.seed_ids, self._config.license)
        user = user_turn(draft.instruction, draft.input)
        return Outcome((machine_record(origin, made_by, user, draft.output, kept.position),))
