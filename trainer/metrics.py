"""One line a step on the terminal, one row a step in metrics.jsonl. Rank 0 writes both."""

import time
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from cluster.files import GIB
from cluster.log import stage_logger
from cluster.run.fence import Fence
from cluster.run.rundir import RunDir, append_jsonl
from trainer.checkpoint.state import TrainState
from trainer.flops import Utilization
from trainer.trackers import Report
from trainer.watchdog import LossWatch

log = stage_logger("train")


@dataclass(frozen=True)
class Step:
    """A step that was started. On a GPU it may still be at work: reading a tensor of it waits for it."""

    state: TrainState  # after it
    loss_sum: torch.Tensor  # [], over all ranks
    grad_norm: torch.Tensor  # [], before clipping
    lr: float
    num_labels: int  # over all ranks
    lengths: np.ndarray  # tokens of each document [D], over all ranks


class StepLine:
    """Reports steps and keeps the running figures of this attempt.

    On a GPU (`is_lazy`) a step is told of when the next one was started, so that the GPU always has work waiting.
    """

    def __init__(
        self, run: RunDir, num_steps: int, first_step: int, is_writer: bool, is_lazy: bool, watch: LossWatch,
        utilization: Utilization, report: Report,
    ):  # fmt: skip
        self.run, self.num_steps, self.first_step = run, num_steps, first_step
        self.is_writer, self.is_lazy = is_writer, is_lazy
        self.watch, self.utilization, self.report = watch, utilization, report
        self.started = self.last = time.perf_counter()
        self.num_tokens = 0
        self.loss: float | None = None
        self.unsaved_losses: list[float] = []
        self.pending: Step | None = None
        self.fence = Fence(run.root)

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, since the first step of this attempt; saving included."""
        elapsed = time.perf_counter() - self.started
        return round(self.num_tokens / elapsed, 1) if self.num_tokens else 0.0

    def step(self, step: Step) -> None:
        """Take note of a step, and tell of the one before if that was not done yet."""
        self.flush()
        self.pending = step
        if not self.is_lazy:
            self.flush()

    def flush(self) -> None:
        """Wait for the step at work and tell of it. Raises Diverged, on every rank, if its loss is no number."""
        if self.pending is None:
            return
        step, self.pending = self.pending, None
        loss, grad_norm = float(step.loss_sum) / step.num_labels, float(step.grad_norm)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.num_tokens += int(step.lengths.sum())
        self.loss = loss
        if self.is_writer:
            self._tell(step, loss, grad_norm, seconds, now)
        warning = self.watch.check(step.state.step, loss, grad_norm, step.lr)
        if warning and self.is_writer:
            log.warning(warning)
        self.unsaved_losses.append(loss)

    def take_mean_loss(self) -> float | None:
        """Mean loss of the steps since this was last asked for."""
        losses, self.unsaved_losses = self.unsaved_losses, []
        return sum(losses) / len(losses) if losses else None

    def _tell(self, step: Step, loss: float, grad_norm: float, seconds: float, now: float) -> None:
        self.fence.check_throttled()
        state = step.state
        rate = float(step.lengths.sum()) / seconds
        figures = {
            "loss": loss, "lr": step.lr, "grad_norm": grad_norm, "tokens_per_second": round(rate, 1),
            "num_tokens": state.num_tokens, "seconds": round(seconds, 4), "memory_gib": round(memory_bytes() / GIB, 3),
        }  # fmt: skip
        mfu = self.utilization.of_step(step.lengths, step.num_labels, seconds)
        if mfu is not None:
            figures["mfu"] = round(mfu, 4)
        left = (now - self.started) / (state.step - self.first_step) * (self.num_steps - state.step)
        log.info(
            f"step {state.step}/{self.num_steps} | loss {loss:.4f} | lr {step.lr:.2e} | "
            f"grad norm {grad_norm:.3f} | {rate:,.0f} tok/s | {'' if mfu is None else f'MFU {mfu:.1%} | '}"
            f"{figures['memory_gib']:.1f} GiB | {int(left) // 60}:{int(left) % 60:02d} left"
        )
        row = {"stage": "train", "step": state.step, **figures, "time": round(time.time(), 3)}
        if self.fence.token is not None:
            row["fencing_token"] = self.fence.token
        append_jsonl(self.run.metrics, row)
        self.report(state.step, figures)


def memory_bytes() -> int:
    """The most that this rank has had allocated on its GPU; without one, what its process has resident now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
