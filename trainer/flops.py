"""Model FLOPs utilization (MFU): the FLOPs that a step needs, as a fraction of what the GPUs could do in its time.

Convention (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, with half of the attention because of the causal mask):
- a trained weight counts 6 FLOPs per token (2 forward, 4 backward); a frozen weight 4, because it has no gradient;
- the input embedding is a lookup and counts nothing; the head runs only on tokens with a label and counts for those;
- attention counts 6 * layers * heads * head_dim * length^2 for a document of `length` tokens, so packing adds nothing;
- recomputation for activation checkpointing does not count.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

# Peak of dense bf16 in FLOP/s, from NVIDIA's datasheets, which print the double for sparse matrices.
# The first name that is contained in the device's name applies.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12,
    "H800": 989e12, "H20": 148e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12,
    "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
}  # fmt: skip
EXPERT_SETTINGS = ("num_local_experts", "num_experts", "n_routed_experts")  # a token uses some of the experts


def peak_flops(device_name: str) -> float | None:
    """Peak of dense bf16 in FLOP/s, by the device name of torch. None means that it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one model, forward and backward."""

    body: float  # per token
    head: float  # per token with a label
    attention: float  # per length^2 of a document

    def count(self, lengths: np.ndarray, num_trained_tokens: float) -> float:
        """FLOPs of documents of `lengths` [D] tokens, `num_trained_tokens` of which have a label."""
        lengths = lengths.astype(np.float64)
        return float(self.body * lengths.sum() + self.head * num_trained_tokens + self.attention * (lengths**2).sum())


def model_flops(lm: nn.Module) -> ModelFlops | None:
    """Count the weights of a model, with or without adapters. None means that the convention does not cover it."""
    settings = lm.config.get_text_config()
    heads = getattr(settings, "num_attention_heads", None)
    if heads is None or any(getattr(settings, name, None) for name in EXPERT_SETTINGS):
        return None
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    embedding, output = lm.get_input_embeddings(), lm.get_output_embeddings()
    in_head = {id(parameter) for parameter in output.parameters()}
    in_embedding = {id(parameter) for parameter in embedding.parameters()}
    body = head = 0.0
    for parameter in lm.parameters():
        flops = getattr(parameter, "ds_numel", parameter.numel()) * (6 if parameter.requires_grad else 4)
        if id(parameter) in in_head:
            head += flops
        elif id(parameter) not in in_embedding:
            body += flops
    return ModelFlops(body, head, 6.0 * settings.num_hidden_layers * heads * head_dim)


class Utilization:
    """Computes the MFU of steps, if the GPU and the model are known."""

    def __init__(self, lm: nn.Module, num_gpus: int):
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.peak, self.num_gpus = peak_flops(name), num_gpus
        self.flops = model_flops(lm) if self.peak else None

    def of_step(self, lengths: np.ndarray, num_trained_tokens: float, seconds: float) -> float | None:
        """The MFU of a step, from 0 to 1. None means that the GPU or the model is not known."""
        if self.flops is None or self.peak is None:
            return None
        return self.flops.count(lengths, num_trained_tokens) / seconds / (self.peak * self.num_gpus)
