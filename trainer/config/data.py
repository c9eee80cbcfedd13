"""What is trained on, in which shares, and what is held out."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import StrictModel

Column = Literal["messages", "conversations", "instruction", "input", "output", "text"]


class DataSource(StrictModel):
    """One dataset. A recipe may give its path alone."""

    path: str = Field(min_length=1, description="a dataset folder, or a .jsonl, .json, .parquet or .arrow file")
    format: Literal["messages", "alpaca", "sharegpt", "text"] | None = Field(
        None,
        description="messages: `messages` of {role, content}; alpaca: `instruction`, `input`, `output`; sharegpt: "
        "`conversations` of {from, value}; text: `text`; default: told by the columns",
    )
    columns: dict[Column, str] = Field({}, description="column of the format -> its name here, such as output: answer")
    epochs: float = Field(
        1.0, gt=0, description="times each row is seen in one epoch of the mixture; 2.5: half of the rows three times"
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="instead of epochs: this source's share of the documents of an epoch, beside the other weights",
    )

    @model_validator(mode="after")
    def _one_way_of_saying_how_often(self) -> "DataSource":
        if self.weight is not None and "epochs" in self.model_fields_set and self.epochs != 1.0:
            raise ValueError("weight and epochs both say how often rows are seen. Keep one of them")
        return self


class ValidationConfig(StrictModel):
    """Data that is never trained on, and when the loss on it is taken."""

    path: str | None = Field(None, description="a dataset of its own; its form is told by the columns")
    fraction: float | None = Field(None, gt=0, lt=1, description="this share of the documents is held out of training")
    every_steps: int = Field(100, ge=1, description="also at the end")
    max_rows: int | None = Field(None, ge=1, description="take the loss of so many documents, chosen by the seed")

    @model_validator(mode="after")
    def _one_origin(self) -> "ValidationConfig":
        if (self.path is None) == (self.fraction is None):
            raise ValueError("give either path, a dataset of its own, or fraction, a share held out of the data")
        return self


def as_sources(value: object) -> object:
    """A path, a source, or a list of both, as a list of sources."""
    if isinstance(value, (str, dict, DataSource)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in value)


def refuse_other_formats(sources: tuple[DataSource, ...], objective: str) -> None:
    """Raise ValueError if a stated format has nothing that the objective trains."""
    for source in sources:
        if source.format is not None and (source.format == "text") != (objective == "text"):
            raise ValueError(f"objective={objective} cannot train {source.path} of format {source.format}. Change one")


def refuse_mixed_weights(sources: tuple[DataSource, ...]) -> None:
    """Raise ValueError if some sources have a weight and others have none."""
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        without = sources[weighted.index(False)].path
        raise ValueError(f"either every source of train.data has a weight or none has; {without} has none")
