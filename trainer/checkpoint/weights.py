"""Save the weights of a live engine as safetensors. Rank 0 gathers them one by one and holds one shard in memory."""

import json
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

from trainer.model.adapters import is_adapted, save_adapter

WEIGHTS_INDEX = "model.safetensors.index.json"


def save_weights(lm: nn.Module, folder: Path, max_shard_size: str) -> None:
    """Save `lm` in Hugging Face form, or only its adapter. A collective: every rank has to call it."""
    if is_adapted(lm):
        trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
        with deepspeed.zero.GatheredParameters(trained, modifier_rank=None):
            if dist.get_rank() == 0:
                save_adapter(lm, folder)
    else:
        _save_shards(lm, folder, max_shard_size)
    dist.barrier()


def _save_shards(lm: nn.Module, folder: Path, max_shard_size: str) -> None:
    """Save every parameter and saved buffer of `lm`, a tied weight once, and the index that transformers reads."""
    is_writer = dist.get_rank() == 0
    saved = lm.state_dict(keep_vars=True)
    tensors = dict(lm.named_parameters()) | {name: each for name, each in lm.named_buffers() if name in saved}
    # ZeRO-3 keeps the shape of a partitioned weight in `ds_shape`.
    shapes = {
        name: torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            with deepspeed.zero.GatheredParameters([tensors[name]], modifier_rank=None):
                if is_writer:
                    shard[name] = tensors[name].detach().cpu().clone().contiguous()
        if is_writer:
            save_file(shard, folder / file, metadata={"format": "pt"})
    if is_writer:
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        lm.config.save_pretrained(folder)
