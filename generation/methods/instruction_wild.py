"""InstructionWild (Xue et al., 2023): a model expands user-style seeds into instructions, then answers them.

    5 seeds -> one request -> new instructions -> filters -> each answered -> rows

The answers are requests of their own, so another model can give them. An instruction has no input field, which keeps
the style of real users.
"""

from collections.abc import Coroutine, Iterable, Sequence
from typing import ClassVar

from cluster.errors import InputError
from generation.accepted import Demonstration
from generation.config.common import Role
from generation.config.methods import InstructionWildConfig
from generation.filters.drafts import Draft
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.methods.base import GeneratedInstructions, one_line
from generation.parsing.chat import Dropped
from generation.records import GenerationResult


class InstructionWild(GeneratedInstructions):
    """Instructions alone first, answers to the accepted ones afterwards."""

    NAME = "instruction_wild"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "instructions": ("demonstrations", "language"),
        "answer": ("instruction", "input"),
    }
    FORMS: ClassVar[dict[Role, str]] = {"writer": "completion", "answerer": "chat"}

    def __init__(self, config: InstructionWildConfig, inputs: MethodInputs) -> None:
        """Raises InputError if no seed is in the language of the recipe."""
        super().__init__(config, inputs)
        self._seeds_to_show = [
            task for task in inputs.seeds if config.language in (None, task.language or config.language)
        ]
        if not self._seeds_to_show:
            known = ", ".join(sorted({task.language for task in inputs.seeds}))
            raise InputError(
                f"synthesize.language={config.language}: no seed is in that language; they are in {known}."
            )

    def propose(self, number: int, visible: Sequence[Demonstration]) -> Coroutine[None, None, Proposal]:
        """Demonstrations are seeds alone, as in Alpaca."""
        config, seeds = self._config, self._seeds_to_show
        drawn = self._inputs.draw(number).sample(seeds, min(config.num_demonstrations, len(seeds)))
        variables = {"demonstrations": [one_line(task.instruction) for task in drawn], "language": config.language}
        seed_ids = tuple(sorted(task.id for task in drawn))
        return self._ask_for_instructions(
            number, "instructions", config.instruction_sampling, variables, seed_ids=seed_ids
        )

    def _parse(self, response: GenerationResult, first_number: int, prompt: str) -> Iterable[Draft | Dropped]:
        return self._parse_list(response, first_number, prompt)

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        return await self._answer(accepted, self._config.answer_sampling)
