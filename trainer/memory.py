"""How much memory a training job takes on each GPU, and the lowest ZeRO stage that fits.

    facts = read_facts(model, config)                       # from config.json; no weights are read
    estimates = [estimate(facts, config, stage, world_size) for stage in config.stages]

All sizes are bytes. The estimate counts what DeepSpeed 0.19 keeps with float32 gradient accumulation (ZeRO, arXiv
1910.02054, section 3, with 4 bytes per gradient instead of 2) and what autograd keeps of a Llama-like decoder layer as
transformers implements it. Only `read_facts` and `usable_bytes` load torch.
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

USABLE_FRACTION = 0.92  # the rest is lost to fragmentation between tensors
RESERVED_BYTES = GIB  # on a GPU, for the CUDA context, NCCL's buffers and cuBLAS's workspace
BYTES_PER_WEIGHT = {"bf16": 2, "fp32": 4}
# NF4 with double quantization: 4 bits per weight, an 8-bit constant per block of 64 weights, and a 32-bit constant per
# 256 of those constants (QLoRA, arXiv 2305.14314, section 3).
BYTES_PER_NF4_WEIGHT = 4 / 8 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a causal language model. Tied parameters count once."""

    num_parameters: int
    num_trained: int
    num_persistent: int  # of parameters that are too small for ZeRO-3 to split
    num_largest: int  # of the largest parameter, which is gathered in one piece
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    num_quantized: int = 0  # parameters in 4 bits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank on its GPU; `host` is in the memory of its node, if something is offloaded."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    logits: int
    step: int  # copies that exist only while the optimizer steps, when there are no activations
    host: int

    @property
    def states(self) -> int:
        """What exists from the first step to the last. A GPU with less memory cannot hold the model."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.working

    @property
    def working(self) -> int:
        return self.buckets + max(self.activations + self.logits, self.step)


def read_facts(model: ModelConfig, config: TrainConfig, lm: "PreTrainedModel | None" = None) -> ModelFacts:
    """Count what the model has. Raises InputError if transformers cannot build it, or if its adapter does not fit it.

    lm: the model on the meta device, to which the adapter is added. None means that it is built here.
    """
    from trainer.model.shape import shape_of

    lm = lm or shape_of(model)
    text = lm.config.get_text_config()
    sizes = [parameter.numel() for parameter in lm.parameters()]
    num_parameters, threshold = sum(sizes), config.zero.param_persistence_threshold
    heads = getattr(text, "num_attention_heads", None) or 1  # a model of state spaces has none
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
        facts = replace(facts, num_quantized=_num_quantized(lm))
    import torch

    from trainer.model.adapters import adapt

    with torch.device("meta"):
        adapted = adapt(lm, model, config, added_token_ids=[])
    return replace(facts, num_trained=sum(each.numel() for each in adapted.parameters() if each.requires_grad))


def _num_quantized(lm: "PreTrainedModel") -> int:
    """Parameters that QLoRA keeps in 4 bits: the matrices of all linear layers except the head."""
    from torch import nn

    head = lm.get_output_embeddings()
    linear = (module for module in lm.modules() if isinstance(module, nn.Linear) and module is not head)
    return sum(module.weight.numel() for module in linear)


def check_heads(facts: ModelFacts, config: TrainConfig) -> None:
    """Raise InputError if the attention heads cannot be divided among the ranks of a sequence-parallel group."""
    parts = config.sequence_parallel_size
    if facts.num_heads % parts:
        raise InputError(
            f"train.sequence_parallel_size={parts} does not divide the model's {facts.num_heads} attention heads. "
            "Every rank of a group takes the same number of heads. Set a divisor."
        )
    if facts.num_kv_heads % parts and parts % facts.num_kv_heads:
        raise InputError(
            f"train.sequence_parallel_size={parts} and the model's {facts.num_kv_heads} key-value heads do not fit: "
            "one of the two numbers has to divide the other. Set train.sequence_parallel_size to a divisor."
        )


def estimate(facts: ModelFacts, config: TrainConfig, stage: int, world_size: int) -> MemoryEstimate:
    """Bytes per rank with this ZeRO stage over `world_size` ranks."""
    width, trained = BYTES_PER_WEIGHT[config.precision], facts.num_trained
    num_shards = world_size if stage >= 1 else 1  # ranks among which AdamW's states are split
    # AdamW's two moments and, with ZeRO, a float32 copy of the weights.
    optimizer = (12 if stage >= 1 else 8) * trained // num_shards
    gradients = _gradients(facts, config, stage, world_size)
    weights = width * (facts.num_parameters - facts.num_quantized) + round(BYTES_PER_NF4_WEIGHT * facts.num_quantized)
    weights //= world_size if stage == 3 else 1
    host = 0
    if config.zero.offload_optimizer != "none":
        host += optimizer + 4 * trained // num_shards  # the gradients of this rank's shard are summed there too
        optimizer = gradients = 0
    if config.zero.offload_parameters != "none":
        host, weights = host + weights, 0
    if config.zero.hpz_partition_size > 1:
        weights += width * facts.num_parameters // config.zero.hpz_partition_size
    live = 0
    if stage == 3 and world_size > 1:
        weights += width * facts.num_persistent
        gathered = max(min(facts.num_parameters, config.zero.max_live_parameters), facts.num_largest)
        live = width * (gathered + facts.num_largest)  # the largest gradient exists whole before it is split
    tokens = config.micro_batch_size * config.max_seq_len // config.sequence_parallel_size
    return MemoryEstimate(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buckets=_buckets(facts, config, stage, world_size),
        activations=live + _activations(facts, config, tokens) + _head_gradient(facts, config, stage),
        logits=_logits(facts, width, min(tokens, config.loss_chunk_tokens)),
        step=4 * trained // num_shards,  # the gradients of this rank's shard in one flat tensor
        host=host,
    )


def _gradients(facts: ModelFacts, config: TrainConfig, stage: int, world_size: int) -> int:
    """Gradients that are summed in float32 over the backward passes of a step."""
    if stage == 0:
        return 4 * facts.num_trained
    if stage == 1 and config.precision == "bf16":
        # DeepSpeed's optimizer for stage 1 and bf16 splits only AdamW's states, and keeps the bf16 gradients too.
        return (4 + 2) * facts.num_trained
    return 4 * facts.num_trained // world_size


def _buckets(facts: ModelFacts, config: TrainConfig, stage: int, world_size: int) -> int:
    """Two buckets in which gradients are collected before the sum over ranks: one fills while the other is sent.

    Stages 1 and 2 also keep this rank's gradients of one micro-batch until they are added to the sum.
    """
    if stage == 0:
        return 0  # all gradients are summed over ranks after the last backward pass
    width = BYTES_PER_WEIGHT[config.precision]
    kept = width * facts.num_trained // world_size if stage < 3 else 0
    return 2 * width * min(config.zero.reduce_bucket_size, facts.num_trained) + kept


def _activations(facts: ModelFacts, config: TrainConfig, tokens: int) -> int:
    """What autograd keeps of one micro-batch between its forward and its backward pass."""
    layer = _layer_activations(facts, config, tokens)
    if config.activation_checkpointing == "none":
        return facts.num_layers * layer
    kept = facts.hidden_size  # values per token: the input of a layer
    if config.activation_checkpointing == "selective":  # and the results of its matrix products and its attention
        queries, keys = facts.num_heads * facts.head_size, facts.num_kv_heads * facts.head_size
        kept += 2 * queries + 2 * keys + 2 * facts.hidden_size + 2 * facts.intermediate_size
    # One layer at a time is recomputed.
    return BYTES_PER_WEIGHT[config.precision] * tokens * kept * facts.num_layers + layer


def _layer_activations(facts: ModelFacts, config: TrainConfig, tokens: int) -> int:
    """Activations of one decoder layer: two RMSNorms (computed in float32), attention, SwiGLU."""
    width = BYTES_PER_WEIGHT[config.precision]
    hidden, queries = facts.hidden_size, facts.num_heads * facts.head_size
    norms = 2 * (4 + 2 * width) * hidden  # float32 input, normalized values before and after the weight
    attention = width * (4 * queries + 2 * facts.num_kv_heads * facts.head_size)
    mlp = width * 4 * facts.intermediate_size
    scores = 0
    if config.attention == "eager":
        # For every pair of tokens in a row: the score, its softmax in float32, and a copy in the model's precision.
        scores = facts.num_heads * config.max_seq_len * (4 + 2 * width)
    return tokens * (norms + attention + mlp + scores)


def _logits(facts: ModelFacts, width: int, tokens: int) -> int:
    """Logits of one chunk of the loss, if every token has a label.

    They exist in the model's precision and in float32, together with their log-softmax and its gradient.
    """
    return tokens * facts.vocab_size * (width + (4 if width < 4 else 0) + 4 + 4)


def _head_gradient(facts: ModelFacts, config: TrainConfig, stage: int) -> int:
    """The gradient of the head, the largest matrix, before it is in a bucket. Chunks of the loss need a second one."""
    if config.tuning != "full":
        return 0
    is_chunked = config.micro_batch_size * config.max_seq_len > config.loss_chunk_tokens
    num_gradients = (stage < 3) + is_chunked  # with ZeRO-3 one of them is in `live` already
    return BYTES_PER_WEIGHT[config.precision] * facts.num_largest * num_gradients


def usable_bytes(config: TrainConfig, ranks_here: int) -> int:
    """The memory that one rank may use.

    It is that of `gpu_memory_gib`, else of this machine's GPU, else a share of the free host memory for each of
    `ranks_here` ranks.
    """
    if config.gpu_memory_gib is not None:
        return int(config.gpu_memory_gib * GIB * USABLE_FRACTION) - RESERVED_BYTES
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0] * USABLE_FRACTION) - RESERVED_BYTES
    return int(psutil.virtual_memory().available / ranks_here * USABLE_FRACTION)


def choose_stage(facts: ModelFacts, config: TrainConfig, world_size: int, usable: int) -> MemoryEstimate:
    """The estimate of the recipe's stage or, with `auto`, of the lowest stage that fits into `usable` bytes.

    Raises InputError if no stage fits, or if the recipe's stage cannot even hold the model. The message has a fix.
    """
    if config.zero_stage != "auto":
        chosen = estimate(facts, config, config.zero_stage, world_size)
        if chosen.states <= usable:
            return chosen
        weights, gradients, adamw = map(format_bytes, (chosen.weights, chosen.gradients, chosen.optimizer))
        raise InputError(
            f"train.zero_stage={config.zero_stage} cannot hold this model: each rank needs "
            f"{format_bytes(chosen.states)} (weights {weights}, gradients {gradients}, AdamW {adamw}), "
            f"but only {format_bytes(usable)} are usable. {find_fix(facts, config, world_size, usable)}"
        )
    estimates = [estimate(facts, config, stage, world_size) for stage in config.stages]
    for candidate in estimates:
        if candidate.total <= usable:
            return candidate
    least = min(estimates, key=lambda candidate: candidate.total)
    raise InputError(
        f"train.zero_stage=auto: no stage fits. With ZeRO-{least.stage} each of {world_size} ranks needs "
        f"{format_bytes(least.total)}, but only {format_bytes(usable)} are usable. "
        f"{find_fix(facts, config, world_size, usable)}"
    )


def find_fix(facts: ModelFacts, config: TrainConfig, world_size: int, usable: int) -> str:
    """Advice for a message. The changes accumulate in the order below until the job fits."""
    offload = config.zero.model_dump() | {"hpz_partition_size": 1, "offload_optimizer": "cpu"}
    changes = [
        ("train.zero_stage=auto", {"zero_stage": "auto"}),
        ("train.activation_checkpointing=full", {"activation_checkpointing": "full"}),
        ("train.micro_batch_size=1", {"micro_batch_size": 1}),
        ("train.zero.offload_optimizer=cpu", {"zero": ZeroConfig(**offload)}),
        ("train.zero.offload_parameters=cpu", {"zero": ZeroConfig(**offload | {"offload_parameters": "cpu"})}),
    ]
    settings: list[str] = []
    for setting, change in changes:
        changed = config.model_copy(update=change)
        if changed == config:
            continue
        config = changed
        settings.append(setting)
        if any(estimate(facts, config, s, world_size).total <= usable for s in config.stages):
            return f"Set {', '.join(settings)}."
    return "Use more ranks, train fewer weights (train.tuning=lora), or use shorter rows (train.max_seq_len)."


def format_bytes(num_bytes: int) -> str:
    """A number of bytes in GiB or MiB, for a message."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"
