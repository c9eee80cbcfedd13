"""Which documents an epoch has, and which are held out of all of them.

Without weights, an epoch has every document of a source `epochs` times. With weights it has as many documents as the
sources have together, shared out by weight. Either way every document of a source comes floor or ceil of the same
number of times, in every epoch and over any number of epochs: the choice walks in a circle over one shuffled list.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from cluster.errors import InputError
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig
from trainer.data.tokens import SourceFacts, Tokens


def held_out(tokens: Tokens, config: TrainConfig, seed: int) -> np.ndarray:
    """Documents that `train.validation.fraction` holds out, in the order in which they are taken. int64 [H]

    The order is that of a hash of seed and tokens, so it does not depend on the order of rows, and documents that are
    equal are on the same side.
    """
    if config.validation is None or config.validation.fraction is None:
        return np.empty(0, dtype=np.int64)
    hashes = hashed(tokens, seed)
    order = np.argsort(hashes, kind="stable")
    size = math.ceil(config.validation.fraction * tokens.num_documents)
    last = hashes[order[size - 1]]
    return order[: np.searchsorted(hashes[order], last, side="right")]


def hashed(tokens: Tokens, seed: int) -> np.ndarray:
    """A hash of every document's tokens and the seed. uint64 [D]"""
    key = str(seed).encode()
    hashes = np.empty(tokens.num_documents, dtype=np.uint64)
    for document in range(tokens.num_documents):
        content = tokens.input_ids[tokens.span(document)].tobytes()
        digest = hashlib.blake2b(content, digest_size=8, key=key).digest()
        hashes[document] = int.from_bytes(digest, "little")
    return hashes


@dataclass(frozen=True)
class Share:
    """The part of one source in the mixture."""

    source: SourceFacts
    pool: np.ndarray  # int64 [R]: its documents, without those held out, shuffled once
    num_seen: int  # documents of it in one epoch, repetitions counted

    @property
    def times(self) -> float:
        """How often a document of it is seen in an epoch, on average."""
        return self.num_seen / len(self.pool)


class Mixture:
    """The documents of every epoch: a pure function of tokens, settings, seed and epoch."""

    def __init__(self, tokens: Tokens, config: TrainConfig, seed: int):
        left_out = np.zeros(tokens.num_documents, dtype=bool)
        left_out[held_out(tokens, config, seed)] = True
        pools, first = [], 0
        for number, source in enumerate(tokens.sources):
            documents = np.arange(first, first + source.num_documents)
            first += source.num_documents
            pool = documents[~left_out[documents]]
            if not len(pool):
                raise InputError(
                    f"train.validation.fraction: nothing of {source.path} is left to train on. Lower the fraction, "
                    "or give a train.validation.path."
                )
            pools.append(np.random.default_rng([seed, number]).permutation(pool))
        counts = _counts(config.data, [len(pool) for pool in pools])
        self.shares = tuple(map(Share, tokens.sources, pools, counts))

    @property
    def num_documents(self) -> int:
        """Documents in one epoch, repetitions counted."""
        return sum(share.num_seen for share in self.shares)

    @property
    def same_every_epoch(self) -> bool:
        return all(share.num_seen % len(share.pool) == 0 for share in self.shares)

    def documents(self, epoch: int) -> np.ndarray:
        """The documents of an epoch in ascending order, repetitions included. int64 [num_documents]"""
        chosen = []
        for share in self.shares:
            begin = epoch * share.num_seen
            chosen.append(share.pool[np.arange(begin, begin + share.num_seen) % len(share.pool)])
        return np.sort(np.concatenate(chosen))


def _counts(settings: tuple[DataSource, ...], sizes: list[int]) -> list[int]:
    """Documents of each source in one epoch. Weighted, they add up to the size of all sources: largest remainders."""
    if not settings:  # the run's own dataset
        return sizes
    if settings[0].weight is None:
        return [max(1, round(source.epochs * size)) for source, size in zip(settings, sizes, strict=True)]
    total, weights = sum(sizes), np.array([source.weight for source in settings])
    shares = total * weights / weights.sum()
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    for index in np.argsort(counts - shares, kind="stable")[: max(0, total - int(counts.sum()))]:
        counts[index] += 1
    return counts.tolist()
