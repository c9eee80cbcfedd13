"""The loss on data that is never trained on: a held-out share of the training data, or a dataset of its own."""

import math
import time
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from cluster.files import append_jsonl
from cluster.log import stage_logger
from cluster.run.fence import verify
from trainer.checkpoint.state import TrainState
from trainer.config.data import DataSource
from trainer.coordinator import load_shared_tokens
from trainer.data.batches import MicroBatch, collate, plan_rows, split_rows
from trainer.data.mixture import document_hashes, held_out_documents
from trainer.data.tokens import Tokens
from trainer.engine import model_inputs
from trainer.job import TrainJob
from trainer.monitoring import Watchdog

log = stage_logger("train")


def validation_loss(engine: DeepSpeedEngine, micro_batches: Iterable[MicroBatch]) -> float:
    """Mean loss per label over the micro-batches of all ranks. A collective: every rank needs the same number of them.

    Without gradient, dropout and noise. It draws no random numbers, so the training after it is the same.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)  # sum of losses, number of labels
    engine.eval()
    with torch.no_grad():
        for batch in micro_batches:
            totals[0] += engine(**model_inputs(engine, batch))
            totals[1] += batch.num_trained_tokens
    engine.train()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])


class Validator:
    """Validates every `train.validation.every_steps` steps and after the last one; never if that section is missing."""

    def __init__(self, job: TrainJob, tokenizer: object, tokens: Tokens, watchdog: Watchdog):
        """A collective. `tokens`: the training data, from which the held-out documents are taken.

        Raises InputError if `train.validation.path` cannot be read or has no usable row.
        """
        self.job, self.config, self.watchdog = job, job.config.validation, watchdog
        self.last_loss: float | None = None  # None means that nothing was validated yet
        if self.config is None:
            return
        if self.config.path is None:
            documents = held_out_documents(tokens, job.config, job.seed)
        else:
            source = DataSource(path=self.config.path)
            tokens = load_shared_tokens(job, tokenizer, (source,), "train.validation.path")[0]
            documents = document_hashes(tokens, job.seed).argsort(kind="stable")
        documents = documents[: self.config.max_examples].tolist()
        self.tokens, self.num_documents, self.rows = tokens, len(documents), plan_rows(tokens, job.config, documents)
        if dist.get_rank() == 0:
            log.info(
                f"validation: {self.num_documents:,} documents, every {self.config.every_steps} steps and at the end"
            )

    def maybe_run(self, engine: DeepSpeedEngine, state: TrainState) -> float | None:
        """The validation loss. None means that no validation is due after this step. A collective."""
        if self.config is None or not (state.finished or state.step % self.config.every_steps == 0):
            return None
        self.watchdog.set_location(f"step {state.step}, validating")
        started = time.perf_counter()
        rank, world_size, size = dist.get_rank(), dist.get_world_size(), self.job.config.micro_batch_size
        num_passes = math.ceil(len(self.rows) / (size * world_size))
        micro_batches = split_rows(self.rows[rank::world_size], size, num_passes, partial(collate, self.tokens))
        self.last_loss = validation_loss(engine, micro_batches)
        if rank == 0:
            self._write(state.step, self.last_loss, seconds=time.perf_counter() - started)
        return self.last_loss

    def _write(self, step: int, loss: float, seconds: float) -> None:
        log.info(f"step {step} | validation loss {loss:.4f} | {seconds:.1f} s")
        verify(self.job.run.root)
        row = {"stage": "validation", "step": step, "loss": loss, "num_documents": self.num_documents}
        append_jsonl(self.job.run.metrics, {**row, "seconds": round(seconds, 3), "time": round(time.time(), 3)})
