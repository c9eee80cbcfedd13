"""The loss on labelled positions, a chunk of them at a time, and the noise that may be added to embeddings.

Logits are V numbers for every position, far more than anything else of a forward pass. Here they exist for one chunk
only: the backward pass makes them again from the hidden states.

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
    """As many chunks as the largest micro-batch needs, if all of its tokens had a label."""
    num_chunks = math.ceil(config.micro_batch_size * config.max_seq_len / config.loss_chunk_tokens)
    return LossSettings(num_chunks, config.z_loss, config.neftune_noise_alpha)


def chunked_loss(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """Summed cross-entropy of `labels` [L] under `head(hidden)` for `hidden` [L, D]. Returns a float32 scalar.

    With a z-loss, its gradient is that of cross-entropy + z_loss * log(Z)^2, where Z is the softmax's denominator
    (Chowdhery et al. 2022, section 5); its value stays the cross-entropy, so that figures can be compared.

    `head` is called as a module, so that ZeRO-3 gathers its weight, and always `num_chunks` times, on empty chunks too:
    ZeRO-3 prefetches by the order of modules it saw before, and keeps a weight that it knows to be needed again.
    """
    num_chunks, size = settings.num_chunks, math.ceil(len(labels) / settings.num_chunks)
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in head.modules())  # an adapter's
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for chunk in range(num_chunks):
        part = slice(chunk * size, (chunk + 1) * size)
        arguments = (head, hidden[part], labels[part], settings.z_loss)
        if num_chunks == 1 or not torch.is_grad_enabled():
            total = total + _loss(*arguments)
        else:
            total = total + checkpoint(_loss, *arguments, use_reentrant=False, preserve_rng_state=has_dropout)
    return total


def _loss(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, z_loss: float) -> torch.Tensor:
    logits = head(hidden).float()  # [chunk, V]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    if z_loss:
        penalty = z_loss * torch.logsumexp(logits, dim=-1).square().sum()
        loss = loss + (penalty - penalty.detach())
    return loss


class EmbeddingNoise:
    """Uniform noise on the input embeddings while training: NEFTune (Jain et al. 2023, arXiv 2310.05914, section 2).

    Each element of a document of T tokens is moved by at most alpha / sqrt(T * D), where the document, not the packed
    row, is the sequence. Drawn from the device's own generator, whose state checkpoints keep.
    """

    def __init__(self, embedding: nn.Module, alpha: float):
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        embedding.register_forward_hook(self._add)

    def follow(self, position_ids: torch.Tensor) -> None:
        """Say which documents the next forward pass has: `position_ids` [B, S] restart at each."""
        self.lengths = document_lengths(position_ids)

    def _add(self, embedding: nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        if not embedding.training or self.lengths is None:
            return output
        bound = self.alpha / torch.sqrt(self.lengths * output.shape[-1])  # [B, S]
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * bound[..., None].to(output.dtype)


def document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """For every position of [B, S], how many tokens its document has."""
    numbers = (position_ids.reshape(-1) == 0).cumsum(0)  # [B * S]: rows begin at 0 too, so no document spans two
    return numbers.bincount()[numbers].reshape(position_ids.shape)
