"""Novelty and near duplicates, against rouge_score and exact Jaccard: `python -m tests.benchmarks.novelty`.

The texts are synthetic: words drawn with the frequency that they have in the packaged seed tasks, in instructions as
long as the seeds'. Half of the queries are drawn in the same way, half are kept texts with up to half of their words
replaced, so that decisions go both ways.

The peer is the loop of Self-Instruct and Alpaca, `RougeScorer.score` against every kept text, on the same queries in
the same run. Beyond 52,000 texts it sees as many, drawn at random, and its time is scaled to all of them. A
disagreement is a neighbor with another score, a text that rouge_score puts before our last neighbor and we do not,
or another decision. All times are of the processor: each side works on one core, whatever else the machine does.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rouge_score.rouge_scorer import RougeScorer

from generation.config.filters import NearDuplicateConfig
from generation.filters.chain import FilterChain
from generation.filters.drafts import Draft, Neighbor
from generation.filters.duplicates import jaccard, normalized, num_bands, shingles
from generation.filters.rouge_index import RougeIndex

SEEDS = Path(__file__).parents[2] / "generation" / "seeds" / "seed_tasks.jsonl"
SIZES = (1_000, 10_000, 52_000, 200_000, 1_000_000)
NUM_OF_PUBLISHED_RUN = 52_000  # instructions of Self-Instruct and of Alpaca; the most that the peer is given
NUM_NEIGHBORS = 10
MAX_SCORE = 0.7


class Texts:
    """Instructions of words from the packaged seeds; the same for the same seed of the generator."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        tasks = [json.loads(line) for line in SEEDS.open(encoding="utf-8")]
        instances = [task["instances"][0] for task in tasks]
        written = [task["instruction"] for task in tasks]
        self._lengths = np.array([len(text.split()) for text in written])
        written += [text for instance in instances for text in instance.values()]
        self._words = np.array(" ".join(written).split(), dtype=object)
        self.vocabulary_size = len(set(self._words))

    def take(self, count: int) -> list[str]:
        lengths = self._draw.choice(self._lengths, count)
        words = self._words[self._draw.integers(len(self._words), size=lengths.sum())]
        ends = np.cumsum(lengths)
        return [" ".join(words[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    def changed(self, text: str) -> str:
        """The text with up to half of its words replaced."""
        words = text.split()
        for place in self._draw.permutation(len(words))[: self._draw.integers(1 + len(words) // 2)]:
            words[place] = self._draw.choice(self._words)
        return " ".join(words)

    def queries(self, kept: list[str], count: int) -> list[str]:
        chosen = self._draw.integers(len(kept), size=count // 2)
        both = zip(self.take(count - count // 2), [self.changed(kept[place]) for place in chosen], strict=False)
        return [query for pair in both for query in pair]


@dataclass(frozen=True, slots=True)
class Peer:
    """What rouge_score said of one query. scores: by place in the pool."""

    scores: dict[int, float]
    seconds_for_all: float


def ask_peer(query: str, kept: list[str], places: list[int]) -> Peer:
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    started = time.process_time()
    scores = {place: scorer.score(kept[place], query)["rougeL"].fmeasure for place in places}
    return Peer(scores, (time.process_time() - started) * len(kept) / len(places))


def num_disagreements(found: list[Neighbor], is_new: bool, query: str, kept: list[str], peer: Peer) -> int:
    ours = {int(neighbor.id): neighbor.score for neighbor in found}
    theirs = peer.scores | ask_peer(query, kept, [place for place in ours if place not in peer.scores] or [0]).scores
    num_wrong_scores = sum(theirs[place] != score for place, score in ours.items())
    last = found[-1].score if len(found) == NUM_NEIGHBORS else 0.0
    num_missed = sum(score > last and place not in ours for place, score in theirs.items())
    return num_wrong_scores + num_missed + (is_new is (max(theirs.values()) > MAX_SCORE))


def timed(call: Callable[[str], object], queries: list[str]) -> tuple[list, float]:
    """Results, and the median of milliseconds of one call."""
    results, milliseconds = [], []
    call(queries[0])
    for query in queries:
        started = time.process_time()
        results.append(call(query))
        milliseconds.append(1000 * (time.process_time() - started))
    return results, statistics.median(milliseconds)


def rows_of_novelty(sizes: list[int], num_queries: int, num_peer_queries: int) -> Iterator[list[str]]:
    for size in sizes:
        print(f"novelty: {size:,} texts", file=sys.stderr, flush=True)
        texts = Texts(seed=size)
        kept = texts.take(size)
        queries = texts.queries(kept, num_queries)
        ids = [str(place) for place in range(size)]
        started = time.process_time()
        index = RougeIndex()
        index.add_many(ids, kept)
        seconds_to_build = time.process_time() - started
        found, milliseconds = timed(lambda query, index=index: index.nearest(query, NUM_NEIGHBORS), queries)
        closer, milliseconds_to_decide = timed(lambda query, index=index: index.nearest(query, 1, MAX_SCORE), queries)
        is_new = [not (near and near[0].score > MAX_SCORE) for near in closer]
        places = np.random.default_rng(0).permutation(size)[:NUM_OF_PUBLISHED_RUN].tolist()
        peers = [ask_peer(query, kept, places) for query in queries[:num_peer_queries]]
        seconds_of_peer = statistics.median(peer.seconds_for_all for peer in peers)
        wrong = sum(
            num_disagreements(found[number], is_new[number], queries[number], kept, peer)
            for number, peer in enumerate(peers)
        )
        yield [
            f"{size:,}", f"{seconds_to_build:.1f}",
            f"{milliseconds:.2f}", f"{milliseconds_to_decide:.2f}", f"{seconds_of_peer:.2f}"
            + ("" if size <= NUM_OF_PUBLISHED_RUN else " (scaled)"),
            f"{1000 * seconds_of_peer / milliseconds:,.0f}", f"{len(peers)} x {len(places):,}", str(wrong),
        ]  # fmt: skip


def row_of_near_duplicates(size: int, num_queries: int) -> list[str]:
    print(f"near duplicates: {size:,} texts", file=sys.stderr, flush=True)
    texts, config = Texts(seed=1), NearDuplicateConfig(fields=("instruction",))
    kept = texts.take(size)
    queries = [texts.changed(text) for text in kept[:num_queries]]
    chain = FilterChain([config])
    started = time.process_time()
    chain.remember_many([str(place) for place in range(size)], kept)
    rate_remembered = size / (time.process_time() - started)
    results, milliseconds = timed(lambda query: chain.decide(Draft(query)), queries)
    sets = [shingles(normalized(text), config) for text in kept]
    num_expected = num_found = num_false = 0
    for query, result in zip(queries, results, strict=True):
        mine = shingles(normalized(query), config)
        is_duplicate = any(jaccard(mine, other) >= config.threshold for other in sets)
        num_expected += is_duplicate
        num_found += is_duplicate and result.rejection is not None
        num_false += not is_duplicate and result.rejection is not None
    return [
        f"{size:,}", f"{num_bands(config)} of {config.num_perm // num_bands(config)}", f"{rate_remembered:,.0f}",
        f"{1000 / milliseconds:,.0f}", f"{num_found} of {num_expected}", str(num_false),
    ]  # fmt: skip


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="right")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--queries", type=int, default=100, help="queries timed at each size")
    parser.add_argument("--peer-queries", type=int, default=4, help="of these, given to rouge_score too")
    parser.add_argument("--near-texts", type=int, default=50_000)
    parser.add_argument("--near-queries", type=int, default=300)
    arguments = parser.parse_args()
    novelty = table(
        "Nearest 10 and decision at ROUGE-L 0.7; medians of one query",
        *("kept", "build s", "nearest ms", "decide ms", "rouge_score s", "times", "compared", "disagree"),
    )
    for row in rows_of_novelty(arguments.sizes, arguments.queries, arguments.peer_queries):
        novelty.add_row(*row)
    near = table(
        "Near duplicates at Jaccard 0.8, each query a kept text with up to half of its words replaced",
        *("kept", "bands", "remembered/s", "judged/s", "found", "false"),
    )
    near.add_row(*row_of_near_duplicates(arguments.near_texts, arguments.near_queries))
    console = Console(width=120)
    console.print(f"Words of the packaged seed tasks: {Texts(0).vocabulary_size:,} different ones.")
    console.print(novelty)
    console.print(near)


if __name__ == "__main__":
    main()
