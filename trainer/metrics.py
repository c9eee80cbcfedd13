"""One line a step on the terminal, one row a step in metrics.jsonl. Rank 0 writes both."""

import time

from cluster.rundir import RunDir, append_jsonl
from trainer.state import TrainState


class StepLine:
    """Reports steps and keeps the running figures of this attempt."""

    def __init__(self, run: RunDir, num_steps: int, first_step: int, is_writer: bool):
        self.run, self.num_steps, self.first_step, self.is_writer = run, num_steps, first_step, is_writer
        self.started = self.last = time.perf_counter()
        self.num_tokens = 0
        self.loss: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, since the first step of this attempt; saving included."""
        elapsed = time.perf_counter() - self.started
        return round(self.num_tokens / elapsed, 1) if self.num_tokens else 0.0

    def step(self, state: TrainState, loss: float, lr: float, grad_norm: float, num_tokens: int) -> None:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.num_tokens += num_tokens
        self.loss = loss
        if not self.is_writer:
            return
        left = (now - self.started) / (state.step - self.first_step) * (self.num_steps - state.step)
        rate = num_tokens / seconds
        print(
            f"[train] step {state.step}/{self.num_steps} | loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.3f} | "
            f"{rate:,.0f} tok/s | {int(left) // 60}:{int(left) % 60:02d} left",
            flush=True,
        )
        append_jsonl(
            self.run.metrics,
            {
                "stage": "train", "step": state.step, "loss": loss, "lr": lr, "grad_norm": grad_norm,
                "tokens_per_second": round(rate, 1), "num_tokens": state.num_tokens, "time": round(time.time(), 3),
            },
        )  # fmt: skip
