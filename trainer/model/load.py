"""Load a causal language model, wrap it with adapters if asked, and give it the loss that training needs."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cluster.config import ModelConfig
from cluster.errors import InputError
from trainer.config.train import TrainConfig
from trainer.config.tuning import METHODS
from trainer.data.chat import set_chat_template
from trainer.model.attention import BY_DOCUMENT, bounds_of, choose_attention
from trainer.model.layers import fit_layers
from trainer.model.loss import PLAIN_LOSS, EmbeddingNoise, LossSettings, chunked_loss
from trainer.model.quantization import four_bits, require_four_bits
from trainer.model.tuning import adapt, base_of, has_virtual_tokens, with_virtual_tokens

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class CausalLMWithLoss(nn.Module):
    """A causal LM whose forward pass returns the summed cross-entropy of the labelled positions.

    The head runs on labelled positions alone, so logits of prompts are never made. Submodules are called as modules, so
    that the hooks by which ZeRO-3 gathers parameters fire.
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
        **bounds: torch.Tensor | int,
    ) -> torch.Tensor:
        """Arguments [B, S]; returns a float32 scalar: the sum over the L positions whose label is not IGNORE.

        `labelled` [L] counts those positions through all rows. With `return_logits`, their logits [L, V] instead.
        `bounds` is what flash attention gets to know of documents.
        """
        if self.noise is not None:
            self.noise.follow(position_ids)
        factor = 1.0
        if not len(labelled):
            # Padding alone, when rows run out. Every parameter still takes part, so that ranks stay in step.
            labelled, factor = labelled.new_zeros(1), 0.0
        hidden = self._hidden(input_ids, position_ids, bounds).flatten(0, 1)[labelled]  # [L, D]
        head = base_of(self.lm).get_output_embeddings()
        if return_logits:
            return head(hidden).float()
        return chunked_loss(head, hidden, labels.flatten()[labelled].clamp(min=0), self.settings) * factor

    def _hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, bounds: dict) -> torch.Tensor:
        """What the head gets, without the virtual tokens of prompt and prefix tuning. [B, S, D]"""
        if self.lm.config._attn_implementation == BY_DOCUMENT:
            bounds = {"cu_seq_lens_q": bounds_of(position_ids)}
        if has_virtual_tokens(self.lm):
            inputs = with_virtual_tokens(self.lm, input_ids)
        else:
            # No attention mask and no cache: with either, transformers stops isolating packed documents.
            inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **bounds}
        decoder = base_of(self.lm).get_decoder()
        return decoder(**inputs).last_hidden_state[:, -input_ids.shape[1] :]


def load_tokenizer(model: ModelConfig, template_file: str | None) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer with its chat template, and how many tokens had to be added for it."""
    tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"model.path: {model.path} has no fast tokenizer; the assistant mask needs character offsets.")
    settings = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    if len(tokenizer) > (vocab_size := settings.get_text_config().vocab_size):
        raise InputError(
            f"model.path: the tokenizer of {model.path} has {len(tokenizer)} tokens, its embedding {vocab_size} rows. "
            "Resize the embedding, or give the tokenizer that the model was trained with."
        )
    return tokenizer, set_chat_template(tokenizer, template_file)


def load_model(
    model: ModelConfig, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, num_added: int
) -> nn.Module:
    """The model in the precision of the recipe, with embeddings for added tokens and with adapters.

    Under ZeRO-3 an `HfDeepSpeedConfig` must be alive, so that weights are partitioned as they are read.
    Raises InputError if added tokens could not be trained: a model must learn to write the one that ends its turn.
    """
    if num_added and config.zero_stage not in METHODS[config.tuning].new_token_stages:
        raise InputError(
            f"{model.path}: its vocabulary lacks {num_added} tokens of the chat template, which tuning={config.tuning} "
            f"with zero_stage={config.zero_stage} cannot train. Set train.tuning=full, or lora with a lower "
            "train.zero_stage, or a train.chat_template made of tokens that the model has."
        )
    lm = AutoModelForCausalLM.from_pretrained(
        model.path,
        revision=model.revision,
        dtype=DTYPES[config.precision],
        attn_implementation=choose_attention(config),
        use_safetensors=True,
        trust_remote_code=False,
        **_in_four_bits(config),
    )
    if lm.config._attn_implementation == BY_DOCUMENT and not lm._supports_sdpa:
        raise InputError(f"{type(lm).__name__} has an attention of its own. Set train.attention=eager.")
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        lm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=True)
    lm.config.use_cache = config.tuning == "prefix"
    fit_layers(lm, config)
    return adapt(lm, model, config, list(range(len(tokenizer) - num_added, len(tokenizer))))


def _in_four_bits(config: TrainConfig) -> dict[str, object]:
    """How QLoRA reads its base: in 4 bits, straight onto this rank's GPU. Raises InputError where that cannot be."""
    if config.tuning != "qlora":
        return {}
    require_four_bits()
    return {
        "quantization_config": four_bits(DTYPES[config.precision]),
        "device_map": {"": torch.cuda.current_device()},
    }
