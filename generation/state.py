"""Where the loop of synthesis stands, as counts that a checkpoint carries."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from generation.records import Production


@dataclass(slots=True)
class Tally:
    """What went into the committed data: drafts that were judged, and requests with their tokens."""

    num_generated: int = 0  # drafts
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def count(self, made_by: Sequence[Production]) -> None:
        self.num_requests += len(made_by)
        self.num_prompt_tokens += sum(each.completion.num_prompt_tokens for each in made_by)
        self.num_completion_tokens += sum(each.completion.num_completion_tokens for each in made_by)


@dataclass(slots=True)
class Admission:
    """After some number of proposals: what has been judged."""

    num_admitted: int = 0  # proposals
    num_kept: int = 0
    num_fruitless: int = 0  # proposals in a row that kept nothing
    kept_after: list[int] = field(default_factory=list)  # num_kept after each of the last `lookahead` proposals

    def copy(self) -> "Admission":
        return replace(self)


def to_json(admission: Admission, committed: Tally) -> dict:
    """The state of a checkpoint: all proposals up to `admission` are in the files, and `committed` went into them."""
    return {"admission": asdict(admission), "committed": asdict(committed)}


def from_json(state: dict) -> tuple[Admission, Tally]:
    return Admission(**state["admission"]), Tally(**state["committed"])
