"""What the ranks do together: they agree on every step in one collective of a few numbers, and share encoded data."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cluster.processes.signals import StopRequest
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config.data import DataSource
from trainer.data.batches import Batches, MicroBatch
from trainer.data.tokens import Tokens, load_tokens, prepare_tokens
from trainer.job import TrainJob
from trainer.monitoring import Watchdog


@dataclass(frozen=True)
class AgreedStep:
    """One optimizer step: this rank's micro-batches, and the counts over all ranks."""

    micro_batches: list[MicroBatch]
    num_rows: int  # over all ranks
    num_trained_tokens: int  # over all ranks
    document_lengths: np.ndarray  # tokens of each document [D], over all ranks
    should_stop: bool  # at least one rank was asked to stop

    @property
    def num_tokens(self) -> int:
        """Over all ranks."""
        return int(self.document_lengths.sum())


def agree_on_step(
    batches: Batches,
    step: int,
    all_sum: Callable[..., list[float]],
    stop: StopRequest,
    checkpointer: Checkpointer,
    watchdog: Watchdog,
) -> AgreedStep:
    """Prepare `step`, which counts from 0, and exchange labels, stop requests and the state of the checkpoint copy.

    A collective. Raises, on every rank, if a rank could not copy its part of the last checkpoint.
    """
    watchdog.set_location(f"step {step + 1}, agreeing on it with the other ranks")
    micro_batches = batches.micro_batches(step)
    num_trained_tokens, num_stopping, num_failed_copies, num_copied = all_sum(
        sum(batch.num_trained_tokens for batch in micro_batches), int(stop.is_set), *checkpointer.copy_flags()
    )
    checkpointer.advance(num_failed_copies, num_copied)
    rows = batches.rows_of_step(step)
    lengths = batches.tokens.lengths[[document for row in rows for document in row]]
    watchdog.set_location(f"step {step + 1}, forward, backward and update")
    return AgreedStep(micro_batches, len(rows), int(num_trained_tokens), lengths, should_stop=num_stopping > 0)


def make_sum_over_ranks(timeout_seconds: float) -> Callable[..., list[float]]:
    """A function that returns the sums of its arguments over all ranks, in float64 so that counts stay exact.

    This call and every call of the function are collectives. The numbers stay on the CPU, so no rank waits until its
    GPU has finished the work in its queue.
    """
    group = None  # the default group, if all tensors are on the CPU
    if torch.cuda.is_available():
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))

    def all_sum(*values: float) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=group)
        return tensor.tolist()

    return all_sum


def load_shared_tokens(
    job: TrainJob, tokenizer: object, sources: Sequence[DataSource], key: str = "train.data"
) -> tuple[Tokens, str]:
    """Encode `sources` on rank 0 and map its files on every rank. Also returns the hash of the encoded data.

    A collective. `key` is the recipe's key that errors name. Raises InputError if the sources cannot be used.
    """
    folder: list[str | None] = [None]
    if dist.get_rank() == 0:
        folder = [str(prepare_tokens(job.config, tokenizer, sources, job.run.tokens, key))]
    dist.broadcast_object_list(folder, src=0)
    path = Path(str(folder[0]))
    return load_tokens(path), path.name
