"""Save the weights of a live engine as safetensors. Rank 0 gathers them one by one and holds one shard in memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from trainer.model.adapters import is_adapted, save_adapter

WEIGHTS_INDEX = "model.safetensors.index.json"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_weights(lm: nn.Module, folder: Path, max_shard_size: str) -> None:
    """Save `lm` in Hugging Face form, or only its adapter. A collective: every rank has to call it."""
    if is_adapted(lm):
        trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
        with deepspeed.zero.GatheredParameters(trained, modifier_rank=None):
            if dist.get_rank() == 0:
                save_adapter(lm, folder)
    else:
        shards = ShardedWeights(folder, parse_size(max_shard_size)) if dist.get_rank() == 0 else None
        for name, tensor in _gathered(lm):
            if shards is not None:
                shards.add(name, tensor)
        if shards is not None:
            shards.close()
            lm.config.save_pretrained(folder)
    dist.barrier()


def _gathered(lm: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, gathered on rank 0's CPU, and then the saved buffers. A tied weight comes once."""
    for name, parameter in lm.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            yield name, parameter.detach().cpu().clone() if dist.get_rank() == 0 else parameter
    saved = set(lm.state_dict(keep_vars=True))
    for name, buffer in lm.named_buffers():
        if name in saved:
            yield name, buffer.detach().cpu().clone()


class ShardedWeights:
    """Safetensors shards that are filled one after the other, with the index that transformers reads."""

    def __init__(self, folder: Path, max_shard_bytes: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + num_bytes > self.max_shard_bytes:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += num_bytes
        self.total_bytes += num_bytes

    def close(self) -> None:
        """Write the last shard, and rename all shards now that their number is known."""
        self._flush()
        total = len(self.shards)
        names = [self._file_name(number, total) for number in range(1, total + 1)]
        for number, name in enumerate(names, 1):
            (self.folder / f"shard-{number}.part").rename(self.folder / name)
        if total > 1:
            weight_map = {tensor: name for name, tensors in zip(names, self.shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @staticmethod
    def _file_name(number: int, total: int) -> str:
        return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"

    def _flush(self) -> None:
        if self.pending:
            self.shards.append(list(self.pending))
            save_file(self.pending, self.folder / f"shard-{len(self.shards)}.part", metadata={"format": "pt"})
        self.pending, self.pending_bytes = {}, 0


def parse_size(size: str) -> int:
    """ "4GB" -> 4000000000 bytes. Raises ValueError on anything but a number with KB, MB or GB."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", size)
    if match is None:
        raise ValueError(f"max_shard_size: {size!r} is not a size such as 4GB or 500MB")
    return int(match[1]) * UNITS[match[2]]
