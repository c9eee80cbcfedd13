"""Rows too long for one GPU: Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509) through DeepSpeed.

`sequence_parallel_size` neighbouring ranks take the same rows, and each a stretch of every row. Inside attention they
exchange: each gets all positions of its share of the heads. Everything else in a decoder is per position.
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


class SplitBatches(Batches):
    """Rows as `Batches` lays them out, of which every rank of a sequence-parallel group gets its own stretch."""

    def __init__(self, tokens: Tokens, config: TrainConfig, seed: int, rank: int, world_size: int):
        self.num_parts = config.sequence_parallel_size
        self.part = rank % self.num_parts
        super().__init__(tokens, config, seed, rank // self.num_parts, world_size // self.num_parts)

    def collate(self, rows: list[list[int]]) -> MicroBatch:
        """Positions [part * S / num_parts, (part + 1) * S / num_parts) of the rows; labels are shifted beforehand.

        Padded at the right without labels, to equal stretches, and to `micro_batch_size` rows, as Ulysses wants.
        """
        whole = super().collate(rows)
        num_rows, num_tokens = whole.input_ids.shape
        length = -(-num_tokens // self.num_parts)
        margin = (0, length * self.num_parts - num_tokens, 0, self.config.micro_batch_size - num_rows)
        stretch = slice(self.part * length, (self.part + 1) * length)

        def share(tensor: torch.Tensor, filler: int) -> torch.Tensor:
            return F.pad(tensor, margin, value=filler)[:, stretch].contiguous()

        return replace(
            whole,
            input_ids=share(whole.input_ids, 0),
            position_ids=share(whole.position_ids, 0),
            labels=share(whole.labels, IGNORE),
        )


def use_ulysses(lm: nn.Module, config: TrainConfig) -> ModuleType | None:
    """Put the exchange around the model's attention. A collective; returns the groups for `deepspeed.initialize`.

    It holds for this process to its end, and for every model in it.
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


def loss_factor(stage: int, world_size: int, sequence_parallel_size: int) -> float:
    """What a rank's summed loss is multiplied by, so that DeepSpeed's division leaves the plain sum over all ranks.

    Without sequence parallelism it divides by the number of ranks. With it, ZeRO-3 still does, while the lower stages
    divide by the number of groups that have different rows.
    """
    return world_size if stage == 3 else world_size / sequence_parallel_size
