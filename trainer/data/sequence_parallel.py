"""The part of every row that one rank of a sequence-parallel group gets. `trainer.model.sequence` has the attention."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from trainer.config.train import TrainConfig
from trainer.data.batches import Batches, MicroBatch
from trainer.data.chat import IGNORE
from trainer.data.tokens import Tokens


class SequenceParallelBatches(Batches):
    """The rows of `Batches`, of which every rank of a sequence-parallel group gets its own part."""

    def __init__(self, tokens: Tokens, config: TrainConfig, seed: int, rank: int, world_size: int):
        self.num_parts = config.sequence_parallel_size
        self.part = rank % self.num_parts
        super().__init__(tokens, config, seed, rank // self.num_parts, world_size // self.num_parts)

    def collate(self, rows: list[list[int]]) -> MicroBatch:
        """Positions [part * S / num_parts, (part + 1) * S / num_parts) of the rows, whose labels are shifted already.

        Padded without labels to parts of equal length and to `micro_batch_size` rows, as Ulysses requires.
        """
        whole = super().collate(rows)
        num_rows, num_tokens = whole.input_ids.shape
        length = -(-num_tokens // self.num_parts)
        padding = (0, length * self.num_parts - num_tokens, 0, self.config.micro_batch_size - num_rows)
        columns = slice(self.part * length, (self.part + 1) * length)

        def part_of(tensor: torch.Tensor, fill_value: int) -> torch.Tensor:
            return F.pad(tensor, padding, value=fill_value)[:, columns].contiguous()

        return replace(
            whole,
            input_ids=part_of(whole.input_ids, 0),
            position_ids=part_of(whole.position_ids, 0),
            labels=part_of(whole.labels, IGNORE),
        )
