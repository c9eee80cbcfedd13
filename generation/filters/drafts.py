"""What filters read and what they return."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from generation.config.filters import FieldName


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why something was rejected. `reason` is a name to count by; `detail` gives the particulars."""

    reason: str
    detail: str = ""


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
Check = Callable[[Draft], Rejection | None]
CheckText = Callable[[str], Rejection | None]


def check_fields(fields: tuple[FieldName, ...], check_text: CheckText) -> Check:
    """Make a check of drafts from a check of texts. The first rejected field decides; the detail names the field.

    An output that is not written yet is skipped.
    """

    def check(draft: Draft) -> Rejection | None:
        for name in fields:
            text: str | None = getattr(draft, name)
            if text is None or (rejection := check_text(text)) is None:
                continue
            if name == "instruction":
                return rejection
            return Rejection(rejection.reason, f"{name}: {rejection.detail}" if rejection.detail else name)
        return None

    return check


def joined_fields(fields: tuple[FieldName, ...], draft: Draft) -> str | None:
    """The fields as one text, see `joined`. None means that one of them is not written yet."""
    return joined([getattr(draft, name) for name in fields])


def joined(texts: Iterable[str | None]) -> str | None:
    """Texts as one, with FIELD_END between them. None if one of them is None."""
    texts = list(texts)
    return None if None in texts else FIELD_END.join(texts)
