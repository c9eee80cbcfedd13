"""Filters that compare a text with the earlier ones: exact duplicates, near duplicates, novelty."""

import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

from rensa import RMinHash, RMinHashLSH

from generation.config.filters import ExactDuplicateConfig, NearDuplicateConfig, NoveltyConfig
from generation.filters.drafts import FIELD_END, Decision, Draft, Rejection, joined_fields
from generation.filters.rouge_index import RougeIndex, rouge_tokens, unicode_tokens

PASSED = Decision(None)
BULK_SIZE = 10_000  # texts whose shingles are in memory at once


def normalized(text: str) -> str:
    """The text in NFKC form, case-folded, with single spaces and none at the ends of fields.

    Lone surrogates become question marks. They can result from a model's bytes, and no encoding accepts them.
    """
    text = unicodedata.normalize("NFKC", text).encode("utf-8", "replace").decode("utf-8")
    return FIELD_END.join(" ".join(field.split()) for field in text.casefold().split(FIELD_END))


class ExactDuplicates:
    """Rejects a text that equals an earlier one. Remembers 16 bytes of each text."""

    def __init__(self, config: ExactDuplicateConfig) -> None:
        self.fields = config.fields
        self._ids: dict[bytes, str] = {}

    def decide(self, draft: Draft) -> Decision:
        text = joined_fields(self.fields, draft)
        if text is None or (found := self._ids.get(self._digest(text))) is None:
            return PASSED
        return Decision(Rejection("exact_duplicate", f"same as {found}"))

    def remember_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        for draft_id, text in zip(ids, texts, strict=True):
            self._ids.setdefault(self._digest(text), draft_id)

    @staticmethod
    def _digest(text: str) -> bytes:
        return blake2b(normalized(text).encode(), digest_size=16).digest()


class NearDuplicates:
    """Rejects a text close to an earlier one. MinHash finds candidates (rensa), exact Jaccard similarity decides."""

    def __init__(self, config: NearDuplicateConfig) -> None:
        self.fields = config.fields
        self._config = config
        self._lsh = RMinHashLSH(config.threshold, config.num_perm, num_bands(config))
        self._ids: list[str] = []
        self._texts: list[str] = []  # normalized

    def decide(self, draft: Draft) -> Decision:
        text = joined_fields(self.fields, draft)
        if text is None or not self._ids or not (found := shingles(normalized(text), self._config)):
            return PASSED
        sketch = RMinHash(self._config.num_perm, self._config.seed)
        sketch.update(list(found))
        best, best_place = 0.0, 0
        for place in sorted(self._lsh.query(sketch)):
            similarity = jaccard(found, shingles(self._texts[place], self._config))
            if similarity > best:
                best, best_place = similarity, place
        if best < self._config.threshold:
            return PASSED
        return Decision(Rejection("near_duplicate", f"Jaccard {best:.3f} to {self._ids[best_place]}"))

    def remember_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        config = self._config
        for start in range(0, len(texts), BULK_SIZE):
            some = [normalized(text) for text in texts[start : start + BULK_SIZE]]
            sets = [list(shingles(text, config)) for text in some]
            matrix = RMinHash.digest_matrix_from_token_sets(sets, config.num_perm, config.seed)
            self._lsh.insert_matrix(matrix, start_key=len(self._ids))
            self._texts += some
            self._ids += ids[start : start + BULK_SIZE]


class Novelty:
    """Rejects a text whose ROUGE-L to a remembered one is above `max_score`, as in Self-Instruct (Wang et al., §2.2).

    With the tokenizer "rouge", scores equal those of Google's rouge_score without stemming, bit for bit. It reads only
    a-z and 0-9, so text in other scripts is never similar to anything. The tokenizer "unicode" reads every script.
    """

    def __init__(self, config: NoveltyConfig) -> None:
        self.fields = config.fields
        self._config = config
        self._index = RougeIndex(rouge_tokens if config.tokenizer == "rouge" else unicode_tokens)

    def decide(self, draft: Draft) -> Decision:
        text = joined_fields(self.fields, draft)
        if text is None:
            return PASSED
        config = self._config
        # If no neighbors are stored, finding one that is too close is enough, and a high `min_score` makes that fast.
        min_score = 0.0 if config.num_nearest else config.max_score
        nearest = tuple(self._index.nearest(text, max(1, config.num_nearest), min_score))
        stored = nearest[: config.num_nearest]
        if nearest and nearest[0].score > config.max_score:
            why = Rejection("not_novel", f"ROUGE-L {nearest[0].score:.3f} to {nearest[0].id}")
            return Decision(why, stored)
        return Decision(None, stored)

    def remember_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        self._index.add_many(ids, texts)


def shingles(text: str, config: NearDuplicateConfig) -> set[str]:
    """All runs of `shingle_size` units of a normalized text. A shorter text is one shingle; an empty text has none."""
    if not text:
        return set()
    units = text if config.shingle_unit == "character" else text.split(" ")
    size = min(config.shingle_size, len(units))
    runs = [units[start : start + size] for start in range(len(units) - size + 1)]
    return set(runs) if config.shingle_unit == "character" else {" ".join(run) for run in runs}


def jaccard(first: set[str], second: set[str]) -> float:
    """Size of the intersection over size of the union."""
    num_common = len(first & second)
    return num_common / (len(first) + len(second) - num_common) if num_common else 0.0


def num_bands(config: NearDuplicateConfig) -> int:
    """The fewest bands that find a text exactly at the threshold with probability `min_recall`.

    With b bands of r values each, similarity s is found with probability 1 - (1 - s^r)^b (Leskovec, Rajaraman and
    Ullman, Mining of Massive Datasets, §3.4.2). More bands find more texts, and cost more comparisons.
    """
    for bands in range(1, config.num_perm + 1):
        if config.num_perm % bands == 0:
            recall = 1 - (1 - config.threshold ** (config.num_perm // bands)) ** bands
            if recall >= config.min_recall:
                return bands
    return config.num_perm
