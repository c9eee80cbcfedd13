"""What filters look at, and what they say of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from generation.config.filters import FieldName


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why something was rejected: a reason to count by, and what exactly."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A row in the making. output: None if it is not written yet; finish_reason: of the text that was written last."""

    instruction: str
    input: str = ""
    output: str | None = None
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class Neighbor:
    """An instruction close to another one. score: ROUGE-L F, 0 to 1."""

    id: str
    score: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a filter or a chain says of a draft. nearest: what novelty was judged by, the closest first."""

    rejection: Rejection | None
    nearest: tuple[Neighbor, ...] = ()


FIELD_END = "\0"  # part of no word and no white space, so that ("a b", "c") and ("a", "b c") stay different texts
Check = Callable[[Draft], Rejection | None]
CheckText = Callable[[str], Rejection | None]


def check_fields(fields: tuple[FieldName, ...], check_text: CheckText) -> Check:
    """A check of drafts out of one of texts: field by field, the first rejection decides and names its field.

    An output that is not written yet is passed over.
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
    """The fields as one text, see `joined`; None while one of them is not written yet."""
    return joined([getattr(draft, name) for name in fields])


def joined(texts: Iterable[str | None]) -> str | None:
    """Texts as one, with FIELD_END between them; None if one of them is None."""
    texts = list(texts)
    return None if None in texts else FIELD_END.join(texts)
