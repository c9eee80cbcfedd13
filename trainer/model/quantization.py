"""A base in 4 bits for QLoRA (Dettmers et al. 2023, arXiv 2305.14314), through bitsandbytes.

Never run by us: it needs an NVIDIA GPU, and this was written on machines without one. The settings are the paper's.
"""

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from cluster.errors import InputError


def require_four_bits() -> None:
    """Raise InputError if this machine cannot hold a model in 4 bits."""
    if not torch.cuda.is_available():
        raise InputError(
            "train.tuning=qlora needs an NVIDIA GPU: bitsandbytes computes with 4-bit weights there alone, and this "
            "machine has none. Set train.tuning=lora."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "train.tuning=qlora needs bitsandbytes, which is not installed. "
            "Install it (`uv pip install bitsandbytes`), or set train.tuning=lora."
        )


def four_bits(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization (section 3): the constants themselves are kept in 8 bits."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
