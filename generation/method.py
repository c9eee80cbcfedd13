"""What the driver and a synthesis method say to each other.

    propose(number)  -> items: drafts of instructions, and what could not even be parsed
    finish(kept)     -> rows made of an instruction that passed the filters

A method only asks models and takes their texts apart. Order, filters, budgets and files are the driver's.
"""

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Protocol

from generation.accepted import Demonstration
from generation.config import Role
from generation.filters import Draft, Neighbor
from generation.records import GenerationResult, Record, RejectedRecord
from generation.requester import Requester
from generation.seed_tasks import SeedTask
from generation.state import Timers
from generation.templates import Prompt


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one proposal brought, in order. `id_prefix` and an item's position make the id of what is kept of it."""

    id_prefix: str
    items: tuple[Draft | RejectedRecord, ...]
    response: GenerationResult | None = None  # none: the instructions are given
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
    """What became of a kept instruction."""

    rows: tuple[Record, ...] = ()
    rejected: tuple[RejectedRecord, ...] = ()
    responses: tuple[GenerationResult, ...] = ()  # requests beside the proposal's own
    is_classification: bool | None = None  # none: not asked


@dataclass(frozen=True, slots=True)
class MethodInputs:
    """What every method is made from."""

    seeds: Sequence[SeedTask]
    prompts: Mapping[str, Prompt]
    requester: Requester
    timers: Timers
    seed: int

    def draw(self, *what: object) -> Random:
        """Random numbers that depend on the run's seed and on `what` they are for, and on nothing else."""
        return Random(":".join(map(str, (self.seed, *what))))


class Method(Protocol):
    """A synthesis method. Made as `Method(config, inputs)`."""

    NAME: ClassVar[str]
    PROMPTS: ClassVar[Mapping[str, tuple[str, ...]]]  # template -> the variables it gets
    FORMS: ClassVar[Mapping[Role, str]]  # the roles it has, and how each is asked if the recipe does not say

    num_wanted: int | None  # instructions to keep; none: as many as there are
    max_proposals: int | None  # none: no limit
    exhausted: str  # why it ends after `max_proposals`; empty: because everything is done

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        """Ids and drafts that the filters know before anything is proposed."""

    def seed_rows(self) -> Sequence[Record]:
        """Rows that are in the dataset before anything is generated."""

    def propose(self, number: int, visible: Sequence[Demonstration]) -> Coroutine[None, None, Proposal]:
        """Begin proposal `number`. It may draw on what is `visible`, now: later it would be something else."""

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """Make the rows of a kept instruction."""
