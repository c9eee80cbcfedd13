"""Two implementations of attention for packed rows, and the arguments of flash attention for packed rows."""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from cluster.errors import InputError

if TYPE_CHECKING:
    from trainer.data.batches import MicroBatch

BY_DOCUMENT = "sdpa_by_document"
VARLEN = "varlen"
# Keyword arguments of an attention function that change nothing in training on rows without a mask and a cache.
HARMLESS = frozenset(
    {
        "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "is_causal", "max_length_k", "max_length_q",
        "output_attentions", "output_hidden_states", "output_router_logits", "position_ids", "scaling", "use_cache",
    }
)  # fmt: skip


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
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention, one document at a time: its cost grows with the square of a document's length, not of a row's.

    query [B, H, S, D], key and value [B, H or fewer, S, D]. cu_seq_lens_q [documents + 1] counts tokens through all
    rows; None means that every row is one document. Returns [B, S, H, D]. Raises InputError for masks, caches and
    arguments that it does not know, because the model's attention would then be another one.
    """
    _refuse_unknown(BY_DOCUMENT, module, query, key, attention_mask, is_causal, others)
    num_rows, num_heads, width, _ = query.shape
    key, value = (repeat_kv(states, num_heads // states.shape[1]) for states in (key, value))
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
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside documents by the flash attention that PyTorch brings. Any number of rows in one call.

    The arguments and the result are those of `attend_by_document`, and max_length_q is the length of the longest
    document. Raises InputError for dropout too.
    """
    others["dropout > 0"] = dropout or None
    _refuse_unknown(VARLEN, module, query, key, attention_mask, is_causal, others)
    num_rows, _, width, _ = query.shape
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


def _refuse_unknown(
    attention: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None,
    is_causal: bool | None, others: dict[str, object],
) -> None:  # fmt: skip
    """Raise InputError for what would make the model's attention another one than this implementation's."""
    given = {name for name, value in others.items() if value is not None and value is not False}
    unknown = sorted(given - HARMLESS)
    if attention_mask is not None or key.shape[2] != query.shape[2] or is_causal is False:
        unknown.append("a mask or a cache")
    if unknown:
        raise InputError(
            f"train.attention={attention} does not know {', '.join(unknown)}, which {type(module).__name__} passes "
            "to its attention. Set train.attention=eager."
        )


def _sliding_window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask [length, length] of a sliding window. None means that the document is no longer than the window."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


for name, attend in ((BY_DOCUMENT, attend_by_document), (VARLEN, attend_varlen)):
    AttentionInterface.register(name, attend)  # transformers makes no mask for an unknown name
