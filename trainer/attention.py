"""Which attention a job uses, and what flash attention has to be told of packed rows."""

from typing import TYPE_CHECKING

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from cluster.errors import InputError
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from trainer.batches import MicroBatch

HOPPER = 9  # compute capability; the kernels of flash attention 3 are for it alone


def choose_attention(config: TrainConfig) -> str:
    """The recipe's attention, or for `auto` the fastest that this machine has.

    Flash attention needs 16 bits, and a packed row to itself. Next comes flex attention for packed rows, whose mask
    takes no memory, and PyTorch's own for all others. `check_isolation` tries what was chosen before the first step.
    """
    if config.attention == "flex_attention" and not torch.cuda.is_available():
        raise InputError(
            "train.attention=flex_attention: PyTorch has no backward pass of it on CPUs. Set auto or sdpa."
        )
    if config.attention != "auto":
        return config.attention
    if not torch.cuda.is_available():
        return "sdpa"
    if config.precision == "bf16" and not (config.packing and config.micro_batch_size > 1):
        if is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == HOPPER:
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "flex_attention" if config.packing and config.sequence_parallel_size == 1 else "sdpa"


def document_bounds(batch: "MicroBatch") -> dict[str, torch.Tensor | int]:
    """What transformers' FlashAttentionKwargs want for a micro-batch of one packed row, as a batch on the CPU has it.

    Without them every layer looks for the documents in `position_ids` on the GPU, and waits for the answer.
    """
    (positions,) = batch.position_ids
    starts = (positions == 0).nonzero().flatten()
    bounds = torch.cat([starts, torch.tensor([len(positions)])]).to(torch.int32)  # [documents + 1]
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
