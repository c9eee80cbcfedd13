"""Alpaca (Taori et al., 2023): the defaults are those of the released `generate_instruction.py` and `prompt.txt`."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.engines.config import Sampling
from generation.config.common import SynthesisConfig
from generation.config.filters import ALPACA_FILTERS, FilterConfig


class TaskSampling(Sampling):
    """How a list of tasks is written (`generate_instruction.py`).

    The released code also forbids the end of the text, so that davinci goes on up to the stops. Models that are asked
    in a chat would then write on after their answer; here they may end.
    """

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(3072, ge=1)
    stop: tuple[str, ...] = Field(("\n20", "20."), description="where the last task begins, number `num_tasks`")


class AlpacaConfig(SynthesisConfig):
    """Whole tasks - instruction, input, output - written many to a request."""

    method: Literal["alpaca"] = "alpaca"
    num_instructions: int = Field(100, ge=1, description="tasks of the machine to keep")
    max_requests: int | None = Field(None, ge=1, description="requests at most; none: no limit")
    num_demonstrations: int = Field(3, ge=1, description="seed tasks shown in a prompt (released code: 3)")
    num_tasks: int = Field(20, ge=2, description="tasks that a prompt asks for, with those shown (`prompt.txt`: 20)")
    instruction_filters: tuple[FilterConfig, ...] = ALPACA_FILTERS
    task_sampling: TaskSampling = TaskSampling()
    include_seed_tasks: bool = Field(False, description="put the seed tasks' own instances into the dataset")

    @model_validator(mode="after")
    def _demonstrations_leave_room_for_tasks(self) -> "AlpacaConfig":
        if self.num_demonstrations >= self.num_tasks:
            raise ValueError(
                f"num_demonstrations={self.num_demonstrations} leaves nothing to write: it counts towards "
                f"num_tasks={self.num_tasks}"
            )
        return self
