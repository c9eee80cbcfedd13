"""How the decoder layers of a loaded model compute: fused kernels, what is kept for the backward pass, compilation."""

import functools
import importlib.util

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from cluster.errors import InputError
from trainer.config.train import TrainConfig

# What a layer spends its time on: its outputs are kept, everything else is cheap to make again.
DEAR = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch._higher_order_ops.flex_attention,
}


def fit_layers(lm: nn.Module, config: TrainConfig) -> None:
    """Set up the layers as the recipe says. For a model as transformers loaded it, before adapters go in."""
    if uses_liger(config):
        use_liger(lm)
    if config.activation_checkpointing != "none":
        # Without reentrance, so that frozen weights and ZeRO-3's hooks work.
        how: dict = {"use_reentrant": False}
        if config.activation_checkpointing == "selective":
            how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_what_is_dear)
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if config.compile:
        for layer in decoder_layers(lm):
            layer.compile(dynamic=True)  # rows differ in length


def decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """Raises InputError for a model whose layers transformers does not mark."""
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"train.compile: {type(lm).__name__} has no marked decoder layers. Set train.compile=false.")
    return layers


def _keep_what_is_dear(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def uses_liger(config: TrainConfig) -> bool:
    """Whether Liger's kernels go in. Raises InputError if the recipe insists and they cannot run here."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    on_gpu = torch.cuda.is_available()
    if config.liger is True and not (installed and on_gpu):
        lacking = "the package is not installed: pip install liger-kernel" if not installed else "there is no GPU here"
        raise InputError(f"train.liger=true, and {lacking}. Or set train.liger=auto.")
    return config.liger is not False and installed and on_gpu


def use_liger(lm: nn.Module) -> None:
    """Replace RMSNorm, rotary embeddings and SwiGLU by Liger's; the loss stays ours. Written for GPUs, not run yet."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        model=lm, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
