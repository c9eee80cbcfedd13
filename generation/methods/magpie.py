"""Magpie (Xu et al., 2024): an aligned model is given its chat template up to the user's turn, and writes that turn.

template prefix -> drawn again and again -> filters -> each answered by the model -> rows
"""

from collections.abc import Sequence
from typing import ClassVar

from generation.accepted import Demonstration
from generation.config import MagpieConfig, Role
from generation.filters import Draft, Rejection
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.methods.answers import ask_for_answer, check_answer
from generation.methods.chat_template import user_turn_opening
from generation.records import Origin, Record, RejectedRecord, machine_record
from generation.requester import UNANSWERED


class Magpie:
    """Instructions out of nothing but the form of a chat."""

    NAME = "magpie"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {"answer": ("instruction", "input")}
    FORMS: ClassVar[dict[Role, str]] = {"writer": "chat", "answerer": "chat"}

    def __init__(self, config: MagpieConfig, inputs: MethodInputs) -> None:
        """Raises InputError if the writer has no chat template."""
        self.num_wanted = config.num_instructions
        self.max_proposals = config.max_requests
        self.exhausted = f"max_requests={config.max_requests} reached"
        self._config = config
        self._inputs = inputs
        self._opening = user_turn_opening(inputs.requester.model("writer").source, config.system_prompt)
        sampling = config.instruction_sampling
        self._sampling = sampling.model_copy(
            update={
                "stop": (*sampling.stop, *self._opening.stop),
                "stop_token_ids": (*sampling.stop_token_ids, *self._opening.stop_token_ids),
            }
        )

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        return ()

    def seed_rows(self) -> Sequence[Record]:
        return ()

    async def propose(self, number: int, visible: Sequence[Demonstration]) -> Proposal:
        response = await self._inputs.requester.continue_tokens(
            "writer", "instructions", list(self._opening.token_ids), "chat template", self._sampling, replica=number
        )
        completion = response.completion
        item: Draft | RejectedRecord = Draft(completion.text.strip(), finish_reason=completion.finish_reason)
        if completion.finish_reason in UNANSWERED:
            item = RejectedRecord("response", Rejection(completion.finish_reason), response.request_id, 0, item)
        return Proposal(f"{self.NAME}-{response.request_id[:16]}", (item,), response)

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        system = self._config.system_prompt
        response = await ask_for_answer(self._inputs, accepted.draft, self._config.answer_sampling, system)
        if rejected := check_answer(accepted.draft, response):
            return InstructionResult(rejected=(rejected,), responses=(response,))
        origin = Origin(self.NAME, accepted.id, license=self._config.license)
        row = machine_record(origin, response, accepted.draft.instruction, response.completion.text.strip())
        return InstructionResult((row,), responses=(response,))
