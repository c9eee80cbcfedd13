"""The `synthesize` section of a recipe: one config model a method, chosen by `method`."""

from functools import reduce
from operator import or_
from typing import Annotated, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from cluster.engines.config import Sampling, SingleSampling, Temperature
from generation.config.common import (
    DEFAULT_MIN_SCORE,
    MAX_SCORE,
    MIN_SCORE,
    ExistingInstructionsConfig,
    GeneratedInstructionsConfig,
    JudgeSampling,
    SynthesisConfig,
)
from generation.config.filters import (
    ALPACA_FILTERS,
    INSTRUCTION_WILD_FILTERS,
    MAGPIE_FILTERS,
    SELF_INSTRUCT_FILTERS,
    FilterConfig,
)

DEFAULT_METHOD = "self_instruct"


class AnswerSampling(Sampling):
    """Sampling of an answer (our choice)."""

    temperature: Temperature = 0.7
    max_tokens: int = Field(1024, ge=1)


# -- Self-Instruct (Wang et al., 2023, arXiv 2212.10560). The defaults are the published constants: appendix A.1 gives
# temperatures and penalties, the released code gives token limits. Each step has a class, so a recipe that sets one
# value keeps the published others. The published stop strings ("16.", "Task:") also count inside a line, and cut "in
# November 2016."; here each begins with a line break.


class InstructionSampling(SingleSampling):
    """Sampling of instructions."""

    temperature: Temperature = 0.7
    top_p: float = Field(0.5, gt=0, le=1)
    presence_penalty: float = Field(2.0, ge=-2, le=2)
    max_tokens: int = Field(1024, ge=1)
    stop: tuple[str, ...] = ("\n16.",)  # released code: "\n\n", "\n16", "16.", "16 ."


class ClassificationSampling(SingleSampling):
    """Sampling of the decision whether an instruction is a classification task."""

    temperature: Temperature = 0.0
    max_tokens: int = Field(3, ge=1)
    stop: tuple[str, ...] = ()  # released code: "\n", "Task"; an answer may begin with an empty line


class InputFirstSampling(SingleSampling):
    """Sampling of instances of tasks that are not classification."""

    temperature: Temperature = 0.0
    presence_penalty: float = Field(1.5, ge=-2, le=2)
    max_tokens: int = Field(350, ge=1)
    stop: tuple[str, ...] = ("\nExample 6", "\nTask:")  # released code: "Example 6", "Task:"


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
        False,
        description="write the first letter in upper case and all others in lower case, also in names (released code: "
        "true)",
    )
    drop_truncated: bool = Field(
        False,
        description="reject a whole response that was cut (released code: true). false means that only its last item "
        "is rejected",
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


# -- Alpaca (Taori et al., 2023). The defaults are those of the released `generate_instruction.py` and `prompt.txt`.


class TaskSampling(SingleSampling):
    """Sampling of a list of tasks (`generate_instruction.py`).

    The released code also forbids the end-of-text token, so that davinci writes up to the stop strings. A chat model
    would then continue after its answer, so here the token is allowed.
    """

    temperature: Temperature = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(3072, ge=1)
    stop: tuple[str, ...] = ("\n20. Instruction:",)  # where the last task begins; released code: "\n20", "20."


class AlpacaConfig(GeneratedInstructionsConfig):
    """A model writes whole tasks (instruction, input, output), many in one request."""

    method: Literal["alpaca"] = "alpaca"
    num_demonstrations: int = Field(3, ge=1, description="seed tasks in a prompt (released code: 3)")
    num_tasks: int = Field(
        20, ge=2, description="tasks that a prompt asks for, its demonstrations included (`prompt.txt`: 20)"
    )
    instruction_filters: tuple[FilterConfig, ...] = Field(
        ALPACA_FILTERS, description="filters of new instructions, in their order (released code)"
    )
    task_sampling: TaskSampling = Field(TaskSampling(), description="sampling of the tasks (released code)")
    include_seed_tasks: bool = Field(False, description="add the instances of the seed tasks to the dataset")

    @model_validator(mode="after")
    def _demonstrations_leave_room_for_tasks(self) -> "AlpacaConfig":
        if self.num_demonstrations >= self.num_tasks:
            raise ValueError(
                f"num_tasks={self.num_tasks} includes the num_demonstrations={self.num_demonstrations} of the prompt, "
                "so no task is left to write"
            )
        return self


# -- InstructionWild (Xue et al., 2023). Its generation code is not published. The settings follow the project's page
# where it names them, else Alpaca, on which the project builds.


class WildInstructionSampling(SingleSampling):
    """Sampling of instructions: Alpaca's temperature and last number. Fewer tokens, because there are no outputs."""

    temperature: Temperature = 1.0
    max_tokens: int = Field(1024, ge=1)
    stop: tuple[str, ...] = ("\n20.",)


class InstructionWildConfig(GeneratedInstructionsConfig):
    """A model expands user-style seeds into more instructions. Accepted instructions are answered afterwards."""

    method: Literal["instruction_wild"] = "instruction_wild"
    num_demonstrations: int = Field(5, ge=1, description="seed instructions in a prompt (project page: 5)")
    language: str | None = Field(
        "English",
        description="the language of the seeds that are shown and of the instructions asked for (project page: "
        "English and Chinese, in separate runs). None means the seeds of all languages",
    )
    instruction_filters: tuple[FilterConfig, ...] = Field(
        INSTRUCTION_WILD_FILTERS, description="filters of new instructions, in their order (our choice)"
    )
    instruction_sampling: WildInstructionSampling = Field(
        WildInstructionSampling(), description="sampling of the instructions"
    )
    answer_sampling: AnswerSampling = Field(AnswerSampling(), description="sampling of the answers")


# -- Magpie (Xu et al., 2024, arXiv 2406.08464)


class UserTurnSampling(SingleSampling):
    """Sampling of user turns (released `gen_ins.py`)."""

    temperature: Temperature = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(2048, ge=1)


class GreedyAnswerSampling(Sampling):
    """Sampling of answers (released `gen_res.py`: greedy)."""

    temperature: Temperature = 0.0
    max_tokens: int = Field(4096, ge=1)


class MagpieConfig(GeneratedInstructionsConfig):
    """An aligned model continues its chat template where the user turn begins. Then it answers what it wrote."""

    method: Literal["magpie"] = "magpie"
    system_prompt: str | None = Field(
        None, description="the system turn before the user turn, to steer the instructions. None means no system turn"
    )
    instruction_filters: tuple[FilterConfig, ...] = Field(
        MAGPIE_FILTERS, description="filters of new instructions, in their order"
    )
    instruction_sampling: UserTurnSampling = Field(
        UserTurnSampling(), description="sampling of the user turns (released code)"
    )
    answer_sampling: GreedyAnswerSampling = Field(
        GreedyAnswerSampling(), description="sampling of the answers (released code: greedy)"
    )


# -- Evol-Instruct (Xu et al., 2023, arXiv 2304.12244, WizardLM). The defaults are the paper's.

Operation = Literal["add_constraints", "deepen", "concretize", "add_reasoning", "complicate_input", "breadth"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


class EvolutionSampling(SingleSampling):
    """Sampling of an evolved instruction, and of an answer (released `openai_access.py`)."""

    temperature: Temperature = 1.0
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(2048, ge=1)


class EqualitySampling(SingleSampling):
    """Sampling of the judge's decision whether two instructions are equal."""

    temperature: Temperature = 0.0
    max_tokens: int = Field(
        32,
        ge=1,
        description="`choice` ends the answer by itself; 32 leaves room for tokenizers that spell it letter by letter",
    )


class EvolInstructConfig(ExistingInstructionsConfig):
    """A model rewrites the seed instructions round by round. Failed rewrites are eliminated."""

    method: Literal["evol_instruct"] = "evol_instruct"
    num_rounds: int = Field(4, ge=1, description="rounds of evolution, M in the paper (§3.2, §4.1: 4)")
    operations: tuple[Operation, ...] = Field(
        OPERATIONS,
        min_length=1,
        description="operations of a round, of which one is drawn with equal probability (§3.2: five in depth, one in "
        "breadth)",
    )
    data_formats: tuple[str, ...] = Field(
        ("XML", "SQL", "Python", "HTML", "shell", "JSON"),
        min_length=1,
        description="formats of the operation `complicate_input`, of which one is drawn with equal probability",
    )
    judge_equality: bool = Field(
        True, description="let the judge eliminate an evolution that is equal to its original (elimination rule 1)"
    )
    max_refusal_words: int = Field(
        80, ge=0, description="an answer with `sorry` and fewer words than this is eliminated (elimination rule 2)"
    )
    leaked_phrases: tuple[str, ...] = Field(
        ("given prompt", "rewritten prompt", "created prompt", "new prompt"),
        description="an evolution that contains one of these phrases of the prompt is eliminated (elimination rule 4)",
    )
    include_originals: bool = Field(True, description="answer the seed instructions too, as round 0 of the dataset")
    evolution_sampling: EvolutionSampling = Field(
        EvolutionSampling(), description="sampling of the evolutions (released code)"
    )
    equality_sampling: EqualitySampling = Field(EqualitySampling(), description="sampling of the judge's decisions")
    answer_sampling: EvolutionSampling = Field(
        EvolutionSampling(), description="sampling of the answers (released code)"
    )


# -- answer only


class AnswerOnlyConfig(ExistingInstructionsConfig):
    """Each seed instruction gets one answer."""

    method: Literal["answer_only"] = "answer_only"
    answer_sampling: AnswerSampling = Field(AnswerSampling(), description="sampling of the answers")


# -- rejection sampling


class CandidateSampling(AnswerSampling):
    """Sampling of several answers to one instruction (our choice)."""

    temperature: Temperature = 1.0
    n: int = Field(4, ge=2, description="answers to each instruction")


class RejectionSamplingConfig(ExistingInstructionsConfig):
    """Each seed instruction gets several answers. A judge or a verifier chooses the best."""

    method: Literal["rejection_sampling"] = "rejection_sampling"
    answer_sampling: CandidateSampling = Field(
        CandidateSampling(), description="sampling of the answers. `n` is their number for each instruction"
    )
    choose_by: Literal["judge", "verifier"] = Field(
        "judge", description="judge means that a model scores the answers, 1 to 5. verifier means that `verifier` does"
    )
    verifier: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="a Python function, as module:function. It gets instruction, input, output and reference as text "
        "and returns a score, usually 0 to 1. None means no function",
    )
    min_score: float | None = Field(
        None,
        ge=0,
        description="the best answer is kept if its score is at least this. Of equal scores, the first answer is the "
        "best. None means 4 of 5 with a judge, and 1 with a verifier",
    )
    judge_sampling: JudgeSampling = Field(JudgeSampling(), description="sampling of the judge's scores")

    @model_validator(mode="after")
    def _verifier_is_named(self) -> "RejectionSamplingConfig":
        if (self.choose_by == "verifier") != (self.verifier is not None):
            raise ValueError("choose_by=verifier needs verifier=module:function, and choose_by=judge takes none")
        return self

    @model_validator(mode="after")
    def _threshold_is_on_the_scale(self) -> "RejectionSamplingConfig":
        if self.choose_by == "judge" and not MIN_SCORE <= self.threshold <= MAX_SCORE:
            raise ValueError(
                f"min_score={self.min_score:g} is outside the judge's scale, which goes from {MIN_SCORE} to {MAX_SCORE}"
            )
        return self

    @property
    def threshold(self) -> float:
        """`min_score`, or its default for a judge or a verifier."""
        if self.min_score is not None:
            return self.min_score
        return DEFAULT_MIN_SCORE if self.choose_by == "judge" else 1.0


METHOD_CONFIGS: dict[str, type[SynthesisConfig]] = {
    config.model_fields["method"].default: config
    for config in (
        SelfInstructConfig,
        AlpacaConfig,
        InstructionWildConfig,
        EvolInstructConfig,
        MagpieConfig,
        AnswerOnlyConfig,
        RejectionSamplingConfig,
    )
}


def _method_of(section: object) -> object:
    if isinstance(section, dict):
        return section.get("method", DEFAULT_METHOD)
    return getattr(section, "method", None)


SynthesizeConfig = Annotated[
    reduce(or_, (Annotated[config, Tag(name)] for name, config in METHOD_CONFIGS.items())), Discriminator(_method_of)
]
