"""Load a tokenizer with its chat template, and check both before a process is started for training."""

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from cluster.config import ModelConfig
from cluster.errors import InputError
from trainer.config.train import TrainConfig
from trainer.config.tuning import METHODS
from trainer.data.chat import check_template
from trainer.data.template import ChatTemplate, set_chat_template
from trainer.data.tokens import refuse_unembedded, require_eos


def load_tokenizer(model: ModelConfig, chat_template: str | None) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer with a chat template, and the number of tokens that the template added to it.

    Its attribute `num_embeddings` is the number of tokens that the model has embeddings for. A tokenizer may have more,
    as that of Gemma 3 1B, if no text contains them: see `trainer.data.tokens.refuse_unembedded`.

    Raises InputError if there is no fast tokenizer, or no such template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        ImportError,
    ) as error:  # what it raises for missing, broken files
        raise InputError(
            f"model.path: {model.path} has no tokenizer that can be read ({str(error).splitlines()[0]}). Copy the "
            "model's tokenizer.json and tokenizer_config.json into its folder."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"model.path: {model.path} has no fast tokenizer, and the loss mask needs its character offsets. Add a "
            "tokenizer.json, which `AutoTokenizer.from_pretrained(..., from_slow=True).save_pretrained(...)` writes."
        )
    settings = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    num_added = set_chat_template(tokenizer, chat_template)
    num_embeddings = settings.get_text_config().vocab_size
    tokenizer.num_embeddings = max(num_embeddings, len(tokenizer)) if num_added else num_embeddings
    return tokenizer, num_added


def check_tokenizer(model: ModelConfig, config: TrainConfig) -> None:
    """Raise InputError if training would refuse the tokenizer or its chat template. A few seconds, without weights."""
    tokenizer, num_added = load_tokenizer(model, config.chat_template)
    refuse_untrainable_tokens(num_added, model, config)
    if config.objective == "chat":
        template = ChatTemplate(tokenizer, config.chat_template_kwargs, config.fold_system)
        for document in check_template(template):
            refuse_unembedded(tokenizer, document, "train.chat_template: what the template writes")
    else:
        require_eos(tokenizer)


def refuse_untrainable_tokens(num_added: int, model: ModelConfig, config: TrainConfig) -> None:
    """Raise InputError if the template adds tokens that are not trained. The model must learn the one that ends a turn.

    `train.zero_stage: auto` is refused only if no stage could train them.
    """
    stages = METHODS[config.tuning].new_token_stages
    if num_added and config.zero_stage not in stages and not (config.zero_stage == "auto" and stages):
        raise InputError(
            f"{model.path}: the vocabulary lacks {num_added} tokens of the chat template, which tuning={config.tuning} "
            f"with zero_stage={config.zero_stage} cannot train. Set train.tuning=full, or tuning=lora with a lower "
            "train.zero_stage, or a train.chat_template that uses only tokens of the model."
        )
