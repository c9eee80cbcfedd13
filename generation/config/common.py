"""What every synthesis method lets a user say: where seeds and prompts are, which models serve, what may be spent."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from cluster.config import StrictModel
from cluster.engines.config import EngineConfig, Sampling
from generation.config.filters import ExactDuplicateConfig, FilterConfig, NearDuplicateConfig, NoveltyConfig

Role = Literal["writer", "answerer", "judge"]
MEMORY_CONFIGS = (NoveltyConfig, ExactDuplicateConfig, NearDuplicateConfig)  # filters that remember what has passed


class RoleConfig(StrictModel):
    """Which model plays a role, and how it is asked."""

    path: str | None = Field(None, description="folder or name on the hub; none: the recipe's `model`")
    revision: str | None = Field(None, description="commit or tag on the hub")
    adapter: str | None = Field(None, description="folder of a LoRA adapter, served on top of `path`")
    form: Literal["completion", "chat"] | None = Field(
        None,
        description="completion: the prompt is continued; chat: it is the user's turn; None means the method's default",
    )
    engine: EngineConfig | None = Field(None, description="engines of this model; none: the recipe's `engine`")


class RolesConfig(StrictModel):
    """The models of a run. Roles of one model and one engine setting share their engines."""

    writer: RoleConfig = RoleConfig()
    answerer: RoleConfig | None = Field(None, description="none: the writer")
    judge: RoleConfig | None = Field(None, description="none: the answerer")

    def of(self, role: Role) -> RoleConfig:
        """Who plays a role."""
        if role == "judge" and self.judge:
            return self.judge
        return self.writer if role == "writer" or self.answerer is None else self.answerer


class BudgetConfig(StrictModel):
    """What a run may spend. At a limit the dataset is sealed as it is; a higher one goes on from the log."""

    max_rows: int | None = Field(None, ge=1, description="rows of the dataset; none: no limit")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="tokens that models may write, over all attempts; what is in flight then is finished"
    )
    max_minutes: float | None = Field(None, gt=0, description="minutes of generating in one attempt")


class JudgeSampling(Sampling):
    """How a judge is asked."""

    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(8, ge=1)


class JudgeConfig(StrictModel):
    """A model that scores finished rows by a rubric, 1 (useless) to 5 (excellent)."""

    rubric: str = Field(
        "The answer is correct, complete and clear, and does what the instruction asks.",
        description="what a good row is, for the prompt",
    )
    min_score: int = Field(4, ge=1, le=5, description="rows with a lower score are rejected")
    sampling: JudgeSampling = JudgeSampling()


class SynthesisConfig(StrictModel):
    """Common to all methods."""

    # What does not decide the data: where things lie (what they hold does, and is compared by its hash), what may be
    # spent, how often progress is saved and told.
    MAY_CHANGE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        {"seeds", "prompts", "models", "budget", "checkpoint_seconds"}
    )

    seeds: str = Field("auto", description="seed tasks; auto: the model's own, else those packaged")
    prompts: str = Field("auto", description="folder of templates; auto: the writer's own, else those packaged")
    models: RolesConfig = RolesConfig()
    budget: BudgetConfig = BudgetConfig()
    max_concurrent_proposals: int = Field(
        64,
        ge=1,
        description="proposals in flight at once; decides which instructions a prompt may show, and so the data",
    )
    max_empty_requests: int = Field(
        200, ge=1, description="the run ends after this many proposals in a row of which no instruction is accepted"
    )
    instruction_filters: tuple[FilterConfig, ...] = Field((), description="what an instruction must pass, in order")
    row_filters: tuple[FilterConfig, ...] = Field((), description="what a finished row must pass, in order")
    judge: JudgeConfig | None = Field(None, description="a model that scores finished rows; none: nobody does")
    license: str | None = Field(None, description="license of what the model writes, for the dataset's column")
    seed_license: str | None = Field(None, description="license of the seed tasks")
    rows_per_shard: int = Field(10_000, ge=1, description="rows of one Arrow file")
    checkpoint_seconds: float = Field(
        30.0, ge=0, description="progress is saved so often, so that a restart need not read the whole log"
    )

    @field_validator("instruction_filters")
    @classmethod
    def _remember_no_outputs(cls, filters: tuple[FilterConfig, ...]) -> tuple[FilterConfig, ...]:
        for each in filters:
            if isinstance(each, MEMORY_CONFIGS) and "output" in each.fields:
                raise ValueError(
                    f"{each.type} with the field output: what is kept here is remembered over restarts by its "
                    "instruction and input alone. Put this filter under row_filters."
                )
        return filters

    def identity(self) -> dict:
        """All that decides the data."""
        return self.model_dump(mode="json", exclude=set(self.MAY_CHANGE_ON_RESUME))
