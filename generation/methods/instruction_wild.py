"""InstructionWild (Xue et al., 2023): instructions alone are expanded from user-style seeds, and answered afterwards.

    5 seeds -> one request -> new instructions -> filters -> each answered -> rows

Splitting the two lets another model answer, and keeps the style of real users: an instruction has no input field.
"""

from collections.abc import Coroutine, Sequence
from typing import ClassVar

from cluster.errors import InputError
from generation.accepted import Demonstration
from generation.config import InstructionWildConfig, Role
from generation.filters import Draft, Rejection
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.methods.answers import ask_for_answer, check_answer
from generation.methods.parsing import parse_instructions
from generation.methods.seeds import one_line, seed_drafts
from generation.records import GenerationResult, Origin, Record, RejectedRecord, machine_record
from generation.requester import UNANSWERED


class InstructionWild:
    """Two passes, the second on what the first kept."""

    NAME = "instruction_wild"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "instructions": ("demonstrations", "language"),
        "answer": ("instruction", "input"),
    }
    FORMS: ClassVar[dict[Role, str]] = {"writer": "completion", "answerer": "chat"}

    def __init__(self, config: InstructionWildConfig, inputs: MethodInputs) -> None:
        """Raises InputError if no seed is in the language that is asked for."""
        self.num_wanted = config.num_instructions
        self.max_proposals = config.max_requests
        self.exhausted = f"max_requests={config.max_requests} reached"
        self._config = config
        self._inputs = inputs
        self._seeds_to_show = [
            task for task in inputs.seeds if config.language in (None, task.language or config.language)
        ]
        if not self._seeds_to_show:
            known = ", ".join(sorted({task.language for task in inputs.seeds}))
            raise InputError(
                f"synthesize.language={config.language}: no seed is in that language; they are in {known}."
            )

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        return seed_drafts(self._inputs.seeds)

    def seed_rows(self) -> Sequence[Record]:
        return ()

    def propose(self, number: int, visible: Sequence[Demonstration]) -> Coroutine[None, None, Proposal]:
        """Demonstrations: seeds alone, as in Alpaca."""
        seeds = self._seeds_to_show
        drawn = self._inputs.draw(number).sample(seeds, min(self._config.num_demonstrations, len(seeds)))
        return self._propose(
            number, [one_line(task.instruction) for task in drawn], tuple(sorted(task.id for task in drawn))
        )

    async def _propose(self, number: int, demonstrations: list[str], seed_ids: tuple[str, ...]) -> Proposal:
        prompt = self._inputs.prompts["instructions"]
        text = prompt.render(demonstrations=demonstrations, language=self._config.language)
        response = await self._inputs.requester.ask(
            "writer", "instructions", prompt, text, self._config.instruction_sampling, replica=number
        )
        items = self._items(response, first_number=len(demonstrations) + 1)
        return Proposal(f"{self.NAME}-{response.request_id[:16]}", items, response, (), seed_ids)

    def _items(self, response: GenerationResult, first_number: int) -> tuple[Draft | RejectedRecord, ...]:
        completion = response.completion
        if completion.finish_reason in UNANSWERED:
            why = Rejection(completion.finish_reason)
            return (RejectedRecord("response", why, response.request_id, 0, Draft("")),)
        with self._inputs.timers.measure("parse"):
            texts = parse_instructions(completion.text, first_number, capitalize=False)
        return tuple(Draft(text) for text in (texts[:-1] if completion.finish_reason == "length" else texts))

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """The second pass."""
        response = await ask_for_answer(self._inputs, accepted.draft, self._config.answer_sampling)
        if rejected := check_answer(accepted.draft, response):
            return InstructionResult(rejected=(rejected,), responses=(response,))
        origin = Origin(self.NAME, accepted.id, 0, (), accepted.proposal.seed_ids, self._config.license)
        row = machine_record(origin, response, accepted.draft.instruction, response.completion.text.strip())
        return InstructionResult((row,), responses=(response,))
