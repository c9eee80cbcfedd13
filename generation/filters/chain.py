"""Filters in the order of a recipe, and what they remember."""

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


class Memory(Protocol):
    """A filter that judges by what came before."""

    fields: tuple[FieldName, ...]

    def decide(self, draft: Draft) -> Decision: ...
    def remember_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None: ...


MEMORIES: dict[type[BaseModel], Callable[..., Memory]] = {
    NoveltyConfig: Novelty,
    ExactDuplicateConfig: ExactDuplicates,
    NearDuplicateConfig: NearDuplicates,
}


class FilterChain:
    """Asks filter after filter. The same drafts remembered in the same order give the same decisions."""

    def __init__(self, configs: Sequence[FilterConfig]) -> None:
        """Raises InputError if a filter cannot work as configured."""
        self._memories: list[Memory] = []
        self._filters: list[Callable[[Draft], Decision]] = []
        for config in configs:
            if type(config) in MEMORIES:
                memory = MEMORIES[type(config)](config)
                self._memories.append(memory)
                self._filters.append(memory.decide)
            else:
                self._filters.append(_decision_of(CHECKS[type(config)](config)))

    def decide(self, draft: Draft) -> Decision:
        """The first rejection, or none. Remembers nothing.

        nearest: what the last filter of novelty that was asked found.
        """
        nearest = ()
        for decide in self._filters:
            decision = decide(draft)
            nearest = decision.nearest or nearest
            if decision.rejection:
                return Decision(decision.rejection, nearest)
        return Decision(None, nearest)

    def remember(self, draft_id: str, draft: Draft) -> None:
        """Judge later drafts by this one too."""
        outputs = None if draft.output is None else [draft.output]
        self.remember_many([draft_id], [draft.instruction], [draft.input], outputs)

    def remember_many(
        self,
        ids: Sequence[str],
        instructions: Sequence[str],
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> None:
        """The same for columns of drafts, much faster than one by one. Without inputs all are empty.

        Without outputs, filters that read the output remember nothing. Raises ValueError if a column is longer than
        another.
        """
        columns = {
            "instruction": instructions,
            "input": [""] * len(instructions) if inputs is None else inputs,
            "output": outputs,
        }
        if any(column is not None and len(column) != len(ids) for column in columns.values()):
            raise ValueError(f"columns of drafts differ in length: there are {len(ids)} ids")
        for memory in self._memories:
            wanted = [columns[name] for name in memory.fields]
            if None in wanted:
                continue
            texts = wanted[0] if len(wanted) == 1 else [joined(row) for row in zip(*wanted, strict=True)]
            memory.remember_texts(ids, texts)


def _decision_of(check: Check) -> Callable[[Draft], Decision]:
    return lambda draft: Decision(check(draft))
