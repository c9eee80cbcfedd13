"""Evol-Instruct (Xu et al., 2023, arXiv 2304.12244, WizardLM): the defaults are the paper's."""

from typing import Literal

from pydantic import Field

from cluster.engines.config import Sampling
from generation.config.common import SynthesisConfig

Operation = Literal["add_constraints", "deepen", "concretize", "add_reasoning", "complicate_input", "breadth"]
OPERATIONS: tuple[Operation, ...] = (
    "add_constraints",
    "deepen",
    "concretize",
    "add_reasoning",
    "complicate_input",
    "breadth",
)


class EvolutionSampling(Sampling):
    """How an instruction is evolved, and how it is answered (released `openai_access.py`)."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(2048, ge=1)


class EqualitySampling(Sampling):
    """How the judge says whether two instructions are the same."""

    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(
        32,
        ge=1,
        description="the form ends the answer; a tokenizer may need one for each of its letters",
    )


class EvolInstructConfig(SynthesisConfig):
    """Given instructions are rewritten round by round; what gained nothing or cannot be answered is eliminated."""

    method: Literal["evol_instruct"] = "evol_instruct"
    max_instructions: int | None = Field(None, ge=1, description="given instructions to evolve; none: all")
    num_rounds: int = Field(4, ge=1, description="evolutions of each instruction, M (§3.2, §4.1: 4)")
    operations: tuple[Operation, ...] = Field(
        OPERATIONS, min_length=1, description="drawn from with equal chance (§3.2: five in depth, one in breadth)"
    )
    data_formats: tuple[str, ...] = Field(
        ("XML", "SQL", "Python", "HTML", "shell", "JSON"), min_length=1, description="of `complicate_input`"
    )
    judge_equality: bool = Field(True, description="eliminate what the judge finds equal to what it came from (rule 1)")
    max_refusal_words: int = Field(80, ge=0, description="shorter answers with `sorry` are eliminated (rule 2)")
    leaked_phrases: tuple[str, ...] = Field(
        ("given prompt", "rewritten prompt", "created prompt", "new prompt"),
        description="an instruction with one of these copies the prompt and is eliminated (rule 4)",
    )
    include_originals: bool = Field(True, description="answer the original instructions too, as round 0 of the dataset")
    evolution_sampling: EvolutionSampling = EvolutionSampling()
    equality_sampling: EqualitySampling = EqualitySampling()
    answer_sampling: EvolutionSampling = EvolutionSampling()
