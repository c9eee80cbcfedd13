"""Which attention implementation a job uses, its arguments for packed rows, and two for packed rows."""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from cluster.errors import InputError
from trainer.config.train import TrainConfig

if TYPE_CHECKING:
    from trainer.data.batches import MicroBatch

BY_DOCUMENT = "sdpa_by_document"
VARLEN = "varlen"
HOPPER = 9  # compute capability (major) of the only GPUs that have the kernels of flash attention 3


def choose_attention(config: TrainConfig) -> str:
    """The recipe's attention. For `auto`, the fastest one that this machine has.

    On a GPU packed rows in bf16 get PyTorch's own flash attention, or version 3 of the package on the GPUs that it is
    made for. On a CPU, and in float32, they get SDPA one document at a time, and SDPA with a mask in compiled layers,
    which cannot loop over documents. Rows that are not packed get the flash attention package if it is installed and
    the precision is bf16, otherwise SDPA. `check_isolation` tests the choice before the first step.

    Raises InputError for flex attention or varlen on a CPU.
    """
    if config.attention in ("flex_attention", VARLEN) and not torch.cuda.is_available():
        reason = "has no backward pass" if config.attention == "flex_attention" else "is not implemented"
        raise InputError(
            f"train.attention={config.attention} does not work on CPUs, where it {reason}. Set auto or sdpa."
        )
    if config.attention != "auto":
        return config.attention
    flash = torch.cuda.is_available() and config.precision == "bf16"
    is_packed = config.packing and config.sequence_parallel_size == 1
    if flash and (config.micro_batch_size == 1 or not config.packing):
        if is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == HOPPER:
            return "flash_attention_3"
        if is_flash_attn_2_available() and not is_packed:
            return "flash_attention_2"
    if is_packed:
        return VARLEN if flash else "sdpa" if config.compile else BY_DOCUMENT
    return "sdpa"


def cumulative_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """`cu_seq_lens` of the documents in rows [B, S] that are joined end to end. int32 [documents + 1]"""
    positions = position_ids.reshape(-1)  # a document starts at the start of every row, so no document spans two
    starts = (positions == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([len(positions)])]).to(torch.int32)


def flash_attention_kwargs(batch: "MicroBatch") -> dict[str, torch.Tensor | int]:
    """transformers' FlashAttentionKwargs for a micro-batch of packed rows that is still on the CPU.

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


def attend_varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside documents by the flash attention that PyTorch brings. Any number of rows in one call.

    The arguments and the result are those of `attend_by_document`, and max_length_q is the length of the longest
    document. Raises ValueError for masks, caches and dropout.
    """
    num_rows, _, width, _ = query.shape
    if attention_mask is not None or key.shape[2] != width or dropout:
        raise ValueError(f"{VARLEN} supports neither masks, caches nor dropout: it is for training on packed rows.")
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # [B * S, H, D]
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, num_rows * width + 1, width, dtype=torch.int32, device=query.device)
        max_length_q = width
    longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else max_length_q
    window = -1 if sliding_window is None else sliding_window - 1  # PyTorch does not count the query itself
    joined = varlen_attn(
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, longest, longest,
        scale=scaling, window_size=(window, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return joined.unflatten(0, (num_rows, width)), None


def _sliding_window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask [length, length] of a sliding window. None means that the document is no longer than the window."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


for name, attend in ((BY_DOCUMENT, attend_by_document), (VARLEN, attend_varlen)):
    AttentionInterface.register(name, attend)  # transformers makes no mask for an unknown name
