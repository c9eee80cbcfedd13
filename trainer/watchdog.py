"""What looks after a run: losses that are not numbers, spikes, ranks that stand still, and a profile on demand."""

import contextlib
import faulthandler
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import torch
from torch.profiler import ProfilerActivity, profile

from cluster.errors import TunesmithError
from trainer.config.train import ProfileConfig, WatchConfig
from trainer.data.tokens import Tokens

NUM_SHOWN = 8  # documents of a step that are named
NUM_CHARACTERS = 60  # of each
LEAST_SPREAD = 0.01  # of the mean: less is taken for this, so that equal losses do not make a spike of the next


class Diverged(TunesmithError):
    """The loss or the gradient is no number. Every rank raises it after the same step."""


class LossWatch:
    """Looks at the figures of every step, in order.

    `describe(step)` says what the rows of a step are made of, for the one who has to look at them.
    """

    def __init__(self, config: WatchConfig, describe: Callable[[int], str]):
        self.config, self.describe = config, describe
        self.recent: deque[float] = deque(maxlen=config.spike_window)

    def check(self, step: int, loss: float, grad_norm: float, lr: float) -> str | None:
        """A warning if the loss is far above the recent ones. Raises Diverged if a figure is no number."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise Diverged(
                f"step {step}: the loss is {loss:g} and the gradient norm {grad_norm:g}. Nothing was saved since; the "
                f"newest checkpoint is from before. Look at train.learning_rate ({lr:.2e} at this step), "
                f"train.max_grad_norm, train.precision, and the rows of this step: {self.describe(step)}"
            )
        warning = None
        if len(self.recent) == self.recent.maxlen:
            mean = statistics.fmean(self.recent)
            spread = max(statistics.stdev(self.recent), LEAST_SPREAD * abs(mean))
            if loss > mean + self.config.spike_std * spread:
                warning = (
                    f"step {step}: the loss jumped to {loss:.4f}; the {len(self.recent)} before had a mean of "
                    f"{mean:.4f} and a deviation of {spread:.4f}. Its rows: {self.describe(step)}"
                )
        self.recent.append(loss)
        return warning


def describe_rows(rows: list[list[int]], tokens: Tokens, decode: Callable[[object], str]) -> str:
    """Name the documents of a step by their number in the encoded dataset, with the first words of some."""
    documents = [document for row in rows for document in row]
    shown = []
    for document in documents[:NUM_SHOWN]:
        text = decode(tokens.input_ids[tokens.offsets[document] : tokens.offsets[document + 1]][:NUM_CHARACTERS])
        shown.append(f"{document} ({text[:NUM_CHARACTERS]!r})")
    more = f" and {len(documents) - NUM_SHOWN} more" if len(documents) > NUM_SHOWN else ""
    return f"documents {', '.join(shown)}{more}, counted from 0 without those that were dropped."


class StallWatch:
    """Tells, from a thread, where this rank is if it has been there for too long.

    Every rank has one: those that wait show where they wait, and the one that they wait for shows why.
    """

    def __init__(self, timeout_seconds: float, rank: int, output: IO[str] | None = None):
        self.timeout_seconds, self.rank, self.output = timeout_seconds, rank, output or sys.stderr
        self._place, self._since = "the start", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)

    def at(self, place: str) -> None:
        """Note that this rank has come to a place."""
        self._place, self._since = place, time.monotonic()

    def __enter__(self) -> "StallWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        told = None
        while not self._ended.wait(self.timeout_seconds / 10):
            since = self._since
            if time.monotonic() - since > self.timeout_seconds and since != told:
                told = since
                seconds = f"{time.monotonic() - since:.0f}"
                self.output.write(f"[train] rank {self.rank} has been at {self._place} for {seconds} s. Its stacks:\n")
                self.output.flush()
                faulthandler.dump_traceback(self.output, all_threads=True)


@contextlib.contextmanager
def profiling(config: ProfileConfig | None, folder: Path, is_writer: bool) -> Iterator[Callable[[int], None]]:
    """Give a function to be called before every step with its number; it writes the trace when its steps are done."""
    first = config.start_step if config and is_writer else 0
    last = first + config.num_steps - 1 if config and is_writer else -1
    running: profile | None = None

    def close() -> None:
        nonlocal running
        if running is not None:
            running.stop()
            folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(folder / f"steps-{first}-{last}.json"))
            running = None

    def before(step: int) -> None:
        nonlocal running
        if step > last:
            close()
        elif step >= first and running is None and last >= 0:
            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            running = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            running.start()

    try:
        yield before
    finally:
        close()
