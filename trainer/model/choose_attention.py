"""Which attention implementation a job uses. It depends on the recipe, the machine and what the model's code can do.

transformers hands a model's special arguments (a soft-cap, attention sinks) to every implementation, and those that do
not know an argument ignore it. The masks of some models let packed documents see each other. One forward pass on the
meta device shows both before weights are read.
"""

import inspect
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from cluster.errors import InputError
from trainer.config.train import TrainConfig
from trainer.model.adapters import decoder_of
from trainer.model.attention import BY_DOCUMENT, HARMLESS, VARLEN

HOPPER = 9  # compute capability (major) of the only GPUs that have the kernels of flash attention 3
RECORDER = "tunesmith_recorder"
DROPOUT = "dropout > 0"  # as an argument; dropout of 0 is harmless
# What each implementation does with the arguments that are not harmless. `eager` is the model's own code.
KNOWN = {
    BY_DOCUMENT: {"sliding_window", DROPOUT},
    VARLEN: {"sliding_window"},
    "sdpa": {"sliding_window", "attention_mask", "position_bias", DROPOUT},
    "flex_attention": {"sliding_window", "softcap", "s_aux"},
    "flash_attention_2": {"sliding_window", "softcap", DROPOUT},
    "flash_attention_3": {"sliding_window", "softcap"},
}
MASKED = ("sdpa", "flex_attention", "eager")  # keep packed documents apart by masks alone


@dataclass(frozen=True)
class AttentionFacts:
    """What a forward pass of the model reveals."""

    arguments: frozenset[str]  # names of what the layers pass to their attention
    masks_documents: bool  # the model's masks keep packed documents apart


def choose_attention(config: TrainConfig, lm: PreTrainedModel) -> tuple[TrainConfig, list[str]]:
    """The config with its attention, and lines for the log that say why it is not the usual one.

    `auto` takes the fastest implementation that machine and model have. If none of them keeps packed documents apart,
    `auto` also turns packing off. `check_isolation` tests the choice before the first step.
    lm: on the meta device; no weights are read.

    Raises InputError if the recipe's own choice does not work.
    """
    if config.attention in ("flex_attention", VARLEN) and not torch.cuda.is_available():
        reason = "has no backward pass" if config.attention == "flex_attention" else "is not implemented"
        raise InputError(
            f"train.attention={config.attention} does not work on CPUs, where it {reason}. Set auto or sdpa."
        )
    facts = read_attention(lm)
    if config.attention != "auto":
        if (reason := refusal(config.attention, lm, facts, config)) is not None:
            raise InputError(f"train.attention={config.attention} does not work: {reason}. Set train.attention=auto.")
        return config, []
    remarks = []
    for packing in sorted({config.packing, False}, reverse=True):
        candidate = config.model_copy(update={"packing": packing})
        for attention in (*_fastest_first(candidate), "eager"):
            if (reason := refusal(attention, lm, facts, candidate)) is None:
                if packing != config.packing:
                    remarks.append("packing is off")
                return candidate.model_copy(update={"attention": attention}), remarks
            remarks.append(f"attention: not {attention}{' on packed rows' if packing else ''}, because {reason}")
    raise AssertionError("without packing every model has eager attention")


def _fastest_first(config: TrainConfig) -> list[str]:
    """What this machine has.

    On a GPU packed rows in bf16 get PyTorch's own flash attention, or version 3 of the package on the GPUs that it is
    made for. On a CPU, and in float32, they get SDPA one document at a time, and SDPA with a mask in compiled layers,
    which cannot loop over documents. Rows that are not packed get the flash attention package if it is installed and
    the precision is bf16, otherwise SDPA.
    """
    found = []
    flash = torch.cuda.is_available() and config.precision == "bf16"
    is_packed = config.packing and config.sequence_parallel_size == 1
    if flash and (config.micro_batch_size == 1 or not config.packing):
        if is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == HOPPER:
            found.append("flash_attention_3")
        if is_flash_attn_2_available() and not is_packed:
            found.append("flash_attention_2")
    if is_packed and flash:
        found.append(VARLEN)
    if is_packed and not config.compile:
        found.append(BY_DOCUMENT)
    return [*found, "sdpa"]


def refusal(attention: str, lm: PreTrainedModel, facts: AttentionFacts, config: TrainConfig) -> str | None:
    """Why this implementation is not this model's attention. None means that it is."""
    name = type(lm).__name__
    supported = {
        BY_DOCUMENT: lm._supports_attention_backend,
        VARLEN: lm._supports_attention_backend,
        "sdpa": lm._supports_sdpa,
        "flex_attention": lm._supports_flex_attn,
        "flash_attention_2": lm._supports_flash_attn,
        "flash_attention_3": lm._supports_flash_attn,
        "eager": True,
    }
    if not supported[attention]:
        return f"{name} does not support it"
    masks = _masks_beyond_arguments(lm, facts.arguments, config.max_seq_len)
    if config.packing and attention in MASKED:
        if not facts.masks_documents:
            return f"the masks of {name} do not keep packed documents apart"
        if "chunked_attention" in masks:
            return f"the chunks of {name}'s masks count from the start of a row, not of a document"
    if attention == "eager" or not lm._supports_attention_backend:
        return None  # the code of the model itself
    if unknown := sorted(facts.arguments - HARMLESS - KNOWN[attention]):
        return f"it ignores {', '.join(unknown)}, which {name} passes"
    if attention in (BY_DOCUMENT, VARLEN) and masks:
        return f"it lacks the masks of {name} for {', '.join(sorted(masks))}"
    return None


def _masks_beyond_arguments(lm: PreTrainedModel, arguments: frozenset[str], max_seq_len: int) -> set[str]:
    """Kinds of layers whose attention needs a mask besides its arguments, on rows of `max_seq_len` tokens."""
    text = lm.config.get_text_config()
    has_window = getattr(text, "sliding_window", None) is not None
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if has_window else "full_attention"])
    kinds.discard("full_attention")
    if "sliding_window" in arguments:
        kinds.discard("sliding_attention")
    if (getattr(text, "attention_chunk_size", None) or 0) >= max_seq_len:
        kinds.discard("chunked_attention")
    return kinds


def read_attention(lm: PreTrainedModel) -> AttentionFacts:
    """Run `lm` on the meta device and record what reaches its attention and its masks.

    Models whose code reads values of tensors stop on the way. What they have passed until then counts:
    `attend_by_document` refuses the rest, and `check_isolation` finds masks that do not keep documents apart.
    """
    arguments, mask_calls = set(), []

    def record(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *masks: object, **others: object
    ) -> tuple[torch.Tensor, None]:
        arguments.update(name for name, value in others.items() if value is not None and value is not False)
        if others.get("dropout"):
            arguments.add(DROPOUT)
        if any(mask is not None for mask in masks):
            arguments.add("attention_mask")
        batch, heads, length, _ = query.shape
        return value.new_empty(batch, length, heads, value.shape[-1]), None

    def record_documents(position_ids: torch.Tensor) -> None:
        mask_calls.append(position_ids)

    def no_mask(**_: object) -> None:
        return None

    AttentionInterface.register(RECORDER, record)
    AttentionMaskInterface.register(RECORDER, no_mask)
    before = lm.config._attn_implementation
    if lm._supports_attention_backend:
        lm.set_attn_implementation(RECORDER)
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "position_ids": ids, "use_cache": False}
    decoder = decoder_of(lm)
    known = inspect.signature(decoder.forward).parameters
    if "position_ids" not in known:
        del inputs["position_ids"]
    try:
        with (
            mock.patch.object(masking_utils, "find_packed_sequence_indices", record_documents),
            torch.device("meta"),
            torch.no_grad(),
        ):
            decoder(**inputs)
    except (RuntimeError, TypeError, IndexError) as error:
        if isinstance(error, TypeError):  # a mask was used that the recorder did not make
            arguments.add("attention_mask")
    finally:
        lm.set_attn_implementation(before)
    return AttentionFacts(frozenset(arguments), bool(mask_calls) and "position_ids" in known)
