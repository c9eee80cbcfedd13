"""The filters of a recipe, in their order."""

from collections.abc import Callable, Sequence
from typing import Protocol

from pydantic import BaseModel

from generation.config.filters import (
    BeginsWithConfig,
    BlacklistConfig,
    EmptyConfig,
    ExactDuplicateConfig,
    FieldName,
    FilterConfig,
    FirstCharacterConfig,
    FormatLeakageConfig,
    LanguageConfig,
    LengthConfig,
    NearDuplicateConfig,
    NoveltyConfig,
    OnlyStopwordsConfig,
    RefusalConfig,
    RepetitionConfig,
    SameAsInputConfig,
    TruncationConfig,
)
from generation.filters import heuristics, quality
from generation.filters.drafts import Check, Decision, Draft, joined
from generation.filters.duplicates import ExactDuplicates, NearDuplicates
from generation.filters.novelty import Novelty

CHECKS: dict[type[BaseModel], Callable[..., Check]] = {
    EmptyConfig: heuristics.empty,
    LengthConfig: heuristics.length,
    BlacklistConfig: heuristics.blacklist,
    BeginsWithConfig: heuristics.begins_with,
    FirstCharacterConfig: heuristics.first_character,
    TruncationConfig: heuristics.truncation,
    SameAsInputConfig: heuristics.same_as_input,
    FormatLeakageConfig: quality.format_leakage,
    RefusalConfig: quality.refusal,
    OnlyStopwordsConfig: quality.only_stopwords,
    RepetitionConfig: quality.repetition,
    LanguageConfig: quality.language,
}


class StatefulFilter(Protocol):
    """A filter that compares a draft with earlier drafts."""

    fields: tuple[FieldName, ...]

    def decide(self, draft: Draft) -> Decision: ...
    def remember_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None: ...


STATEFUL_FILTERS: dict[type[BaseModel], Callable[..., StatefulFilter]] = {
    NoveltyConfig: Novelty,
    ExactDuplicateConfig: ExactDuplicates,
    NearDuplicateConfig: NearDuplicates,
}


class FilterChain:
    """Applies the filters in order. The same drafts remembered in the same order give the same decisions."""

    def __init__(self, configs: Sequence[FilterConfig]) -> None:
        """Raises InputError if a filter's configuration is wrong."""
        self._stateful: list[StatefulFilter] = []
        self._filters: list[Callable[[Draft], Decision]] = []
        for config in configs:
            if type(config) in STATEFUL_FILTERS:
                stateful = STATEFUL_FILTERS[type(config)](config)
                self._stateful.append(stateful)
                self._filters.append(stateful.decide)
            else:
                self._filters.append(_decision_of(CHECKS[type(config)](config)))

    def decide(self, draft: Draft) -> Decision:
        """The decision of the first filter that rejects. `nearest` is that of the last novelty filter applied.

        Remembers nothing.
        """
        nearest = ()
        for decide in self._filters:
            decision = decide(draft)
            nearest = decision.nearest or nearest
            if decision.rejection:
                return Decision(decision.rejection, nearest)
        return Decision(None, nearest)

    def remember(self, draft_id: str, draft: Draft) -> None:
        """Compare later drafts with this one too."""
        outputs = None if draft.output is None else [draft.output]
        self.remember_many([draft_id], [draft.instruction], [draft.input], outputs)

    def remember_many(
        self,
        ids: Sequence[str],
        instructions: Sequence[str],
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> None:
        """Remember columns of drafts, much faster than one by one. `inputs`: None means that all are empty.

        `outputs`: None means that filters on the output remember nothing. Raises ValueError for columns of
        different lengths.
        """
        columns = {
            "instruction": instructions,
            "input": [""] * len(instructions) if inputs is None else inputs,
            "output": outputs,
        }
        if any(column is not None and len(column) != len(ids) for column in columns.values()):
            raise ValueError(f"columns of drafts differ in length: there are {len(ids)} ids")
        for stateful in self._stateful:
            wanted = [columns[name] for name in stateful.fields]
            if None in wanted:
                continue
            texts = wanted[0] if len(wanted) == 1 else [joined(row) for row in zip(*wanted, strict=True)]
            stateful.remember_texts(ids, texts)


def _decision_of(check: Check) -> Callable[[Draft], Decision]:
    return lambda draft: Decision(check(draft))
