"""Checks of the model's logits before the first step. A model that fails them would be trained on a wrong loss."""

import deepspeed
import torch
import torch.distributed as dist

from cluster.errors import InputError
from trainer.data.batches import Batches, MicroBatch
from trainer.data.chat import IGNORE
from trainer.engine import model_inputs
from trainer.model.adapters import base_of

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # of the largest logit; a leak between documents shows as 0.1 to 1


def check_logits(engine: deepspeed.DeepSpeedEngine, batches: Batches) -> None:
    """Raise InputError, on every rank, if the loss would be taken on logits that are not the model's. A collective."""
    check_head(engine, batches)
    if batches.config.packing:
        check_isolation(engine, batches)


def check_head(engine: deepspeed.DeepSpeedEngine, batches: Batches) -> None:
    """Compare our logits with those of the model's own forward pass, which may scale or cap them."""
    batch = batches.collate([batches.rows[0][:1]])
    device = engine.device
    inputs = {"input_ids": batch.input_ids.to(device)}
    if engine.sequence_parallel_size > 1:
        inputs["position_ids"] = batch.position_ids.to(device)  # positions of this rank's part of the row
    engine.eval()
    with torch.no_grad():
        ours = _labelled_logits(engine, batch)
        expected = engine.module.lm(**inputs).logits
    engine.train()
    expected = expected[:, -batch.labels.shape[1] :]  # drop the positions of virtual tokens
    error = _largest_error(ours, expected[(batch.labels != IGNORE).to(device)].float())
    if error > TOLERANCE[batches.config.precision]:
        raise InputError(
            f"this model changes its logits after the output embedding (they differ by {error:.3f} of the largest), so "
            "its loss would be wrong here. Tune a model whose logits are its output embedding alone, such as Llama's."
        )


def check_isolation(engine: deepspeed.DeepSpeedEngine, batches: Batches) -> None:
    """Compare the logits of a packed row with those of its documents one by one. Every rank runs the same row.

    The comparison finds positions that do not start again, but rounding may hide a weak leak. A gradient does not: in
    every precision, that of a document's logits with respect to another document is 0 unless the model mixes them.
    """
    packed = next((row for row in batches.rows if len(row) > 1), None)
    if packed is None:
        return
    engine.eval()
    with torch.no_grad():
        together = _gather_row(engine, _labelled_logits(engine, batches.collate([packed])))
        apart = [_gather_row(engine, _labelled_logits(engine, batches.collate([[document]]))) for document in packed]
    error = _largest_error(together, torch.cat(apart))
    shortest = sorted(packed, key=lambda document: batches.tokens.lengths[document])[:2]
    leak = 0.0 if engine.sequence_parallel_size > 1 else _gradient_across(engine, batches.collate([shortest]))
    engine.train()
    if error > TOLERANCE[batches.config.precision] or leak > 0:
        raise InputError(
            f"packed documents see each other in this model with train.attention={batches.config.attention} (logits "
            f"differ by {error:.3f} of the largest and have a gradient of {leak:.1e} with respect to another "
            "document). Set train.packing=false."
        )


def _gradient_across(engine: deepspeed.DeepSpeedEngine, batch: MicroBatch) -> float:
    """The largest gradient of the second document's logits with respect to the embeddings of the first, on any rank.

    batch: one row of two documents [1, S].
    """
    embedded: list[torch.Tensor] = []

    def cut(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded[:] = [output.detach().requires_grad_()]
        return embedded[0]

    handle = base_of(engine.module.lm).get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            # Not through the engine, which forbids backward passes that are not its own.
            logits = engine.module(**model_inputs(engine, batch), return_logits=True)
    finally:
        handle.remove()
    document = (batch.position_ids == 0).cumsum(dim=1).to(engine.device)  # [1, S], 1 for the first document
    second = logits[document[batch.labels.to(engine.device) != IGNORE] == 2]
    (gradient,) = torch.autograd.grad(second.square().sum(), embedded)  # [1, S, D]
    largest = gradient[document == 1].abs().max().float()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _labelled_logits(engine: deepspeed.DeepSpeedEngine, batch: MicroBatch) -> torch.Tensor:
    """Logits [L, V] of the L labelled positions in this rank's part of the rows; empty if it has none."""
    logits = engine(**model_inputs(engine, batch), return_logits=True)
    return logits if batch.num_trained_tokens else logits.new_empty(0)


def _gather_row(engine: deepspeed.DeepSpeedEngine, logits: torch.Tensor) -> torch.Tensor:
    """Concatenate the logits of all ranks that share a row."""
    if engine.sequence_parallel_size == 1:
        return logits
    parts: list[torch.Tensor | None] = [None] * engine.sequence_parallel_size
    dist.all_gather_object(parts, logits.cpu(), group=engine.get_sequence_parallel_group())
    return torch.cat(parts)


def _largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference on any rank, relative to the largest expected value. The same result on every rank."""
    largest = torch.zeros((), device=deepspeed.get_accelerator().current_device_name())
    if expected.numel():
        largest += (actual - expected).abs().max() / expected.abs().max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)
