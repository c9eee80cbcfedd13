"""What is watched while training runs. None of it changes the result."""

from typing import Literal

from pydantic import Field

from cluster.config import StrictModel

Tracker = Literal["tensorboard", "wandb", "trackio"]


class WatchConfig(StrictModel):
    spike_window: int = Field(50, ge=2, description="steps whose losses say what is usual")
    spike_std: float = Field(6.0, gt=0, description="a loss so many standard deviations above their mean is told of")
    stall_timeout_seconds: float | None = Field(
        None,
        gt=0,
        description="a rank so long at one place prints its stack; "
        "default: 300, or half of process_group_timeout_seconds where that is less",
    )


class ProfileConfig(StrictModel):
    """A trace of some steps of rank 0 by torch's profiler, for chrome://tracing or Perfetto."""

    start_step: int = Field(10, ge=1, description="the first step in the trace, counted as the step lines count")
    num_steps: int = Field(3, ge=1)
