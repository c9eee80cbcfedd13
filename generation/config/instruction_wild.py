"""InstructionWild (Xue et al., 2023): instructions in the style of real users, answers in a second pass.

No generation code is published. What the project's page says is followed; the rest is Alpaca's, on which it builds.
"""

from typing import Literal

from pydantic import Field

from cluster.engines.config import Sampling
from generation.config.common import SynthesisConfig
from generation.config.filters import INSTRUCTION_WILD_FILTERS, FilterConfig


class WildSampling(Sampling):
    """How instructions are proposed: Alpaca's temperature and last number; shorter, for there are no outputs."""

    temperature: float = Field(1.0, ge=0)
    max_tokens: int = Field(1024, ge=1)
    stop: tuple[str, ...] = ("\n20.",)


class WildAnswerSampling(Sampling):
    """How an instruction is answered (not published; ours)."""

    temperature: float = Field(0.7, ge=0)
    max_tokens: int = Field(1024, ge=1)


class InstructionWildConfig(SynthesisConfig):
    """Instructions alone are expanded from user-style seeds; each that is kept is answered afterwards."""

    method: Literal["instruction_wild"] = "instruction_wild"
    num_instructions: int = Field(100, ge=1, description="instructions of the machine to keep")
    max_requests: int | None = Field(None, ge=1, description="requests for instructions at most; none: no limit")
    num_demonstrations: int = Field(5, ge=1, description="seed instructions shown in a prompt (project page: 5)")
    language: str | None = Field(
        "English",
        description="the only language of the seeds shown and of what is asked for (published: English and Chinese, "
        "each on its own); none: whatever the seeds are in",
    )
    instruction_filters: tuple[FilterConfig, ...] = INSTRUCTION_WILD_FILTERS
    instruction_sampling: WildSampling = WildSampling()
    answer_sampling: WildAnswerSampling = WildAnswerSampling()
