"""Trains several run folders in one process group, and records which weights of the base have changed.

`torchrun -m tests.trainer.tuning_worker RUN...` writes `untouched.json` in each run folder: the number of frozen
weights that were compared with the base's file after training, and the names of those that differ.
"""

import json
import sys
from pathlib import Path

from trainer.runtime import load_comm_kernel, quieten_libraries, set_accelerator_env

set_accelerator_env()

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.trainer.tools import train_here
from trainer import engine, train
from trainer.job import read_job

partitioned_config, make_engine = engine.deepspeed_config, train.make_engine
kept: list[deepspeed.DeepSpeedEngine] = []


def partition_everything(*arguments: object) -> dict:
    """With ZeRO-3 DeepSpeed does not split small weights, and all weights of a tiny model are small."""
    settings = partitioned_config(*arguments)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def keep_engine(*arguments: object) -> deepspeed.DeepSpeedEngine:
    kept[:] = [make_engine(*arguments)]
    return kept[0]


def compare_with_base(run: Path) -> None:
    """Write which frozen weights of the engine that trained last differ from the file they were read from."""
    base = load_file(Path(read_job(run).model.path) / "model.safetensors")
    frozen = [(name, p) for name, p in kept[0].module.named_parameters() if not p.requires_grad]
    changed = []
    for name, parameter in frozen:
        key = next(key for key in base if name.replace(".base_layer", "").endswith(key))
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            if not torch.equal(parameter.detach(), base[key]):
                changed.append(key)
    if dist.get_rank() == 0:
        (run / "untouched.json").write_text(json.dumps({"compared": len(frozen), "changed": changed}))


def main() -> None:
    quieten_libraries()
    torch.set_num_threads(1)
    load_comm_kernel()
    engine.deepspeed_config, train.make_engine = partition_everything, keep_engine
    deepspeed.init_distributed(dist_backend="gloo")
    for run in sys.argv[1:]:
        train_here(Path(run))
        compare_with_base(Path(run))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
