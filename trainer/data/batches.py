"""The order of training: which rows make step k, and which of these rows this rank gets.

The order is a pure function of seed and epoch, and the rows of a step do not depend on the number of ranks. So a run
resumes from a step number alone. A step has `global_batch_size` examples, packed among themselves, or (batch_unit=rows)
`global_batch_size` rows, packed once over the whole epoch. The first keeps the batch size of a recipe that does not
pack; the second fills rows a little better.

A document is an example as tokens. Shapes: B rows in a micro-batch, S tokens in its longest row.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from cluster.errors import InputError
from trainer.config.train import TrainConfig
from trainer.data.chat import IGNORE
from trainer.data.mixture import Mixture
from trainer.data.tokens import Tokens

Row = list[int]  # document indices


@dataclass(frozen=True)
class MicroBatch:
    """`position_ids` restart at every document; `labels` are shifted already, so no label crosses a document border."""

    input_ids: torch.Tensor  # int64 [B, S]
    position_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S]

    @property
    def num_trained_tokens(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The arguments of `CausalLMWithLoss`. The labelled positions, int64 [L], are found here, on the CPU: to ask a
        GPU how many there are would wait for all its queued work."""
        labelled = (self.labels.flatten() != IGNORE).nonzero().flatten()
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "labels": self.labels,
            "labelled": labelled,
        }


def check_batch_size(config: TrainConfig, world_size: int) -> None:
    """Raise InputError if a step of rows cannot be shared evenly. A step of examples always can."""
    rows_per_pass = config.micro_batch_size * world_size
    if config.batch_unit == "rows" and config.global_batch_size % rows_per_pass:
        raise InputError(
            f"train.global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size "
            f"{config.micro_batch_size} x {world_size} ranks = {rows_per_pass}. "
            "Change one of them, or set train.batch_unit=examples."
        )


class Batches:
    """Rows of every step for one rank.

    Raises InputError if the batch size does not fit the number of ranks, or if holding documents out leaves nothing of
    a source.
    """

    def __init__(self, tokens: Tokens, config: TrainConfig, seed: int, rank: int, world_size: int):
        self.rows_per_pass = config.micro_batch_size * world_size
        check_batch_size(config, world_size)
        self.tokens, self.config, self.seed, self.rank, self.world_size = tokens, config, seed, rank, world_size
        self.mixture = Mixture(tokens, config, seed)
        self._rows_of_epoch = lru_cache(maxsize=1)(self._rows_of_epoch)
        self._steps_of_epoch = lru_cache(maxsize=1)(self._steps_of_epoch)
        self.rows = [row for step in self._steps_of_epoch(0) for row in step]  # of the first epoch
        self.steps_per_epoch = len(self._steps_of_epoch(0))  # others differ only if a source is repeated in part
        self._epoch_ends = self._end_of_every_epoch()
        self.num_steps = min(self._epoch_ends[-1], config.max_steps or self._epoch_ends[-1])
        self.grad_accum_steps = self._num_passes(self._steps_of_epoch(0)[0])  # usual number; see `micro_batches`

    def _end_of_every_epoch(self) -> list[int]:
        """The number of the first step after every epoch."""
        counts = [self.steps_per_epoch] * self.config.num_epochs
        if self.config.batch_unit == "rows" and self.config.packing and not self.mixture.same_every_epoch:
            counts = [len(self._steps_of_epoch(epoch)) for epoch in range(self.config.num_epochs)]
        return np.cumsum(counts).tolist()

    def _steps_of_epoch(self, epoch: int) -> list[list[Row]]:
        """The rows of every step of an epoch."""
        size, generator = self.config.global_batch_size, np.random.default_rng([self.seed, epoch])
        if self.config.batch_unit == "examples":
            order = generator.permutation(self.mixture.documents(epoch))
            groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
            return [plan_rows(self.tokens, self.config, group) for group in groups]
        rows = self._rows_of_epoch(0 if self.mixture.same_every_epoch else epoch)
        order = generator.permutation(len(rows))
        return [[rows[row] for row in order[begin : begin + size]] for begin in range(0, len(order), size)]

    def _rows_of_epoch(self, epoch: int) -> list[Row]:
        return plan_rows(self.tokens, self.config, self.mixture.documents(epoch))

    def rows_of_step(self, step: int) -> list[Row]:
        """The rows of an optimizer step over all ranks, in order. The last step of an epoch may have fewer."""
        epoch = bisect.bisect_right(self._epoch_ends, step)
        return self._steps_of_epoch(epoch)[step - (self._epoch_ends[epoch - 1] if epoch else 0)]

    def _num_passes(self, rows: list[Row]) -> int:
        if self.config.batch_unit == "rows":
            return self.config.global_batch_size // self.rows_per_pass
        return math.ceil(len(rows) / self.rows_per_pass)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step. Every rank gets the same number, some without labels if rows run out.

        With batch_unit=rows every step has `grad_accum_steps` of them; with examples, as many as its rows need.
        """
        rows = self.rows_of_step(step)
        mine = rows[self.rank :: self.world_size]
        return split_rows(mine, self.config.micro_batch_size, self._num_passes(rows), self.collate)

    def collate(self, rows: Sequence[Row]) -> MicroBatch:
        return collate(self.tokens, rows)

    def describe(self) -> list[str]:
        """Lines for the log: what each source, an epoch and a step hold."""
        config, tokens, mixture = self.config, self.tokens, self.mixture
        lines = [share.describe() for share in mixture.shares]
        documents = mixture.documents(0)
        num_tokens, trained = (int(lengths[documents].sum()) for lengths in (tokens.lengths, tokens.trained_lengths))
        packed = f", {num_tokens / (len(self.rows) * config.max_seq_len):.1%} full" if config.packing else ""
        lines.append(
            f"an epoch: {len(documents):,} examples in {len(self.rows):,} rows of up to {config.max_seq_len} tokens"
            f"{packed}; {num_tokens:,} tokens, {trained:,} of them with a loss ({trained / num_tokens:.1%})"
        )
        other, ratio = "examples", len(documents) / len(self.rows)
        if config.batch_unit == "examples":
            other, ratio = "rows", 1 / ratio
        lines.append(
            f"a step: {config.global_batch_size} {config.batch_unit}"
            + (f", about {config.global_batch_size * ratio:.0f} {other}," if config.packing else "")
            + f" = {config.micro_batch_size} rows micro x {self.grad_accum_steps} accumulated x {self.world_size} ranks"
        )
        return lines


def plan_rows(tokens: Tokens, config: TrainConfig, documents: Sequence[int]) -> list[Row]:
    """The rows that hold `documents`: several to a row with packing, else one."""
    if not config.packing:
        return [[int(document)] for document in documents]
    rows = best_fit_decreasing(tokens.lengths[documents].tolist(), config.max_seq_len)
    return [[int(documents[index]) for index in row] for row in rows]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents of `lengths` tokens into rows of at most `capacity` tokens. Returns document indices by row.

    Longest first, each into the row with the least room that still takes it, else into a new row. Deterministic: ties
    go to the lower index. O(n log n) plus one big-integer operation of `capacity` bits for each document.
    Raises ValueError if a document is longer than `capacity`.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r is set while some row has room for exactly r more tokens
    for document in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[document]
        if length > capacity:
            raise ValueError(f"document {document} has {length} tokens, a row holds {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        if left := room - length:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    return rows


def split_rows(
    rows: Sequence[Row], micro_batch_size: int, num_passes: int, collate: Callable[[Sequence[Row]], MicroBatch]
) -> list[MicroBatch]:
    """Rows of a rank as `num_passes` micro-batches, the last ones without labels if rows run out."""
    size = micro_batch_size
    return [collate(rows[i * size : (i + 1) * size]) for i in range(num_passes)]


def collate(tokens: Tokens, rows: Sequence[Row]) -> MicroBatch:
    """Rows of documents as tensors, padded at the right with documents that have no labels."""
    lengths = tokens.lengths
    num_tokens = max((int(sum(lengths[document] for document in row)) for row in rows), default=2)
    shape = (max(len(rows), 1), num_tokens)
    input_ids = np.zeros(shape, dtype=np.int64)
    position_ids = np.tile(np.arange(num_tokens), (shape[0], 1))
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for b, row in enumerate(rows):
        begin = 0
        for document in row:
            source = tokens.span(document)
            end = begin + source.stop - source.start
            input_ids[b, begin:end] = tokens.input_ids[source]
            labels[b, begin:end] = tokens.labels[source]
            position_ids[b, begin:end] = np.arange(end - begin)
            begin = end
        position_ids[b, begin:] = np.arange(num_tokens - begin)
    return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(position_ids), torch.from_numpy(labels))
