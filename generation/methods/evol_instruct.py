"""Evol-Instruct (Xu et al., 2023, WizardLM): instructions are rewritten round by round, and failed rewrites eliminated.

    given instruction -> round 1 .. M: rewrite by a random operation -> judge -> answer -> eliminate, or go on from it

An eliminated evolution goes back un-evolved and is tried again in the next round (§3.2), by then most likely with
another operation. Rounds of one instruction depend on nothing but its own past, so no round waits for another
instruction's: the chains run side by side and the data is the same as of rounds in lockstep.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from cluster.engines.config import StructuredOutput
from generation.accepted import Demonstration
from generation.config import EvolInstructConfig, Role
from generation.config.evol_instruct import Operation
from generation.config.filters import FormatLeakageConfig, OnlyStopwordsConfig, RefusalConfig
from generation.filters import Draft, FilterChain, Rejection
from generation.judge import not_judged
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.methods.answers import ask_for_answer, check_answer
from generation.methods.given import GivenInstructions
from generation.records import GenerationResult, Record, RejectedRecord, machine_record, user_turn
from generation.requester import UNANSWERED

EQUAL, NOT_EQUAL = "Equal", "Not equal"


@dataclass(slots=True)
class _Chain:
    """One instruction on its way through the rounds."""

    current: str
    parent_ids: tuple[str, ...] = ()  # rows of the earlier rounds that it came through
    rows: list[Record] = field(default_factory=list)
    rejected: list[RejectedRecord] = field(default_factory=list)
    responses: list[GenerationResult] = field(default_factory=list)


class EvolInstruct(GivenInstructions):
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
        super().__init__(config, inputs, config.max_instructions)
        self._evolution = config
        leaks = FormatLeakageConfig(fields=("instruction",), markers=config.leaked_phrases)
        self._leaked = FilterChain([leaks])  # rule 4
        refusals = RefusalConfig(phrases=(), max_words=config.max_refusal_words)
        self._answer_rules = FilterChain([refusals, OnlyStopwordsConfig()])  # rules 2 and 3
        choice = StructuredOutput(choice=(EQUAL, NOT_EQUAL))
        self._equality_sampling = config.equality_sampling.model_copy(update={"structured": choice})

    async def propose(self, number: int, visible: Sequence[Demonstration]) -> Proposal:
        """An instruction with its input is one text, as published."""
        task = self._given[number]
        texts = [user_turn(task.instruction, instance.input) for instance in task.instances] or [task.instruction]
        return Proposal(task.id, tuple(Draft(text) for text in texts), seed_ids=(task.id,))

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """All rounds of one instruction."""
        chain = _Chain(accepted.draft.instruction)
        if self._evolution.include_given:
            await self._answer_given(accepted, chain)
        for round_number in range(1, self._evolution.num_rounds + 1):
            await self._evolve(accepted, chain, round_number)
        return InstructionResult(tuple(chain.rows), tuple(chain.rejected), tuple(chain.responses))

    async def _answer_given(self, accepted: AcceptedInstruction, chain: _Chain) -> None:
        answer = await self._answer(chain, chain.current, 0)
        if answer:
            self._keep(accepted, chain, chain.current, answer, 0)

    async def _evolve(self, accepted: AcceptedInstruction, chain: _Chain, round_number: int) -> None:
        """One round: the chain goes on from the evolved instruction, or stays where it is."""
        operation: Operation = self._inputs.draw(accepted.id, round_number).choice(self._evolution.operations)
        response = await self._rewrite(accepted, chain.current, operation, round_number)
        chain.responses.append(response)
        evolved = response.completion.text.strip()
        if why := await self._eliminate_instruction(chain, response, evolved):
            draft = Draft(evolved, finish_reason=response.completion.finish_reason)
            chain.rejected.append(RejectedRecord("evolution", why, response.request_id, round_number, draft))
            return
        answer = await self._answer(chain, evolved, round_number)
        if answer:
            self._keep(accepted, chain, evolved, answer, round_number)
            chain.current = evolved

    async def _rewrite(
        self, accepted: AcceptedInstruction, instruction: str, operation: Operation, round_number: int
    ) -> GenerationResult:
        prompt = self._inputs.prompts[operation]
        variables = {"instruction": instruction}
        if operation == "complicate_input":
            data_format = self._inputs.draw(accepted.id, round_number, "format").choice(self._evolution.data_formats)
            variables["data_format"] = data_format
        text = prompt.render(**variables)
        sampling = self._evolution.evolution_sampling
        return await self._inputs.requester.ask("writer", operation, prompt, text, sampling, replica=round_number)

    async def _eliminate_instruction(self, chain: _Chain, response: GenerationResult, evolved: str) -> Rejection | None:
        """Why an evolved instruction is eliminated before it is answered, or None."""
        finish_reason = response.completion.finish_reason
        if finish_reason in UNANSWERED:
            return Rejection(finish_reason)
        if finish_reason == "length":
            return Rejection("truncated_evolution")
        if not evolved:
            return Rejection("empty")
        if leaked := self._leaked.decide(Draft(evolved)).rejection:
            return leaked
        if evolved == chain.current:
            return Rejection("equal", "unchanged")
        return await self._judge_equality(chain, evolved) if self._evolution.judge_equality else None

    async def _judge_equality(self, chain: _Chain, evolved: str) -> Rejection | None:
        """Rule 1: an evolution that asks the same as what it came from has gained nothing."""
        prompt = self._inputs.prompts["equal"]
        text = prompt.render(first=chain.current, second=evolved)
        answer = await self._inputs.requester.ask("judge", "equal", prompt, text, self._equality_sampling)
        chain.responses.append(answer)
        result = answer.completion.text.strip()
        if result == NOT_EQUAL:
            return None
        return Rejection("equal") if result == EQUAL else not_judged(answer)

    async def _answer(self, chain: _Chain, instruction: str, round_number: int) -> GenerationResult | None:
        """Answer an instruction; an answer that shows it cannot be answered eliminates it."""
        draft = Draft(instruction)
        response = await ask_for_answer(self._inputs, draft, self._evolution.answer_sampling, replica=round_number)
        chain.responses.append(response)
        rejected = check_answer(draft, response)
        if rejected is None:
            answered = Draft(instruction, "", response.completion.text)
            if why := self._answer_rules.decide(answered).rejection:
                rejected = RejectedRecord("answer", why, response.request_id, 0, answered)
        if rejected:
            chain.rejected.append(rejected)
            return None
        return response

    def _keep(
        self,
        accepted: AcceptedInstruction,
        chain: _Chain,
        instruction: str,
        answer: GenerationResult,
        round_number: int,
    ) -> None:
        origin = self._origin(self.NAME, accepted, round_number, chain.parent_ids)
        row = machine_record(origin, answer, instruction, answer.completion.text.strip())
        chain.rows.append(row)
        chain.parent_ids = (*chain.parent_ids, row.id)
