"""Which documents an epoch has, and which documents are held out of all epochs.

Without weights, an epoch has every document of a source `epochs` times. With weights, it has as many documents as the
sources have together, divided by weight. Either way each document of a source occurs floor or ceil of the same number
of times, in every epoch and over any number of epochs: the choice walks in a circle over one shuffled list.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from cluster.errors import InputError
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig
from trainer.data.dropped import DroppedRows
from trainer.data.tokens import SourceFacts, Tokens


def held_out_documents(tokens: Tokens, config: TrainConfig, seed: int) -> np.ndarray:
    """The documents that `train.validation.fraction` holds out, ordered by hash. int64 [H]

    The hash is of the seed and the tokens. So the choice does not depend on the order of rows, and two equal documents
    are never on different sides. Documents of one row have one hash.
    """
    if config.validation is None or config.validation.fraction is None:
        return np.empty(0, dtype=np.int64)
    hashes = document_hashes(tokens, seed)
    order = np.argsort(hashes, kind="stable")
    size = math.ceil(config.validation.fraction * tokens.num_documents)
    last = hashes[order[size - 1]]
    return order[: np.searchsorted(hashes[order], last, side="right")]


def document_hashes(tokens: Tokens, seed: int) -> np.ndarray:
    """A hash of the seed and the tokens of every document, or of the first one of the same row. uint64 [D]"""
    key = str(seed).encode()
    hashes = np.empty(tokens.num_documents, dtype=np.uint64)
    for document in range(tokens.num_documents):
        if tokens.rows is not None and (first := tokens.rows[document]) != document:
            hashes[document] = hashes[first]
            continue
        content = tokens.input_ids[tokens.span(document)].tobytes()
        digest = hashlib.blake2b(content, digest_size=8, key=key).digest()
        hashes[document] = int.from_bytes(digest, "little")
    return hashes


@dataclass(frozen=True)
class SourceShare:
    """One source in the mixture."""

    source: SourceFacts
    pool: np.ndarray  # int64 [R]: its documents without those held out, shuffled once
    num_per_epoch: int  # documents of it in one epoch, repetitions counted

    def describe(self) -> str:
        """A line for the log."""
        source = self.source
        reasons = DroppedRows(Counter(source.dropped), source.first_dropped).describe()
        held_out = source.num_documents - len(self.pool)
        times = self.num_per_epoch / len(self.pool)
        return (
            f"{source.path}: {source.num_documents:,} examples"
            + (f", {sum(source.dropped.values()):,} dropped ({reasons})" if reasons else "")
            + "".join(f", {count:,} {note}" for note, count in source.notes.items())
            + (f", {held_out:,} held out" if held_out else "")
            + (f", each {times:.4g} times an epoch" if times != 1 else "")
        )


class Mixture:
    """The documents of every epoch: a pure function of tokens, settings, seed and epoch."""

    def __init__(self, tokens: Tokens, config: TrainConfig, seed: int):
        is_held_out = np.zeros(tokens.num_documents, dtype=bool)
        is_held_out[held_out_documents(tokens, config, seed)] = True
        pools, first = [], 0
        for number, source in enumerate(tokens.sources):
            documents = np.arange(first, first + source.num_documents)
            first += source.num_documents
            pool = documents[~is_held_out[documents]]
            if not len(pool):
                raise InputError(
                    f"train.validation.fraction: all of {source.path} is held out, so none of it is left to train on. "
                    "Lower the fraction, or set train.validation.path."
                )
            pools.append(np.random.default_rng([seed, number]).permutation(pool))
        counts = _documents_per_epoch(config.data, [len(pool) for pool in pools])
        self.shares = tuple(map(SourceShare, tokens.sources, pools, counts))

    @property
    def same_every_epoch(self) -> bool:
        return all(share.num_per_epoch % len(share.pool) == 0 for share in self.shares)

    def documents(self, epoch: int) -> np.ndarray:
        """The documents of an epoch in ascending order, repetitions included. int64"""
        chosen = []
        for share in self.shares:
            begin = epoch * share.num_per_epoch
            chosen.append(share.pool[np.arange(begin, begin + share.num_per_epoch) % len(share.pool)])
        return np.sort(np.concatenate(chosen))


def _documents_per_epoch(sources: tuple[DataSource, ...], sizes: list[int]) -> list[int]:
    """Documents of each source in one epoch. With weights they add up to the size of all sources (largest remainders).

    sizes: documents of each source that are not held out.
    """
    if not sources:  # the run's own dataset
        return sizes
    if sources[0].weight is None:
        return [max(1, round(source.epochs * size)) for source, size in zip(sources, sizes, strict=True)]
    total, weights = sum(sizes), np.array([source.weight for source in sources])
    shares = total * weights / weights.sum()
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    for index in np.argsort(counts - shares, kind="stable")[: max(0, total - int(counts.sum()))]:
        counts[index] += 1
    return counts.tolist()
