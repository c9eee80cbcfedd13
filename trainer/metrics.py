"""The figures of every step: a line in the log, a row in metrics.jsonl, and the trackers. Rank 0 writes all three."""

import contextlib
import hashlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import psutil
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from cluster.files import GIB, append_jsonl
from cluster.log import stage_logger
from cluster.run.fence import Fence
from cluster.run.rundir import RunDir
from trainer.checkpoint.state import TrainState
from trainer.coordinator import AgreedStep
from trainer.data.batches import Batches
from trainer.flops import Utilization
from trainer.job import TrainJob
from trainer.monitoring import LossMonitor, describe_step

log = stage_logger("train")
Report = Callable[[int, dict[str, float]], None]  # takes a step and its figures


@dataclass(frozen=True)
class StepRecord:
    """A step that was started. On a GPU it may still be running: reading one of its tensors waits for it."""

    step: AgreedStep
    state: TrainState  # after the step
    loss_sum: torch.Tensor  # [], over all ranks
    grad_norm: torch.Tensor  # [], before clipping
    lr: float


class StepLogger:
    """Logs every step and keeps the figures of this attempt.

    On a GPU (`is_lazy`) a step is logged after the next one was started, so that the GPU always has work in its queue.
    """

    def __init__(
        self, run: RunDir, num_steps: int, first_step: int, is_writer: bool, monitor: LossMonitor,
        utilization: Utilization, report: Report,
    ):  # fmt: skip
        self.run, self.num_steps, self.first_step, self.is_writer = run, num_steps, first_step, is_writer
        self.monitor, self.utilization, self.report = monitor, utilization, report
        self.is_lazy = torch.cuda.is_available()
        self.started_at = self.last_logged_at = time.perf_counter()
        self.num_tokens = 0
        self.loss: float | None = None
        self.unsaved_losses: list[float] = []
        self.pending: StepRecord | None = None
        self.fence = Fence(run.root)

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, since the first step of this attempt. The time for saving counts."""
        elapsed = time.perf_counter() - self.started_at
        return round(self.num_tokens / elapsed, 1) if self.num_tokens else 0.0

    def log_step(
        self, step: AgreedStep, state: TrainState, loss_sum: torch.Tensor, grad_norm: torch.Tensor, lr: float
    ) -> None:
        """Log a step; on a GPU, log the previous one. `state` is the state after the step."""
        self.flush()
        self.pending = StepRecord(step, state, loss_sum, grad_norm, lr)
        if not self.is_lazy:
            self.flush()

    def flush(self) -> None:
        """Log the pending step, which waits until it has run. Raises Diverged, on every rank, if it is not finite."""
        if self.pending is None:
            return
        record, self.pending = self.pending, None
        self.loss, grad_norm = float(record.loss_sum) / record.step.num_trained_tokens, float(record.grad_norm)
        now = time.perf_counter()
        seconds, self.last_logged_at = now - self.last_logged_at, now
        self.num_tokens += record.step.num_tokens
        if self.is_writer:
            self._write(record, self.loss, grad_norm, seconds)
        warning = self.monitor.check(record.state.step, self.loss, grad_norm, record.lr)
        if warning and self.is_writer:
            log.warning(warning)
        self.unsaved_losses.append(self.loss)

    def take_mean_loss(self) -> float | None:
        """Mean loss of the steps since the last call, which may wait for the GPU. None means that there were none."""
        self.flush()
        losses, self.unsaved_losses = self.unsaved_losses, []
        return sum(losses) / len(losses) if losses else None

    def _write(self, record: StepRecord, loss: float, grad_norm: float, seconds: float) -> None:
        self.fence.check_throttled()
        state, step = record.state, record.step
        tokens_per_second = float(step.num_tokens) / seconds
        figures = {
            "loss": loss, "lr": record.lr, "grad_norm": grad_norm, "tokens_per_second": round(tokens_per_second, 1),
            "num_tokens": state.num_tokens, "seconds": round(seconds, 4), "memory_gib": round(memory_bytes() / GIB, 3),
        }  # fmt: skip
        mfu = self.utilization.of_step(step.document_lengths, step.num_trained_tokens, seconds)
        if mfu is not None:
            figures["mfu"] = round(mfu, 4)
        seconds_per_step = (self.last_logged_at - self.started_at) / (state.step - self.first_step)
        minutes_left, seconds_left = divmod(int(seconds_per_step * (self.num_steps - state.step)), 60)
        log.info(
            f"step {state.step}/{self.num_steps} | loss {loss:.4f} | lr {record.lr:.2e} | "
            f"grad norm {grad_norm:.3f} | {tokens_per_second:,.0f} tok/s | {'' if mfu is None else f'MFU {mfu:.1%} | '}"
            f"{figures['memory_gib']:.1f} GiB | {minutes_left}:{seconds_left:02d} left"
        )
        row = {"stage": "train", "step": state.step, **figures, "time": round(time.time(), 3)}
        if self.fence.token is not None:
            row["fencing_token"] = self.fence.token
        append_jsonl(self.run.metrics, row)
        self.report(state.step, figures)


@contextlib.contextmanager
def step_logging(
    job: TrainJob, engine: DeepSpeedEngine, batches: Batches, tokenizer, first_step: int
) -> Iterator[StepLogger]:
    """The StepLogger of a training that starts after `first_step`, with the trackers of the recipe open."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    monitor = LossMonitor(job.config.watch, partial(describe_step, batches, tokenizer.decode))
    utilization = Utilization(engine.module.lm, world_size)
    trackers = job.config.report_to if rank == 0 else ()
    with open_trackers(trackers, job.run, job.config.model_dump(mode="json")) as report:
        yield StepLogger(job.run, batches.num_steps, first_step, rank == 0, monitor, utilization, report)


def memory_bytes() -> int:
    """The peak of this rank's allocated GPU memory. Without a GPU, the resident memory of its process now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


@contextlib.contextmanager
def open_trackers(names: Sequence[str], run: RunDir, settings: dict) -> Iterator[Report]:
    """A function that sends the figures of a step to every tracker in `names`.

    A resumed run continues in its tracker too. The trackers' own libraries find the keys of their services.
    """
    with contextlib.ExitStack() as stack:
        reports = [_open_tracker(name, run, settings, stack) for name in names]

        def report(step: int, figures: dict[str, float]) -> None:
            for send in reports:
                send(step, {f"train/{key}": value for key, value in figures.items()})

        yield report


def _open_tracker(name: str, run: RunDir, settings: dict, stack: contextlib.ExitStack) -> Report:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = stack.enter_context(SummaryWriter(str(run.tensorboard)))
        return lambda step, figures: [writer.add_scalar(key, value, step) for key, value in figures.items()]
    library = importlib.import_module(name)  # wandb, or trackio, which has the same functions
    folder = run.root.resolve()
    options = {"id": hashlib.sha256(str(folder).encode()).hexdigest()[:16], "dir": str(folder)}
    library.init(
        project="tunesmith", name=folder.name, config=settings, resume="allow", **(options if name == "wandb" else {})
    )
    stack.callback(library.finish)
    return lambda step, figures: library.log(figures, step=step)
