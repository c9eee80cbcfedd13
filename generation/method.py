"""The interface between the driver and a synthesis method.

    propose(number)   -> drafts of instructions, and what could not be parsed
    finish(accepted)  -> rows of an instruction that passed the filters

A method sends requests to models and parses their answers. The driver does the rest: order, filters, budgets, files.
"""

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from cluster.engines.config import Sample, Sampling
from generation.accepted import Demonstration
from generation.config.common import Role, SynthesisConfig
from generation.filters.drafts import Draft, Neighbor, Rejection
from generation.parsing.chat import TRUNCATED, Dropped
from generation.records import (
    GenerationResult,
    Origin,
    Record,
    RejectedRecord,
    machine_record,
    user_turn,
    why_unanswered,
)
from generation.requester import Requester
from generation.seed_tasks import SeedTask
from generation.state import Timers
from generation.templates import Prompt


@dataclass(frozen=True, slots=True)
class Proposal:
    """The items of one proposal, in order. An accepted item's id is `id_prefix` and its position."""

    id_prefix: str
    items: tuple[Draft | RejectedRecord, ...]
    response: GenerationResult | None = None  # None means that the instructions are given, not generated
    parent_ids: tuple[str, ...] = ()
    seed_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AcceptedInstruction:
    """An instruction that passed the filters, and the proposal that it came from."""

    id: str
    draft: Draft
    position: int  # among the items of its proposal
    proposal: Proposal
    nearest: tuple[Neighbor, ...] = ()


@dataclass(frozen=True, slots=True)
class InstructionResult:
    """What came of an accepted instruction."""

    rows: tuple[Record, ...] = ()
    rejected: tuple[RejectedRecord, ...] = ()
    responses: tuple[GenerationResult, ...] = ()  # without the proposal's response
    is_classification: bool | None = None  # None means that the model was not asked


@dataclass(frozen=True, slots=True)
class MethodInputs:
    """What every method gets."""

    seeds: Sequence[SeedTask]
    prompts: Mapping[str, Prompt]
    requester: Requester
    timers: Timers
    seed: int

    def draw(self, *what: object) -> Random:
        """Random numbers that depend only on the run's seed and on `what` they are for."""
        return Random(":".join(map(str, (self.seed, *what))))


class Method:
    """A synthesis method. Without a `remembered` and `seed_rows` of its own it starts from nothing."""

    NAME: ClassVar[str]
    PROMPTS: ClassVar[Mapping[str, tuple[str, ...]]]  # template -> its variables
    FORMS: ClassVar[Mapping[Role, str]]  # its roles -> the form of requests if the recipe names none

    num_wanted: int | None  # instructions to accept; None means as many as there are
    max_proposals: int | None  # None means no limit
    exhausted: str  # why the run ends after `max_proposals`; empty means that everything is done

    def __init__(self, config: SynthesisConfig, inputs: MethodInputs) -> None:
        self._config = config
        self._inputs = inputs

    @classmethod
    def forms(cls, config: SynthesisConfig) -> Mapping[Role, str]:
        """Those of FORMS whose roles are asked with these settings."""
        return cls.FORMS

    def check_seeds(self) -> None:
        """Raise InputError, or log a warning, if the seeds do not fit the settings. Called before an engine starts."""

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        """Ids and drafts that the filters remember before the first proposal."""
        return ()

    def seed_rows(self) -> Sequence[Record]:
        """Rows that come first in the dataset, before anything is generated."""
        return ()

    def propose(self, number: int, visible: Sequence[Demonstration]) -> Coroutine[None, None, Proposal]:
        """Start proposal `number`. Read `visible` before the first await: it changes afterwards."""
        raise NotImplementedError

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """Make the rows of an accepted instruction."""
        raise NotImplementedError

    def _origin(self, accepted: AcceptedInstruction, round_number: int = 0, parent_ids: tuple[str, ...] = ()) -> Origin:
        proposal = accepted.proposal
        parents = parent_ids or proposal.parent_ids
        return Origin(self.NAME, accepted.id, round_number, parents, proposal.seed_ids, self._config.license)

    async def _ask_for_answer(
        self, draft: Draft, sampling: Sampling, system: str | None = None, replica: int = 0
    ) -> GenerationResult:
        """Request an answer from the answerer with the template `answer`."""
        prompt = self._inputs.prompts["answer"]
        text = prompt.render(instruction=draft.instruction, input=draft.input)
        return await self._inputs.requester.ask("answerer", "answer", prompt, text, sampling, replica, system)

    async def _answer(
        self, accepted: AcceptedInstruction, sampling: Sampling, system: str | None = None, replica: int = 0
    ) -> InstructionResult:
        """A row of the instruction and each of its `sampling.n` answers, or the rejected answer."""
        response = await self._ask_for_answer(accepted.draft, sampling, system, replica)
        rows, rejected, seen = [], [], set()
        for sample, written in enumerate(response.completion.samples):
            text = written.text.strip()
            why = check_answer(accepted.draft, response, sample)
            if why is None and text in seen:
                why = reject_answer(accepted.draft, response, sample, Rejection("duplicate_answer"))
            if why is None:
                seen.add(text)
                rows.append(self._answer_row(accepted, response, sample))
            else:
                rejected.append(why)
        return InstructionResult(tuple(rows), tuple(rejected), (response,))

    def _answer_row(self, accepted: AcceptedInstruction, response: GenerationResult, sample: int) -> Record:
        """The row of the instruction and one sample of its answer."""
        draft, text = accepted.draft, response.completion.samples[sample].text.strip()
        user = user_turn(draft.instruction, draft.input)
        return machine_record(self._origin(accepted), response, user, text, sample=sample, input_text=draft.input)


def rejection_of_cut(sample: Sample) -> Rejection | None:
    """Why a text that ends before its end is rejected; None if it does not."""
    if not sample.was_cut:
        return None
    is_stopped = sample.finish_reason != "length"
    return Rejection(TRUNCATED, f"at the stop string {sample.stop_reason!r}" if is_stopped else "")


def rejection_of_piece(piece: Dropped, response: GenerationResult) -> Rejection:
    """Why a piece of a response does not become data."""
    cut = rejection_of_cut(response.completion.samples[0])
    return cut if cut and piece.reason == TRUNCATED else Rejection(piece.reason)


def check_answer(draft: Draft, response: GenerationResult, sample: int = 0) -> RejectedRecord | None:
    """The rejected answer if it is missing, empty or cut; None if it can be a row."""
    written = response.completion.samples[sample]
    if why := why_unanswered(response, sample):
        return reject_answer(draft, response, sample, why)
    if not written.text.strip():
        return reject_answer(draft, response, sample, Rejection("empty_output"))
    why = rejection_of_cut(written)
    return reject_answer(draft, response, sample, why) if why else None


def reject_answer(draft: Draft, response: GenerationResult, sample: int, why: Rejection) -> RejectedRecord:
    """A sample of the answers to `draft` as a rejected row, with its reasoning if there is nothing else."""
    written = response.completion.samples[sample]
    answered = replace(draft, output=written.text or written.reasoning_content, finish_reason=written.finish_reason)
    return RejectedRecord("answer", why, response.request_id, sample, answered)
