"""What watches a training: checks of every step's loss, the stacks of a rank that hangs, and a trace of some steps."""

import faulthandler
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from torch.profiler import ProfilerActivity, profile

from cluster.errors import TunesmithError
from trainer.config.train import ProfileConfig, WatchConfig
from trainer.data.batches import Batches

NUM_DOCUMENTS = 8  # of a step that a message shows
NUM_CHARACTERS = 60  # of each document that a message shows
MIN_RELATIVE_STD = 0.01  # of the mean, so that after equal losses the next one does not count as a jump


class Diverged(TunesmithError):
    """The loss or the gradient norm is not finite. Every rank raises this after the same step."""


class LossMonitor:
    """Takes the figures of every step, in order.

    `describe_step(step)` describes the data of a step, which counts from 1, for the messages.
    """

    def __init__(self, config: WatchConfig, describe_step: Callable[[int], str]):
        self.config, self.describe_step = config, describe_step
        self.recent_losses: deque[float] = deque(maxlen=config.spike_window)

    def check(self, step: int, loss: float, grad_norm: float, lr: float) -> str | None:
        """Return a warning if the loss is far above the recent ones. Raise Diverged if a figure is not finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise Diverged(
                f"step {step}: the loss is {loss:g} and the gradient norm {grad_norm:g}. No checkpoint was saved since "
                f"then. Look at train.learning_rate ({lr:.2e} at this step), train.max_grad_norm, train.precision, and "
                f"the data of this step: {self.describe_step(step)}"
            )
        warning = None
        if len(self.recent_losses) == self.recent_losses.maxlen:
            mean = statistics.fmean(self.recent_losses)
            std = max(statistics.stdev(self.recent_losses), MIN_RELATIVE_STD * abs(mean))
            if loss > mean + self.config.spike_std * std:
                warning = (
                    f"step {step}: the loss jumped to {loss:.4f}. The previous {len(self.recent_losses)} losses have "
                    f"mean {mean:.4f} and standard deviation {std:.4f}. The data of this step: "
                    f"{self.describe_step(step)}"
                )
        self.recent_losses.append(loss)
        return warning


def describe_step(batches: Batches, decode: Callable[[object], str], step: int) -> str:
    """The documents of a step, by their index in the encoded dataset, with the first words of some."""
    tokens = batches.tokens
    documents = [document for row in batches.rows_of_step(step - 1) for document in row]
    shown = []
    for document in documents[:NUM_DOCUMENTS]:
        text = decode(tokens.input_ids[tokens.span(document)][:NUM_CHARACTERS])
        shown.append(f"{document} ({text[:NUM_CHARACTERS]!r})")
    more = f" and {len(documents) - NUM_DOCUMENTS} more" if len(documents) > NUM_DOCUMENTS else ""
    return f"documents {', '.join(shown)}{more}. The index counts from 0 and leaves out dropped documents."


class Watchdog:
    """Prints where this rank is, and the stacks of its threads, once it has been there for `timeout_seconds`.

    Every rank has one. If one rank hangs, the others wait for it: their stacks show where they wait, and its own shows
    why.
    """

    def __init__(self, timeout_seconds: float, rank: int, output: IO[str] | None = None):
        self.timeout_seconds, self.rank, self.output = timeout_seconds, rank, output or sys.stderr
        self._location, self._since = "the start", time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def set_location(self, location: str) -> None:
        """Note what this rank does next, such as "step 7, saving"."""
        self._location, self._since = location, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        reported_since = None
        while not self._stopped.wait(self.timeout_seconds / 10):
            since = self._since
            seconds = time.monotonic() - since
            if seconds > self.timeout_seconds and since != reported_since:
                reported_since = since
                self.output.write(
                    f"[train] rank {self.rank} has been at {self._location} for {seconds:.0f} s. Its stacks:\n"
                )
                self.output.flush()
                faulthandler.dump_traceback(self.output, all_threads=True)


class Profiler:
    """Records the steps that `config` names and writes `<folder>/steps-FIRST-LAST.json` after the last of them.

    None as `config` means that nothing is recorded.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path):
        self.folder = folder
        self.steps = range(config.start_step, config.start_step + config.num_steps) if config else range(0)
        self._running: profile | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before_step(self, step: int) -> None:
        """Start or stop recording. `step` counts from 1, as in the log."""
        if step not in self.steps:
            self._stop()
        elif self._running is None:
            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._running.start()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._running.export_chrome_trace(str(self.folder / f"steps-{self.steps[0]}-{self.steps[-1]}.json"))
            self._running = None
