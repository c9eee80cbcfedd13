"""Which base model an adapter was trained on: written next to the adapter, and compared before the adapter is loaded.

An adapter of another model of the same shape loads without an error and generates nonsense. The name of a model does
not identify it (folders and branches change), so a fingerprint of its weights does.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from cluster.errors import InputError
from cluster.files import write_json

BASE_FILE = "base_model.json"
NUM_SAMPLED = 64  # values from each tensor; full tuning changes nearly all of them


def record_base(base: PreTrainedModel, revision: str | None, folder: Path) -> None:
    """Write the base of an adapter into the adapter's folder."""
    write_json(folder / BASE_FILE, {"model_type": base.config.model_type, "fingerprint": fingerprint(base, revision)})


def check_base(base: PreTrainedModel, revision: str | None, folder: Path) -> None:
    """Raise InputError unless `base` is the model that the adapter in `folder` was trained on."""
    file = folder / BASE_FILE
    if not file.is_file():
        raise InputError(
            f"{folder}: {BASE_FILE} is missing, so the base of this adapter is unknown. Export the adapter again."
        )
    recorded = json.loads(file.read_text())
    if recorded["fingerprint"] != (found := fingerprint(base, revision)):
        raise InputError(
            f"{folder}: this adapter was trained on another base ({recorded['model_type']}, fingerprint "
            f"{recorded['fingerprint']}) than {base.name_or_path} ({base.config.model_type}, {found}). "
            "Use the model that it was trained on."
        )


def fingerprint(base: PreTrainedModel, revision: str | None) -> str:
    """SHA-256 over name, shape and first values of every tensor in the files of `base`, as 16 hex digits.

    revision: of a model on the hub, as passed to from_pretrained, which does not store it.

    The values are read from the files, because in memory weights may be partitioned or in 4 bits. The number of shards
    does not change the fingerprint, nor does bf16 instead of float32. Raises InputError if there are no safetensors
    files.
    """
    tensors = {}
    for file in _weight_files(base, revision):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                values = content.get_slice(name)
                shape = values.get_shape()
                first = (slice(1),) * (len(shape) - 1) + (slice(NUM_SAMPLED),)
                sample = values[first] if shape else content.get_tensor(name)
                tensors[name] = f"{name} {shape} ".encode() + _bytes(sample)
    return hashlib.sha256(b"\n".join(tensors[name] for name in sorted(tensors))).hexdigest()[:16]


def _bytes(sample: torch.Tensor) -> bytes:
    return sample.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def _weight_files(base: PreTrainedModel, revision: str | None) -> list[Path]:
    folder = Path(base.name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download  # the weights were just loaded, so they are cached

        folder = Path(snapshot_download(base.name_or_path, revision=revision, local_files_only=True))
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{folder}: there is no model*.safetensors, which identifies the base of an adapter.")
    return files
