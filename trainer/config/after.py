"""What becomes of a tuned model: the sections `export:` and `evaluate:`."""

from typing import Literal

from pydantic import Field, field_validator

from cluster.config import SecretRef, StrictModel
from cluster.engines.config import Sampling


class ExportConfig(StrictModel):
    form: Literal["merged", "adapter"] = Field("merged", description="adapter: only the PEFT weights")
    checkpoint: Literal["newest", "best"] = Field(
        "newest", description="best: of those that train.checkpoint.keep_best kept, by train.checkpoint.best"
    )
    dtype: Literal["same", "bf16", "fp32"] = "same"
    max_shard_size: str = "4GB"
    to: str | None = Field(None, description="hub:<org>/<name> uploads the folder as well")
    hub_token: SecretRef | None = Field(
        None, description="{env: NAME} of the token for `to`; default: HF_TOKEN, or what `hf auth login` left"
    )


class EvaluateConfig(StrictModel):
    sets: tuple[str, ...] = Field(
        (), description="JSON-lines files; empty: those beside the model, else the packaged ones"
    )
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=128)
    compare_base: bool = Field(True, description="evaluate the model before tuning as well")

    @field_validator("sets", mode="before")
    @classmethod
    def _one_path_is_a_list_too(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value
