"""Self-Instruct (Wang et al., 2023, arXiv 2212.10560): the defaults are the published constants."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.engines.config import Sampling
from generation.config.common import SynthesisConfig
from generation.config.filters import SELF_INSTRUCT_FILTERS, FilterConfig


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


class SelfInstructConfig(SynthesisConfig):
    """Instructions grown from seed tasks, each classified and given instances by the same model."""

    method: Literal["self_instruct"] = "self_instruct"
    num_instructions: int = Field(100, ge=1, description="instructions of the machine to keep")
    max_requests: int | None = Field(None, ge=1, description="requests for instructions at most; none: no limit")
    num_demonstrations: int = Field(8, ge=1, description="instructions shown in a prompt (§2.2: 8)")
    num_machine_demonstrations: int = Field(2, ge=0, description="of these, made by the machine (§2.2: 2)")
    only_classification_seeds: bool = Field(
        False, description="show only seed tasks that are classification, under a header that asks for such"
    )
    capitalize: bool = Field(True, description="upper case first letter, lower case rest, as published")
    drop_truncated: bool = Field(True, description="drop a list of instructions that was cut at max_tokens, whole")
    instruction_filters: tuple[FilterConfig, ...] = SELF_INSTRUCT_FILTERS
    max_instances: int = Field(5, ge=1, description="instances kept of an instruction")
    drop_contradictions: bool = Field(True, description="drop all instances of a task with two outputs for one input")
    clean_input_probability: float = Field(
        0.5, ge=0, le=1, description="how often a lone field label in an input is removed and empty lines are closed up"
    )
    encoding: Literal["plain", "published"] = Field(
        "plain", description="how instruction and input become the user's turn; published: one of 13 forms, at random"
    )
    instruction_sampling: InstructionSampling = InstructionSampling()
    classification_sampling: ClassificationSampling = ClassificationSampling()
    input_first_sampling: InputFirstSampling = InputFirstSampling()
    output_first_sampling: OutputFirstSampling = OutputFirstSampling()
    include_seed_tasks: bool = Field(True, description="put the seed tasks' own instances into the dataset")

    @model_validator(mode="after")
    def _demonstrations_leave_room_for_seeds(self) -> "SelfInstructConfig":
        if self.num_machine_demonstrations > self.num_demonstrations:
            raise ValueError(
                f"num_machine_demonstrations={self.num_machine_demonstrations} is more than "
                f"num_demonstrations={self.num_demonstrations}, of which it is a part"
            )
        return self
