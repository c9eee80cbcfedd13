"""What a user says about synthesis. Defaults are the published constants of Self-Instruct (Wang et al., 2023)."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import StrictModel
from cluster.engine_config import Sampling

BLACKLIST = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to"),
)


# Sampling of each step: appendix A.1 gives temperatures and penalties, the released code stops and token limits.
# Classes, so that a recipe that sets one value keeps the published others.
class InstructionSampling(Sampling):
    """How instructions are proposed."""

    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.5, gt=0, le=1)
    presence_penalty: float = Field(2.0, ge=-2, le=2)
    max_tokens: int = Field(1024, ge=1)
    stop: tuple[str, ...] = ("\n\n", "\n16", "16.", "16 .")


class ClassificationSampling(Sampling):
    """How it is decided whether an instruction is a classification task."""

    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(3, ge=1)
    stop: tuple[str, ...] = ("\n", "Task")


class InputFirstSampling(Sampling):
    """How instances of other tasks are written."""

    temperature: float = Field(0.0, ge=0)
    presence_penalty: float = Field(1.5, ge=-2, le=2)
    max_tokens: int = Field(350, ge=1)
    stop: tuple[str, ...] = ("Example 6", "Task:")


class OutputFirstSampling(InputFirstSampling):
    """How instances of classification tasks are written."""

    max_tokens: int = Field(300, ge=1)


class SynthesizeConfig(StrictModel):
    """Self-Instruct: instructions grown from seed tasks, each classified and given instances by the same model."""

    method: Literal["self_instruct"] = "self_instruct"
    seeds: str = Field("auto", description="seed tasks (JSON lines); auto: the model's own, else those packaged")
    prompts: str = Field("auto", description="folder of templates; auto: the model's own, else those packaged")
    num_instructions: int = Field(100, ge=1, description="instructions of the machine to keep")
    max_requests: int | None = Field(None, ge=1, description="requests for instructions at most; none: no limit")
    max_fruitless_requests: int = Field(200, ge=1, description="requests in a row that keep nothing before giving up")
    lookahead: int = Field(64, ge=1, description="requests for instructions in flight; part of what decides the data")
    num_demonstrations: int = Field(8, ge=1, description="instructions shown in a prompt (§2.2: 8)")
    num_machine_demonstrations: int = Field(2, ge=0, description="of these, made by the machine (§2.2: 2)")
    capitalize: bool = Field(True, description="upper case first letter, lower case rest, as published")
    min_instruction_words: int = Field(4, ge=1, description="shorter instructions are rejected")
    max_instruction_words: int = Field(150, ge=1, description="longer instructions are rejected")
    blacklist: tuple[str, ...] = Field(BLACKLIST, description="words of tasks that a text model cannot do")
    max_rouge_l: float = Field(0.7, ge=0, le=1, description="instructions closer than this to a kept one are rejected")
    num_nearest: int = Field(10, ge=1, description="nearest kept instructions stored with each instruction")
    max_instances: int = Field(5, ge=1, description="instances kept of an instruction")
    instruction_sampling: InstructionSampling = InstructionSampling()
    classification_sampling: ClassificationSampling = ClassificationSampling()
    input_first_sampling: InputFirstSampling = InputFirstSampling()
    output_first_sampling: OutputFirstSampling = OutputFirstSampling()
    include_seed_tasks: bool = Field(True, description="put the seed tasks' own instances into the dataset")
    license: str | None = Field(None, description="license of what the model writes, for the dataset's column")
    seed_license: str | None = Field(None, description="license of the seed tasks")
    rows_per_shard: int = Field(10_000, ge=1, description="rows of one Arrow file")

    @model_validator(mode="after")
    def _demonstrations_leave_room_for_seeds(self) -> "SynthesizeConfig":
        if self.num_machine_demonstrations > self.num_demonstrations:
            raise ValueError(
                f"num_machine_demonstrations={self.num_machine_demonstrations} is more than "
                f"num_demonstrations={self.num_demonstrations}, of which it is a part"
            )
        return self
