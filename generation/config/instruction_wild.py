"""InstructionWild (Xue et al., 2023): instructions in the style of real users, answered in a second request.

Its generation code is not published. The settings follow the project's page where it names them, else Alpaca, on which
the project builds.
"""

from typing import Literal

from pydantic import Field

from cluster.engines.config import Sampling
from generation.config.common import AnswerSampling, GeneratedInstructionsConfig
from generation.config.filters import INSTRUCTION_WILD_FILTERS, FilterConfig


class WildInstructionSampling(Sampling):
    """Sampling of instructions: Alpaca's temperature and last number. Fewer tokens, because there are no outputs."""

    temperature: float = Field(1.0, ge=0)
    max_tokens: int = Field(1024, ge=1)
    stop: tuple[str, ...] = ("\n20.",)


class InstructionWildConfig(GeneratedInstructionsConfig):
    """A model expands user-style seeds into more instructions. Accepted instructions are answered afterwards."""

    method: Literal["instruction_wild"] = "instruction_wild"
    num_demonstrations: int = Field(5, ge=1, description="seed instructions in a prompt (project page: 5)")
    language: str | None = Field(
        "English",
        description="the language of the seeds that are shown and of the instructions asked for (project page: "
        "English and Chinese, in separate runs). None means the seeds of all languages",
    )
    instruction_filters: tuple[FilterConfig, ...] = Field(
        INSTRUCTION_WILD_FILTERS, description="filters of new instructions, in their order (our choice)"
    )
    instruction_sampling: WildInstructionSampling = Field(
        WildInstructionSampling(), description="sampling of the instructions"
    )
    answer_sampling: AnswerSampling = Field(AnswerSampling(), description="sampling of the answers")
