"""Trains several run folders in one process group: `torchrun -m tests.trainer.exact_worker RUN...`."""

import sys
from pathlib import Path

from trainer.quiet import name_accelerator, quieten_libraries

name_accelerator()

import deepspeed  # noqa: E402
import torch  # noqa: E402

from tests.trainer.tools import train_here  # noqa: E402
from trainer.kernels import load_comm_kernel  # noqa: E402


def main() -> None:
    quieten_libraries()
    torch.set_num_threads(1)
    load_comm_kernel()
    deepspeed.init_distributed(dist_backend="gloo")
    for run in sys.argv[1:]:
        train_here(Path(run))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
