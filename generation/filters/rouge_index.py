"""Exact nearest neighbors by ROUGE-L F among up to millions of texts, and the tokenizers for it."""

import string
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import regex
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

from generation.filters.drafts import Neighbor
from generation.filters.words import UNSPACED, UNSPACED_CHARACTER

BULK_SIZE = 50_000  # texts added at one time
NUM_PROBED = 64  # texts scored first, to learn which score the others have to reach
LEVEL_STEP = 0.85  # factor by which the first level is lowered until NUM_PROBED bounds are above it
# Bounds are single precision and scores double. SLACK is far more than the difference that makes, and far less than the
# distance of two scores.
SLACK = 1e-5
LOWEST = 1e-9  # less than the bound of any text that shares a token
FREQUENT = 1 / 32  # a feature in a larger share of the texts is a column of bytes, which is then faster to add
MIN_TEXTS_FOR_COLUMNS = 2048

ALPHANUMERIC = (string.ascii_lowercase + string.digits).encode()
ROUGE_BYTES = bytes(byte if byte in ALPHANUMERIC else ord(" ") for byte in range(256))

# In scripts without spaces a character with its marks is a token, in all others a run of letters, digits and marks.
UNICODE_WORD = regex.compile(rf"{UNSPACED_CHARACTER.pattern}|[\w--[[{UNSPACED}]&&\p{{L}}]]+")

Feature = tuple[int, int]  # (token, k): the occurrence number k of the token in a text, from 0


def rouge_tokens(text: str) -> list[str]:
    """The tokens of rouge_score: lower-cased runs of a-z and 0-9. Text in other scripts has none."""
    return text.lower().encode("ascii", "replace").translate(ROUGE_BYTES).decode("ascii").split()


def unicode_tokens(text: str) -> list[str]:
    """Words of every script, in NFKC form and case-folded."""
    return UNICODE_WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class RougeIndex:
    """Finds the texts with the highest ROUGE-L F to a query.

    A common subsequence is no longer than the number of tokens that both texts share, counted with repetition. That
    number gives an upper bound of each text's score. A query computes all bounds in a few vector operations. Then
    rapidfuzz scores only texts whose bound can still reach the result.

    The k-th occurrence of a token in a text is a feature of its own, so the number of shared tokens is a sum over
    features. A frequent feature has a column of bytes, any other a list of texts.
    """

    def __init__(self, tokenize: Callable[[str], list[str]] = rouge_tokens) -> None:
        self._tokenize = tokenize
        self._vocabulary: dict[str, int] = defaultdict()
        self._vocabulary.default_factory = self._vocabulary.__len__  # a new token gets the next number
        self._ids: list[str] = []
        self._tokens = array("i")  # of all texts, one after the other
        self._starts = array("q")  # place of each text's first token
        self._lengths = array("i")
        self._max_length = 0
        self._postings: dict[Feature, array] = defaultdict(partial(array, "i"))
        self._row_of: dict[Feature, int] = {}
        self._columns = np.zeros((0, 0), dtype=np.uint8)  # [num frequent features, capacity], 1 where a text has it
        self._num_texts_surveyed = 0  # number of texts when frequent features were last chosen

    def __len__(self) -> int:
        return len(self._ids)

    def add_many(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """Add many texts, faster than one by one."""
        for start in range(0, len(texts), BULK_SIZE):
            self._add_some(ids[start : start + BULK_SIZE], texts[start : start + BULK_SIZE])

    def nearest(self, text: str, max_neighbors: int, min_score: float = 0.0) -> list[Neighbor]:
        """The closest texts with a score above 0 and of at least `min_score`, best first.

        Of equal scores, the text added first comes first. A higher `min_score` makes the search faster.
        """
        query = [self._vocabulary.get(token, -1) for token in self._tokenize(text)]  # -1: in none of the texts
        if not self._ids or all(token == -1 for token in query):
            return []
        best = TopTexts(max_neighbors, min_score)
        self._search(query, best)
        ranked = zip(best.places.tolist(), best.scores.tolist(), strict=True)
        return [Neighbor(self._ids[place], score) for place, score in ranked]

    def _search(self, query: list[int], best: "TopTexts") -> None:
        """Score the texts whose bound can reach the result, those with the highest bounds first."""
        bounds = self._upper_bounds(query)
        level, above = self._first_level(bounds, len(query), best), np.inf
        while True:
            places = np.flatnonzero((bounds >= level) & (bounds < above))
            for some in _by_falling_bound(places, bounds, best):
                best.add(some, self._exact(query, some))
            if level <= best.threshold():
                break
            level, above = best.threshold(), level

    # -- adding

    def _add_some(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        number_of = self._vocabulary.__getitem__
        first_text, first_token = len(self._ids), len(self._tokens)
        for text in texts:
            before = len(self._tokens)
            self._tokens.extend(map(number_of, self._tokenize(text)))
            self._starts.append(before)
            self._lengths.append(len(self._tokens) - before)
        self._ids += ids
        self._max_length = max(self._max_length, *self._lengths[first_text:])
        if (num_missing := len(self._ids) - self._columns.shape[1]) > 0:
            self._columns = np.pad(self._columns, ((0, 0), (0, max(1024, self._columns.shape[1], num_missing))))
        places = np.arange(first_text, len(self._ids), dtype=np.int32)
        for feature, which in _features(
            np.array(self._tokens[first_token:]), np.repeat(places, self._lengths[first_text:])
        ):
            if (row := self._row_of.get(feature)) is not None:
                self._columns[row, which] = 1
            else:
                self._postings[feature].frombytes(which.tobytes())
        if len(self._ids) >= max(MIN_TEXTS_FOR_COLUMNS, 2 * self._num_texts_surveyed):
            self._move_frequent_to_columns()

    def _move_frequent_to_columns(self) -> None:
        self._num_texts_surveyed = len(self._ids)
        frequent = [f for f, texts in self._postings.items() if len(texts) >= FREQUENT * len(self._ids)]
        added = np.zeros((len(frequent), self._columns.shape[1]), dtype=np.uint8)
        for row, feature in enumerate(frequent):
            added[row, np.frombuffer(self._postings.pop(feature), dtype=np.int32)] = 1
            self._row_of[feature] = len(self._columns) + row
        self._columns = np.concatenate([self._columns, added])

    # -- searching

    def _upper_bounds(self, query: list[int]) -> np.ndarray:
        """ROUGE-L F of each text if all the tokens that it shares with the query were in the same order. [num texts]"""
        num_texts = len(self._ids)
        shared = np.zeros(num_texts, dtype=np.uint8 if len(query) < 256 else np.uint32)
        for feature in _features_of(query):
            if (row := self._row_of.get(feature)) is not None:
                np.add(shared, self._columns[row, :num_texts], out=shared)
            elif feature in self._postings:
                places = np.frombuffer(self._postings[feature], dtype=np.int32)
                shared[places.astype(np.int64)] += 1  # numpy takes far longer with indices of another width
        mean_lengths = (np.array(self._lengths) + len(query)) / np.float32(2)
        return np.divide(shared, mean_lengths, dtype=np.float32)

    def _first_level(self, bounds: np.ndarray, num_query: int, best: "TopTexts") -> float:
        """A level that about NUM_PROBED bounds reach: their scores say which score a text needs to be in the result."""
        num_wanted = max(NUM_PROBED, best.max_places)
        lowest = max(best.threshold(), 1 / (num_query + self._max_length))
        level = LEVEL_STEP * float(bounds.max())
        while level > lowest and np.count_nonzero(bounds >= level) < num_wanted:
            level *= LEVEL_STEP
        return max(level, lowest)

    def _exact(self, query: list[int], places: np.ndarray) -> np.ndarray:
        """ROUGE-L F of these texts, in rouge_score's order of operations. [num places]"""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)[places]
        num_common = self._num_in_order(query, places, lengths)
        precision = num_common / len(query)
        recall = num_common / np.maximum(lengths, 1)
        total = precision + recall
        return np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1), 0.0)

    def _num_in_order(self, query: list[int], places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Length of the longest common subsequence with each of these texts.

        rapidfuzz compares strings of characters. Each token of the query becomes a character. All other tokens are left
        out, because they are never part of a common subsequence.
        """
        known = list(dict.fromkeys(token for token in query if token != -1))
        dtype, encoding = (np.uint8, "latin-1") if len(known) < 256 else (np.dtype("<u4"), "utf-32-le")
        codes = np.zeros(len(self._vocabulary), dtype=np.uint32)
        codes[known] = np.arange(1, len(known) + 1)
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        starts = np.frombuffer(self._starts, dtype=np.int64)[places]
        tokens = np.frombuffer(self._tokens, dtype=np.int32)[np.repeat(starts, lengths) + within]
        coded = codes[tokens]
        codes_of_query = codes[[token for token in query if token != -1]]
        is_shared = coded != 0
        num_shared = np.concatenate([[0], np.cumsum(is_shared)])
        text_ends = num_shared[ends].tolist()
        text_starts = num_shared[ends - lengths].tolist()
        characters = coded[is_shared].astype(dtype).tobytes().decode(encoding, "surrogatepass")
        texts = [characters[start:end] for start, end in zip(text_starts, text_ends, strict=True)]
        query_text = codes_of_query.astype(dtype).tobytes().decode(encoding, "surrogatepass")
        return cdist([query_text], texts, scorer=LCSseq.similarity, dtype=np.int64)[0]


class TopTexts:
    """The highest scores so far, in order, and the places of their texts."""

    def __init__(self, max_places: int, min_score: float) -> None:
        self.max_places = max_places
        self.places = np.zeros(0, dtype=np.int64)
        self.scores = np.zeros(0)
        self._min_score = min_score

    def add(self, places: np.ndarray, scores: np.ndarray) -> None:
        good = (scores > 0) & (scores >= max(self._min_score, self.threshold()))
        places = np.concatenate([self.places, places[good]])
        scores = np.concatenate([self.scores, scores[good]])
        order = np.lexsort((places, -scores))[: self.max_places]
        self.places, self.scores = places[order], scores[order]

    def threshold(self) -> float:
        """A text whose bound is below this cannot be in the result."""
        last = float(self.scores[-1]) if len(self.scores) == self.max_places else self._min_score
        return max(last - SLACK, LOWEST)


def _by_falling_bound(places: np.ndarray, bounds: np.ndarray, best: TopTexts) -> Iterator[np.ndarray]:
    """Groups of texts by falling bound, each larger than the last, without texts that cannot reach the result."""
    num = max(NUM_PROBED, best.max_places)
    while len(places) > num:
        order = np.argpartition(-bounds[places], num - 1)
        yield places[order[:num]]
        places = places[order[num:]]
        places = places[bounds[places] >= best.threshold()]
        num *= 16
    if len(places):
        yield places


def _features(tokens: np.ndarray, texts: np.ndarray) -> Iterator[tuple[Feature, np.ndarray]]:
    """Each feature and the texts that have it, ascending. tokens, texts: [num tokens], texts ascending."""
    order = np.argsort(tokens, kind="stable")
    tokens, texts = tokens[order], texts[order]
    same = np.r_[False, (tokens[1:] == tokens[:-1]) & (texts[1:] == texts[:-1])] if len(tokens) else np.zeros(0, bool)
    position = np.arange(len(tokens))
    occurrence = position - np.maximum.accumulate(np.where(same, 0, position))
    for k in range(int(occurrence.max()) + 1 if len(tokens) else 0):
        chosen = occurrence == k
        some_tokens, some_texts = tokens[chosen], texts[chosen]
        starts = np.flatnonzero(np.r_[True, some_tokens[1:] != some_tokens[:-1]])
        for token, which in zip(some_tokens[starts].tolist(), np.split(some_texts, starts[1:]), strict=True):
            yield (token, k), which


def _features_of(query: Sequence[int]) -> Iterator[Feature]:
    seen: dict[int, int] = defaultdict(int)
    for token in query:
        if token != -1:
            yield token, seen[token]
            seen[token] += 1
