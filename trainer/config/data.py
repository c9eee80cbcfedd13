"""The sections `train.data:` and `train.validation:` of a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import StrictModel

Column = Literal[
    "messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text",
    "system", "history", "tools",
]  # fmt: skip


class DataSource(StrictModel):
    """One dataset. A plain path means a section with this path."""

    path: str = Field(
        min_length=1,
        description="a JSON, JSONL, CSV, TSV, Parquet or Arrow file, also compressed; a folder of such files, or a "
        "pattern that matches some; or a dataset folder",
    )
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"] | None = Field(
        None,
        description="messages has a column `messages` of {role, content}. sharegpt has `conversations` of {from, "
        "value}. alpaca has `instruction`, `input` and `output`. prompt_completion has `prompt` and `completion`. text "
        "has `text`. None means that the columns of each row decide",
    )
    columns: dict[Column, str] = Field(
        {}, description="for each column of the format its name in this dataset, if that differs: {output: answer}"
    )
    epochs: float = Field(
        1.0,
        gt=0,
        description="how many times each example occurs in one epoch of training. With 2.5, half of the examples occur "
        "twice and half three times",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="instead of epochs, the part of an epoch that comes from this source, relative to the weights of "
        "the other sources. None means that epochs decides",
    )

    @model_validator(mode="after")
    def _weight_or_epochs(self) -> "DataSource":
        if self.weight is not None and "epochs" in self.model_fields_set and self.epochs != 1.0:
            raise ValueError("weight and epochs both set how often rows occur. Remove one of them")
        return self


class ValidationConfig(StrictModel):
    """Data that is never trained on, and when its loss is computed. Set either path or fraction."""

    path: str | None = Field(
        None, description="a separate dataset, in any of the formats of train.data. None means that fraction is set"
    )
    fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="this fraction of the examples is held out of training. None means that path is set",
    )
    every_steps: int = Field(
        100, ge=1, description="optimizer steps between two validations. The last step is always validated"
    )
    max_examples: int | None = Field(
        None, ge=1, description="validate on this many examples, chosen by the seed. None means all"
    )

    @model_validator(mode="after")
    def _path_or_fraction(self) -> "ValidationConfig":
        if (self.path is None) == (self.fraction is None):
            raise ValueError("set either path, a separate dataset, or fraction, a part of train.data to hold out")
        return self
