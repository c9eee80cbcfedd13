"""Trains several run folders in one process group: `torchrun -m tests.trainer.exact_worker RUN...`."""

import sys
from pathlib import Path

from trainer.runtime import load_comm_kernel, quieten_libraries, set_accelerator_env

set_accelerator_env()

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.trainer.tools import train_here


def forget_ulysses() -> None:
    """Undo what sequence parallelism changed in this process, before the next job runs in it."""
    parallel_state_sp._release_sequence_parallel_groups()
    groups.mpu = None
    if "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def main() -> None:
    quieten_libraries()
    torch.set_num_threads(1)
    load_comm_kernel()
    deepspeed.init_distributed(dist_backend="gloo")
    for run in sys.argv[1:]:
        train_here(Path(run))
        forget_ulysses()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
