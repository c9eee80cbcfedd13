"""Alpaca (Taori et al., 2023). The defaults are those of the released `generate_instruction.py` and `prompt.txt`."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.engines.config import Sampling
from generation.config.common import GeneratedInstructionsConfig
from generation.config.filters import ALPACA_FILTERS, FilterConfig


class TaskSampling(Sampling):
    """Sampling of a list of tasks (`generate_instruction.py`).

    The released code also forbids the end-of-text token, so that davinci writes up to the stop strings. A chat model
    would then continue after its answer, so here the token is allowed.
    """

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(3072, ge=1)
    stop: tuple[str, ...] = Field(("\n20", "20."), description="where the last task begins, number `num_tasks`")


class AlpacaConfig(GeneratedInstructionsConfig):
    """A model writes whole tasks (instruction, input, output), many in one request."""

    method: Literal["alpaca"] = "alpaca"
    num_demonstrations: int = Field(3, ge=1, description="seed tasks in a prompt (released code: 3)")
    num_tasks: int = Field(
        20, ge=2, description="tasks that a prompt asks for, its demonstrations included (`prompt.txt`: 20)"
    )
    instruction_filters: tuple[FilterConfig, ...] = Field(
        ALPACA_FILTERS, description="filters of new instructions, in their order (released code)"
    )
    task_sampling: TaskSampling = Field(TaskSampling(), description="sampling of the tasks (released code)")
    include_seed_tasks: bool = Field(False, description="add the instances of the seed tasks to the dataset")

    @model_validator(mode="after")
    def _demonstrations_leave_room_for_tasks(self) -> "AlpacaConfig":
        if self.num_demonstrations >= self.num_tasks:
            raise ValueError(
                f"num_tasks={self.num_tasks} includes the num_demonstrations={self.num_demonstrations} of the prompt, "
                "so no task is left to write"
            )
        return self
