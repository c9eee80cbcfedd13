"""Alpaca (Taori et al., 2023): the defaults are those of the released `generate_instruction.py` and `prompt.txt`."""

from typing import Literal

from pydantic import Field

from cluster.engine_config import Sampling
from generation.config.common import SynthesisConfig
from generation.config.filters import ALPACA_FILTERS, FilterConfig


class TaskSampling(Sampling):
    """How a list of tasks is written."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(3072, ge=1)
    stop: tuple[str, ...] = ("\n20", "20.", "20.")


class AlpacaConfig(SynthesisConfig):
    """Whole tasks - instruction, input, output - written many to a request."""

    method: Literal["alpaca"] = "alpaca"
    num_instructions: int = Field(100, ge=1, description="tasks of the machine to keep")
    max_requests: int | None = Field(None, ge=1, description="requests at most; none: no limit")
    num_demonstrations: int = Field(3, ge=1, description="seed tasks shown in a prompt")
    num_tasks: int = Field(20, ge=2, description="tasks that a prompt asks for, those shown included")
    instruction_filters: tuple[FilterConfig, ...] = ALPACA_FILTERS
    task_sampling: TaskSampling = TaskSampling()
    include_seed_tasks: bool = Field(False, description="put the seed tasks' own instances into the dataset")
