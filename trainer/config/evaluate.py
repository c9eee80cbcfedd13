"""The section `evaluate:` of a recipe."""

from pydantic import Field, field_validator

from cluster.config import StrictModel
from cluster.engines.config import SingleSampling


class EvaluateConfig(StrictModel):
    """Which tasks the models answer, and how."""

    sets: tuple[str, ...] = Field(
        (),
        description="JSON-lines files of tasks: a path, or a list. Empty means the files that come with the model, "
        "or the packaged ones if it has none",
    )
    sampling: SingleSampling = Field(
        SingleSampling(temperature=0.0, max_tokens=128), description="how the answers are sampled"
    )
    compare_base: bool = Field(True, description="also evaluate the model as it was before tuning")

    @field_validator("sets", mode="before")
    @classmethod
    def _one_path_is_a_list_too(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value
