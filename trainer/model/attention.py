"""Which attention implementation a job uses, its arguments for packed rows, and one for packed rows on a CPU."""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from cluster.errors import InputError
from trainer.config.train import TrainConfig

if TYPE_CHECKING:
    from trainer.data.batches import MicroBatch

BY_DOCUMENT = "sdpa_by_document"
HOPPER = 9  # compute capability (major) of the only GPUs that have the kernels of flash attention 3


def choose_attention(config: TrainConfig) -> str:
    """The recipe's attention. For `auto`, the fastest one that this machine has.

    Flash attention needs 16 bits and, if rows are packed, micro-batches of one row. Second is flex attention for packed
    rows, because its mask takes no memory. On CPUs packed rows get SDPA one document at a time. Everything else gets
    SDPA. `check_isolation` tests the choice before the first step.

    Raises InputError for flex attention on a CPU.
    """
    if config.attention == "flex_attention" and not torch.cuda.is_available():
        raise InputError(
            "train.attention=flex_attention does not work on CPUs, where it has no backward pass. Set auto or sdpa."
        )
    if config.attention != "auto":
        return config.attention
    if not torch.cuda.is_available():
        can_split = config.packing and config.sequence_parallel_size == 1 and not config.compile
        return BY_DOCUMENT if can_split else "sdpa"
    if config.precision == "bf16" and not (config.packing and config.micro_batch_size > 1):
        if is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == HOPPER:
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "flex_attention" if config.packing and config.sequence_parallel_size == 1 else "sdpa"


def cumulative_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """`cu_seq_lens` of the documents in rows [B, S] that are joined end to end. int32 [documents + 1]"""
    positions = position_ids.reshape(-1)  # a document starts at the start of every row, so no document spans two
    starts = (positions == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([len(positions)])]).to(torch.int32)


def flash_attention_kwargs(batch: "MicroBatch") -> dict[str, torch.Tensor | int]:
    """transformers' FlashAttentionKwargs for a micro-batch of one packed row that is still on the CPU.

    Without them every layer would look for the documents in `position_ids` on the GPU, and wait for the result.
    """
    lengths = cumulative_lengths(batch.position_ids)
    longest = int(lengths.diff().max())
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


def attend_by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention, one document at a time: its cost grows with the square of a document's length, not of a row's.

    query [B, H, S, D], key and value [B, H or fewer, S, D]. cu_seq_lens_q [documents + 1] counts tokens through all
    rows; None means that every row is one document. Returns [B, S, H, D]. Raises ValueError for masks and caches.
    """
    num_rows, _, width, _ = query.shape
    if attention_mask is not None or key.shape[2] != width:
        raise ValueError(f"{BY_DOCUMENT} supports neither masks nor caches: it is for training on packed rows.")
    groups = module.num_key_value_groups
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    bounds = range(0, num_rows * width + 1, width) if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    rows: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]
    for begin, end in pairwise(bounds):
        row, start = divmod(begin, width)
        part = slice(start, start + end - begin)
        mask = _sliding_window_mask(end - begin, sliding_window, query.device)
        rows[row].append(
            F.scaled_dot_product_attention(
                *(states[row : row + 1, :, part] for states in (query, key, value)),
                attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
            )
        )  # fmt: skip
    joined = torch.cat([torch.cat(parts, dim=2) for parts in rows])
    return joined.transpose(1, 2).contiguous(), None


def _sliding_window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask [length, length] of a sliding window. None means that the document is no longer than the window."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(BY_DOCUMENT, attend_by_document)  # transformers makes no mask for an unknown name
