"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751), which peft does not have.

Each layer gets two small networks, one after attention and one after the feed-forward. They process the output of the
sub-layer's last projection, before the residual connection (section 2.1, figure 2). The base stays frozen.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from cluster.errors import InputError
from cluster.files import write_json

PEFT_TYPE = "BOTTLENECK"  # in the config file, where peft has the name of a method of its own
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# The last projection of each sub-layer, by its name in Llama, Mistral, Qwen2, Qwen3, Gemma and Phi-3.
LAST_PROJECTIONS = ("self_attn.o_proj", "mlp.down_proj")
INIT_STD = 1e-2  # of a Gaussian truncated at two standard deviations (section 3.6): starts near the identity


class Bottleneck(nn.Module):
    """x + up(activation(down(x))) for x [..., H]."""

    def __init__(self, hidden_size: int, bottleneck_size: int, activation: str):
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(hidden_size, bottleneck_size)
        self.up = nn.Linear(bottleneck_size, hidden_size)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(ACT2FN[self.activation](self.down(x)))


class LinearWithBottleneck(nn.Module):
    """A projection of the base with a bottleneck after it."""

    def __init__(self, base_layer: nn.Linear, bottleneck: Bottleneck):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck = bottleneck

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bottleneck(self.base_layer(x))


def add_bottlenecks(lm: PreTrainedModel, bottleneck_size: int, activation: str) -> PreTrainedModel:
    """Freeze `lm` and add adapters to it, in place.

    Raises InputError if its layers do not have the projections named in LAST_PROJECTIONS.
    """
    projections = [
        name for name, module in lm.named_modules() if name.endswith(LAST_PROJECTIONS) and isinstance(module, nn.Linear)
    ]
    num_expected = len(LAST_PROJECTIONS) * lm.config.get_text_config().num_hidden_layers
    if len(projections) != num_expected:
        raise InputError(
            f"train.tuning=adapter does not work with {type(lm).__name__}, which has {len(projections)} of the "
            f"{num_expected} projections that adapters follow ({' and '.join(LAST_PROJECTIONS)} in each layer). "
            "Set train.tuning=lora."
        )
    lm.requires_grad_(False)
    for name in projections:
        parent, _, attribute = name.rpartition(".")
        layer = lm.get_submodule(name)
        bottleneck = Bottleneck(layer.out_features, bottleneck_size, activation)
        bottleneck.to(device=layer.weight.device, dtype=layer.weight.dtype)
        setattr(lm.get_submodule(parent), attribute, LinearWithBottleneck(layer, bottleneck))
    return lm


def has_bottlenecks(lm: nn.Module) -> bool:
    return any(isinstance(module, LinearWithBottleneck) for module in lm.modules())


def save_bottlenecks(lm: PreTrainedModel, folder: Path) -> None:
    """Write the adapters of `lm` and their config. Their weights must not be partitioned."""
    bottlenecks = {name: module for name, module in lm.named_modules() if isinstance(module, Bottleneck)}
    first = next(iter(bottlenecks.values()))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().clone()
        for name, module in bottlenecks.items()
        for key, tensor in module.named_parameters()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(
        folder / CONFIG_FILE,
        {
            "peft_type": PEFT_TYPE,
            "bottleneck_size": first.down.out_features,
            "activation": first.activation,
            "base_model_name_or_path": lm.name_or_path,
        },
    )


def is_bottleneck(folder: Path) -> bool:
    """Whether the adapter in `folder` is a bottleneck adapter, and not one of peft's."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{folder}: there is no {CONFIG_FILE}. Choose the folder of an adapter.")
    return json.loads(file.read_text()).get("peft_type") == PEFT_TYPE


def load_bottlenecks(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add the adapters saved in `folder` to `base`, in place. Raises InputError if some are missing."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    lm = add_bottlenecks(base, config["bottleneck_size"], config["activation"])
    tensors = load_file(folder / WEIGHTS_FILE)
    expected = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    if tensors.keys() != expected:
        raise InputError(
            f"{folder / WEIGHTS_FILE}: found {len(tensors)} tensors, expected {len(expected)}. Export again."
        )
    lm.load_state_dict(tensors, strict=False)  # strict would require the base's weights too
    return lm
