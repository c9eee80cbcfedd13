"""The order of training: which rows make step k, and which of them are this rank's.

Order is a pure function of seed and epoch, and the rows of a step do not depend on the number of ranks, so a run goes
on from a step number alone. A step has either so many rows, packed once over the whole epoch, or so many documents,
which are then packed among themselves: fewer tokens to a row, but the batch size of a recipe that does not pack.

Shapes: B rows in a micro-batch, S tokens in its longest row.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainer.config.train import TrainConfig
from trainer.data.chat import IGNORE
from trainer.data.mixture import Mixture
from trainer.data.packing import best_fit_decreasing
from trainer.data.tokens import Tokens

Row = list[int]  # document indices


@dataclass(frozen=True)
class MicroBatch:
    """`position_ids` restart at every document; `labels` are already shifted, so no label crosses a border."""

    input_ids: torch.Tensor  # int64 [B, S]
    position_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S]

    @property
    def num_labels(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What `CausalLMWithLoss` takes. Which positions have a label, int64 [L], is found here, on the CPU: asking a
        GPU how many there are means waiting until it has done all its work."""
        labelled = (self.labels.flatten() != IGNORE).nonzero().flatten()
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "labels": self.labels,
            "labelled": labelled,
        }


def plan_rows(tokens: Tokens, config: TrainConfig, documents: Sequence[int]) -> list[Row]:
    """The rows that hold `documents`: several to a row with packing, else one."""
    if not config.packing:
        return [[int(document)] for document in documents]
    rows = best_fit_decreasing(tokens.lengths[documents].tolist(), config.max_seq_len)
    return [[int(documents[index]) for index in row] for row in rows]


def packing_efficiency(tokens: Tokens, rows: Sequence[Row], max_seq_len: int) -> float:
    """Tokens of documents over tokens that the rows could hold."""
    return float(sum(tokens.lengths[document] for row in rows for document in row) / (len(rows) * max_seq_len))


class Batches:
    """Rows of every step for one rank.

    Raises ValueError if steps are counted in rows and `global_batch_size` is not a multiple of
    `micro_batch_size * world_size`, and InputError if holding data out leaves nothing of a source.
    """

    def __init__(self, tokens: Tokens, config: TrainConfig, seed: int, rank: int, world_size: int):
        self.per_pass = config.micro_batch_size * world_size
        if config.batch_unit == "rows" and config.global_batch_size % self.per_pass:
            raise ValueError(
                f"train.global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size "
                f"{config.micro_batch_size} x {world_size} ranks = {self.per_pass}. Change one of them."
            )
        self.tokens, self.config, self.seed, self.rank, self.world_size = tokens, config, seed, rank, world_size
        self.mixture = Mixture(tokens, config, seed)
        self._epoch, self._steps = -1, []
        self._rows_of_any_epoch: list[Row] | None = None
        self.rows = [row for step in self._steps_of_epoch(0) for row in step]  # of the first epoch
        self.steps_per_epoch = len(self._steps)  # of the first epoch; of others too unless sources are repeated in part
        self._ends = self._last_steps()
        self.num_steps = min(self._ends[-1], config.max_steps or self._ends[-1])
        self.grad_accum_steps = self._num_passes(self._steps_of_epoch(0)[0])  # usual number; see `micro_batches`

    def _last_steps(self) -> list[int]:
        """The step after the last one of every epoch."""
        counts = [self.steps_per_epoch] * self.config.num_epochs
        if self.config.batch_unit == "rows" and self.config.packing and not self.mixture.same_every_epoch:
            counts = [len(self._steps_of_epoch(epoch)) for epoch in range(self.config.num_epochs)]
        return np.cumsum(counts).tolist()

    def _steps_of_epoch(self, epoch: int) -> list[list[Row]]:
        """The rows of every step of an epoch. The newest epoch asked for is remembered."""
        if epoch == self._epoch:
            return self._steps
        size, generator = self.config.global_batch_size, np.random.default_rng([self.seed, epoch])
        if self.config.batch_unit == "documents":
            order = generator.permutation(self.mixture.documents(epoch))
            groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
            steps = [plan_rows(self.tokens, self.config, group) for group in groups]
        else:
            rows = self._plan(epoch)
            order = generator.permutation(len(rows))
            steps = [[rows[row] for row in order[begin : begin + size]] for begin in range(0, len(order), size)]
        self._epoch, self._steps = epoch, steps
        return steps

    def _plan(self, epoch: int) -> list[Row]:
        if self._rows_of_any_epoch is not None:
            return self._rows_of_any_epoch
        rows = plan_rows(self.tokens, self.config, self.mixture.documents(epoch))
        if self.mixture.same_every_epoch:
            self._rows_of_any_epoch = rows
        return rows

    def rows_of_step(self, step: int) -> list[Row]:
        """The rows of an optimizer step over all ranks, in order. The last step of an epoch may have fewer."""
        epoch = bisect.bisect_right(self._ends, step)
        return self._steps_of_epoch(epoch)[step - (self._ends[epoch - 1] if epoch else 0)]

    def _num_passes(self, rows: list[Row]) -> int:
        if self.config.batch_unit == "rows":
            return self.config.global_batch_size // self.per_pass
        return math.ceil(len(rows) / self.per_pass)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of a step: on every rank as many micro-batches, some without labels if rows run out.

        Counted in rows there are `grad_accum_steps` of them in every step; counted in documents, as many as it takes.
        """
        rows = self.rows_of_step(step)
        mine = rows[self.rank :: self.world_size]
        return in_passes(mine, self.config.micro_batch_size, self._num_passes(rows), self.collate)

    def collate(self, rows: Sequence[Row]) -> MicroBatch:
        return collate(self.tokens, rows)

    def describe(self) -> list[str]:
        """What an epoch and a step hold, for people."""
        config, tokens, mixture = self.config, self.tokens, self.mixture
        lines = []
        for share in mixture.shares:
            source = share.source
            dropped = ", ".join(f"{count} {reason}" for reason, count in source.dropped.items()) or "none"
            held_out = source.num_documents - len(share.pool)
            lines.append(
                f"{source.path}: {source.num_documents:,} documents ({dropped} dropped)"
                + (f", {held_out:,} held out" if held_out else "")
                + (f", each {share.times:.4g} times an epoch" if share.times != 1 else "")
            )
        documents = mixture.documents(0)
        num_tokens, trained = (int(lengths[documents].sum()) for lengths in (tokens.lengths, tokens.trained_lengths))
        packed = f", {packing_efficiency(tokens, self.rows, config.max_seq_len):.1%} full" if config.packing else ""
        lines.append(
            f"an epoch: {len(documents):,} documents in {len(self.rows):,} rows of up to {config.max_seq_len} tokens"
            f"{packed}; {num_tokens:,} tokens, {trained:,} of them with a loss ({trained / num_tokens:.1%})"
        )
        other, ratio = "documents", len(documents) / len(self.rows)
        if config.batch_unit == "documents":
            other, ratio = "rows", 1 / ratio
        lines.append(
            f"a step: {config.global_batch_size} {config.batch_unit}"
            + (f", about {config.global_batch_size * ratio:.0f} {other}," if config.packing else "")
            + f" = {config.micro_batch_size} rows micro x {self.grad_accum_steps} accumulated x {self.world_size} ranks"
        )
        return lines


def in_passes(
    rows: Sequence[Row], micro_batch_size: int, num_passes: int, collate: Callable[[Sequence[Row]], MicroBatch]
) -> list[MicroBatch]:
    """Rows of a rank as `num_passes` micro-batches, the last ones without labels if rows run out."""
    size = micro_batch_size
    return [collate(rows[i * size : (i + 1) * size]) for i in range(num_passes)]


def collate(tokens: Tokens, rows: Sequence[Row]) -> MicroBatch:
    """Lay rows of documents side by side, padded at the right with label-less documents of their own."""
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
