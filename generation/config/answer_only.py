"""Answer only: one answer to each existing instruction."""

from typing import Literal

from pydantic import Field

from generation.config.common import AnswerSampling, ExistingInstructionsConfig


class AnswerOnlyConfig(ExistingInstructionsConfig):
    """Each seed instruction gets one answer."""

    method: Literal["answer_only"] = "answer_only"
    answer_sampling: AnswerSampling = Field(AnswerSampling(), description="sampling of the answers")
