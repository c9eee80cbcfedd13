"""How the decoder layers of a model compute: fused kernels, activation checkpointing, compilation."""

import functools
import importlib.util

import torch
import torch.nn.attention.varlen  # defines its operation
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from cluster.errors import InputError
from trainer.config.train import TrainConfig

# The expensive operations of a layer. `selective` saves their outputs and recomputes everything else.
SAVED_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch._higher_order_ops.flex_attention,
]


def configure_layers(lm: nn.Module, config: TrainConfig) -> None:
    """Set up the layers of a model from transformers as the recipe says. Call it before adapters are added."""
    if uses_liger(config):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # The loss stays ours.
        _apply_liger_kernel_to_instance(
            model=lm, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
    if config.activation_checkpointing != "none":
        options: dict = {"use_reentrant": False}  # reentrant checkpoints break frozen weights and ZeRO-3's hooks
        if config.activation_checkpointing == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if config.compile:
        for layer in decoder_layers(lm):
            layer.compile(dynamic=True)  # row lengths vary


def decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model. Raises InputError if transformers does not mark them as such."""
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"train.compile: {type(lm).__name__} has no marked decoder layers to compile. Set train.compile=false."
        )
    return layers


def uses_liger(config: TrainConfig) -> bool:
    """Whether to use Liger's kernels. Raises InputError for liger=true on a machine that cannot run them."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    on_gpu = torch.cuda.is_available()
    if config.liger is True and not (installed and on_gpu):
        reason = "this machine has no GPU" if installed else "the package liger-kernel is not installed"
        raise InputError(f"train.liger=true does not work, because {reason}. Set train.liger=auto.")
    # torch.compile fuses the same operations itself, and cannot look into Liger's kernels.
    return installed and on_gpu and (config.liger is True or (config.liger == "auto" and not config.compile))
