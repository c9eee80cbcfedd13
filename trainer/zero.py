"""The DeepSpeed configuration of a job: a pure function of the recipe. Defaults that have moved are written out."""

import torch

from trainer.config import TrainConfig

BUCKET_ELEMENTS = 200_000_000  # 400 MB of bf16: large enough to hide latency, small beside the weights of a 7B model


def deepspeed_config(config: TrainConfig, grad_accum_steps: int, world_size: int) -> dict:
    """What `deepspeed.initialize(config=...)` gets. The optimizer and the schedule are ours and not in it."""
    on_gpu = torch.cuda.is_available()
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "train_batch_size": config.micro_batch_size * grad_accum_steps * world_size,
        "gradient_clipping": config.max_grad_norm,  # 1.0 unless written out, since 0.19
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": False},
        # Summing many micro-batches in bf16 doubles the gradient's error; float32 costs two bytes a parameter.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: no compiler is needed on the node
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "reduce_scatter": True,  # on ZeRO-3 the other path divides gradients by another number
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_partitions": True,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "round_robin_gradients": False,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS // 4,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,  # weights are streamed out one by one instead
        },
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
