"""What a recipe leaves open (`auto`), settled once the ranks have met: the same for all of them, at every restart."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist
from pydantic import ValidationError

from cluster.errors import InputError
from cluster.files import write_json
from cluster.log import stage_logger
from trainer.checkpoint.state import newest_checkpoint
from trainer.config.train import TrainConfig
from trainer.job import TrainJob
from trainer.memory import MemoryEstimate, amount, check_heads, choose_stage, read_facts, usable_bytes
from trainer.model.attention import choose_attention
from trainer.model.layers import uses_liger

log = stage_logger("train")


def settle(job: TrainJob) -> TrainJob:
    """The job with its ZeRO stage chosen. A collective; raises InputError on every rank if the model does not fit.

    A job that goes on keeps the stage of its checkpoints, whatever memory is free now.
    """
    check_ranks(job, dist.get_world_size())
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    usable: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(usable, usable_bytes(job.config, ranks_here))
    answer: list[object] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [_choose(job, dist.get_world_size(), min(usable))]
        except InputError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    (chosen,) = answer
    if isinstance(chosen, str):
        raise InputError(chosen)
    return replace(job, config=chosen)


def _choose(job: TrainJob, world_size: int, usable: int) -> TrainConfig:
    file = job.run.zero
    config = job.config
    if config.zero_stage == "auto" and newest_checkpoint(job.run.checkpoints) is not None and file.is_file():
        config = config.model_copy(update={"zero_stage": json.loads(file.read_text())["zero_stage"]})
    attention = choose_attention(config)
    facts = read_facts(job.model, config)
    check_heads(facts, config)
    chosen = choose_stage(facts, config, world_size, usable)
    config = settled(config, chosen.stage, attention)
    write_json(file, {"zero_stage": chosen.stage, "world_size": world_size, "usable": usable, "bytes": asdict(chosen)})
    log.info(f"{describe(chosen, usable)}; attention: {config.attention}")
    return config


def settled(config: TrainConfig, stage: int, attention: str) -> TrainConfig:
    """The recipe with these choices. Raises InputError if they clash with the rest of it."""
    try:
        return TrainConfig(**config.model_dump() | {"zero_stage": stage, "attention": attention})
    except ValidationError as error:
        (complaint,) = error.errors()
        raise InputError(f"train: {complaint['msg'].removeprefix('Value error, ')}") from error


def describe(chosen: MemoryEstimate, usable: int) -> str:
    """One line: the stage, and what it is expected to take."""
    text = (
        f"ZeRO-{chosen.stage}: about {amount(chosen.total)} a rank ({amount(chosen.states)} for weights, gradients and "
        f"optimizer), {amount(usable)} usable"
    )
    return text if chosen.total <= usable else f"{text}: it may not fit"


def check_ranks(job: TrainJob, world_size: int) -> None:
    """Raise InputError for settings that this number of ranks does not allow."""
    hpz = job.config.zero.hpz_partition_size
    if world_size % hpz:
        raise InputError(
            f"train.zero.hpz_partition_size={hpz} does not divide {world_size} ranks. Set it to the ranks of a node."
        )
    parts = job.config.sequence_parallel_size
    if world_size % parts:
        raise InputError(
            f"train.sequence_parallel_size={parts} does not divide {world_size} ranks. Change one of them."
        )
    uses_liger(job.config)  # raises if the recipe insists in vain
    if (folder := job.config.zero.nvme_path) is not None:
        from deepspeed.ops.op_builder import AsyncIOBuilder  # DeepSpeed is dear to import, and few have such a disk

        if not Path(folder).is_dir():
            raise InputError(f"train.zero.nvme_path: there is no folder {folder} on this node.")
        if not AsyncIOBuilder().is_compatible():
            raise InputError("train.zero.nvme_path: DeepSpeed needs libaio for it (apt install libaio-dev).")
