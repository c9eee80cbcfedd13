"""The loss of labelled positions, computed in chunks, and NEFTune's noise on embeddings.

Logits are V numbers for every position, far more than any other activation. Here they exist for one chunk at a time:
the backward pass recomputes them from the hidden states.

Shapes: L labelled positions, D hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.config.train import TrainConfig


@dataclass(frozen=True)
class LossSettings:
    num_chunks: int = 1
    z_loss: float = 0.0
    neftune_noise_alpha: float = 0.0


PLAIN_LOSS = LossSettings()


def loss_settings(config: TrainConfig) -> LossSettings:
    """Settings with as many chunks as a full micro-batch needs if every token has a label."""
    num_chunks = math.ceil(config.micro_batch_size * config.max_seq_len / config.loss_chunk_tokens)
    return LossSettings(num_chunks, config.z_loss, config.neftune_noise_alpha)


def chunked_loss(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """Summed cross-entropy of `labels` [L] under `head(hidden)` for `hidden` [L, D]. Returns a float32 scalar.

    With a z-loss, the gradient is that of cross-entropy + z_loss * log(Z)^2, where Z is the softmax's denominator
    (Chowdhery et al. 2022, section 5). The value stays the cross-entropy, so that losses can be compared.

    `head` is called as a module, so that ZeRO-3 gathers its weight. It is called `num_chunks` times even if chunks are
    empty, because ZeRO-3 prefetches weights in the order of modules that it recorded before.
    """
    num_chunks, size = settings.num_chunks, math.ceil(len(labels) / settings.num_chunks)
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in head.modules())  # an adapter's
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for chunk in range(num_chunks):
        part = slice(chunk * size, (chunk + 1) * size)
        arguments = (head, hidden[part], labels[part], settings.z_loss)
        if num_chunks == 1 or not torch.is_grad_enabled():
            total = total + _chunk_loss(*arguments)
        else:
            total = total + checkpoint(_chunk_loss, *arguments, use_reentrant=False, preserve_rng_state=has_dropout)
    return total


def _chunk_loss(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, z_loss: float) -> torch.Tensor:
    logits = head(hidden).float()  # [chunk, V]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    if z_loss:
        penalty = z_loss * torch.logsumexp(logits, dim=-1).square().sum()
        loss = loss + (penalty - penalty.detach())
    return loss


class EmbeddingNoise:
    """Uniform noise on the input embeddings in training: NEFTune (Jain et al. 2023, arXiv 2310.05914, section 2).

    Each element of a document of T tokens changes by at most alpha / sqrt(T * D). The sequence here is the document,
    not the packed row. The noise comes from the device's generator, whose state is in checkpoints.
    """

    def __init__(self, embedding: nn.Module, alpha: float):
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        embedding.register_forward_hook(self._add)

    def set_documents(self, position_ids: torch.Tensor) -> None:
        """Set the documents of the next forward pass. `position_ids` [B, S] restart at each of them."""
        self.lengths = document_lengths(position_ids)

    def _add(self, embedding: nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        if not embedding.training or self.lengths is None:
            return output
        bound = self.alpha / torch.sqrt(self.lengths * output.shape[-1])  # [B, S]
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * bound[..., None].to(output.dtype)


def document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """For every position, the number of tokens of its document. [B, S]"""
    numbers = (position_ids.reshape(-1) == 0).cumsum(0)  # [B * S]: rows start at 0 too, so no document spans two
    return numbers.bincount()[numbers].reshape(position_ids.shape)
