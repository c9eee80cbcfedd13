"""The section `export:` of a recipe."""

from typing import Literal

from pydantic import Field

from cluster.config import SecretRef, StrictModel


class ExportConfig(StrictModel):
    """The model folder that a run ends with, and where to upload it."""

    form: Literal["merged", "adapter"] = Field(
        "merged", description="merged writes the whole model. adapter writes only the adapter's weights"
    )
    checkpoint: Literal["newest", "best"] = Field(
        "newest",
        description="which checkpoint to export. best has the lowest train.checkpoint.best of those that "
        "train.checkpoint.keep_best kept",
    )
    dtype: Literal["same", "bf16", "fp32"] = Field(
        "same", description="data type of a merged model's weights. same means train.precision"
    )
    max_shard_size: str = Field("4GB", description="largest size of one safetensors file, such as 500MB or 4GB")
    to: str | None = Field(
        None, description="hub:<org>/<name>, a private repository to upload to. None means no upload"
    )
    hub_token: SecretRef | None = Field(
        None,
        description="the token for the upload, as {env: NAME} of an environment variable. None means HF_TOKEN, or the "
        "token that `hf auth login` stored",
    )
