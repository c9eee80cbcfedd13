"""Rejection sampling: several answers to each existing instruction, of which the best is kept."""

import asyncio
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import ClassVar

from cluster.errors import InputError
from cluster.log import stage_logger
from generation.config.common import Role
from generation.config.methods import RejectionSamplingConfig
from generation.filters.drafts import Draft, Rejection
from generation.judge import not_judged, parse_score, score_sampling
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, check_answer, reject_answer
from generation.methods.base import ExistingInstructions
from generation.records import GenerationResult

NUM_TRIED_OUTPUTS = 20
log = stage_logger("synthesize")

# A function of the user: (instruction, input, output, reference) -> score. A higher score is better. The reference is
# the seed's output, and empty if that is not known.
Verifier = Callable[[str, str, str, str], float]


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

    @classmethod
    def forms(cls, config: RejectionSamplingConfig) -> Mapping[Role, str]:
        return {role: form for role, form in cls.FORMS.items() if role != "judge" or config.choose_by == "judge"}

    def check_seeds(self) -> None:
        """Log a warning if the verifier rejects even the seeds' own outputs: then it is hardly made for these seeds."""
        if self._verify is None:
            return
        known = ((task.instruction, each) for task in self._inputs.seeds for each in task.instances if each.output)
        tried = list(islice(known, NUM_TRIED_OUTPUTS))
        best = max((self._verify(text, each.input, each.output, each.output) for text, each in tried), default=math.inf)
        if best < self._config.threshold:
            log.warning(
                f"synthesize.verifier: {self._config.verifier} gives the outputs of the first {len(tried)} seeds "
                f"{best:g} at most, less than min_score={self._config.threshold:g}. If it is not made for these seeds, "
                "it will reject all answers: let a judge choose, with synthesize.choose_by=judge "
                "synthesize.verifier=null."
            )

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        draft, sampling = accepted.draft, self._config.answer_sampling
        response = await self._ask_for_answer(draft, sampling, replica=accepted.position)
        samples = range(len(response.completion.samples))
        rejected = {s: why for s in samples if (why := check_answer(draft, response, s))}
        usable = [sample for sample in samples if sample not in rejected]
        scores, judge_responses = await self._score(draft, response, usable)
        for sample, why in choose_best(scores, self._config.threshold).items():
            rejected[sample] = reject_answer(draft, response, sample, why)
        rows = tuple(
            replace(self._answer_row(accepted, response, sample), score=float(scores[sample]))
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


# -- the verifier


def load_verifier(path: str) -> Verifier:
    """Load the function `module:function`, which is installed or lies in the working directory, and check its scores.

    Raises InputError if it cannot be loaded. A call raises InputError if the function raises or returns no number.
    """
    module, _, name = path.partition(":")
    if (working_dir := os.getcwd()) not in sys.path:
        sys.path.append(working_dir)  # at the end, so that no folder there hides an installed package
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # loading a module can raise anything
        raise InputError(
            f"synthesize.verifier: cannot load {path}: {type(error).__name__}: {error}. Give module:function; "
            "the module must be installed or lie in the working directory."
        ) from error
    if not callable(function):
        raise InputError(f"synthesize.verifier: {path} is of type {type(function).__name__}, not a function.")

    def verify(instruction: str, input_text: str, output: str, reference: str) -> float:
        try:
            score = float(function(instruction, input_text, output, reference))
        except Exception as error:  # the user's code can raise anything
            why = f"{type(error).__name__}: {error}"
            raise InputError(_failed(path, why, instruction, input_text, output)) from error
        if math.isnan(score):
            raise InputError(_failed(path, "its score is not a number", instruction, input_text, output))
        return score

    return verify


def _failed(path: str, why: str, instruction: str, input_text: str, output: str) -> str:
    return (
        f"synthesize.verifier: {path} failed: {why}; instruction {instruction[:200]!r}, input {input_text[:200]!r}, "
        f"output {output[:200]!r}. Fix the function and start again: the answers stay in the request log."
    )
