"""When checkpoints are made and which are kept."""

from pydantic import Field

from cluster.config import StrictModel


class CheckpointConfig(StrictModel):
    every_steps: int = Field(200, ge=1)
    keep_last: int = Field(2, ge=1, description="older complete checkpoints are removed")
