"""Evol-Instruct (Xu et al., 2023, WizardLM): instructions are rewritten round by round, and failed rewrites eliminated.

    existing instruction -> rounds 1 to M: rewrite by a random operation -> judge -> answer -> eliminate or continue

If an evolution is eliminated, the next round starts from the instruction before it (§3.2), most likely with another
operation. The rounds of one instruction depend on no other instruction. So instructions go through their rounds
concurrently, and the data is the same as if all of them went through each round together.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from cluster.engines.config import StructuredOutput
from generation.config.common import Role
from generation.config.filters import FormatLeakageConfig, OnlyStopwordsConfig, RefusalConfig
from generation.config.methods import EvolInstructConfig, Operation
from generation.filters.chain import FilterChain
from generation.filters.drafts import Draft, Rejection
from generation.judge import not_judged
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, check_answer, rejection_of_cut
from generation.methods.base import ExistingInstructions
from generation.parsing.chat import REFUSAL, is_refusal, unframe
from generation.records import (
    GenerationResult,
    Record,
    RejectedRecord,
    machine_record,
    user_turn,
    why_unanswered,
)
from generation.seed_tasks import SeedTask

EQUAL, NOT_EQUAL = "Equal", "Not equal"


@dataclass(slots=True)
class _Lineage:
    """What the rounds made of one instruction so far."""

    accepted: AcceptedInstruction
    current: str
    parent_ids: tuple[str, ...] = ()  # rows of the earlier rounds, the oldest first
    rows: list[Record] = field(default_factory=list)
    rejected: list[RejectedRecord] = field(default_factory=list)
    responses: list[GenerationResult] = field(default_factory=list)


class EvolInstruct(ExistingInstructions):
    """Five operations in depth, one in breadth, four rules of elimination."""

    NAME = "evol_instruct"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "add_constraints": ("instruction",),
        "deepen": ("instruction",),
        "concretize": ("instruction",),
        "add_reasoning": ("instruction",),
        "complicate_input": ("instruction", "data_format"),
        "breadth": ("instruction",),
        "equal": ("first", "second"),
        "answer": ("instruction", "input"),
    }
    FORMS: ClassVar[dict[Role, str]] = {"writer": "chat", "answerer": "chat", "judge": "chat"}

    def __init__(self, config: EvolInstructConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        leaks = FormatLeakageConfig(fields=("instruction",), markers=config.leaked_phrases)
        self._leaked = FilterChain([leaks])  # rule 4
        refusals = RefusalConfig(phrases=(), max_words=config.max_refusal_words)
        self._answer_rules = FilterChain([refusals, OnlyStopwordsConfig()])  # rules 2 and 3
        choice = StructuredOutput(choice=(EQUAL, NOT_EQUAL))
        self._equality_sampling = config.equality_sampling.model_copy(update={"structured": choice})

    @classmethod
    def forms(cls, config: EvolInstructConfig) -> Mapping[Role, str]:
        return {role: form for role, form in cls.FORMS.items() if role != "judge" or config.judge_equality}

    def _drafts(self, task: SeedTask) -> Iterable[Draft]:
        """An instruction with its input is one text, as published."""
        return (Draft(user_turn(task.instruction, instance.input)) for instance in task.instances)

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """All rounds of one instruction."""
        lineage = _Lineage(accepted, accepted.draft.instruction)
        if self._config.include_originals:
            await self._answer(lineage, lineage.current, 0)
        for round_number in range(1, self._config.num_rounds + 1):
            await self._evolve(lineage, round_number)
        return InstructionResult(tuple(lineage.rows), tuple(lineage.rejected), tuple(lineage.responses))

    async def _evolve(self, lineage: _Lineage, round_number: int) -> None:
        """One round. The next one starts from the evolved instruction, or from the same one if this is eliminated."""
        response = await self._rewrite(lineage, round_number)
        evolved, taken_off = unframe(response.completion.text)
        if why := await self._eliminate_instruction(lineage, response, evolved):
            draft = Draft(response.completion.text.strip(), finish_reason=response.completion.finish_reason)
            lineage.rejected.append(RejectedRecord("evolution", why, response.request_id, round_number, draft))
            return
        for position, piece in enumerate(taken_off):
            draft = Draft("", "", piece.text)
            why = Rejection(piece.reason)
            lineage.rejected.append(RejectedRecord("response", why, response.request_id, position, draft))
        if await self._answer(lineage, evolved, round_number):
            lineage.current = evolved

    async def _rewrite(self, lineage: _Lineage, round_number: int) -> GenerationResult:
        config, instruction_id = self._config, lineage.accepted.id
        operation: Operation = self._inputs.draw(instruction_id, round_number).choice(config.operations)
        variables = {"instruction": lineage.current}
        if operation == "complicate_input":
            formats = self._inputs.draw(instruction_id, round_number, "format")
            variables["data_format"] = formats.choice(config.data_formats)
        prompt = self._inputs.prompts[operation]
        response = await self._inputs.requester.ask(
            "writer", operation, prompt, prompt.render(**variables), config.evolution_sampling, replica=round_number
        )
        lineage.responses.append(response)
        return response

    async def _eliminate_instruction(
        self, lineage: _Lineage, response: GenerationResult, evolved: str
    ) -> Rejection | None:
        """Why an evolved instruction is eliminated before it is answered, or None."""
        if why := why_unanswered(response) or rejection_of_cut(response.completion.samples[0]):
            return why
        if not evolved:
            return Rejection("empty")
        if is_refusal(evolved):
            return Rejection(REFUSAL)
        if leaked := self._leaked.decide(Draft(evolved)).rejection:
            return leaked
        if evolved == lineage.current:
            return Rejection("equal", "unchanged")
        return await self._judge_equality(lineage, evolved) if self._config.judge_equality else None

    async def _judge_equality(self, lineage: _Lineage, evolved: str) -> Rejection | None:
        """Rule 1: eliminate an evolution that asks the same as the instruction it came from."""
        prompt = self._inputs.prompts["equal"]
        text = prompt.render(first=lineage.current, second=evolved)
        answer = await self._inputs.requester.ask("judge", "equal", prompt, text, self._equality_sampling)
        lineage.responses.append(answer)
        result = answer.completion.text.strip()
        if result == NOT_EQUAL:
            return None
        return Rejection("equal") if result == EQUAL else not_judged(answer)

    async def _answer(self, lineage: _Lineage, instruction: str, round_number: int) -> bool:
        """Answer an instruction. Returns whether it has a row; a refusal or an empty answer eliminates it."""
        draft = Draft(instruction)
        response = await self._ask_for_answer(draft, self._config.answer_sampling, replica=round_number)
        lineage.responses.append(response)
        rejected = check_answer(draft, response)
        if rejected is None:
            answered = Draft(instruction, "", response.completion.text)
            if why := self._answer_rules.decide(answered).rejection:
                rejected = RejectedRecord("answer", why, response.request_id, 0, answered)
        if rejected:
            lineage.rejected.append(rejected)
            return False
        origin = self._origin(lineage.accepted, round_number, lineage.parent_ids)
        row = machine_record(origin, response, instruction, response.completion.text.strip())
        lineage.rows.append(row)
        lineage.parent_ids = (*lineage.parent_ids, row.id)
        return True
