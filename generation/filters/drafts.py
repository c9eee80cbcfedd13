"""What filters read and what they return."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from generation.config.filters import FieldName


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why something was rejected. `reason` is a name to count by; `detail` gives the particulars.

    `filter`: type of the filter that rejected it; empty if a rule of the method did.
    """

    reason: str
    detail: str = ""
    filter: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Draft:
    """A row that is not complete yet.

    `output`: None means that it is not written yet. `finish_reason`: that of the text written last.
    """

    instruction: str
    input: str = ""
    output: str | None = None
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class Instance:
    """One input (may be empty) and the output it asks for."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Neighbor:
    """An earlier instruction and its ROUGE-L F to the new one, 0 to 1."""

    id: str
    score: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a filter or a chain decides about a draft. `nearest`: its neighbors in the novelty filter, closest first."""

    rejection: Rejection | None
    nearest: tuple[Neighbor, ...] = ()


FIELD_END = "\0"  # neither a word character nor white space, so ("a b", "c") and ("a", "b c") stay different texts


def joined_fields(fields: tuple[FieldName, ...], draft: Draft) -> str | None:
    """The fields as one text, see `joined`. None means that one of them is not written yet."""
    return joined([getattr(draft, name) for name in fields])


def joined(texts: Iterable[str | None]) -> str | None:
    """Texts as one, with FIELD_END between them. None if one of them is None."""
    texts = list(texts)
    return None if None in texts else FIELD_END.join(texts)
