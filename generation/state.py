"""Where the loop of synthesis stands, as counts that a checkpoint carries."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from generation.records import Production


@dataclass(slots=True)
class Tally:
    """Requests that went into something, and their tokens."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def count(self, made_by: Sequence[Production]) -> None:
        self.num_requests += len(made_by)
        self.num_prompt_tokens += sum(each.completion.num_prompt_tokens for each in made_by)
        self.num_completion_tokens += sum(each.completion.num_completion_tokens for each in made_by)

    def plus(self, other: "Tally") -> "Tally":
        return Tally(
            self.num_requests + other.num_requests,
            self.num_prompt_tokens + other.num_prompt_tokens,
            self.num_completion_tokens + other.num_completion_tokens,
        )


@dataclass(slots=True)
class Admission:
    """After some number of proposals: what has been judged."""

    num_admitted: int = 0  # proposals
    num_generated: int = 0  # drafts
    num_kept: int = 0
    num_fruitless: int = 0  # proposals in a row that kept nothing
    tally: Tally = field(default_factory=Tally)  # of the proposals
    kept_after: list[int] = field(default_factory=list)  # num_kept after each of the last `lookahead` proposals

    def copy(self) -> "Admission":
        return Admission(
            self.num_admitted, self.num_generated, self.num_kept, self.num_fruitless,
            Tally(**asdict(self.tally)), self.kept_after,
        )  # fmt: skip


def to_json(admission: Admission, finished: Tally) -> dict:
    """The state of a checkpoint: all proposals up to `admission` are in the files, and `finished` wrote their rows."""
    return {"admission": asdict(admission), "finished": asdict(finished)}


def from_json(state: dict) -> tuple[Admission, Tally]:
    admission = state["admission"]
    return Admission(**{**admission, "tally": Tally(**admission["tally"])}), Tally(**state["finished"])
