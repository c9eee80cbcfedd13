"""A model scores finished rows by a rubric, and rows with low scores are rejected."""

import asyncio
from dataclasses import replace

from cluster.engines.config import Sampling, StructuredOutput
from generation.config.common import MAX_SCORE, MIN_SCORE, JudgeConfig
from generation.filters.drafts import Draft, Rejection
from generation.method import InstructionResult
from generation.records import GenerationResult, Record, RejectedRecord, draft_of, why_unanswered
from generation.requester import Requester
from generation.templates import Prompt

SCORES = tuple(str(score) for score in range(MIN_SCORE, MAX_SCORE + 1))
PROMPTS = {"judge": ("instruction", "input", "output", "rubric")}


def score_sampling(sampling: Sampling) -> Sampling:
    """The same sampling, with the output restricted to a score."""
    return sampling.model_copy(update={"structured": StructuredOutput(choice=SCORES)})


def parse_score(response: GenerationResult) -> int | None:
    """The score in a response. None means that the judge did not answer."""
    text = response.completion.text.strip()
    return int(text) if text in SCORES else None


def not_judged(response: GenerationResult) -> Rejection:
    """The rejection of a row that the judge gave no score for."""
    why, completion = why_unanswered(response), response.completion
    if why:
        return Rejection("not_judged", f"{why.reason}: {why.detail}" if why.detail else why.reason)
    return Rejection("not_judged", completion.text.strip() or completion.finish_reason)


class Judge:
    """Asks the judge to score every row of a result."""

    def __init__(self, config: JudgeConfig, prompt: Prompt, requester: Requester) -> None:
        self._config = config
        self._prompt = prompt
        self._requester = requester
        self._sampling = score_sampling(config.sampling)

    async def score(self, result: InstructionResult) -> InstructionResult:
        """The result with the score of each row, and with rows of a low score moved to the rejected."""
        answers = await asyncio.gather(*(self._ask(record) for record in result.rows))
        rows, rejected = [], list(result.rejected)
        for record, response in zip(result.rows, answers, strict=True):
            score = parse_score(response)
            if score is not None and score >= self._config.min_score:
                rows.append(replace(record, score=float(score)))
                continue
            why = Rejection("low_score", str(score)) if score else not_judged(response)
            rejected.append(RejectedRecord("row", why, record.id, 0, draft_of(record)))
        return replace(result, rows=tuple(rows), rejected=tuple(rejected), responses=(*result.responses, *answers))

    async def _ask(self, record: Record) -> GenerationResult:
        draft: Draft = draft_of(record)
        text = self._prompt.render(
            instruction=draft.instruction, input=draft.input, output=draft.output, rubric=self._config.rubric
        )
        return await self._requester.ask("judge", "judge", self._prompt, text, self._sampling)
