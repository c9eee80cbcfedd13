"""What the shape of a model reveals before its weights are read, and before an engine or a rank starts."""

import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cluster.config import ModelConfig
from cluster.errors import InputError
from trainer.config.train import TrainConfig

POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)(\.|$)")


def shape_of(model: ModelConfig) -> PreTrainedModel:
    """The model on the meta device, from config.json alone. Raises InputError if transformers cannot build it."""
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
        with torch.device("meta"):
            # bf16, because some kernels have no float32 form on this device
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model.path: transformers cannot read {model.path} as a causal language model: {reason} "
            "Choose a text model that transformers has."
        ) from error


def require_safetensors(model: ModelConfig) -> None:
    """Raise InputError if a folder has weights, but not as safetensors. Other formats can run code when they load."""
    folder = Path(model.path)
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if folder.is_dir() and pickles and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model.path: {folder} has its weights as {pickles[0].name} only, a pickle, which can run code. Convert "
            f'them once, if you trust the file: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )


def check_positions(lm: PreTrainedModel, config: TrainConfig) -> None:
    """Raise InputError if rows may be longer than the model's table of positions. Computed positions have no end."""
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    tables = [name for name, _ in (*lm.named_parameters(), *lm.named_buffers()) if POSITION_TABLE.search(name)]
    num_virtual = config.prompt.num_virtual_tokens if config.tuning == "prompt" else 0
    if tables and limit is not None and config.max_seq_len + num_virtual > limit:
        virtual = f" and {num_virtual} virtual tokens are" if num_virtual else " is"
        raise InputError(
            f"train.max_seq_len={config.max_seq_len}{virtual} more than the {limit} positions of {type(lm).__name__}. "
            f"Set train.max_seq_len={limit - num_virtual}."
        )
