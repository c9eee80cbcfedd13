"""Tuning methods that train an adapter: how the adapter is added to a model, saved, and loaded again.

Bottleneck adapters are in bottleneck.py, all other methods in peft. trainer/config/tuning.py has their combinations.

The folder of an adapter names its base model. An adapter of another model of the same shape loads without an error and
generates nonsense. The name of a model does not identify it (folders and branches change), so a fingerprint of its
weights does.
"""

import copy
import hashlib
import json
from pathlib import Path

import torch
from peft import IA3Config as PeftIa3Config
from peft import LoraConfig as PeftLoraConfig
from peft import (
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.files import write_json
from trainer.config.train import TrainConfig
from trainer.model.bottleneck import (
    WEIGHTS_FILE,
    add_bottlenecks,
    has_bottlenecks,
    is_bottleneck,
    load_bottlenecks,
    save_bottlenecks,
)

BASE_FILE = "base_model.json"
LINEAR = (nn.Linear, Conv1D)  # GPT-2 has the latter
NUM_SAMPLED = 64  # values from each tensor; full tuning changes nearly all of them


def adapt(lm: PreTrainedModel, model: ModelConfig, config: TrainConfig, added_token_ids: list[int]) -> nn.Module:
    """`lm` with the adapter of the recipe: a PeftModel around it, or `lm` itself with bottleneck adapters.

    With tuning=full it is returned as it is. Raises InputError if the model lacks the layers that the recipe names.
    """
    if config.tuning == "full":
        return lm
    lm.base_revision = model.revision  # saved with the adapter
    if config.tuning == "adapter":
        return add_bottlenecks(lm, config.adapter.bottleneck_size, config.adapter.activation)
    section = f"train.{'lora' if config.tuning == 'qlora' else config.tuning}"
    peft_config = _peft_config(lm, model, config, added_token_ids)
    _require_targets(lm, section, peft_config)
    is_tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    try:
        adapted = get_peft_model(lm, peft_config, revision=model.revision)
    except ValueError as error:  # peft did not find the layers
        raise InputError(f"{section}: {error} ({type(lm).__name__}). It has {', '.join(_linear_names(lm))}.") from error
    if is_tied and any(isinstance(layer, BaseTunerLayer) for layer in _vocabulary_modules(lm)):
        raise InputError(
            f"{section}: the head and the input embedding of {type(lm).__name__} are one tied weight, and an adapter "
            f"of one would be merged into both. Leave {' and '.join(_vocabulary_layers(lm))} out of its modules."
        )
    return adapted


def _require_targets(lm: nn.Module, section: str, peft_config: PeftConfig) -> None:
    """Raise InputError unless `lm` has every module that the recipe names. peft is content with one of them."""
    targets = getattr(peft_config, "target_modules", None)
    if targets is None or isinstance(targets, str):
        return
    names = [name for name, _ in lm.named_modules()]
    absent = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if absent:
        raise InputError(
            f"{section}: {type(lm).__name__} has no module {', '.join(sorted(absent))}. Name only modules that it has: "
            f"{', '.join(_linear_names(lm))}."
        )


def _linear_names(lm: nn.Module) -> list[str]:
    """Last parts of the names of the linear layers, which adapters are for."""
    return sorted({name.rpartition(".")[2] for name, module in lm.named_modules() if isinstance(module, LINEAR)})


def _peft_config(
    lm: PreTrainedModel, model: ModelConfig, config: TrainConfig, added_token_ids: list[int]
) -> PeftConfig:
    if config.tuning in ("lora", "qlora"):
        return _lora(lm, config, added_token_ids)
    if config.tuning == "ia3":
        ia3 = config.ia3
        return PeftIa3Config(
            task_type=TaskType.CAUSAL_LM,
            target_modules=[*ia3.attention_modules, *ia3.feedforward_modules],
            feedforward_modules=list(ia3.feedforward_modules),
        )
    if config.tuning == "prefix":
        return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=config.prefix.num_virtual_tokens)
    text = config.prompt.init_text
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=config.prompt.num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT if text else PromptTuningInit.SAMPLE_VOCAB,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=model.path if text else None,
        tokenizer_kwargs={"revision": model.revision} if text else None,
    )


def _lora(lm: PreTrainedModel, config: TrainConfig, added_token_ids: list[int]) -> PeftLoraConfig:
    lora = config.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        trainable_token_indices=dict.fromkeys(_vocabulary_layers(lm), added_token_ids) if added_token_ids else None,
    )


def _vocabulary_layers(lm: nn.Module) -> list[str]:
    """Names of the input embedding and the head. If they are not tied, rows of both have to be trained."""
    layers = _vocabulary_modules(lm)
    return [name.rpartition(".")[2] for name, module in lm.named_modules() if module in layers]


def _vocabulary_modules(lm: nn.Module) -> tuple[nn.Module, nn.Module]:
    return lm.get_input_embeddings(), lm.get_output_embeddings()


def base_of(lm: nn.Module) -> PreTrainedModel:
    """The model of transformers, without the PeftModel around it."""
    return lm.get_base_model() if isinstance(lm, PeftModel) else lm


def decoder_of(lm: nn.Module) -> PreTrainedModel:
    """The part of the model below its head. A model may name itself as its decoder, such as Llama 4's."""
    base = base_of(lm)
    decoder = base.get_decoder()
    if decoder is not base:
        return decoder
    return next(child for child in base.children() if isinstance(child, PreTrainedModel))


def has_virtual_tokens(lm: nn.Module) -> bool:
    return isinstance(lm, PeftModel) and lm.active_peft_config.is_prompt_learning


def with_virtual_tokens(lm: PeftModel, input_ids: torch.Tensor) -> dict[str, object]:
    """The decoder's inputs for input_ids [B, S] with N virtual tokens in front.

    Prefix tuning: their keys and values as attention cache. Prompt tuning: embeddings [B, N + S, H].
    """
    virtual = lm.get_prompt(batch_size=len(input_ids))
    if lm.active_peft_config.peft_type == "PREFIX_TUNING":
        return {"input_ids": input_ids, "past_key_values": virtual, "use_cache": True}
    embedded = base_of(lm).get_input_embeddings()(input_ids)
    return {"inputs_embeds": torch.cat([virtual.to(embedded.dtype), embedded], dim=1), "use_cache": False}


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to norms, biases or the vectors of IA3, which start at 1."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the shape of a partitioned weight
    return len(shape) >= 2 and ".ia3_l." not in name


def is_adapted(lm: nn.Module) -> bool:
    """Whether the model has an adapter."""
    return isinstance(lm, PeftModel) or has_bottlenecks(lm)


def save_adapter(lm: nn.Module, folder: Path) -> None:
    """Write the adapter of `lm` and its base's fingerprint. The adapter's weights must not be partitioned."""
    if not isinstance(lm, PeftModel):
        save_bottlenecks(lm, folder)
    elif has_virtual_tokens(lm):
        _save_virtual_tokens(lm, folder)
    else:
        # The adapter already has the rows of added tokens; whole embeddings would make it many times larger.
        lm.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    base = base_of(lm)
    found = {"model_type": base.config.model_type, "fingerprint": fingerprint(base, base.base_revision)}
    write_json(folder / BASE_FILE, found)


def _save_virtual_tokens(lm: PeftModel, folder: Path) -> None:
    """Like peft's save_pretrained, which however calls the prompt's module, and with ZeRO-3 waits for other ranks."""
    config = copy.deepcopy(lm.active_peft_config)
    config.inference_mode = True
    config.save_pretrained(folder)
    weight = lm.prompt_encoder[lm.active_adapter].embedding.weight
    save_file({"prompt_embeddings": weight.detach().cpu().clone()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(
    base: PreTrainedModel, folder: Path, revision: str | None = None, vocabulary_size: int = 0
) -> nn.Module:
    """`base` in evaluation mode with the adapter of `folder`, which may be of any method.

    revision: of `base` if it comes from the hub. None means its main branch.
    vocabulary_size: of the tokenizer, if the adapter trained tokens that the base lacks.
    Raises InputError if the adapter was trained on another base, or if the folder has no whole adapter.
    """
    is_ours = is_bottleneck(folder)
    check_base(base, revision, folder)
    if vocabulary_size > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(vocabulary_size, pad_to_multiple_of=64, mean_resizing=True)
    lm = load_bottlenecks(base, folder) if is_ours else PeftModel.from_pretrained(base, folder)
    return lm.eval()


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
        raise InputError(
            f"{folder}: there is no model*.safetensors, which identifies the base of an adapter. Use a base "
            "with safetensors."
        )
    return files
