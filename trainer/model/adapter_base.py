"""Which base model an adapter was trained on: recorded beside the adapter, and compared before it is loaded.

An adapter of another model of the same shape loads without complaint and answers nonsense. Names of models do not tell
them apart (folders move, branches of the hub do too), so their weights do.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from cluster.errors import InputError
from cluster.files import write_json

RECORD = "base_model.json"
NUM_SAMPLED = 64  # values of each tensor; tuning a model moves nearly all of them


def record_base(base: PreTrainedModel, revision: str | None, folder: Path) -> None:
    """Write into an adapter's folder which base it belongs to."""
    write_json(folder / RECORD, {"model_type": base.config.model_type, "fingerprint": fingerprint(base, revision)})


def check_base(base: PreTrainedModel, revision: str | None, folder: Path) -> None:
    """Raise InputError unless `base` is the model that the adapter in `folder` was trained on."""
    file = folder / RECORD
    if not file.is_file():
        raise InputError(
            f"{folder}: no {RECORD}, so nothing says which model this adapter belongs to. Export it again."
        )
    recorded = json.loads(file.read_text())
    if recorded["fingerprint"] != (found := fingerprint(base, revision)):
        raise InputError(
            f"{folder}: this adapter was trained on another base ({recorded['model_type']}, fingerprint "
            f"{recorded['fingerprint']}) than {base.name_or_path} ({base.config.model_type}, {found}). "
            "Give the model that it was trained on."
        )


def fingerprint(base: PreTrainedModel, revision: str | None) -> str:
    """SHA-256 over name, shape and first values of every tensor in the files of `base`, 16 hex digits.

    revision: of a model on the hub, as it was given to from_pretrained, which leaves no trace of it.

    Read from the files, because in memory weights may be partitioned or in 4 bits. Neither the number of shards nor
    bf16 against float32 changes it. Raises InputError if the model was not read from safetensors files.
    """
    tensors = {}
    for file in _weight_files(base, revision):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - a safetensors file is no mapping
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
        from huggingface_hub import snapshot_download  # its weights are in the cache, as they were just read from there

        folder = Path(snapshot_download(base.name_or_path, revision=revision, local_files_only=True))
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no model*.safetensors, so what the adapter was trained on cannot be recorded.")
    return files
