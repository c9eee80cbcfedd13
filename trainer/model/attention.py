"""Which attention a job uses, what it has to be told of packed rows, and our own for packed rows without a GPU."""

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
HOPPER = 9  # compute capability; the kernels of flash attention 3 are for it alone


def choose_attention(config: TrainConfig) -> str:
    """The recipe's attention, or for `auto` the fastest that this machine has.

    Flash attention needs 16 bits, and a packed row to itself. Next comes flex attention for packed rows, whose mask
    takes no memory; on CPUs PyTorch's own, a document at a time; and PyTorch's own as it is for all others.
    `check_isolation` tries what was chosen before the first step.
    """
    if config.attention == "flex_attention" and not torch.cuda.is_available():
        raise InputError(
            "train.attention=flex_attention: PyTorch has no backward pass of it on CPUs. Set auto or sdpa."
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


def bounds_of(position_ids: torch.Tensor) -> torch.Tensor:
    """Where documents begin and the last one ends, int32 [documents + 1], in rows [B, S] laid end to end."""
    positions = position_ids.reshape(-1)  # every row begins with a document, so none spans two
    starts = (positions == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([len(positions)])]).to(torch.int32)


def document_bounds(batch: "MicroBatch") -> dict[str, torch.Tensor | int]:
    """What transformers' FlashAttentionKwargs want for a micro-batch of one packed row, as a batch on the CPU has it.

    Without them every layer looks for the documents in `position_ids` on the GPU, and waits for the answer.
    """
    bounds = bounds_of(batch.position_ids)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


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
    """Causal attention of every document by itself: the work is that of its length squared, not of the row's.

    query [B, H, S, D], key and value [B, H or fewer, S, D]; cu_seq_lens_q [documents + 1] counts through all rows, and
    without it every row is one document. Returns [B, S, H, D]. Raises ValueError for masks and caches.
    """
    num_rows, _, width, _ = query.shape
    if attention_mask is not None or key.shape[2] != width:
        raise ValueError(f"{BY_DOCUMENT} knows no masks and no caches: it is for training on packed rows.")
    groups = module.num_key_value_groups
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    bounds = range(0, num_rows * width + 1, width) if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    rows: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]
    for begin, end in pairwise(bounds):
        row, start = divmod(begin, width)
        part = slice(start, start + end - begin)
        mask = _band(end - begin, sliding_window, query.device)
        rows[row].append(
            F.scaled_dot_product_attention(
                *(states[row : row + 1, :, part] for states in (query, key, value)),
                attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
            )
        )  # fmt: skip
    joined = torch.cat([torch.cat(parts, dim=2) for parts in rows])
    return joined.transpose(1, 2).contiguous(), None


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask [length, length] of a sliding window, or None where the document is no longer than the window."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(BY_DOCUMENT, attend_by_document)  # transformers makes no mask for a name it has none for
