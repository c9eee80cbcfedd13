"""Instructions that are there already: each is answered once, or several times to keep the best answer."""

import asyncio
import importlib
from collections.abc import Callable, Sequence
from typing import ClassVar

from cluster.errors import InputError
from generation.config import AnswerOnlyConfig, RejectionSamplingConfig, Role, SynthesisConfig
from generation.filters import Draft, Rejection
from generation.judge import parse_score, score_sampling
from generation.kept import Shown
from generation.method import Kept, MethodInputs, Outcome, Proposal
from generation.methods.answers import ask_for_answer, check_answer
from generation.records import Origin, Production, Record, RejectedRecord, machine_record, user_turn
from generation.seed_tasks import SeedTask

Verifier = Callable[[str, str, str, str], float]  # instruction, input, output, reference (empty: not known) -> score


class GivenInstructions:
    """What the methods on given instructions share: every proposal is one of them, in order."""

    def __init__(self, config: SynthesisConfig, inputs: MethodInputs, max_instructions: int | None) -> None:
        self._given: Sequence[SeedTask] = inputs.seeds[:max_instructions]
        self.num_wanted = None
        self.max_proposals = len(self._given)
        self.exhausted = ""
        self._config = config
        self._inputs = inputs

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        return ()

    def seed_rows(self) -> Sequence[Record]:
        return ()

    async def propose(self, number: int, visible: Sequence[Shown]) -> Proposal:
        """Nothing is generated: the instruction, once for each of its inputs."""
        task = self._given[number]
        items = tuple(Draft(task.instruction, instance.input, instance.output or None) for instance in task.instances)
        return Proposal(task.id, items or (Draft(task.instruction),), seed_ids=(task.id,))

    def _origin(self, name: str, kept: Kept, round_number: int = 0) -> Origin:
        seed_ids = kept.proposal.seed_ids
        return Origin(name, seed_ids[0], round_number, (), seed_ids, self._config.license)


class AnswerOnly(GivenInstructions):
    """One answer to each instruction."""

    NAME = "answer_only"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {"answer": ("instruction", "input")}
    FORMS: ClassVar[dict[Role, str]] = {"answerer": "chat"}

    def __init__(self, config: AnswerOnlyConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs, config.max_instructions)
        self._sampling = config.answer_sampling

    async def finish(self, kept: Kept) -> Outcome:
        made_by = await ask_for_answer(self._inputs, kept.draft, self._sampling, replica=kept.position)
        if rejected := check_answer(kept.draft, made_by):
            return Outcome(rejected=(rejected,), made_by=(made_by,))
        user = user_turn(kept.draft.instruction, kept.draft.input)
        row = machine_record(self._origin(self.NAME, kept), made_by, user, made_by.completion.text.strip())
        return Outcome((row,), made_by=(made_by,))


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
        self._verifier = load_verifier(config.verifier) if config.verifier else None

    async def finish(self, kept: Kept) -> Outcome:
        made_by = await ask_for_answer(self._inputs, kept.draft, self._sampling, replica=kept.position)
        num_samples = len(made_by.completion.samples)
        rejected = [check_answer(kept.draft, made_by, sample) for sample in range(num_samples)]
        usable = [sample for sample in range(num_samples) if rejected[sample] is None]
        scores, judged_by = await self._score(kept.draft, made_by, usable)
        best = max(usable, key=lambda sample: scores[sample], default=None)  # of equals the first
        rows = []
        for sample in usable:
            answer = made_by.completion.samples[sample]
            if sample == best and scores[sample] >= self._min_score:
                user = user_turn(kept.draft.instruction, kept.draft.input)
                origin = self._origin(self.NAME, kept)
                rows.append(machine_record(origin, made_by, user, answer.text.strip(), sample=sample))
                continue
            why = Rejection("low_score" if scores[sample] < self._min_score else "not_best", f"{scores[sample]:g}")
            draft = Draft(kept.draft.instruction, kept.draft.input, answer.text)
            rejected[sample] = RejectedRecord("answer", why, made_by.request_id, sample, draft)
        return Outcome(tuple(rows), tuple(filter(None, rejected)), (made_by, *judged_by))

    async def _score(
        self, draft: Draft, made_by: Production, usable: list[int]
    ) -> tuple[dict[int, float], tuple[Production, ...]]:
        """Score by sample, and the requests that it took. What a judge does not answer for scores 0."""
        texts = {sample: made_by.completion.samples[sample].text.strip() for sample in usable}
        if self._verifier is not None:
            reference = draft.output or ""
            verify = self._verifier
            scores = {s: float(verify(draft.instruction, draft.input, text, reference)) for s, text in texts.items()}
            return scores, ()
        prompt = self._inputs.prompts["judge"]
        answers = await asyncio.gather(
            *(
                self._inputs.requester.ask(
                    "judge",
                    "judge",
                    prompt,
                    prompt.render(instruction=draft.instruction, input=draft.input, output=text),
                    self._judge_sampling,
                )
                for text in texts.values()
            )
        )
        return {s: float(parse_score(answer) or 0) for s, answer in zip(texts, answers, strict=True)}, tuple(answers)


def load_verifier(path: str) -> Verifier:
    """The function that `module:function` names. Raises InputError if there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"synthesize.verifier: cannot load {path}: {error}. Give module:function.") from error
