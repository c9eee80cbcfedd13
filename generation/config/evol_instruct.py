"""Evol-Instruct (Xu et al., 2023, arXiv 2304.12244, WizardLM). The defaults are the paper's."""

from typing import Literal

from pydantic import Field

from cluster.engines.config import Sampling
from generation.config.common import ExistingInstructionsConfig

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
    """Sampling of an evolved instruction, and of an answer (released `openai_access.py`)."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(2048, ge=1)


class EqualitySampling(Sampling):
    """Sampling of the judge's decision whether two instructions are equal."""

    temperature: float = Field(0.0, ge=0)
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
