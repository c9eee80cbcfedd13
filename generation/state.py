"""What the driver counts and measures: the state of its loop, the committed data, and the time it spends itself."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from generation.records import GenerationResult


@dataclass(slots=True)
class Counts:
    """What went into the committed data: drafts that were filtered, and requests with their tokens."""

    num_generated: int = 0  # drafts
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def add(self, responses: Sequence[GenerationResult]) -> None:
        self.num_requests += len(responses)
        self.num_prompt_tokens += sum(each.completion.num_prompt_tokens for each in responses)
        self.num_completion_tokens += sum(each.completion.num_completion_tokens for each in responses)


@dataclass(frozen=True, slots=True)
class LoopState:
    """The loop after some number of proposals: what passed the instruction filters."""

    num_proposals: int = 0
    num_accepted: int = 0  # instructions
    num_empty: int = 0  # latest proposals in a row of which nothing was accepted
    num_accepted_after: list[int] = field(default_factory=list)  # each of the last `max_concurrent_proposals` proposals


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment. All numbers but `num_accepted` are of committed data, seed rows and earlier attempts too."""

    seconds: float  # since this attempt began to generate
    num_accepted: int  # instructions, ahead of those that are committed
    num_proposals: int
    num_instructions: int
    num_rows: int
    num_completion_tokens: int
    rejected: Mapping[str, int]  # by reason


def to_json(state: LoopState, committed: Counts) -> dict:
    """The state of a checkpoint: everything up to `state` is in the files, and `committed` counts what went in."""
    return {"state": asdict(state), "committed": asdict(committed)}


def from_json(checkpoint: dict) -> tuple[LoopState, Counts]:
    return LoopState(**checkpoint["state"]), Counts(**checkpoint["committed"])


class Timers:
    """Seconds that the driver's process spent, by activity: parse, filter, write, log. Activities may not nest."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the duration of the block to `activity`. The block must not wait for anything."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - start
