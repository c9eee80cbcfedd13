"""Rows too long for one GPU: Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509) through DeepSpeed.

A group of `sequence_parallel_size` neighboring ranks shares its rows: each rank has one part of every row, from
`trainer.data.sequence_parallel`. For attention the ranks exchange data, so that each has all positions of a part of the
heads. All other parts of a decoder work on each position separately.
"""

from types import ModuleType

from torch import nn

from trainer.config.train import TrainConfig


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
