"""The base of all config models, and those that several packages use."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class StrictModel(BaseModel):
    """A frozen pydantic model in which unknown keys are errors. Config models do no I/O."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(StrictModel):
    """A model: a folder, or a name on the hub."""

    path: str = Field(min_length=1, description="a folder in Hugging Face's format, or org/name on the hub")
    revision: str | None = Field(None, description="commit or tag of a model on the hub. None means its main branch")


class SecretRef(StrictModel):
    """The name of the environment variable that holds a secret. Neither recipes nor run folders contain its value."""

    env: EnvName = Field(description="name of the variable")


def flatten(values: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings with dotted keys: {"train": {"seed": 1}} -> {"train.seed": 1}. An empty mapping is a value."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    pairs: dict[str, object] = {}
    for key, value in values.items():
        pairs |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return pairs
