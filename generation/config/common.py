"""Settings of every synthesis method: seeds and prompts, the models of the roles, the budget."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from cluster.config import StrictModel
from cluster.engines.config import EngineConfig, SingleSampling, Temperature
from generation.config.filters import (
    ROW_FILTERS,
    ExactDuplicateConfig,
    FilterConfig,
    NearDuplicateConfig,
    NoveltyConfig,
)

Role = Literal["writer", "answerer", "judge"]
MIN_SCORE, MAX_SCORE = 1, 5  # a judge's scale
DEFAULT_MIN_SCORE = 4  # "good, with a small flaw"
STATEFUL_FILTERS = (NoveltyConfig, ExactDuplicateConfig, NearDuplicateConfig)  # they remember accepted drafts


class RoleConfig(StrictModel):
    """The model of a role, and the form of its prompts."""

    path: str | None = Field(None, description="a model folder, or a name on the hub. None means the recipe's `model`")
    revision: str | None = Field(None, description="a commit or tag on the hub. None means the newest commit of `main`")
    adapter: str | None = Field(
        None, description="the folder of a LoRA adapter, applied to `path`. None means no adapter"
    )
    form: Literal["completion", "chat"] | None = Field(
        None,
        description="completion means that the model continues the prompt. chat means that the prompt is the user "
        "turn of a chat. None means the method's default",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="variables for the model's chat template, such as {enable_thinking: false}"
    )
    engine: EngineConfig | None = Field(None, description="the engines of this model. None means the recipe's `engine`")


class RolesConfig(StrictModel):
    """The models of the roles. Roles with the same model and the same engine settings share their engines."""

    writer: RoleConfig = Field(RoleConfig(), description="the model that writes instructions")
    answerer: RoleConfig | None = Field(None, description="the model that answers instructions. None means the writer")
    judge: RoleConfig | None = Field(None, description="the model that judges answers. None means the answerer")

    def recipe_role(self, role: Role) -> Role:
        """The role whose settings a role has: its own, or those that it takes over."""
        if role == "judge" and self.judge:
            return "judge"
        return "writer" if role == "writer" or self.answerer is None else "answerer"

    def of(self, role: Role) -> RoleConfig:
        """The model of a role."""
        return getattr(self, self.recipe_role(role))


class BudgetConfig(StrictModel):
    """Limits of a run. At a limit the dataset is complete. With a higher limit the run continues from its log."""

    max_rows: int | None = Field(None, ge=1, description="rows of the dataset. None means no limit")
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens that the models may write, over all attempts of the run. Requests in flight at the limit "
        "are still finished. None means no limit",
    )
    max_minutes: float | None = Field(
        None, gt=0, description="minutes of generation in one attempt. None means no limit"
    )


class JudgeSampling(SingleSampling):
    """Sampling of a judge's score."""

    temperature: Temperature = 0.0
    max_tokens: int = Field(8, ge=1)


class JudgeConfig(StrictModel):
    """A model that scores finished rows by a rubric, from 1 (useless) to 5 (excellent)."""

    rubric: str = Field(
        "The answer is correct, complete and clear, and does what the instruction asks.",
        description="what makes a row good. It is part of the judge's prompt",
    )
    min_score: int = Field(
        DEFAULT_MIN_SCORE, ge=MIN_SCORE, le=MAX_SCORE, description="rows with a lower score are rejected"
    )
    sampling: JudgeSampling = Field(JudgeSampling(), description="sampling of the score")


class SynthesisConfig(StrictModel):
    """Settings of every method."""

    # Settings that do not decide the data. Of seeds, prompts and models the contents decide, and they are compared by
    # their hashes; the paths do not.
    MAY_CHANGE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        {"seeds", "prompts", "models", "budget", "checkpoint_seconds"}
    )

    seeds: str = Field(
        "auto",
        description="seed tasks: any file or folder that train.data takes. Of a conversation, the first user turn and "
        "the answer to it are used. auto means those in the model folder's `tunesmith/`, else the packaged ones",
    )
    prompts: str = Field(
        "auto",
        description="a folder of prompt templates. auto means those in the model folder's `tunesmith/`, else the "
        "packaged ones",
    )
    models: RolesConfig = Field(RolesConfig(), description="the models that write, answer and judge")
    budget: BudgetConfig = Field(BudgetConfig(), description="limits of rows, tokens and minutes")
    max_concurrent_proposals: int = Field(
        64,
        ge=1,
        description="proposals in flight at once. A proposal is one request for instructions, or one seed task. A "
        "prompt shows only instructions that were accepted at least this many proposals earlier, so a change of this "
        "value changes the data",
    )
    max_empty_requests: int = Field(
        200, ge=1, description="the run ends after this many requests in a row without an accepted instruction"
    )
    instruction_filters: tuple[FilterConfig, ...] = Field((), description="filters of new instructions, in their order")
    row_filters: tuple[FilterConfig, ...] = Field(
        ROW_FILTERS,
        description="filters of finished rows, in their order. The default rejects reasoning, refusals, instructions "
        "given back as the answer, and endless repetition (our choice; the published methods have none)",
    )
    judge: JudgeConfig | None = Field(None, description="score finished rows by a model. None means no scores")
    license: str | None = Field(
        None, description="license of the generated rows, for the column `license` of the dataset. None means unknown"
    )
    seed_license: str | None = Field(
        None, description="license of the seed tasks, for the column `license` of the dataset. None means unknown"
    )
    rows_per_shard: int = Field(10_000, ge=1, description="rows in one Arrow file of the dataset")
    checkpoint_seconds: float = Field(
        30.0,
        ge=0,
        description="seconds between two checkpoints of the progress. A restart reads the request log from the last "
        "checkpoint on",
    )

    @field_validator("instruction_filters")
    @classmethod
    def _remember_no_outputs(cls, filters: tuple[FilterConfig, ...]) -> tuple[FilterConfig, ...]:
        for each in filters:
            if isinstance(each, STATEFUL_FILTERS) and "output" in each.fields:
                raise ValueError(
                    f"{each.type} reads the field output, but a restart restores accepted instructions without their "
                    "outputs. Move this filter to row_filters."
                )
        return filters

    def identity(self) -> dict:
        """The settings that decide the data, as JSON."""
        return self.model_dump(mode="json", exclude=set(self.MAY_CHANGE_ON_RESUME))


class GeneratedInstructionsConfig(SynthesisConfig):
    """Settings of the methods whose instructions a model generates."""

    num_instructions: int = Field(100, ge=1, description="the run ends when this many instructions are accepted")
    max_requests: int | None = Field(
        None, ge=1, description="the run ends after this many requests for instructions. None means no limit"
    )


class ExistingInstructionsConfig(SynthesisConfig):
    """Settings of the methods whose instructions are the seeds."""

    max_instructions: int | None = Field(
        None, ge=1, description="use only this many instructions, the first ones of the seeds. None means all"
    )
