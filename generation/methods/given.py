"""Instructions that are there already: each is answered once, or several times to keep the best answer."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import ClassVar

from generation.accepted import Demonstration
from generation.config import AnswerOnlyConfig, RejectionSamplingConfig, Role, SynthesisConfig
from generation.filters import Draft, Rejection
from generation.judge import not_judged, parse_score, score_sampling
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.methods.answers import ask_for_answer, check_answer
from generation.records import GenerationResult, Origin, Record, RejectedRecord, machine_record, user_turn
from generation.seed_tasks import SeedTask
from generation.verifier import load_verifier


class GivenInstructions:
    """What the methods on given instructions share: every proposal is one of them, in order."""

    def __init__(self, config: SynthesisConfig, inputs: MethodInputs, max_instructions: int | None) -> None:
        self._given: Sequence[SeedTask] = inputs.seeds
        self.num_wanted = None
        self.max_proposals = min(len(inputs.seeds), max_instructions or len(inputs.seeds))
        self.exhausted = ""
        self._config = config
        self._inputs = inputs

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        return ()

    def seed_rows(self) -> Sequence[Record]:
        return ()

    async def propose(self, number: int, visible: Sequence[Demonstration]) -> Proposal:
        """Nothing is generated: the instruction, once for each of its inputs."""
        task = self._given[number]
        items = tuple(Draft(task.instruction, instance.input, instance.output or None) for instance in task.instances)
        return Proposal(task.id, items or (Draft(task.instruction),), seed_ids=(task.id,))

    def _origin(
        self, name: str, accepted: AcceptedInstruction, round_number: int = 0, parent_ids: tuple[str, ...] = ()
    ) -> Origin:
        return Origin(name, accepted.id, round_number, parent_ids, accepted.proposal.seed_ids, self._config.license)


class AnswerOnly(GivenInstructions):
    """One answer to each instruction."""

    NAME = "answer_only"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {"answer": ("instruction", "input")}
    FORMS: ClassVar[dict[Role, str]] = {"answerer": "chat"}

    def __init__(self, config: AnswerOnlyConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs, config.max_instructions)
        self._sampling = config.answer_sampling

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        response = await ask_for_answer(self._inputs, accepted.draft, self._sampling, replica=accepted.position)
        if rejected := check_answer(accepted.draft, response):
            return InstructionResult(rejected=(rejected,), responses=(response,))
        user = user_turn(accepted.draft.instruction, accepted.draft.input)
        row = machine_record(self._origin(self.NAME, accepted), response, user, response.completion.text.strip())
        return InstructionResult((row,), responses=(response,))


class RejectionSampling(GivenInstructions):
    """n answers to each instruction; a judge or a verifier scores them, and the best is kept if it is good enough."""

    NAME = "rejection_sampling"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "answer": ("instruction", "input"),
        "judge": ("instruction", "input", "output"),
    }
    FORMS: ClassVar[dict[Role, str]] = {"answerer": "chat", "judge": "chat"}

    def __init__(self, config: RejectionSamplingConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs, config.max_instructions)
        self._sampling = config.answer_sampling
        self._judge_sampling = score_sampling(config.judge_sampling)
        self._min_score = config.min_score
        self._verify = load_verifier(config.verifier) if config.verifier else None

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        response = await ask_for_answer(self._inputs, accepted.draft, self._sampling, replica=accepted.position)
        samples = range(len(response.completion.samples))
        rejected = {s: why for s in samples if (why := check_answer(accepted.draft, response, s))}
        usable = [sample for sample in samples if sample not in rejected]
        scores, judged_by = await self._score(accepted.draft, response, usable)
        rejected |= {
            sample: RejectedRecord(
                "answer", why, response.request_id, sample, _answered(accepted.draft, response, sample)
            )
            for sample, why in choose_best(scores, self._min_score).items()
        }
        user = user_turn(accepted.draft.instruction, accepted.draft.input)
        rows = tuple(
            machine_record(self._origin(self.NAME, accepted), response, user, _text(response, sample), sample=sample)
            for sample in usable
            if sample not in rejected
        )
        return InstructionResult(rows, tuple(rejected[sample] for sample in sorted(rejected)), (response, *judged_by))

    async def _score(
        self, draft: Draft, response: GenerationResult, usable: list[int]
    ) -> tuple[dict[int, float | Rejection], tuple[GenerationResult, ...]]:
        """Score by sample, or why it has none, and the requests that it took."""
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
    """All samples but the best one, of equals the first, with the reason; that one too if it is not good enough."""
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
