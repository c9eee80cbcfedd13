"""Replaces what a recipe leaves open (`auto`) once the ranks have met. Every rank and restart gets the same."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist
from pydantic import ValidationError

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.files import write_json
from cluster.log import stage_logger
from trainer.checkpoint.state import newest_checkpoint, read_state
from trainer.config.train import TrainConfig
from trainer.data.batches import check_batch_size
from trainer.job import TrainJob
from trainer.memory import MemoryEstimate, ModelFacts, check_heads, choose_stage, format_bytes, read_facts, usable_bytes
from trainer.model.choose_attention import choose_attention
from trainer.model.layers import uses_liger
from trainer.model.shape import check_positions, require_safetensors, shape_of

log = stage_logger("train")


def resolve_auto(job: TrainJob) -> TrainJob:
    """The job with its ZeRO stage and attention chosen. A collective.

    A resumed job keeps the stage of its checkpoints, however much memory is free now. Raises InputError, on every rank,
    if the model does not fit.
    """
    check_num_ranks(job, dist.get_world_size())
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    usable: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(usable, usable_bytes(job.config, ranks_here))
    outcome: list[TrainConfig | str | None] = [None]  # the config, or the message of an error
    if dist.get_rank() == 0:
        try:
            outcome = [_resolve_config(job, dist.get_world_size(), min(usable))]
        except InputError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0)
    (config,) = outcome
    if isinstance(config, str):
        raise InputError(config)
    return replace(job, config=config)


def _resolve_config(job: TrainJob, world_size: int, usable: int) -> TrainConfig:
    file = job.run.zero
    config = job.config
    if config.zero_stage == "auto" and newest_checkpoint(job.run.checkpoints) is not None and file.is_file():
        config = config.model_copy(update={"zero_stage": json.loads(file.read_text())["zero_stage"]})
    config, facts, remarks = check_shape(job.model, config)
    chosen = choose_stage(facts, config, world_size, usable)
    config = with_choices(config, zero_stage=chosen.stage)
    write_json(file, {"zero_stage": chosen.stage, "world_size": world_size, "usable": usable, "bytes": asdict(chosen)})
    for remark in remarks:
        log.info(remark)
    log.info(f"{describe(chosen, usable)}; attention: {config.attention}")
    return config


def check_shape(model: ModelConfig, config: TrainConfig) -> tuple[TrainConfig, ModelFacts, list[str]]:
    """The config with its attention chosen, the model's sizes, and lines for the log. Reads config.json, no weights.

    Raises InputError if this model cannot be trained as the recipe says.
    """
    require_safetensors(model)
    lm = shape_of(model)
    check_positions(lm, config)
    config, remarks = choose_attention(config, lm)
    facts = read_facts(model, config, lm)
    check_heads(facts, config)
    return config, facts, remarks


def with_choices(config: TrainConfig, **choices: object) -> TrainConfig:
    """The config with these choices, checked again. Raises InputError if they clash with the rest of it."""
    try:
        return TrainConfig(**config.model_dump() | choices)
    except ValidationError as error:
        (details,) = error.errors()
        raise InputError(f"train: {details['msg'].removeprefix('Value error, ')}") from error


def describe(chosen: MemoryEstimate, usable: int) -> str:
    """One line: the stage and its estimated memory, against `usable` bytes."""
    text = (
        f"ZeRO-{chosen.stage}: about {format_bytes(chosen.total)} per rank ({format_bytes(chosen.states)} for weights, "
        f"gradients and optimizer), {format_bytes(usable)} usable"
    )
    return text if chosen.total <= usable else f"{text}: it may not fit"


def check_num_ranks(job: TrainJob, world_size: int) -> None:
    """Raise InputError if a setting does not work with this number of ranks or on this node."""
    partition_size = job.config.zero.hpz_partition_size
    if world_size % partition_size:
        raise InputError(
            f"train.zero.hpz_partition_size={partition_size} does not divide {world_size} ranks. "
            "Set it to the number of ranks on a node."
        )
    num_parts = job.config.sequence_parallel_size
    if world_size % num_parts:
        raise InputError(
            f"train.sequence_parallel_size={num_parts} does not divide {world_size} ranks. Change one of them."
        )
    try:
        check_batch_size(job.config, world_size // num_parts)
    except InputError as error:
        if (newest := newest_checkpoint(job.run.checkpoints)) is None:
            raise
        raise InputError(
            f"{error} {newest} was saved by {read_state(newest).world_size} ranks. A resumed training cannot change "
            "its global_batch_size. Change the number of ranks."
        ) from error
    uses_liger(job.config)  # raises InputError if the recipe wants Liger and cannot have it
    if (folder := job.config.zero.nvme_path) is not None:
        from deepspeed.ops.op_builder import AsyncIOBuilder  # slow to import, and few recipes use an NVMe disk

        if not Path(folder).is_dir():
            raise InputError(f"train.zero.nvme_path: this node has no folder {folder}. Create it, or name another.")
        if not AsyncIOBuilder().is_compatible():
            raise InputError("train.zero.nvme_path: DeepSpeed needs libaio for it (apt install libaio-dev).")
