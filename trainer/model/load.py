"""Load a causal language model, set up for training, and wrap it with its loss."""

import importlib.util

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from cluster.config import ModelConfig
from cluster.errors import InputError
from trainer.config.train import TrainConfig
from trainer.model.adapters import adapt, base_of, decoder_of, has_virtual_tokens, with_virtual_tokens
from trainer.model.attention import BY_DOCUMENT, VARLEN, cumulative_lengths
from trainer.model.layers import configure_layers
from trainer.model.loss import PLAIN_LOSS, EmbeddingNoise, LossSettings, chunked_loss
from trainer.model.tokenizer import refuse_untrainable_tokens

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class CausalLMWithLoss(nn.Module):
    """A causal LM whose forward pass returns the summed cross-entropy of the labelled positions.

    The head runs only on labelled positions, so logits of prompts are never computed. Submodules are called as modules,
    because ZeRO-3 gathers parameters in their hooks.
    """

    def __init__(self, lm: nn.Module, settings: LossSettings = PLAIN_LOSS):
        super().__init__()
        self.lm, self.settings = lm, settings
        alpha = settings.neftune_noise_alpha
        self.noise = EmbeddingNoise(lm.get_input_embeddings(), alpha) if alpha else None

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        labelled: torch.Tensor,
        return_logits: bool = False,
        **flash_kwargs: torch.Tensor | int,
    ) -> torch.Tensor:
        """The summed loss of the L positions whose label is not IGNORE, a float32 scalar. The first three are [B, S].

        labelled: [L], the indices of these positions through all rows.
        return_logits: return their logits [L, V] instead.
        flash_kwargs: see `flash_attention_kwargs`.
        """
        if self.noise is not None:
            self.noise.set_documents(position_ids)
        factor = 1.0
        if not len(labelled):
            # Only padding, because rows ran out. Every parameter still takes part, so that ranks stay synchronized.
            labelled, factor = labelled.new_zeros(1), 0.0
        base = base_of(self.lm)
        hidden = self._hidden(input_ids, position_ids, flash_kwargs).flatten(0, 1)[labelled]  # [L, D]
        hidden, head = hidden.to(base.dtype), base.get_output_embeddings()  # Mamba's decoder returns float32
        if return_logits:
            return head(hidden).float()
        return chunked_loss(head, hidden, labels.flatten()[labelled].clamp(min=0), self.settings) * factor

    def _hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, flash_kwargs: dict) -> torch.Tensor:
        """The last hidden states without those of virtual tokens. [B, S, D]"""
        if self.lm.config._attn_implementation in (BY_DOCUMENT, VARLEN) and not flash_kwargs:
            flash_kwargs = {"cu_seq_lens_q": cumulative_lengths(position_ids)}
        if has_virtual_tokens(self.lm):
            inputs = with_virtual_tokens(self.lm, input_ids)
        else:
            # No attention mask and no cache: with either of them, transformers does not isolate packed documents.
            inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **flash_kwargs}
        return decoder_of(self.lm)(**inputs).last_hidden_state[:, -input_ids.shape[1] :]


def load_model(
    model: ModelConfig, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, num_added: int
) -> nn.Module:
    """The model in the recipe's precision, with embeddings for added tokens and with the adapters of its tuning method.

    config: as `resolve_auto` returns it. With `attention: auto` transformers chooses.
    With ZeRO-3 an `HfDeepSpeedConfig` must exist during the call, so that weights are partitioned as they are read.
    Raises InputError if added tokens could not be trained.
    """
    refuse_untrainable_tokens(num_added, model, config)
    lm = AutoModelForCausalLM.from_pretrained(
        model.path,
        revision=model.revision,
        dtype=DTYPES[config.precision],
        attn_implementation=None if config.attention == "auto" else config.attention,
        use_safetensors=True,
        trust_remote_code=False,
        **_quantization(config),
    )
    if num_added and len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        lm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=True)
    lm.config.use_cache = config.tuning == "prefix"
    configure_layers(lm, config)
    return adapt(lm, model, config, list(range(len(tokenizer) - num_added, len(tokenizer))))


def _quantization(config: TrainConfig) -> dict[str, object]:
    """For QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the arguments that load a base in 4 bits onto this GPU.

    NF4 with double quantization, as in section 3 of the paper. Not tested on a GPU yet.
    """
    if config.tuning != "qlora":
        return {}
    require_four_bits()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[config.precision],
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}


def require_four_bits() -> None:
    """Raise InputError if this machine cannot hold a model in 4 bits."""
    if not torch.cuda.is_available():
        raise InputError(
            "train.tuning=qlora needs an NVIDIA GPU, because bitsandbytes computes with 4-bit weights only there. "
            "Set train.tuning=lora."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "train.tuning=qlora needs bitsandbytes, which is not installed. "
            "Install it (`uv pip install bitsandbytes`), or set train.tuning=lora."
        )
