"""Checks the loss and the gradient norm of every step: not finite ends the training, a jump is a warning."""

import math
import statistics
from collections import deque
from collections.abc import Callable

from cluster.errors import TunesmithError
from trainer.config.train import WatchConfig
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
