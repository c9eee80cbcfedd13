"""Magpie (Xu et al., 2024, arXiv 2406.08464): an aligned model writes users' turns out of nothing."""

from typing import Literal

from pydantic import Field

from cluster.engines.config import Sampling
from generation.config.common import SynthesisConfig
from generation.config.filters import MAGPIE_FILTERS, FilterConfig


class QuerySampling(Sampling):
    """How users' turns are drawn (released `gen_ins.py`)."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(2048, ge=1)


class ResponseSampling(Sampling):
    """How they are answered (released `gen_res.py`: greedy)."""

    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(4096, ge=1)


class MagpieConfig(SynthesisConfig):
    """Instructions drawn from the model's own idea of a user, each answered by it."""

    method: Literal["magpie"] = "magpie"
    num_instructions: int = Field(100, ge=1, description="instructions to keep")
    max_requests: int | None = Field(None, ge=1, description="draws at most; none: no limit")
    system_prompt: str | None = Field(None, description="put before the user's turn, to steer what is asked")
    instruction_filters: tuple[FilterConfig, ...] = MAGPIE_FILTERS
    instruction_sampling: QuerySampling = QuerySampling()
    answer_sampling: ResponseSampling = ResponseSampling()
