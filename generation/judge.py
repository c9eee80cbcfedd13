"""A model scores finished rows by a rubric, and rows with low scores are rejected."""

import asyncio
from dataclasses import replace

from cluster.engines.config import Sampling, StructuredOutput
from generation.config.common import JudgeConfig
from generation.filters.drafts import Draft, Rejection
from generation.method import InstructionResult
from generation.records import GenerationResult, Record, RejectedRecord, draft_of
from generation.requester import UNANSWERED, Requester
from generation.templates import Prompt

SCORES = ("1", "2", "3", "4", "5")
PROMPTS = {"judge": ("instruction", "input", "output", "rubric")}


def score_sampling(sampling: Sampling) -> Sampling:
    """The same sampling, with the output restricted to a score."""
    return sampling.model_copy(update={"structured": StructuredOutput(choice=SCORES)})


def parse_score(response: GenerationResult) -> int | None:
    """The score in a response. None means that the judge did not answer."""
    text = response.completion.text.strip()
    return int(text) if response.completion.finish_reason not in UNANSWERED and text in SCORES else None


def not_judged(response: GenerationResult) -> Rejection:
    """The rejection of a row that the judge gave no score for."""
    completion = response.completion
    return Rejection("not_judged", completion.text.strip() or completion.finish_reason)


class Judge:
    """Asks the judge to score every row of a result."""

    def __init__(self, config: JudgeConfig, prompt: Prompt, requester: Requester) -> None:
        self._config = config
        self._prompt = prompt
        self._requester = requester
        self._sampling = score_sampling(config.sampling)

    async def score(self, result: InstructionResult) -> InstructionResult:
        """The result, with rows of a low score moved to the rejected."""
        answers = await asyncio.gather(*(self._ask(record) for record in result.rows))
        rows, rejected = [], list(result.rejected)
        for record, response in zip(result.rows, answers, strict=True):
            score = parse_score(response)
            if score is not None and score >= self._config.min_score:
                rows.append(record)
                continue
            why = Rejection("low_score", str(score)) if score else not_judged(response)
            rejected.append(RejectedRecord("row", why, record.id, 0, draft_of(record)))
        return replace(result, rows=tuple(rows), rejected=tuple(rejected), responses=(*result.responses, *answers))

    async def _ask(self, record: Record) -> GenerationResult:
        draft: Draft = draft_of(record)
        text = self._prompt.render(
            instruction=draft.instruction, input="", output=draft.output, rubric=self._config.rubric
        )
        return await self._requester.ask("judge", "judge", self._prompt, text, self._sampling)
