"""Rejection sampling: several answers to each existing instruction, of which the best is kept."""

from typing import Literal

from pydantic import Field, model_validator

from generation.config.common import AnswerSampling, ExistingInstructionsConfig, JudgeSampling


class CandidateSampling(AnswerSampling):
    """Sampling of several answers to one instruction (our choice)."""

    temperature: float = Field(1.0, ge=0)
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
    min_score: float = Field(
        1.0,
        ge=0,
        description="the best answer is kept if its score is at least this. Of equal scores, the first answer is the "
        "best",
    )
    judge_sampling: JudgeSampling = Field(JudgeSampling(), description="sampling of the judge's scores")

    @model_validator(mode="after")
    def _verifier_is_named(self) -> "RejectionSamplingConfig":
        if (self.choose_by == "verifier") != (self.verifier is not None):
            raise ValueError("choose_by=verifier needs verifier=module:function, and choose_by=judge takes none")
        return self
