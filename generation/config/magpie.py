"""Magpie (Xu et al., 2024, arXiv 2406.08464): an aligned model writes user turns from its chat template alone."""

from typing import Literal

from pydantic import Field

from cluster.engines.config import Sampling
from generation.config.common import GeneratedInstructionsConfig
from generation.config.filters import MAGPIE_FILTERS, FilterConfig


class UserTurnSampling(Sampling):
    """Sampling of user turns (released `gen_ins.py`)."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(2048, ge=1)


class GreedyAnswerSampling(Sampling):
    """Sampling of answers (released `gen_res.py`: greedy)."""

    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(4096, ge=1)


class MagpieConfig(GeneratedInstructionsConfig):
    """An aligned model continues its chat template where the user turn begins. Then it answers what it wrote."""

    method: Literal["magpie"] = "magpie"
    system_prompt: str | None = Field(
        None, description="the system turn before the user turn, to steer the instructions. None means no system turn"
    )
    instruction_filters: tuple[FilterConfig, ...] = Field(
        MAGPIE_FILTERS, description="filters of new instructions, in their order"
    )
    instruction_sampling: UserTurnSampling = Field(
        UserTurnSampling(), description="sampling of the user turns (released code)"
    )
    answer_sampling: GreedyAnswerSampling = Field(
        GreedyAnswerSampling(), description="sampling of the answers (released code: greedy)"
    )
