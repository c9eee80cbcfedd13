"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751), which peft does not have.

In each layer two small networks are added, one after attention and one after the feed-forward, each on the output of
the sub-layer's last projection, before the residual connection adds it (section 2.1, figure 2). The base stays frozen.

    base = AutoModelForCausalLM.from_pretrained("org/base")
    lm = load_adapters(base, Path("runs/my-run/export"))
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
from trainer.model.adapter_base import check_base

KIND = "BOTTLENECK"  # where peft's configs have the name of their method
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# The last projection of each sub-layer, as Llama, Mistral, Qwen2, Qwen3, Gemma and Phi-3 name it.
SUBLAYER_ENDS = ("self_attn.o_proj", "mlp.down_proj")
INIT_STD = 1e-2  # section 3.6: a Gaussian cut off at two standard deviations, so that all starts near the identity


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


class Adapted(nn.Module):
    """A projection of the base with a bottleneck on its output."""

    def __init__(self, base_layer: nn.Linear, bottleneck: Bottleneck):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck = bottleneck

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bottleneck(self.base_layer(x))


def add_adapters(lm: PreTrainedModel, bottleneck_size: int, activation: str) -> PreTrainedModel:
    """Freeze `lm` and put adapters into it, in place.

    Raises InputError if its layers have not the parts that are known here.
    """
    ends = [
        name for name, module in lm.named_modules() if name.endswith(SUBLAYER_ENDS) and isinstance(module, nn.Linear)
    ]
    num_wanted = len(SUBLAYER_ENDS) * lm.config.get_text_config().num_hidden_layers
    if len(ends) != num_wanted:
        raise InputError(
            f"train.tuning=adapter: {type(lm).__name__} has {len(ends)} of the {num_wanted} projections "
            f"({' and '.join(SUBLAYER_ENDS)} in each layer) that adapters go after. Set train.tuning=lora."
        )
    lm.requires_grad_(False)
    for name in ends:
        parent, _, attribute = name.rpartition(".")
        layer = lm.get_submodule(name)
        bottleneck = Bottleneck(layer.out_features, bottleneck_size, activation)
        bottleneck.to(device=layer.weight.device, dtype=layer.weight.dtype)
        setattr(lm.get_submodule(parent), attribute, Adapted(layer, bottleneck))
    return lm


def has_adapters(lm: nn.Module) -> bool:
    return any(isinstance(module, Adapted) for module in lm.modules())


def save_adapters(lm: PreTrainedModel, folder: Path) -> None:
    """Write the adapters of `lm`, whose weights have to be whole in this process, and what they are."""
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
            "peft_type": KIND,
            "bottleneck_size": first.down.out_features,
            "activation": first.activation,
            "base_model_name_or_path": lm.name_or_path,
        },
    )


def is_bottleneck(folder: Path) -> bool:
    """Whether the adapter in `folder` is one of these rather than one of peft's."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{folder}: no {CONFIG_FILE}, so there is no adapter. Give the folder of one.")
    return json.loads(file.read_text()).get("peft_type") == KIND


def load_adapters(base: PreTrainedModel, folder: Path, revision: str | None = None) -> PreTrainedModel:
    """Put the adapters saved in `folder` into `base`, in place.

    revision: of `base`, if it is from the hub and not its main branch.

    Raises InputError if they belong to another model, or the folder holds something else.
    """
    if not is_bottleneck(folder):
        raise InputError(f"{folder}: not bottleneck adapters but peft's kind. Load it with peft.PeftModel.")
    check_base(base, revision, folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    lm = add_adapters(base, config["bottleneck_size"], config["activation"])
    tensors = load_file(folder / WEIGHTS_FILE)
    wanted = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    if tensors.keys() != wanted:
        raise InputError(
            f"{folder / WEIGHTS_FILE}: has {len(tensors)} tensors where {len(wanted)} belong. Export again."
        )
    lm.load_state_dict(tensors, strict=False)  # strict would ask for the base's weights as well
    return lm
