"""Rejection sampling: several answers to each existing instruction, of which the best is kept."""

import asyncio
from collections.abc import Mapping
from typing import ClassVar

from generation.config.common import Role
from generation.config.methods import RejectionSamplingConfig
from generation.filters import Draft, Rejection
from generation.judge import not_judged, parse_score, score_sampling
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, check_answer
from generation.methods.base import ExistingInstructions
from generation.methods.verifier import load_verifier
from generation.records import GenerationResult, RejectedRecord, machine_record, user_turn


class RejectionSampling(ExistingInstructions):
    """n answers to each instruction. A judge or a verifier scores them, and the best is kept if it is good enough."""

    NAME = "rejection_sampling"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "answer": ("instruction", "input"),
        "judge": ("instruction", "input", "output"),
    }
    FORMS: ClassVar[dict[Role, str]] = {"answerer": "chat", "judge": "chat"}

    def __init__(self, config: RejectionSamplingConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self._judge_sampling = score_sampling(config.judge_sampling)
        self._verify = load_verifier(config.verifier) if config.verifier else None

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        draft, sampling = accepted.draft, self._config.answer_sampling
        response = await self._ask_for_answer(draft, sampling, replica=accepted.position)
        samples = range(len(response.completion.samples))
        rejected = {s: why for s in samples if (why := check_answer(draft, response, s))}
        usable = [sample for sample in samples if sample not in rejected]
        scores, judge_responses = await self._score(draft, response, usable)
        rejected |= {
            sample: RejectedRecord("answer", why, response.request_id, sample, _answered(draft, response, sample))
            for sample, why in choose_best(scores, self._config.min_score).items()
        }
        user = user_turn(draft.instruction, draft.input)
        rows = tuple(
            machine_record(self._origin(accepted), response, user, _text(response, sample), sample=sample)
            for sample in usable
            if sample not in rejected
        )
        in_order = tuple(rejected[sample] for sample in sorted(rejected))
        return InstructionResult(rows, in_order, (response, *judge_responses))

    async def _score(
        self, draft: Draft, response: GenerationResult, usable: list[int]
    ) -> tuple[dict[int, float | Rejection], tuple[GenerationResult, ...]]:
        """The score of each usable sample, or why it has none; and the responses of the judge."""
        if self._verify is not None:
            reference = draft.output or ""
            return {s: self._verify(draft.instruction, draft.input, _text(response, s), reference) for s in usable}, ()
        answers = await asyncio.gather(*(self._judge(draft, _text(response, sample)) for sample in usable))
        scores = [parse_score(answer) or not_judged(answer) for answer in answers]
        return dict(zip(usable, scores, strict=True)), tuple(answers)

    async def _judge(self, draft: Draft, output: str) -> GenerationResult:
        prompt = self._inputs.prompts["judge"]
        text = prompt.render(instruction=draft.instruction, input=draft.input, output=output)
        return await self._inputs.requester.ask("judge", "judge", prompt, text, self._judge_sampling)


def choose_best(scores: Mapping[int, float | Rejection], min_score: float) -> dict[int, Rejection]:
    """Why each sample but the best is rejected, and the best too if its score is below `min_score`.

    Of equal scores, the first is the best.
    """
    numbers = {sample: score for sample, score in scores.items() if not isinstance(score, Rejection)}
    best = max(numbers, key=numbers.__getitem__, default=None)
    rejections = {sample: score for sample, score in scores.items() if isinstance(score, Rejection)}
    for sample, score in numbers.items():
        if score < min_score:
            rejections[sample] = Rejection("low_score", f"{score:g}")
        elif sample != best:
            rejections[sample] = Rejection("not_best", f"{score:g}")
    return rejections


def _text(response: GenerationResult, sample: int) -> str:
    return response.completion.samples[sample].text.strip()


def _answered(draft: Draft, response: GenerationResult, sample: int) -> Draft:
    return Draft(draft.instruction, draft.input, _text(response, sample))
