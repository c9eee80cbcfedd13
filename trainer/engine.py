"""The model under DeepSpeed: one optimizer step, the learning rate of a step, and how the engine is built."""

import math

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm
from transformers.integrations import HfDeepSpeedConfig

from trainer.config.train import TrainConfig
from trainer.config.zero import ZeroConfig
from trainer.data.batches import MicroBatch
from trainer.job import TrainJob
from trainer.model.adapters import is_decayed
from trainer.model.attention import VARLEN, flash_attention_kwargs
from trainer.model.load import CausalLMWithLoss, load_model
from trainer.model.loss import loss_settings
from trainer.model.sequence import use_ulysses


def train_step(
    engine: deepspeed.DeepSpeedEngine, micro_batches: list[MicroBatch], num_trained_tokens: int, lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step. Returns the sum of the token losses over all ranks, and the gradient norm before clipping.

    Both are tensors of shape [] on the engine's device. On a GPU the step may still be running when this returns, and
    reading one of them waits for it.

    The gradient is that of (sum of token losses) / `num_trained_tokens`, those of all micro-batches and ranks.
    DeepSpeed averages over ranks, which `factor` undoes; `scale_wrt_gas=False` turns accumulation into a plain sum.
    """
    factor = dist.get_world_size()
    if engine.zero_optimization_stage() < 3:  # with sequence parallelism these divide by the number of groups instead
        factor /= engine.sequence_parallel_size
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    total_loss = torch.zeros((), device=engine.device)
    on_device = [model_inputs(engine, batch) for batch in micro_batches]  # starts all copies before the first pass
    for number, inputs in enumerate(on_device, 1):
        engine.set_gradient_accumulation_boundary(number == len(on_device))  # their number may differ between steps
        loss_sum = engine(**inputs)
        engine.backward(loss_sum * (factor / num_trained_tokens), scale_wrt_gas=False)
        total_loss += loss_sum.detach()
        if engine.is_gradient_accumulation_boundary() and lacks_grad_norm(engine):
            grad_norm = get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        engine.step()
    if not lacks_grad_norm(engine):
        grad_norm = engine.get_global_grad_norm()
    dist.all_reduce(total_loss)
    return total_loss, torch.as_tensor(grad_norm)


def model_inputs(engine: deepspeed.DeepSpeedEngine, batch: MicroBatch) -> dict[str, torch.Tensor | int]:
    """The arguments of `CausalLMWithLoss` on the engine's device. Copies to a GPU are asynchronous."""
    inputs: dict = dict(batch.inputs)
    attention = engine.module.lm.config._attn_implementation
    one_row = attention.startswith("flash") and len(batch.input_ids) == 1 and engine.sequence_parallel_size == 1
    if one_row or attention == VARLEN:
        inputs |= flash_attention_kwargs(batch)
    if engine.device.type == "cpu":
        return inputs
    return {
        name: value.pin_memory().to(engine.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def lacks_grad_norm(engine: deepspeed.DeepSpeedEngine) -> bool:
    """True without ZeRO: DeepSpeed then clips the gradient and does not keep its norm."""
    return engine.zero_optimization_stage() == 0


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Learning rate of `step`, which counts from 0. A pure function, so a resumed run needs no scheduler state.

    The last step of the linear warm-up has the peak rate. A schedule that falls would reach `min_lr_ratio` of the peak
    one step after the last (cosine: Loshchilov and Hutter 2017, section 3, without restarts).
    """
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    decay_start = warmup_steps
    if config.lr_schedule == "wsd":
        decay_start = max(warmup_steps, num_steps - math.ceil(config.decay_ratio * num_steps))
    progress = max(0, step - decay_start) / max(1, num_steps - decay_start)
    if config.lr_schedule == "constant":
        share = 1.0
    elif config.lr_schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = 1 - progress
    floor = config.min_lr_ratio
    return config.learning_rate * (floor + (1 - floor) * share)


def make_engine(
    job: TrainJob, tokenizer: object, num_added_tokens: int, grad_accum_steps: int, world_size: int
) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed with torch's AdamW. `is_decayed` decides which parameters decay."""
    config = job.config
    settings = deepspeed_config(config, grad_accum_steps, world_size)
    # With ZeRO-3 transformers partitions the weights while it reads them, as long as this object exists.
    partitioner = HfDeepSpeedConfig(settings) if config.zero_stage == 3 else None
    module = CausalLMWithLoss(load_model(job.model, config, tokenizer, num_added_tokens), loss_settings(config))
    del partitioner
    rank_groups = use_ulysses(module.lm, config)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if is_decayed(name, p)]
    not_decayed = [p for name, p in trained if not is_decayed(name, p)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate, betas=config.betas, eps=config.adam_epsilon, fused=True,
    )  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, mpu=rank_groups, dist_init_required=False
    )
    engine.train()
    return engine


def deepspeed_config(config: TrainConfig, grad_accum_steps: int, world_size: int) -> dict:
    """The configuration for `deepspeed.initialize`. Optimizer and schedule are ours, so they are not in it.

    Every value whose default has changed between DeepSpeed's versions is written out.
    """
    num_data_parallel = world_size // config.sequence_parallel_size
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "train_batch_size": config.micro_batch_size * grad_accum_steps * num_data_parallel,
        "sequence_parallel_size": config.sequence_parallel_size,
        "gradient_clipping": config.max_grad_norm,  # the default is 1.0 since 0.19
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": False},
        # Summing many micro-batches in bf16 doubles the gradient's error; float32 costs two bytes per parameter.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW needs no compiler on the node
        "zero_force_ds_cpu_optimizer": False,  # the same AdamW also updates states that are offloaded to the CPU
        "zero_optimization": {"stage": config.zero_stage, **_bucket_settings(config.zero), **_offload(config.zero)},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _bucket_settings(zero: ZeroConfig) -> dict:
    return {
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_scatter": True,  # without it ZeRO-3 divides gradients by another number
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_partitions": True,
        "allgather_bucket_size": zero.allgather_bucket_size,
        "round_robin_gradients": False,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.param_persistence_threshold,
        "stage3_max_live_parameters": zero.max_live_parameters,
        "stage3_max_reuse_distance": zero.max_live_parameters,
        "stage3_gather_16bit_weights_on_model_save": False,  # our checkpoints gather the weights one by one
        "zero_hpz_partition_size": zero.hpz_partition_size,
    }


def _offload(zero: ZeroConfig) -> dict:
    """DeepSpeed's `offload_*` sections, each left out if its part stays on the GPU."""
    common = {"pin_memory": zero.pin_memory and torch.cuda.is_available()}
    if zero.nvme_path is not None:
        common["nvme_path"] = zero.nvme_path
    sections = {}
    if zero.offload_optimizer != "none":
        sections["offload_optimizer"] = {"device": zero.offload_optimizer, **common}
    if zero.offload_parameters != "none":
        sections["offload_param"] = {"device": zero.offload_parameters, **common}
    return sections
