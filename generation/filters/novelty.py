"""Is a text new? Exact ROUGE-L against everything remembered, as in Self-Instruct (Wang et al., 2023, §2.2).

With the tokenizer "rouge", scores are those of Google's rouge_score without stemming, bit for bit. It sees only a-z and
0-9: text in other scripts has no tokens, so it is never similar to anything. The tokenizer "unicode" sees every script.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

from generation.config.filters import NoveltyConfig
from generation.filters.drafts import Decision, Draft, Neighbor, Rejection, joined_fields
from generation.filters.tokens import rouge_tokens, unicode_tokens

TOKENIZERS = {"rouge": rouge_tokens, "unicode": unicode_tokens}
BULK_SIZE = 50_000  # texts added at one time
NUM_PROBED = 64  # texts scored first, to learn which others can still reach the top
LEVEL_STEP = 0.85  # how fast the first bound is lowered until that many texts are above it
SLACK = 1e-5  # bounds are single precision, scores double: far more than the difference, far less than a step of scores
LOWEST = 1e-9  # less than the bound of any text that shares a token
FREQUENT = 1 / 32  # a feature in more of the texts is a column of bytes; from there on adding a column is faster
MIN_TEXTS_FOR_COLUMNS = 2048
MAX_SCANNED = 40_000  # tokens of all texts, times each begun 64 of the query: up to there all are simply scored
FIRST_SURROGATE = 0xD800  # code points from here to 0xDFFF are no characters
UNKNOWN = "\uffff"  # a token that is in none of the texts

Feature = tuple[int, int]  # (token, k): the token's occurrence number k in a text, from 0


class Novelty:
    """The filter: rejects what is closer than `max_score` to anything remembered."""

    def __init__(self, config: NoveltyConfig) -> None:
        self.fields = config.fields
        self._config = config
        self._index = NoveltyIndex(TOKENIZERS[config.tokenizer])

    def decide(self, draft: Draft) -> Decision:
        text = joined_fields(self.fields, draft)
        if text is None:
            return Decision(None)
        config = self._config
        # If none are stored, one that is too close is all there is to find, and most texts are out at once.
        min_score = 0.0 if config.num_nearest else config.max_score
        nearest = tuple(self._index.nearest(text, max(1, config.num_nearest), min_score))
        stored = nearest[: config.num_nearest]
        if nearest and nearest[0].score > config.max_score:
            why = Rejection("not_novel", f"ROUGE-L {nearest[0].score:.3f} to {nearest[0].id}")
            return Decision(why, stored)
        return Decision(None, stored)

    def remember_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        self._index.add_many(ids, texts)


class Vocabulary(dict[str, int]):
    """Numbers tokens as they come."""

    def __missing__(self, token: str) -> int:
        number = self[token] = len(self)
        return number


class NoveltyIndex:
    """Texts by which new ones are judged.

    A common subsequence is no longer than the tokens that both texts have, counted with repetition. So a query counts
    shared tokens over all texts in a few vector operations, and only texts whose bound can still reach the last place
    are scored, by rapidfuzz. The k-th occurrence of a token in a text is a feature of its own, which makes that count a
    sum over features: a frequent one has a column of bytes, any other a list of texts. As long as there are few texts
    that costs more than it saves unless `min_score` rules most of them out, and all are scored.
    """

    def __init__(self, tokenize: Callable[[str], list[str]] = rouge_tokens) -> None:
        self._tokenize = tokenize
        self._vocabulary = Vocabulary()
        self._ids: list[str] = []
        self._tokens = array("i")  # of all texts, one after the other
        self._starts = array("q")  # place of each text's first token
        self._lengths = array("i")
        self._max_length = 0
        self._strings: list[str] | None = []  # a character for each token, of all texts; None once they are many
        self._half_lengths = np.zeros(0, dtype=np.float32)  # [capacity]
        self._postings: dict[Feature, array] = defaultdict(partial(array, "i"))
        self._row_of: dict[Feature, int] = {}
        self._columns = np.zeros((0, 0), dtype=np.uint8)  # [num frequent features, capacity], 1 where a text has it
        self._num_texts_surveyed = 0  # when the frequent features were last chosen
        self._shared = np.zeros(0, dtype=np.uint8)  # [capacity]; memory for one query, as are these two:
        self._bounds = np.zeros(0, dtype=np.float32)  # [capacity]
        self._codes = np.zeros(0, dtype=np.uint32)  # [vocabulary or more], zero between queries

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, text_id: str, text: str) -> None:
        """Judge later texts by this one too."""
        self.add_many([text_id], [text])

    def add_many(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """The same for many, faster than one by one."""
        for start in range(0, len(texts), BULK_SIZE):
            self._add_some(ids[start : start + BULK_SIZE], texts[start : start + BULK_SIZE])

    def nearest(self, text: str, max_neighbors: int, min_score: float = 0.0) -> list[Neighbor]:
        """The closest texts with a score above 0 and of at least `min_score`, best first.

        Among equals, the one added first. The higher `min_score`, the faster.
        """
        query = [self._vocabulary.get(token, -1) for token in self._tokenize(text)]  # -1: in none of the texts
        if not self._ids or all(token == -1 for token in query):
            return []
        best = Best(max_neighbors, min_score)
        if min_score == 0 and self._strings is not None and len(self._tokens) * -(-len(query) // 64) <= MAX_SCANNED:
            scores = self._scores(query, self._scan(query), np.array(self._lengths))
            best.add(np.arange(len(scores)), scores)
        else:
            self._search(query, best)
        ranked = zip(best.places.tolist(), best.scores.tolist(), strict=True)
        return [Neighbor(self._ids[place], score) for place, score in ranked]

    def _search(self, query: list[int], best: "Best") -> None:
        """Score what can get in, by the bounds."""
        bounds = self._upper_bounds(query)
        level, above = self._first_level(bounds, len(query), best), np.inf
        while True:
            places = np.flatnonzero((bounds >= level) & (bounds < above))
            for some in _funnel(places, bounds, best):
                best.add(some, self._exact(query, some))
            if level <= best.cut():
                break
            level, above = best.cut(), level

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
        self._add_strings(first_text)
        self._max_length = max(self._max_length, *self._lengths[first_text:])
        self._make_room(len(self._ids))
        lengths = np.array(self._lengths[first_text:])
        self._half_lengths[first_text : len(self._ids)] = lengths / 2
        if len(texts) == 1:
            self._note_one(first_text, self._tokens[first_token:])
        else:
            tokens = np.array(self._tokens[first_token:])
            self._note_many(first_text, tokens, np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
        if len(self._ids) >= max(MIN_TEXTS_FOR_COLUMNS, 2 * self._num_texts_surveyed):
            self._move_frequent_to_columns()

    def _add_strings(self, first_text: int) -> None:
        if self._strings is None:
            return
        if len(self._tokens) > MAX_SCANNED or len(self._vocabulary) > FIRST_SURROGATE:
            self._strings = None
            return
        for start, length in zip(self._starts[first_text:], self._lengths[first_text:], strict=True):
            self._strings.append("".join(map(chr, self._tokens[start : start + length])))

    def _note_one(self, place: int, tokens: Sequence[int]) -> None:
        for feature in _features_of(tokens):
            if (row := self._row_of.get(feature)) is not None:
                self._columns[row, place] = 1
            else:
                self._postings[feature].append(place)

    def _note_many(self, first_text: int, tokens: np.ndarray, texts: np.ndarray) -> None:
        for feature, which in _features(tokens, texts):
            which += first_text
            if (row := self._row_of.get(feature)) is not None:
                self._columns[row, which] = 1
            else:
                self._postings[feature].frombytes(which.tobytes())

    def _make_room(self, num_texts: int) -> None:
        if num_texts > len(self._bounds):
            capacity = max(1024, 2 * len(self._bounds), num_texts)
            self._shared = np.zeros(capacity, dtype=np.uint8)
            self._bounds = np.zeros(capacity, dtype=np.float32)
            self._half_lengths = np.pad(self._half_lengths, (0, capacity - len(self._half_lengths)))
            self._columns = np.pad(self._columns, ((0, 0), (0, capacity - self._columns.shape[1])))
        if len(self._vocabulary) > len(self._codes):
            self._codes = np.zeros(2 * len(self._vocabulary), dtype=np.uint32)

    def _move_frequent_to_columns(self) -> None:
        self._num_texts_surveyed = len(self._ids)
        frequent = [f for f, texts in self._postings.items() if len(texts) >= FREQUENT * len(self._ids)]
        added = np.zeros((len(frequent), self._columns.shape[1]), dtype=np.uint8)
        for row, feature in enumerate(frequent):
            added[row, np.frombuffer(self._postings.pop(feature), dtype=np.int32)] = 1
            self._row_of[feature] = len(self._columns) + row
        self._columns = np.concatenate([self._columns, added])

    # -- judging

    def _scan(self, query: list[int]) -> np.ndarray:
        """Length of the longest common subsequence with every text."""
        text = "".join(UNKNOWN if token == -1 else chr(token) for token in query)
        return cdist([text], self._strings, scorer=LCSseq.similarity, dtype=np.int64)[0]

    def _upper_bounds(self, query: list[int]) -> np.ndarray:
        """ROUGE-L F of each text if all the tokens that it shares with the query were in the same order. [num texts]"""
        num_texts = len(self._ids)
        shared = self._shared[:num_texts] if len(query) < 256 else np.zeros(num_texts, dtype=np.uint32)
        shared.fill(0)
        for feature in _features_of(query):
            if (row := self._row_of.get(feature)) is not None:
                np.add(shared, self._columns[row, :num_texts], out=shared)
            elif feature in self._postings:
                places = np.frombuffer(self._postings[feature], dtype=np.int32)
                shared[places.astype(np.int64)] += 1  # numpy takes far longer with indices of another width
        bounds = self._bounds[:num_texts]
        np.add(self._half_lengths[:num_texts], np.float32(len(query) / 2), out=bounds)
        return np.divide(shared, bounds, out=bounds, dtype=np.float32)

    def _first_level(self, bounds: np.ndarray, num_query: int, best: "Best") -> float:
        """A bound that just enough texts reach to learn from them what the last place takes."""
        num_wanted = max(NUM_PROBED, best.max_places)
        lowest = max(best.cut(), 1 / (num_query + self._max_length))
        level = LEVEL_STEP * float(bounds.max())
        while level > lowest and np.count_nonzero(bounds >= level) < num_wanted:
            level *= LEVEL_STEP
        return max(level, lowest)

    def _exact(self, query: list[int], places: np.ndarray) -> np.ndarray:
        """ROUGE-L F of these texts."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)[places]
        return self._scores(query, self._num_in_order(query, places, lengths), lengths)

    @staticmethod
    def _scores(query: list[int], num_common: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """ROUGE-L F, in rouge_score's order of operations."""
        precision = num_common / len(query)
        recall = num_common / np.maximum(lengths, 1)
        total = precision + recall
        return np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1), 0.0)

    def _num_in_order(self, query: list[int], places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Length of the longest common subsequence with each of these texts.

        rapidfuzz compares strings of characters: each token of the query is a character, and other tokens, which are
        never part of a common subsequence, are left out.
        """
        known = list(dict.fromkeys(token for token in query if token != -1))
        dtype, encoding = (np.uint8, "latin-1") if len(known) < 256 else (np.dtype("<u4"), "utf-32-le")
        codes = self._codes
        codes[known] = np.arange(1, len(known) + 1)
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        starts = np.frombuffer(self._starts, dtype=np.int64)[places]
        tokens = np.frombuffer(self._tokens, dtype=np.int32)[np.repeat(starts, lengths) + within]
        coded = codes[tokens]
        codes_of_query = codes[[token for token in query if token != -1]]
        codes[known] = 0
        is_shared = coded != 0
        num_shared = np.concatenate([[0], np.cumsum(is_shared)])
        text_ends = num_shared[ends].tolist()
        text_starts = num_shared[ends - lengths].tolist()
        characters = coded[is_shared].astype(dtype).tobytes().decode(encoding, "surrogatepass")
        texts = [characters[start:end] for start, end in zip(text_starts, text_ends, strict=True)]
        query_text = codes_of_query.astype(dtype).tobytes().decode(encoding, "surrogatepass")
        return cdist([query_text], texts, scorer=LCSseq.similarity, dtype=np.int64)[0]


class Best:
    """The best places so far, in order."""

    def __init__(self, max_places: int, min_score: float) -> None:
        self.max_places = max_places
        self.places = np.zeros(0, dtype=np.int64)
        self.scores = np.zeros(0)
        self._min_score = min_score

    def add(self, places: np.ndarray, scores: np.ndarray) -> None:
        good = (scores > 0) & (scores >= max(self._min_score, self.cut()))
        places = np.concatenate([self.places, places[good]])
        scores = np.concatenate([self.scores, scores[good]])
        order = np.lexsort((places, -scores))[: self.max_places]
        self.places, self.scores = places[order], scores[order]

    def cut(self) -> float:
        """A text with a bound below this one cannot get in."""
        last = float(self.scores[-1]) if len(self.scores) == self.max_places else self._min_score
        return max(last - SLACK, LOWEST)


def _funnel(places: np.ndarray, bounds: np.ndarray, best: Best) -> Iterator[np.ndarray]:
    """The texts of highest bound first, a few, then more, then all that can still get in after those were scored."""
    num = max(NUM_PROBED, best.max_places)
    while len(places) > num:
        order = np.argpartition(-bounds[places], num - 1)
        yield places[order[:num]]
        places = places[order[num:]]
        places = places[bounds[places] >= best.cut()]
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
