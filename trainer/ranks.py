"""What the ranks tell each other beside the tensors of the model."""

import datetime
from collections.abc import Callable

import torch
import torch.distributed as dist

AllSum = Callable[..., list[float]]


def make_all_sum(timeout_seconds: float) -> AllSum:
    """A function that gives the sums of its arguments over all ranks, in float64 so that counts stay exact.

    Making it and calling it are collectives. The numbers stay on the CPU: no one waits for the GPU's queue of work.
    """
    group = None  # the default one, where all tensors are on the CPU
    if torch.cuda.is_available():
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))

    def all_sum(*values: float) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=group)
        return tensor.tolist()

    return all_sum
