"""The DeepSpeed configuration of a job: a pure function of the recipe. Defaults that have moved are written out."""

import torch

from trainer.config.train import TrainConfig
from trainer.config.zero import ZeroConfig


def deepspeed_config(config: TrainConfig, grad_accum_steps: int, world_size: int) -> dict:
    """What `deepspeed.initialize(config=...)` gets. The optimizer and the schedule are ours and not in it."""
    num_groups = world_size // config.sequence_parallel_size  # of ranks that take rows of their own
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "train_batch_size": config.micro_batch_size * grad_accum_steps * num_groups,
        "sequence_parallel_size": config.sequence_parallel_size,
        "gradient_clipping": config.max_grad_norm,  # 1.0 unless written out, since 0.19
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": False},
        # Summing many micro-batches in bf16 doubles the gradient's error; float32 costs two bytes a parameter.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: no compiler is needed on the node
        "zero_force_ds_cpu_optimizer": False,  # the same AdamW updates states that are offloaded to the CPU
        "zero_optimization": {"stage": config.zero_stage, **_buckets(config.zero), **_offload(config.zero)},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _buckets(zero: ZeroConfig) -> dict:
    return {
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_scatter": True,  # on ZeRO-3 the other path divides gradients by another number
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_partitions": True,
        "allgather_bucket_size": zero.allgather_bucket_size,
        "round_robin_gradients": False,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.param_persistence_threshold,
        "stage3_max_live_parameters": zero.max_live_parameters,
        "stage3_max_reuse_distance": zero.max_live_parameters,
        "stage3_gather_16bit_weights_on_model_save": False,  # weights are streamed out one by one instead
        "zero_hpz_partition_size": zero.hpz_partition_size,
    }


def _offload(zero: ZeroConfig) -> dict:
    """The sections that DeepSpeed reads; absent where nothing is offloaded."""
    common = {"pin_memory": zero.pin_memory and torch.cuda.is_available()}
    if zero.nvme_path is not None:
        common["nvme_path"] = zero.nvme_path
    sections = {}
    if zero.offload_optimizer != "none":
        sections["offload_optimizer"] = {"device": zero.offload_optimizer, **common}
    if zero.offload_parameters != "none":
        sections["offload_param"] = {"device": zero.offload_parameters, **common}
    return sections
