"""The loss on data that is never trained on: a share held out of the job's own, or a dataset beside it."""

import math
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from cluster.log import stage_logger
from cluster.run.fence import verify
from cluster.run.rundir import append_jsonl
from trainer.config.data import DataSource
from trainer.data.batches import MicroBatch, collate, plan_rows, split_rows
from trainer.data.mixture import document_hashes, held_out_documents
from trainer.data.tokens import Tokens, load_tokens, prepare_tokens
from trainer.engine import model_inputs
from trainer.job import TrainJob

log = stage_logger("train")
KEY = "train.validation.path"


def validate(engine: DeepSpeedEngine, batches: Iterable[MicroBatch]) -> float:
    """Mean loss a label over all ranks' micro-batches. A collective: every rank needs as many of them.

    Without gradient, dropout or noise, so it draws no random numbers and changes nothing of the training.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)  # sum of losses, labels
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            totals[0] += engine(**model_inputs(engine, batch))
            totals[1] += batch.num_labels
    engine.train()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])


class Validation:
    """When the loss is taken, of what, and where it is told. Every rank has one."""

    def __init__(self, job: TrainJob, tokens: Tokens, documents: list[int]):
        """`documents` of `tokens` are validated on."""
        self.job, self.tokens = job, tokens
        self.num_documents = len(documents)
        self.rows = plan_rows(tokens, job.config, documents)
        self.last_loss: float | None = None

    def at(self, engine: DeepSpeedEngine, step: int, is_last: bool) -> float | None:
        """Validate and report if it is time after `step`, else return None. A collective."""
        if not is_last and step % self.job.config.validation.every_steps:
            return None
        started = time.perf_counter()
        self.last_loss = validate(engine, self._micro_batches())
        if dist.get_rank() != 0:
            return self.last_loss
        seconds = time.perf_counter() - started
        log.info(f"step {step} | validation loss {self.last_loss:.4f} | {seconds:.1f} s")
        row = {"stage": "validation", "step": step, "loss": self.last_loss, "num_documents": self.num_documents}
        verify(self.job.run.root)
        append_jsonl(self.job.run.metrics, {**row, "seconds": round(seconds, 3), "time": round(time.time(), 3)})
        return self.last_loss

    def _micro_batches(self) -> Iterable[MicroBatch]:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        size = self.job.config.micro_batch_size
        num_passes = math.ceil(len(self.rows) / (size * world_size))
        return split_rows(self.rows[rank::world_size], size, num_passes, partial(collate, self.tokens))


def make_validation(job: TrainJob, tokenizer: object, tokens: Tokens) -> Validation | None:
    """What the recipe asks for, if anything. A collective: rank 0 encodes a dataset of its own, the others map it.

    Raises InputError if that dataset cannot be read or none of it can be used.
    """
    config = job.config.validation
    if config is None:
        return None
    if config.path is None:
        documents = held_out_documents(tokens, job.config, job.seed)
    else:
        folder: list[str | None] = [None]
        if dist.get_rank() == 0:
            source = DataSource(path=config.path)
            folder = [str(prepare_tokens(job.config, tokenizer, (source,), job.run.tokens, KEY))]
        dist.broadcast_object_list(folder, src=0)
        tokens = load_tokens(Path(str(folder[0])))
        documents = document_hashes(tokens, job.seed).argsort(kind="stable")
    validation = Validation(job, tokens, documents[: config.max_examples].tolist())
    if dist.get_rank() == 0:
        log.info(f"validation: {validation.num_documents:,} documents, every {config.every_steps} steps and at the end")
    return validation
