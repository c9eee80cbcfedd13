"""Answer only: existing instructions are answered, each by one text or by `answer_sampling.n`."""

from typing import ClassVar

from generation.config.common import Role
from generation.method import AcceptedInstruction, InstructionResult
from generation.methods.base import ExistingInstructions


class AnswerOnly(ExistingInstructions):
    """An instruction with several inputs gets its answers for each input."""

    NAME = "answer_only"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {"answer": ("instruction", "input")}
    FORMS: ClassVar[dict[Role, str]] = {"answerer": "chat"}

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        return await self._answer(accepted, self._config.answer_sampling, replica=accepted.position)
