"""Trains run folders in one process group, each up to a step: `torchrun -m tests.trainer.elastic_worker RUN STEP ...`.

STEP 0 stands for the end of the training.
"""

import sys
from pathlib import Path

from trainer.runtime import load_comm_kernel, quieten_libraries, set_accelerator_env

set_accelerator_env()

import deepspeed
import torch

from trainer.job import read_job
from trainer.train import train


class StopAfter:
    """Requests a stop after `num_steps` steps. `is_set` is read once before every step."""

    def __init__(self, num_steps: int):
        self.left = num_steps

    @property
    def is_set(self) -> bool:
        self.left -= 1
        return self.left == -1


def main() -> None:
    quieten_libraries()
    torch.set_num_threads(1)
    load_comm_kernel()
    deepspeed.init_distributed(dist_backend="gloo")
    for run, step in zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True):
        train(read_job(Path(run)), StopAfter(step or 10**9))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
