"""When checkpoints are made, where they are written first, and which are kept."""

from typing import Literal

from pydantic import Field

from cluster.config import StrictModel


class CheckpointConfig(StrictModel):
    every_steps: int = Field(200, ge=1)
    keep_last: int = Field(2, ge=1, description="so many of the newest complete checkpoints stay")
    keep_best: int = Field(0, ge=0, description="beside them, so many with the lowest `best` stay")
    best: Literal["validation_loss", "train_loss"] = Field(
        "validation_loss", description="train_loss: mean over the steps since the checkpoint before"
    )
    local_dir: str | None = Field(
        None,
        description="a folder on each node's own disk: checkpoints are written there, and copied to the run folder "
        "while training goes on",
    )
