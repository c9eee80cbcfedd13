"""Is an instruction new? Exact ROUGE-L against everything kept so far, as in Self-Instruct (Wang et al., 2023, §2.2).

Scores are those of Google's rouge_score without stemming, bit for bit. The tokenizer sees only a-z and 0-9: text in
other scripts has no tokens, so it is never similar to anything.
"""

import re
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

NON_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")
FIRST_CHARACTER = 0xE000  # above the surrogates; tokens are written as characters, which rapidfuzz compares fastest
NUM_PROBED = 64  # texts scored first, to learn which others can still reach the top


@dataclass(frozen=True, slots=True)
class Neighbor:
    """An instruction close to another one. score: ROUGE-L F, 0 to 1."""

    id: str
    score: float


def rouge_tokens(text: str) -> list[str]:
    """The tokens that rouge_score sees: lower case, runs of a-z and 0-9."""
    return NON_ALPHANUMERIC.sub(" ", text.lower()).split()


class NoveltyIndex:
    """Texts by which new ones are judged."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._texts: list[str] = []  # one character a token
        self._lengths = array("i")
        self._characters: dict[str, str] = {}
        self._postings: dict[str, tuple[array, array]] = {}  # character -> texts that have it, and how often

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, text_id: str, text: str) -> None:
        """Judge later texts by this one too."""
        encoded = self._encode(text)
        for character, num in Counter(encoded).items():
            texts, counts = self._postings.setdefault(character, (array("i"), array("i")))
            texts.append(len(self._ids))
            counts.append(num)
        self._ids.append(text_id)
        self._texts.append(encoded)
        self._lengths.append(len(encoded))

    def nearest(self, text: str, max_neighbors: int) -> list[Neighbor]:
        """The closest texts with a score above 0, best first; among equals, the one added first.

        Only texts whose bound can reach the last place are scored: a common subsequence is no longer than the tokens
        that both have, counted with repetition.
        """
        query = self._encode(text)
        if not query or not self._ids:
            return []
        bounds = self._scores(self._num_shared_tokens(query), len(query))  # [num texts]
        num_probed = min(max(NUM_PROBED, max_neighbors), len(bounds))
        probed = self._exact(query, np.argpartition(-bounds, num_probed - 1)[:num_probed])
        last_place = np.sort(probed)[-max_neighbors] if num_probed >= max_neighbors else 0.0
        hopeful = np.flatnonzero((bounds >= last_place) & (bounds > 0))
        scores = self._exact(query, hopeful)
        ranked = np.argsort(-scores, kind="stable")[:max_neighbors]
        return [Neighbor(self._ids[hopeful[i]], float(scores[i])) for i in ranked if scores[i] > 0]

    def _encode(self, text: str) -> str:
        characters = self._characters
        return "".join(
            characters.setdefault(token, chr(FIRST_CHARACTER + len(characters))) for token in rouge_tokens(text)
        )

    def _num_shared_tokens(self, query: str) -> np.ndarray:
        """How many tokens each text has in common with the query."""
        shared = np.zeros(len(self._ids), dtype=np.int64)  # [num texts]
        for character, num in Counter(query).items():
            if character in self._postings:
                texts, counts = self._postings[character]
                shared[np.frombuffer(texts, dtype=np.int32)] += np.minimum(np.frombuffer(counts, dtype=np.int32), num)
        return shared

    def _exact(self, query: str, which: np.ndarray) -> np.ndarray:
        texts = [self._texts[i] for i in which]
        lengths = cdist([query], texts, scorer=LCSseq.similarity, dtype=np.int64)[0]  # [num texts]
        return self._scores(lengths, len(query), which)

    def _scores(self, num_common: np.ndarray, num_query: int, which: np.ndarray | None = None) -> np.ndarray:
        """ROUGE-L F from lengths of common subsequences, in rouge_score's order of operations."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        if which is not None:
            lengths = lengths[which]
        precision = num_common / num_query
        recall = num_common / np.maximum(lengths, 1)
        total = precision + recall
        return np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1), 0.0)
