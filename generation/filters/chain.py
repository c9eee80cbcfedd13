"""The filters of a recipe, in their order."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from generation.config.filters import FilterConfig
from generation.filters import rules
from generation.filters.drafts import Decision, Draft, joined
from generation.filters.duplicates import ExactDuplicates, NearDuplicates, Novelty

# By the `type` of a filter in a recipe.
CHECKS = {
    "empty": rules.empty,
    "length": rules.length,
    "blacklist": rules.blacklist,
    "begins_with": rules.begins_with,
    "first_character": rules.first_character,
    "truncation": rules.truncation,
    "same_as_input": rules.same_as_input,
    "format_leakage": rules.format_leakage,
    "reasoning": rules.reasoning,
    "refusal": rules.refusal,
    "repeats_instruction": rules.repeats_instruction,
    "only_stopwords": rules.only_stopwords,
    "repetition": rules.repetition,
    "language": rules.language,
}
# These compare a draft with earlier drafts.
STATEFUL_FILTERS = {"novelty": Novelty, "exact_duplicate": ExactDuplicates, "near_duplicate": NearDuplicates}


class FilterChain:
    """Applies the filters in order. The same drafts remembered in the same order give the same decisions."""

    def __init__(self, configs: Sequence[FilterConfig]) -> None:
        """Raises InputError if a filter's configuration is wrong."""
        self._stateful: list[Novelty | ExactDuplicates | NearDuplicates] = []
        self._filters: list[tuple[str, Callable[[Draft], Decision]]] = []  # each with its type
        for config in configs:
            if config.type in STATEFUL_FILTERS:
                stateful = STATEFUL_FILTERS[config.type](config)
                self._stateful.append(stateful)
                self._filters.append((config.type, stateful.decide))
            else:
                self._filters.append((config.type, _decision_of(CHECKS[config.type](config))))

    def decide(self, draft: Draft) -> Decision:
        """The decision of the first filter that rejects. `nearest` is that of the last novelty filter applied.

        Remembers nothing.
        """
        nearest = ()
        for name, decide in self._filters:
            decision = decide(draft)
            nearest = decision.nearest or nearest
            if decision.rejection:
                return Decision(replace(decision.rejection, filter=name), nearest)
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


def _decision_of(check: rules.Check) -> Callable[[Draft], Decision]:
    return lambda draft: Decision(check(draft))
