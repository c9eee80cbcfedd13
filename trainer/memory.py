"""How much memory a training job takes on each GPU, and the lowest ZeRO stage that fits.

    facts = read_facts(model, config)                       # from config.json alone; no weights are read
    estimates = [estimate(facts, config, stage, world_size) for stage in config.stages]

Bytes everywhere. What is counted is what DeepSpeed 0.19 keeps with float32 gradient accumulation (ZeRO, arXiv
1910.02054, section 3, with 4 bytes a gradient instead of 2) and what autograd keeps of a Llama-like decoder layer as
transformers writes it. Loads torch only where facts are read.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.files import GIB, MIB
from trainer.config.train import TrainConfig
from trainer.config.zero import ZeroConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USABLE_SHARE = 0.92  # the rest is lost to fragments between tensors
RESERVED_BYTES = GIB  # of a GPU: the CUDA context, NCCL's buffers and cuBLAS's workspace
WIDTH = {"bf16": 2, "fp32": 4}  # bytes of a weight
# Bytes of one in NF4 with double quantization: 4 bits, and 8 bits for the constant of each block of 64, whose own
# constants, one for 256 of them, have 32 bits (QLoRA, arXiv 2305.14314, section 3).
BLOCK_WIDTH = 4 / 8 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a causal language model. Parameters are counted once where they are tied."""

    num_parameters: int
    num_trained: int
    num_persistent: int  # in parameters too small for ZeRO-3 to split
    num_largest: int  # in the largest parameter, which is gathered in one piece
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    num_in_blocks: int = 0  # of the parameters, in 4 bits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank on its GPU, and in its node's memory where something is offloaded."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    logits: int
    step: int  # copies that exist while the optimizer steps, when activations do not
    host: int

    @property
    def states(self) -> int:
        """What is there from the first step to the last. A GPU with less cannot hold the model."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.working

    @property
    def working(self) -> int:
        return self.buckets + max(self.activations + self.logits, self.step)


def read_facts(model: ModelConfig, config: TrainConfig) -> ModelFacts:
    """Build the model without memory for its weights, and count. Raises InputError if transformers does not know it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        whole = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(whole, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model.path: {model.path} is no causal language model that transformers knows: {reason}"
        ) from error
    text = whole.get_text_config()
    sizes = [parameter.numel() for parameter in lm.parameters()]
    num_parameters, threshold = sum(sizes), config.zero.param_persistence_threshold
    heads = text.num_attention_heads
    facts = ModelFacts(
        num_parameters=num_parameters,
        num_trained=num_parameters,
        num_persistent=sum(size for size in sizes if size <= threshold),
        num_largest=max(sizes),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
    )
    if config.tuning == "full":
        return facts
    if config.tuning == "qlora":
        facts = replace(facts, num_in_blocks=_num_in_blocks(lm))
    from trainer.model.tuning import adapt

    with torch.device("meta"):
        adapted = adapt(lm, model, config, added_token_ids=[])
    return replace(facts, num_trained=sum(each.numel() for each in adapted.parameters() if each.requires_grad))


def _num_in_blocks(lm: "PreTrainedModel") -> int:
    """Parameters that QLoRA keeps in 4 bits: the matrices of all linear layers but the head."""
    from torch import nn

    head = lm.get_output_embeddings()
    linear = (module for module in lm.modules() if isinstance(module, nn.Linear) and module is not head)
    return sum(module.weight.numel() for module in linear)


def check_heads(facts: ModelFacts, config: TrainConfig) -> None:
    """Raise InputError if the ranks of a group cannot share out the attention heads."""
    parts = config.sequence_parallel_size
    if facts.num_heads % parts:
        raise InputError(
            f"train.sequence_parallel_size={parts} does not divide the model's {facts.num_heads} attention heads. "
            "Each rank of a group takes an equal share of them."
        )
    if facts.num_kv_heads % parts and parts % facts.num_kv_heads:
        raise InputError(
            f"train.sequence_parallel_size={parts} and the model's {facts.num_kv_heads} key-value heads: neither "
            "divides the other."
        )


def estimate(facts: ModelFacts, config: TrainConfig, stage: int, world_size: int) -> MemoryEstimate:
    """Bytes per rank with this ZeRO stage over `world_size` ranks."""
    width, trained = WIDTH[config.precision], facts.num_trained
    share = world_size if stage >= 1 else 1  # ranks among which AdamW's states are split
    # The float32 copy of the weights and AdamW's two moments; plain data parallelism needs no copy.
    optimizer = (12 if stage >= 1 else 8) * trained // share
    gradients = _gradients(facts, config, stage, world_size)
    weights = width * (facts.num_parameters - facts.num_in_blocks) + round(BLOCK_WIDTH * facts.num_in_blocks)
    weights //= world_size if stage == 3 else 1
    host = 0
    if config.zero.offload_optimizer != "none":
        host += optimizer + 4 * trained // share  # gradients of this rank's share are summed there as well
        optimizer = gradients = 0
    if config.zero.offload_parameters != "none":
        host, weights = host + weights, 0
    if config.zero.hpz_partition_size > 1:
        weights += width * facts.num_parameters // config.zero.hpz_partition_size
    live = 0
    if stage == 3 and world_size > 1:
        weights += width * facts.num_persistent
        gathered = max(min(facts.num_parameters, config.zero.max_live_parameters), facts.num_largest)
        live = width * (gathered + facts.num_largest)  # the gradient of the largest is whole before it is split
    tokens = config.micro_batch_size * config.max_seq_len // config.sequence_parallel_size
    return MemoryEstimate(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buckets=_buckets(facts, config, stage, world_size),
        activations=live + _activations(facts, config, tokens) + _head_gradient(facts, config, stage),
        logits=_logits(facts, width, min(tokens, config.loss_chunk_tokens)),
        step=4 * trained // share,  # this rank's gradients, flat
        host=host,
    )


def _gradients(facts: ModelFacts, config: TrainConfig, stage: int, world_size: int) -> int:
    """Gradients between the backward passes of a step, summed in float32."""
    if stage == 0:
        return 4 * facts.num_trained
    if stage == 1 and config.precision == "bf16":
        # DeepSpeed's optimizer for these two splits nothing but AdamW's states, and keeps the bf16 gradients as well.
        return (4 + 2) * facts.num_trained
    return 4 * facts.num_trained // world_size


def _buckets(facts: ModelFacts, config: TrainConfig, stage: int, world_size: int) -> int:
    """Where gradients are gathered before they are summed over ranks: two buckets, so that one fills while one goes.

    On stages 1 and 2 as well the gradients of one micro-batch that are this rank's to keep, until they are added up.
    """
    if stage == 0:
        return 0  # all are summed when the last backward pass is over
    width = WIDTH[config.precision]
    kept = width * facts.num_trained // world_size if stage < 3 else 0
    return 2 * width * min(config.zero.reduce_bucket_size, facts.num_trained) + kept


def _activations(facts: ModelFacts, config: TrainConfig, tokens: int) -> int:
    """What autograd keeps between the forward and the backward pass of one micro-batch."""
    layer = _layer_activations(facts, config, tokens)
    block_inputs = WIDTH[config.precision] * tokens * facts.hidden_size
    if config.activation_checkpointing == "none":
        return facts.num_layers * layer
    kept = block_inputs
    if config.activation_checkpointing == "selective":
        kept += WIDTH[config.precision] * tokens * _product_width(facts)
    return facts.num_layers * kept + layer  # one layer at a time is made again


def _product_width(facts: ModelFacts) -> int:
    """Values per token that the matrix products and the attention of a layer give."""
    queries, keys = facts.num_heads * facts.head_size, facts.num_kv_heads * facts.head_size
    return 2 * queries + 2 * keys + 2 * facts.hidden_size + 2 * facts.intermediate_size


def _layer_activations(facts: ModelFacts, config: TrainConfig, tokens: int) -> int:
    """Of one decoder layer: two RMSNorms (computed in float32), attention, SwiGLU."""
    width = WIDTH[config.precision]
    hidden, queries = facts.hidden_size, facts.num_heads * facts.head_size
    norms = 2 * (4 + 2 * width) * hidden  # float32 input, normalized values before and after the weight
    attention = width * (4 * queries + 2 * facts.num_kv_heads * facts.head_size)
    mlp = width * 4 * facts.intermediate_size
    scores = 0
    if config.attention == "eager":
        # Scores, their softmax in float32 and its copy in the model's precision, of every pair of tokens in a row.
        scores = facts.num_heads * config.max_seq_len * (4 + 2 * width)
    return tokens * (norms + attention + mlp + scores)


def _logits(facts: ModelFacts, width: int, tokens: int) -> int:
    """Of one chunk of the loss: logits in the model's precision, as float32, their log-softmax and its gradient, were
    every token labelled."""
    return tokens * facts.vocab_size * (width + (4 if width < 4 else 0) + 4 + 4)


def _head_gradient(facts: ModelFacts, config: TrainConfig, stage: int) -> int:
    """That of the head, the largest matrix, before it is in a bucket; a second one while those of chunks are summed."""
    if config.tuning != "full":
        return 0
    is_chunked = config.micro_batch_size * config.max_seq_len > config.loss_chunk_tokens
    return WIDTH[config.precision] * facts.num_largest * ((stage < 3) + is_chunked)  # ZeRO-3 has counted one


def usable_bytes(config: TrainConfig, ranks_here: int) -> int:
    """What one rank may use: of the recipe's GPU, else of this machine's, else of the free memory of `ranks_here`."""
    if config.gpu_memory_gib is not None:
        return int(config.gpu_memory_gib * GIB * USABLE_SHARE) - RESERVED_BYTES
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0] * USABLE_SHARE) - RESERVED_BYTES
    return int(psutil.virtual_memory().available / ranks_here * USABLE_SHARE)


def choose_stage(facts: ModelFacts, config: TrainConfig, world_size: int, usable: int) -> MemoryEstimate:
    """The estimate of the recipe's stage, or of the lowest one that fits into `usable` bytes.

    Raises InputError if none fits, or if the recipe's cannot even hold the model; both with what would.
    """
    if config.zero_stage != "auto":
        chosen = estimate(facts, config, config.zero_stage, world_size)
        if chosen.states <= usable:
            return chosen
        taken = (
            f"weights {amount(chosen.weights)}, gradients {amount(chosen.gradients)}, AdamW {amount(chosen.optimizer)}"
        )
        raise InputError(
            f"train.zero_stage={config.zero_stage} cannot hold this model: {taken}, together "
            f"{amount(chosen.states)} a rank, of which {amount(usable)} are usable. "
            f"{remedy(facts, config, world_size, usable)}"
        )
    estimates = [estimate(facts, config, stage, world_size) for stage in config.stages]
    fitting = next((found for found in estimates if found.total <= usable), None)
    if fitting is not None:
        return fitting
    least = min(estimates, key=lambda found: found.total)
    raise InputError(
        f"train.zero_stage=auto: no stage fits. ZeRO-{least.stage} over {world_size} ranks takes {amount(least.total)} "
        f"a rank, of which {amount(usable)} are usable. {remedy(facts, config, world_size, usable)}"
    )


def remedy(facts: ModelFacts, config: TrainConfig, world_size: int, usable: int) -> str:
    """The first of these changes, each on top of those before it, with which the job fits."""
    offload = config.zero.model_dump() | {"hpz_partition_size": 1, "offload_optimizer": "cpu"}
    changes = [
        ("train.zero_stage=auto", {"zero_stage": "auto"}),
        ("train.activation_checkpointing=full", {"activation_checkpointing": "full"}),
        ("train.micro_batch_size=1", {"micro_batch_size": 1}),
        ("train.zero.offload_optimizer=cpu", {"zero": ZeroConfig(**offload)}),
        ("train.zero.offload_parameters=cpu", {"zero": ZeroConfig(**offload | {"offload_parameters": "cpu"})}),
    ]
    words: list[str] = []
    for word, change in changes:
        tried = config.model_copy(update=change)
        if tried == config:
            continue
        config = tried
        words.append(word)
        if any(estimate(facts, config, s, world_size).total <= usable for s in config.stages):
            return f"Set {', '.join(words)}."
    return "Train on more ranks, or fewer weights (train.tuning=lora), or shorter rows (train.max_seq_len)."


def amount(num_bytes: int) -> str:
    """A number of bytes for people."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"
