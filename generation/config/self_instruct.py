"""Self-Instruct (Wang et al., 2023, arXiv 2212.10560). The defaults are the published constants."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.engines.config import Sampling
from generation.config.common import GeneratedInstructionsConfig
from generation.config.filters import SELF_INSTRUCT_FILTERS, FilterConfig


# Appendix A.1 gives temperatures and penalties, the released code gives stop strings and token limits. Each step has a
# class, so a recipe that sets one value keeps the published others.
class InstructionSampling(Sampling):
    """Sampling of instructions."""

    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.5, gt=0, le=1)
    presence_penalty: float = Field(2.0, ge=-2, le=2)
    max_tokens: int = Field(1024, ge=1)
    stop: tuple[str, ...] = ("\n\n", "\n16", "16.", "16 .")


class ClassificationSampling(Sampling):
    """Sampling of the decision whether an instruction is a classification task."""

    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(3, ge=1)
    stop: tuple[str, ...] = ("\n", "Task")


class InputFirstSampling(Sampling):
    """Sampling of instances of tasks that are not classification."""

    temperature: float = Field(0.0, ge=0)
    presence_penalty: float = Field(1.5, ge=-2, le=2)
    max_tokens: int = Field(350, ge=1)
    stop: tuple[str, ...] = ("Example 6", "Task:")


class OutputFirstSampling(InputFirstSampling):
    """Sampling of instances of classification tasks."""

    max_tokens: int = Field(300, ge=1)


class SelfInstructConfig(GeneratedInstructionsConfig):
    """A model writes new instructions from demonstrations, then classifies them and writes their instances."""

    method: Literal["self_instruct"] = "self_instruct"
    num_demonstrations: int = Field(8, ge=1, description="instructions in a prompt (§2.2: 8)")
    num_machine_demonstrations: int = Field(
        2,
        ge=0,
        description="how many of the `num_demonstrations` are accepted instructions; the others are seeds (§2.2: 2)",
    )
    only_classification_seeds: bool = Field(
        False, description="show only classification tasks among the seeds, and ask for classification tasks"
    )
    capitalize: bool = Field(
        True, description="write the first letter in upper case and all others in lower case (released code)"
    )
    drop_truncated: bool = Field(
        True,
        description="reject a whole response that was cut at max_tokens. false means that only its last item is "
        "dropped",
    )
    instruction_filters: tuple[FilterConfig, ...] = Field(
        SELF_INSTRUCT_FILTERS, description="filters of new instructions, in their order (released code)"
    )
    max_instances: int = Field(
        5, ge=1, description="instances to keep of one instruction, drawn at random (released code: 5)"
    )
    drop_contradictions: bool = Field(
        True, description="reject all instances of a task if one input has two different outputs (released code)"
    )
    clean_input_probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="probability with which an input loses its field label (`Sentence:`), if it has just one, and its "
        "empty lines (released code: 0.5)",
    )
    encoding: Literal["plain", "published"] = Field(
        "plain",
        description="how instruction and input become the user turn. plain means the instruction, an empty line and "
        "the input. published means one of the released code's 13 forms, drawn at random",
    )
    instruction_sampling: InstructionSampling = Field(
        InstructionSampling(), description="sampling of the instructions (appendix A.1)"
    )
    classification_sampling: ClassificationSampling = Field(
        ClassificationSampling(), description="sampling of the classification (appendix A.1)"
    )
    input_first_sampling: InputFirstSampling = Field(
        InputFirstSampling(), description="sampling of instances of other tasks (appendix A.1)"
    )
    output_first_sampling: OutputFirstSampling = Field(
        OutputFirstSampling(), description="sampling of instances of classification tasks (appendix A.1)"
    )
    include_seed_tasks: bool = Field(True, description="add the instances of the seed tasks to the dataset")

    @model_validator(mode="after")
    def _demonstrations_leave_room_for_seeds(self) -> "SelfInstructConfig":
        if self.num_machine_demonstrations > self.num_demonstrations:
            raise ValueError(
                f"num_machine_demonstrations={self.num_machine_demonstrations} is a part of "
                f"num_demonstrations={self.num_demonstrations}, so it cannot be larger"
            )
        return self
