"""The model under DeepSpeed: made, checked before the first step, and taken through one step."""

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm
from transformers.integrations import HfDeepSpeedConfig

from cluster.errors import InputError
from trainer.data.batches import Batches, MicroBatch
from trainer.data.chat import IGNORE
from trainer.job import TrainJob
from trainer.model.attention import document_bounds
from trainer.model.load import CausalLMWithLoss, load_model
from trainer.model.loss import loss_settings
from trainer.model.sequence import loss_factor, use_ulysses
from trainer.model.tuning import is_decayed
from trainer.zero import deepspeed_config

ISOLATION_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # of the largest logit; a leak between documents shows as 0.1 to 1


def train_step(
    engine: deepspeed.DeepSpeedEngine, micro_batches: list[MicroBatch], num_labels: int, lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step. Returns the sum of losses over all ranks, and the gradients' norm before clipping.

    Both are tensors without dimensions, where the model is: on a GPU, reading them waits for the step.

    Gradients are those of (sum of token losses) / (labels of the step over all micro-batches and ranks): DeepSpeed
    averages over ranks, which `loss_factor` undoes; `scale_wrt_gas=False` makes accumulation a plain sum.
    """
    factor = loss_factor(engine.zero_optimization_stage(), dist.get_world_size(), engine.sequence_parallel_size)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    total = torch.zeros((), device=engine.device)
    on_device = [model_inputs(engine, batch) for batch in micro_batches]  # all copies start before the first pass
    for number, inputs in enumerate(on_device, 1):
        engine.set_gradient_accumulation_boundary(number == len(on_device))  # their number may differ by step
        loss_sum = engine(**inputs)
        engine.backward(loss_sum * (factor / num_labels), scale_wrt_gas=False)
        total += loss_sum.detach()
        if engine.is_gradient_accumulation_boundary() and keeps_no_norm(engine):
            norm = get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        engine.step()
    if not keeps_no_norm(engine):
        norm = engine.get_global_grad_norm()
    dist.all_reduce(total)
    return total, torch.as_tensor(norm)


def model_inputs(engine: deepspeed.DeepSpeedEngine, batch: MicroBatch) -> dict[str, torch.Tensor | int]:
    """A micro-batch on the engine's device, as `CausalLMWithLoss` takes it. Copies to a GPU go on behind our back."""
    inputs: dict = dict(batch.inputs)
    attention = engine.module.lm.config._attn_implementation
    if attention.startswith("flash") and len(batch.input_ids) == 1 and engine.sequence_parallel_size == 1:
        inputs |= document_bounds(batch)
    if engine.device.type == "cpu":
        return inputs
    return {
        name: value.pin_memory().to(engine.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def keeps_no_norm(engine: deepspeed.DeepSpeedEngine) -> bool:
    """True for plain data parallelism: DeepSpeed clips there without recording the norm."""
    return engine.zero_optimization_stage() == 0


def make_engine(
    job: TrainJob, tokenizer: object, num_added: int, grad_accum_steps: int, world_size: int
) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed with torch's AdamW; see `is_decayed` for what decays."""
    config = job.config
    settings = deepspeed_config(config, grad_accum_steps, world_size)
    # Must stay alive while the model is read: with ZeRO-3 transformers then partitions weights as they arrive.
    partitioner = HfDeepSpeedConfig(settings) if config.zero_stage == 3 else None
    module = CausalLMWithLoss(load_model(job.model, config, tokenizer, num_added), loss_settings(config))
    del partitioner
    groups_of_ranks = use_ulysses(module.lm, config)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if is_decayed(name, p)]
    vectors = [p for name, p in trained if not is_decayed(name, p)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate, betas=config.betas, eps=config.adam_epsilon, fused=True,
    )  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, mpu=groups_of_ranks, dist_init_required=False
    )
    engine.train()
    return engine


def check_head(engine: deepspeed.DeepSpeedEngine, batches: Batches, precision: str) -> None:
    """Refuse to train if the model's own logits are not those the loss is taken on, as where it scales or caps them."""
    batch = batches.collate([batches.rows[0][:1]])
    device = engine.device
    inputs = {"input_ids": batch.input_ids.to(device)}
    if engine.sequence_parallel_size > 1:
        inputs["position_ids"] = batch.position_ids.to(device)  # where this rank's stretch begins
    engine.eval()
    with torch.no_grad():
        ours = _logits(engine, batch)
        own = engine.module.lm(**inputs).logits
    engine.train()
    own = own[:, -batch.labels.shape[1] :]  # without virtual tokens
    error = _worst_error(ours, own[(batch.labels != IGNORE).to(device)].float())
    if error > ISOLATION_TOLERANCE[precision]:
        raise InputError(
            f"this model changes its logits after the output embedding (they differ by {error:.3f} of the largest), so "
            "its loss would be wrong here. Tune a model whose logits are its output embedding alone, such as Llama's."
        )


def check_isolation(engine: deepspeed.DeepSpeedEngine, batches: Batches, precision: str) -> None:
    """Refuse to train if a packed row gives other logits than its documents alone. Every rank runs the same row."""
    packed = next((row for row in batches.rows if len(row) > 1), None)
    if packed is None:
        return
    engine.eval()
    with torch.no_grad():
        together = _whole(engine, _logits(engine, batches.collate([packed])))
        apart = torch.cat([_whole(engine, _logits(engine, batches.collate([[document]]))) for document in packed])
    engine.train()
    error = _worst_error(together, apart)
    if error > ISOLATION_TOLERANCE[precision]:
        raise InputError(
            f"packed documents see each other in this model with train.attention={batches.config.attention} "
            f"(logits differ by {error:.3f} of the largest). Set train.packing=false or another train.attention."
        )


def _logits(engine: deepspeed.DeepSpeedEngine, batch: MicroBatch) -> torch.Tensor:
    """Logits [L, V] of the labelled positions in this rank's stretch of the rows; empty if there are none."""
    logits = engine(**model_inputs(engine, batch), return_logits=True)
    return logits if batch.num_labels else logits.new_empty(0)


def _whole(engine: deepspeed.DeepSpeedEngine, logits: torch.Tensor) -> torch.Tensor:
    """The stretches of all ranks that share a row, joined again."""
    if engine.sequence_parallel_size == 1:
        return logits
    stretches: list[torch.Tensor | None] = [None] * engine.sequence_parallel_size
    dist.all_gather_object(stretches, logits.cpu(), group=engine.get_sequence_parallel_group())
    return torch.cat(stretches)


def _worst_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest value, on any rank: all of them have to agree to go on."""
    worst = torch.zeros((), device=deepspeed.get_accelerator().current_device_name())
    if expected.numel():
        worst += (found - expected).abs().max() / expected.abs().max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)
