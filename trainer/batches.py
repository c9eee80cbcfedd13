"""The order of training: which rows make step k, and which of them are this rank's.

Order is a pure function of seed and epoch, and the rows of a step do not depend on the number of ranks, so a run goes
on from a step number alone.

Shapes: B rows in a micro-batch, S tokens in its longest row.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from trainer.chat import IGNORE
from trainer.config import TrainConfig
from trainer.data import Tokens
from trainer.packing import best_fit_decreasing


@dataclass(frozen=True)
class MicroBatch:
    """`position_ids` restart at every document; `labels` are already shifted, so no label crosses a border."""

    input_ids: torch.Tensor  # int64 [B, S]
    position_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S]

    @property
    def num_labels(self) -> int:
        return int((self.labels != IGNORE).sum())


def plan_rows(tokens: Tokens, config: TrainConfig) -> list[list[int]]:
    """Document indices of every row: several to a row with packing, else one."""
    if not config.packing:
        return [[document] for document in range(tokens.num_documents)]
    return best_fit_decreasing(tokens.lengths.tolist(), config.max_seq_len)


class Batches:
    """Rows of every step for one rank.

    Raises ValueError if `global_batch_size` is not a multiple of `micro_batch_size * world_size`.
    """

    def __init__(self, tokens: Tokens, config: TrainConfig, seed: int, rank: int, world_size: int):
        per_pass = config.micro_batch_size * world_size
        if config.global_batch_size % per_pass:
            raise ValueError(
                f"train.global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size "
                f"{config.micro_batch_size} x {world_size} ranks = {per_pass}. Change one of them."
            )
        self.tokens, self.config, self.seed, self.rank, self.world_size = tokens, config, seed, rank, world_size
        self.rows = plan_rows(tokens, config)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self.grad_accum_steps = config.global_batch_size // per_pass
        self.steps_per_epoch = math.ceil(len(self.rows) / config.global_batch_size)
        total = self.steps_per_epoch * config.num_epochs
        self.num_steps = min(total, config.max_steps) if config.max_steps else total

    def rows_of_step(self, step: int) -> list[list[int]]:
        """The rows of an optimizer step over all ranks, in order. The last step of an epoch may have fewer."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        size = self.config.global_batch_size
        return [self.rows[row] for row in self._order[index * size : (index + 1) * size]]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of a step: always `grad_accum_steps` micro-batches, some without labels if rows run out."""
        mine = self.rows_of_step(step)[self.rank :: self.world_size]
        size = self.config.micro_batch_size
        return [self.collate(mine[i * size : (i + 1) * size]) for i in range(self.grad_accum_steps)]

    def collate(self, rows: list[list[int]]) -> MicroBatch:
        """Lay rows of documents side by side, padded at the right with label-less documents of their own."""
        lengths = self.tokens.lengths
        num_tokens = max((int(sum(lengths[document] for document in row)) for row in rows), default=2)
        shape = (max(len(rows), 1), num_tokens)
        input_ids = np.zeros(shape, dtype=np.int64)
        position_ids = np.tile(np.arange(num_tokens), (shape[0], 1))
        labels = np.full(shape, IGNORE, dtype=np.int64)
        for b, row in enumerate(rows):
            begin = 0
            for document in row:
                source = slice(int(self.tokens.offsets[document]), int(self.tokens.offsets[document + 1]))
                end = begin + source.stop - source.start
                input_ids[b, begin:end] = self.tokens.input_ids[source]
                labels[b, begin:end] = self.tokens.labels[source]
                position_ids[b, begin:end] = np.arange(end - begin)
                begin = end
            position_ids[b, begin:] = np.arange(num_tokens - begin)
        return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(position_ids), torch.from_numpy(labels))
