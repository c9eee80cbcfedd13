"""Methods that answer instructions that are there already: once each, or several times to keep the best."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.engines.config import Sampling
from generation.config.common import JudgeSampling, SynthesisConfig


class AnswerSampling(Sampling):
    """How an instruction is answered."""

    temperature: float = Field(0.7, ge=0)
    max_tokens: int = Field(1024, ge=1)


class CandidateSampling(AnswerSampling):
    """How several answers to one instruction are drawn."""

    temperature: float = Field(1.0, ge=0)
    n: int = Field(4, ge=2, description="answers to each instruction")


class AnswerOnlyConfig(SynthesisConfig):
    """Each given instruction gets one answer."""

    method: Literal["answer_only"] = "answer_only"
    max_instructions: int | None = Field(None, ge=1, description="given instructions to answer; none: all")
    answer_sampling: AnswerSampling = AnswerSampling()


class RejectionSamplingConfig(SynthesisConfig):
    """Each given instruction gets n answers, of which a judge or a verifier chooses the best."""

    method: Literal["rejection_sampling"] = "rejection_sampling"
    max_instructions: int | None = Field(None, ge=1, description="given instructions to answer; none: all")
    answer_sampling: CandidateSampling = CandidateSampling()
    choose_by: Literal["judge", "verifier"] = Field("judge", description="who scores the answers")
    verifier: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="module:function of (instruction, input, output, reference) that returns a score, 0 to 1",
    )
    min_score: float = Field(
        1.0, ge=0, description="the best answer must reach it: 1 to 5 of the judge, 0 to 1 of the verifier"
    )
    judge_sampling: JudgeSampling = JudgeSampling()

    @model_validator(mode="after")
    def _verifier_is_named(self) -> "RejectionSamplingConfig":
        if (self.choose_by == "verifier") != (self.verifier is not None):
            raise ValueError("choose_by=verifier needs verifier=module:function, and choose_by=judge takes none")
        return self
