"""Alpaca (Taori et al., 2023): whole tasks in one call.

    3 seeds -> one request -> up to 17 tasks of instruction, input and output -> filters -> rows

Unlike in Self-Instruct, a prompt never shows what the model wrote, and classification tasks are not treated apart.
"""

from collections.abc import Coroutine, Iterable, Sequence
from typing import ClassVar

from cluster.errors import InputError
from generation.accepted import Demonstration
from generation.config.common import Role
from generation.config.methods import AlpacaConfig
from generation.filters.drafts import Draft, Rejection
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.methods.base import GeneratedInstructions, one_line, seed_records
from generation.parsing.chat import Dropped
from generation.parsing.labels import parse_tasks
from generation.records import GenerationResult, Record, RejectedRecord, machine_record, user_turn


class Alpaca(GeneratedInstructions):
    """Instruction, input and output of many tasks in one completion."""

    NAME = "alpaca"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {"tasks": ("demonstrations", "num_tasks")}
    FORMS: ClassVar[dict[Role, str]] = {"writer": "completion"}

    def __init__(self, config: AlpacaConfig, inputs: MethodInputs) -> None:
        """Raises InputError if no seed task has an output to show."""
        super().__init__(config, inputs)
        self._seeds_to_show = [task for task in inputs.seeds if task.instances and task.instances[0].output]
        if not self._seeds_to_show:
            raise InputError("synthesize.seeds: no task has an output, but the prompt of alpaca shows whole tasks.")

    def seed_rows(self) -> Sequence[Record]:
        return seed_records(self._inputs.seeds, self._config.seed_license) if self._config.include_seed_tasks else ()

    def propose(self, number: int, visible: Sequence[Demonstration]) -> Coroutine[None, None, Proposal]:
        """Demonstrations are human tasks alone, each with its first instance (released `encode_prompt`)."""
        config, seeds = self._config, self._seeds_to_show
        drawn = self._inputs.draw(number).sample(seeds, min(config.num_demonstrations, len(seeds)))
        demonstrations = [
            {
                "instruction": one_line(task.instruction),
                "input": task.instances[0].input,
                "output": task.instances[0].output,
            }
            for task in drawn
        ]
        variables = {"demonstrations": demonstrations, "num_tasks": config.num_tasks}
        seed_ids = tuple(sorted(task.id for task in drawn))
        return self._ask_for_instructions(number, "tasks", config.task_sampling, variables, seed_ids=seed_ids)

    def _parse(self, response: GenerationResult, first_number: int, prompt: str) -> Iterable[Draft | Dropped]:
        return parse_tasks(response.completion.text, first_number, response.completion.was_cut)

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """Ask no model: the task is complete. A task without an output is rejected; the released code keeps it."""
        draft, response = accepted.draft, accepted.proposal.response
        if not draft.output:
            why = Rejection("empty_output")
            rejected = RejectedRecord("instance", why, response.request_id, accepted.position, draft)
            return InstructionResult(rejected=(rejected,))
        user = user_turn(draft.instruction, draft.input)
        position = accepted.position
        row = machine_record(self._origin(accepted), response, user, draft.output, position, input_text=draft.input)
        return InstructionResult((row,))
