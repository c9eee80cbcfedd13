"""Rows too long for one GPU: Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509) through DeepSpeed.

A group of `sequence_parallel_size` neighboring ranks shares its rows: each rank has one part of every row. For
attention the ranks exchange data, so that each has all positions of a part of the heads. All other parts of a decoder
work on each position separately.
"""

from dataclasses import replace
from types import ModuleType

import torch
from torch import nn
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


def use_ulysses(lm: nn.Module, config: TrainConfig) -> ModuleType | None:
    """Replace the model's attention by Ulysses'. Returns the process groups for `deepspeed.initialize`. A collective.

    None means that the job has no sequence parallelism. The replacement is for all models of the process until it ends.
    """
    if config.sequence_parallel_size == 1:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=lm,
        core_attn_implementation=config.attention,
        sequence_parallel_size=config.sequence_parallel_size,
        micro_batch_size=config.micro_batch_size,
        seq_length_is_variable=True,
    )
