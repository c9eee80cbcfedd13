"""The interface between the driver and a synthesis method.

    propose(number)   -> drafts of instructions, and what could not be parsed
    finish(accepted)  -> rows of an instruction that passed the filters

A method sends requests to models and parses their answers. The driver does the rest: order, filters, budgets, files.
"""

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Protocol

from generation.accepted import Demonstration
from generation.config.common import Role
from generation.filters import Draft, Neighbor
from generation.records import GenerationResult, Record, RejectedRecord
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


class Method(Protocol):
    """A synthesis method, constructed as `Method(config, inputs)`."""

    NAME: ClassVar[str]
    PROMPTS: ClassVar[Mapping[str, tuple[str, ...]]]  # template -> its variables
    FORMS: ClassVar[Mapping[Role, str]]  # its roles -> the form of requests if the recipe names none

    num_wanted: int | None  # instructions to accept; None means as many as there are
    max_proposals: int | None  # None means no limit
    exhausted: str  # why the run ends after `max_proposals`; empty means that everything is done

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        """Ids and drafts that the filters remember before the first proposal."""

    def seed_rows(self) -> Sequence[Record]:
        """Rows that come first in the dataset, before anything is generated."""

    def propose(self, number: int, visible: Sequence[Demonstration]) -> Coroutine[None, None, Proposal]:
        """Start proposal `number`. Read `visible` before the first await: it changes afterwards."""

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """Make the rows of an accepted instruction."""
